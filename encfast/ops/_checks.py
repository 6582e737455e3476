"""Argument checks shared by the ops: sentences that name the argument, the rule and what came.

Shapes, dtypes and devices are checked always. Values are read on the CPU alone; those on a GPU are
asserted there, without waiting, under ENCFAST_CHECK=1. Compiled graphs hold no check of values. The
native kernels check again.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, x: object, dim: int | None = None, shape: str = "") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a torch.Tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {x.layout}, expected a dense (strided) tensor")
    if dim is not None and x.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {dim}-D {shape}")


def check_dtype(op: str, name: str, x: Tensor, *expected: torch.dtype, hint: str = "") -> None:
    if x.dtype not in expected:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in expected)
        came = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is {came}, expected {wanted}{hint}")


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {x.device}, {like_name} is on {like.device}; move one of them"
        )


def _device_to_check(x: Tensor) -> str | None:
    """Type of x's device; None where a check of values would break a graph or has none to see."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return None
    return x.device.type


def can_read_values(x: Tensor) -> bool:
    """True where the values of `x` may decide about an error: on the CPU, in eager mode."""
    return _device_to_check(x) == "cpu"


def can_assert_values(x: Tensor) -> bool:
    """True where `assert_on_device` may look at `x`: on a GPU, in eager mode, and asked for."""
    return _device_to_check(x) == "cuda" and os.environ.get("ENCFAST_CHECK") == "1"


def assert_on_device(condition: Tensor, message: str) -> None:
    """Has the device look at a condition when it gets there; nobody waits for the answer.

    Where it is false the device prints the message (254 characters at most) and whoever next waits
    for the device gets the error; a GPU is of no use to the process after that.
    """
    torch._assert_async(condition.all(), message)


def check_values(
    op: str, name: str, x: Tensor, good: Callable[[Tensor], Tensor], rule: Callable[[], str]
) -> None:
    """Every element of `x` is one that `good` maps to True; `rule` says which those are.

    The rule is a function so that its text, which may hold symbolic sizes, is made for errors only.
    """
    if can_read_values(x):
        right = good(x)
        if not right.all():
            raise ValueError(f"{op}: {name} holds {x[~right][0].item()}, {rule()}")
    elif can_assert_values(x):
        assert_on_device(good(x), f"{op}: {name} holds a wrong value, {rule()}")


def check_range(
    op: str, name: str, x: Tensor, low: int, high: int, rule: Callable[[], str]
) -> None:
    """`check_values` for low <= element < high, at a fifth of its price on the CPU."""
    if can_read_values(x) and x.numel():
        for end in x.aminmax():
            value = end.item()
            if not low <= value < high:
                raise ValueError(f"{op}: {name} holds {value}, {rule()}")
    elif can_assert_values(x):
        assert_on_device((x >= low) & (x < high), f"{op}: {name} holds a wrong value, {rule()}")


def check_cu_seqlens_values(
    op: str, name: str, cu_seqlens: Tensor, total: int, max_name: str, max_seqlen: int | None
) -> None:
    """cu_seqlens = [0, ..., total], never decreasing, no step longer than max_seqlen."""
    if can_read_values(cu_seqlens):
        _read_cu_seqlens(op, name, cu_seqlens, total, max_name, max_seqlen)
    elif can_assert_values(cu_seqlens):
        lengths = cu_seqlens.diff()
        assert_on_device(cu_seqlens[0] == 0, f"{op}: {name} does not start at 0")
        assert_on_device(
            lengths >= 0, f"{op}: {name} decreases, expected the running sum of the lengths"
        )
        assert_on_device(
            cu_seqlens[-1] == total,
            f"{op}: {name} does not end at the number of rows, {total}",
        )
        if max_seqlen is not None:
            assert_on_device(
                lengths <= max_seqlen,
                f"{op}: {max_name} is {max_seqlen}, but a sequence of {name} has more rows",
            )


def _read_cu_seqlens(
    op: str, name: str, cu_seqlens: Tensor, total: int, max_name: str, max_seqlen: int | None
) -> None:
    ends = cu_seqlens.detach().numpy()
    if ends[0] != 0:
        raise ValueError(f"{op}: {name} starts at {ends[0]}, expected 0")
    lengths = ends[1:].astype("int64") - ends[:-1]
    if lengths.size and lengths.min() < 0:
        b = int(lengths.argmin())
        raise ValueError(
            f"{op}: {name} decreases from {ends[b]} to {ends[b + 1]} at sequence {b}, expected "
            "the running sum of the lengths"
        )
    if ends[-1] != total:
        raise ValueError(f"{op}: {name} ends at {ends[-1]}, expected the number of rows, {total}")
    if max_seqlen is not None and lengths.size and lengths.max() > max_seqlen:
        raise ValueError(
            f"{op}: {max_name} is {max_seqlen}, but sequence {int(lengths.argmax())} of {name} has "
            f"{lengths.max()} rows"
        )
