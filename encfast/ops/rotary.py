"""Rotary positions: pairs of elements of a head turned by an angle that grows with the position.

With (c, s) the cosine and sine in row positions[i] of the tables, for every head of row i and every
pair j of its elements:

    out_1 = x_1 c_j - x_2 s_j        out_2 = x_2 c_j + x_1 s_j

Conventions. The tables [S, R / 2] turn the first R elements of a head, the others pass through
(partial rotary). Pair j is (x[j], x[j + R / 2]), the half layout of GPT-NeoX, Llama and ModernBERT;
`interleaved` makes it (x[2j], x[2j + 1]), as in GPT-J and the paper. Row i takes row positions[i]
of the tables, without positions row i: tables of another base, scaled positions and offsets are
all just other tables or positions.

The op is linear in x and its gradient is the turn by minus the angle, `conjugate`: gradients of any
order are made of it. Tables and positions have none. No rows yield no rows.

Source: Su et al., RoFormer (arXiv:2104.09864), section 3.2.2.

Backends: C++ on the CPU and Triton on CUDA and HIP, q and k in one pass over the tables; elsewhere
the reference.
"""

import torch
from torch import Tensor

from ..ref.rotary import rotary as _ref
from . import _backends
from ._checks import FLOAT_DTYPES, check_device, check_dtype, check_range, check_tensor

MAX_HEAD_SIZE = 256
DISPATCHER_OPS = ("rotary",)

# Without k the second result has no elements: an operator has a fixed number of them.
torch.library.define(
    "encfast::rotary",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, "
    "bool conjugate) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(op: str, named: dict[str, Tensor], cos, sin, positions, interleaved, conjugate) -> None:
    for name, x in named.items():
        check_tensor(op, name, x, 3, "[N, heads, head size]")
        check_dtype(op, name, x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.rotary")
        if not 2 <= x.shape[2] <= MAX_HEAD_SIZE:
            raise ValueError(
                f"{op}: {name} has head size {x.shape[2]}, expected 2..{MAX_HEAD_SIZE}"
            )
    (first_name, first), *others = named.items()
    for name, x in others:
        check_device(op, name, x, first_name, first)
        check_dtype(op, name, x, first.dtype, hint=f" like {first_name}")
        if x.shape[0] != first.shape[0] or x.shape[2] != first.shape[2]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}, expected rows and head size of "
                f"{first_name}, {tuple(first.shape)}"
            )
    _check_tables(op, cos, sin, first_name, first)
    _check_positions(op, positions, cos, first_name, first)
    for name, flag in (("interleaved", interleaved), ("conjugate", conjugate)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} is {type(flag).__name__}, expected a bool")


def _check_tables(op: str, cos: Tensor, sin: Tensor, x_name: str, x: Tensor) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table, 2, "[S, R / 2]")
        check_dtype(op, name, table, *FLOAT_DTYPES)
        check_device(op, name, table, x_name, x)
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} has no gradient; pass {name}.detach()")
    if not 1 <= cos.shape[1] <= x.shape[2] // 2:
        raise ValueError(
            f"{op}: cos has {cos.shape[1]} columns, expected half of the rotated elements, "
            f"1..{x.shape[2] // 2} for head size {x.shape[2]}"
        )
    if sin.shape != cos.shape:
        raise ValueError(
            f"{op}: sin has shape {tuple(sin.shape)}, expected that of cos, {tuple(cos.shape)}"
        )
    check_dtype(op, "sin", sin, cos.dtype, hint=" like cos")


def _check_positions(
    op: str, positions: Tensor | None, cos: Tensor, x_name: str, x: Tensor
) -> None:
    if positions is None:
        if cos.shape[0] != x.shape[0]:
            raise ValueError(
                f"{op}: cos has {cos.shape[0]} rows, {x_name} has {x.shape[0]}; pass positions "
                "unless the tables have one row for each"
            )
        return
    check_tensor(op, "positions", positions, 1, "[N]")
    check_dtype(op, "positions", positions, torch.int64, torch.int32)
    check_device(op, "positions", positions, x_name, x)
    if positions.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: positions has {positions.shape[0]} entries, {x_name} has {x.shape[0]} rows"
        )
    rows = cos.shape[0]
    check_range(op, "positions", positions, 0, rows, lambda: f"the tables have {rows} rows")


@torch.library.register_fake("encfast::rotary")
def _fake(q, k, cos, sin, positions, interleaved, conjugate):
    return q.new_empty(q.shape), q.new_empty((0,) if k is None else k.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.conjugate = inputs
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad[:2]):
        ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dq, dk):
    needed = [
        need and grad is not None
        for need, grad in zip(ctx.needs_input_grad[:2], (dq, dk), strict=True)
    ]
    grads = [grad for grad, need in zip((dq, dk), needed, strict=True) if need]
    if not grads:
        return (None,) * 7
    second = grads[1] if len(grads) == 2 else None
    angles = (*ctx.saved_tensors, ctx.interleaved, not ctx.conjugate)
    turned = iter(torch.ops.encfast.rotary(grads[0], second, *angles))
    return *(next(turned) if need else None for need in needed), *(None,) * 5


torch.library.register_autograd("encfast::rotary", _backward, setup_context=_setup_context)


def _check_op(q, k, *angles) -> dict[str, Tensor]:
    named = {"q": q} if k is None else {"q": q, "k": k}
    with torch.no_grad():
        _check("rotary", named, *angles)
    return named


def _reference(q, k, cos, sin, positions, interleaved, conjugate):
    named = _check_op(q, k, cos, sin, positions, interleaved, conjugate)
    options = {"interleaved": interleaved, "conjugate": conjugate}
    turned = [_ref(x, cos, sin, positions, **options) for x in named.values()]
    return turned[0], q.new_empty((0,)) if k is None else turned[1]


def _triton(q, k, cos, sin, positions, interleaved, conjugate):
    from ..kernels import rotary as kernels

    _check_op(q, k, cos, sin, positions, interleaved, conjugate)
    return kernels.rotary(q, k, cos, sin, positions, interleaved, conjugate)


_backends.register_reference("rotary", "rotary", _reference)
_backends.register_triton("rotary", "rotary", _triton, _reference)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turns the heads of packed rows by the angles of their positions.

    Args:
        x: [N, H, D] float32, bfloat16 or float16, D in 2..256. Any strides: a view of a fused
            projection is read in place as long as the last dimension is contiguous.
        cos: [S, R / 2] float32, bfloat16 or float16, not differentiable; R <= D elements of each
            head are turned, the others pass through.
        sin: like cos.
        positions: [N] int64 or int32 in 0..S - 1; None: the tables have one row per row of x.
        interleaved: pairs are neighbours instead of halves.
        conjugate: turn back, by minus the angle.

    Returns:
        [N, H, D] in the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. Positions are checked
            in eager mode on the CPU; a GPU asserts them under ENCFAST_CHECK=1.
        RuntimeError: a position outside of the tables met by the native kernel in compiled code.

    Numerics: float32 inside, one rounding. Bit-equal for any number of threads.

    Examples:
        >>> x, angles = torch.ones(2, 1, 2), torch.tensor([[0.0], [torch.pi / 2]])
        >>> ops.rotary(x, angles.cos(), angles.sin())[:, 0].round(decimals=3)
        tensor([[ 1.,  1.],
                [-1.,  1.]])
    """
    _check("rotary", {"x": x}, cos, sin, positions, interleaved, conjugate)
    return torch.ops.encfast.rotary(x, None, cos, sin, positions, interleaved, conjugate)[0]


def rotary_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turns queries and keys of the same rows in one pass: `rotary` of each.

    The views q and k of a fused projection [N, H + 2 Hk, D] are read in place, and v stays there.
    Where q and k have different positions, as in cross attention, call `rotary` for each.

    Args:
        q: [N, H, D].
        k: [N, Hk, D] in the dtype of q.
        cos, sin, positions, interleaved, conjugate: see `rotary`.

    Returns:
        q and k turned, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `rotary`.

    Examples:
        >>> angles = torch.rand(5, 8)
        >>> q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
        >>> turned, _ = ops.rotary_qk(q, k, angles.cos(), angles.sin())
        >>> torch.equal(turned, ops.rotary(q, angles.cos(), angles.sin()))
        True
    """
    _check("rotary_qk", {"q": q, "k": k}, cos, sin, positions, interleaved, conjugate)
    return torch.ops.encfast.rotary(q, k, cos, sin, positions, interleaved, conjugate)


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
