"""The tolerance rule of encfast's tests, for kernels here and for your own.

A kernel may be at most `factor` times as far from the float64 reference as the same maths in plain
PyTorch at the test dtype, plus one eps of that dtype at the scale of the result.
"""

import torch
from torch import Tensor

__all__ = ["assert_close_to_reference"]


def assert_close_to_reference(
    name: str,
    actual: Tensor,
    reference64: Tensor,
    plain_low_precision: Tensor,
    factor: float = 2.0,
    *,
    eps_factor: float = 1.0,
    allow_degenerate: bool = False,
    worst: int = 4,
) -> None:
    """Fails unless `actual` is about as accurate as plain PyTorch in the same dtype.

    The rule is applied to the largest and to the root-mean-square error, so that one bad element
    and many slightly bad ones both fail. NaN and infinities must stand in the same places.

    Args:
        name: what is compared, for the message.
        actual: the result under test; its dtype sets eps.
        reference64: the same result in float64.
        plain_low_precision: the same maths in plain PyTorch at the test dtype.
        factor: 2 for results, 3 for gradients.
        eps_factor: how many eps are granted on top. More than 1 only for results of few elements,
            on which the error of the plain maths may be 0 by luck.
        allow_degenerate: accept a reference that is mostly zero or constant, which proves little;
            only for cases whose meaning is exactly that (no visible key, no rows).
        worst: how many of the worst elements the message lists.

    Raises:
        AssertionError: shape or dtype differ, the reference is degenerate, or the rule is broken.
        TypeError: `reference64` is not float64.
    """
    if reference64.dtype != torch.float64:
        raise TypeError(f"{name}: reference64 is {reference64.dtype}, expected torch.float64")
    for what, other in (("reference64", reference64), ("plain_low_precision", plain_low_precision)):
        if other.shape != actual.shape:
            raise AssertionError(
                f"{name}: shape {tuple(actual.shape)}, {what} has {tuple(other.shape)}"
            )
    if not allow_degenerate:
        _assert_informative(name, reference64)
    if actual.numel() == 0:
        return
    got = actual.detach().to("cpu", torch.float64)
    ref = reference64.detach().cpu()
    plain = plain_low_precision.detach().to("cpu", torch.float64)
    _assert_same_nonfinite(name, got, ref)
    finite = torch.isfinite(ref)
    error = (got - ref).abs().where(finite, 0)
    plain_error = (plain - ref).abs().where(finite & torch.isfinite(plain), 0)
    magnitude = ref.abs().where(finite, 0)
    eps = torch.finfo(actual.dtype).eps
    for kind, reduce in (("max", _max), ("rms", _rms)):
        bound = factor * reduce(plain_error) + eps_factor * eps * reduce(magnitude)
        if reduce(error) > bound:
            raise AssertionError(
                f"{name}: {kind} error {reduce(error):.3e} exceeds {bound:.3e} = {factor} x "
                f"{reduce(plain_error):.3e} (plain {actual.dtype}) + {eps_factor} eps {eps:.1e} x "
                f"{reduce(magnitude):.3e}\n{_worst(got, ref, plain, error, worst)}"
            )


def _max(x: Tensor) -> float:
    return x.max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _assert_informative(name: str, reference: Tensor) -> None:
    finite = reference[torch.isfinite(reference)]
    if finite.numel() == 0 or (finite == 0).float().mean() > 0.5:
        raise AssertionError(f"{name}: the reference is mostly zero or empty, it proves nothing")
    if finite.numel() > 1 and finite.max() == finite.min():
        raise AssertionError(f"{name}: the reference is constant ({finite[0]}), it proves nothing")


def _assert_same_nonfinite(name: str, actual: Tensor, reference: Tensor) -> None:
    same = torch.where(
        torch.isfinite(reference),
        torch.isfinite(actual),
        (actual == reference) | (actual.isnan() & reference.isnan()),
    )
    if not same.all():
        where = (~same).nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int((~same).sum())} elements differ in NaN or Inf, the first at {where}: "
            f"got {actual[tuple(where)]}, expected {reference[tuple(where)]}"
        )


def _worst(actual: Tensor, reference: Tensor, plain: Tensor, error: Tensor, count: int) -> str:
    lines = []
    for flat in error.flatten().topk(min(count, error.numel())).indices:
        at = tuple(int(i) for i in torch.unravel_index(flat, error.shape))
        lines.append(
            f"  {list(at)}: got {actual[at]:.7g}, reference {reference[at]:.7g}, "
            f"plain {plain[at]:.7g}"
        )
    return "\n".join(lines)
