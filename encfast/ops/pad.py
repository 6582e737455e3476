"""Row moves between a padded grid and a packed batch, and between packed batches.

    gather_rows:   out[i] = x[index[i]], zeros where index[i] is -1
    scatter_rows:  out[index[i]] += x[i] from zeros, rows with index -1 dropped
    find_rows:     which rows of a grid a mask keeps, as an index with -1 behind it

The moves are linear and each other's adjoint: gradients of any order are made of them. `unpad`
finds rows and gathers them, and `pad` is a scatter. Rows that nothing is scattered to are zeros:
pad rows never hold garbage. Rows that share an index are added in their order in float32 and
rounded once, so the result is the same for every run and number of threads. Rows move as bytes:
what stands in one row, NaN included, reaches no other.

Rows of a dtype that cannot be added (bool, uint8, ...) must not share an index: the CPU refuses,
CUDA, which may not wait to find out, keeps the first of them.

Backends: C++ on the CPU and CUDA; elsewhere the reference.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..ref.pad import find_rows as _ref_find
from ..ref.pad import gather_rows as _ref_gather
from ..ref.pad import scatter_rows as _ref_scatter
from . import _backends
from ._checks import (
    FLOAT_DTYPES,
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_device,
    check_dtype,
    check_range,
    check_tensor,
    check_values,
)

DISPATCHER_OPS = ("gather_rows", "scatter_rows", "find_rows")

torch.library.define(
    "encfast::gather_rows",
    "(Tensor x, Tensor index) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::scatter_rows",
    "(Tensor x, Tensor index, SymInt n) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::find_rows",
    "(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_SUMMABLE = (*FLOAT_DTYPES, torch.float64, torch.int32, torch.int64)


class Unpadded(NamedTuple):
    """What `unpad` returns: the rows a mask keeps, and where they came from."""

    data: Tensor  # [N, ...]
    indices: Tensor  # [N] int64, row b * S + s of the grid
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int


def _check_rows(
    op: str, x: Tensor, name: str, rows: Tensor, low: int, high: int | None = None
) -> None:
    """`rows` is an int64 vector on x's device, low <= rows < high (by default the rows of x)."""
    _check_form(op, x, name, rows)
    _check_range(op, x, name, rows, low, high)


def _check_form(op: str, x: Tensor, name: str, rows: Tensor) -> None:
    check_tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), expected at least one dimension, the rows")
    check_tensor(op, name, rows, 1, "[M]")
    check_dtype(op, name, rows, torch.int64)
    check_device(op, name, rows, "x", x)


def _check_range(
    op: str, x: Tensor, name: str, rows: Tensor, low: int, high: int | None = None
) -> None:
    high = x.shape[0] if high is None else high
    check_range(op, name, rows, low, high, lambda: f"expected {low} <= row < {high}")


def _check_count(op: str, name: str, count: int) -> None:
    if not isinstance(count, int | torch.SymInt) or isinstance(count, bool):
        raise TypeError(f"{op}: {name} is {type(count).__name__}, expected an int")
    if count < 0:
        raise ValueError(f"{op}: {name} is {count}, expected >= 0")


def _check_same_rows(op: str, x: Tensor, name: str, rows: Tensor) -> None:
    if rows.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: {name} has {rows.shape[0]} entries, x has {x.shape[0]} rows")


@torch.library.register_fake("encfast::gather_rows")
def _fake_gather(x, index):
    return x.new_empty((index.shape[0], *x.shape[1:]))


@torch.library.register_fake("encfast::scatter_rows")
def _fake_scatter(x, index, n):
    return x.new_empty((n, *x.shape[1:]))


@torch.library.register_fake("encfast::find_rows")
def _fake_find(mask):
    return (
        mask.new_empty(mask.shape[0] * mask.shape[1], dtype=torch.int64),
        mask.new_empty(mask.shape[0] + 1, dtype=torch.int32),
    )


def _setup_gather(ctx, inputs, output) -> None:
    x, index = inputs
    ctx.n = x.shape[0]
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(index)


def _gather_backward(ctx, dout):
    (index,) = ctx.saved_tensors
    return torch.ops.encfast.scatter_rows(dout, index, ctx.n), None


def _setup_scatter(ctx, inputs, output) -> None:
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, dout):
    (index,) = ctx.saved_tensors
    return torch.ops.encfast.gather_rows(dout, index), None, None


torch.library.register_autograd(
    "encfast::gather_rows", _gather_backward, setup_context=_setup_gather
)
torch.library.register_autograd(
    "encfast::scatter_rows", _scatter_backward, setup_context=_setup_scatter
)


def _reference_gather(x, index):
    _check_rows("gather_rows", x, "index", index, -1)
    return _ref_gather(x, index)


def _reference_scatter(x, index, n):
    _check_rows("scatter_rows", x, "index", index, -1, n)
    _check_same_rows("scatter_rows", x, "index", index)
    if x.dtype not in _SUMMABLE and index[index >= 0].unique().numel() < (index >= 0).sum():
        raise TypeError(f"scatter_rows: index holds a row twice, {x.dtype} rows cannot be added")
    return _ref_scatter(x, index, n)


def _reference_find(mask):
    _check_mask("find_rows", mask)
    return _ref_find(mask)


_backends.register_reference("pad", "gather_rows", _reference_gather)
_backends.register_reference("pad", "scatter_rows", _reference_scatter)
_backends.register_reference("pad", "find_rows", _reference_find)
_backends.register_cuda("pad", "gather_rows", _reference_gather)
_backends.register_cuda("pad", "scatter_rows", _reference_scatter)
_backends.register_cuda("pad", "find_rows", _reference_find)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [n, ...] by index [M] int64, where -1 stands for a row of zeros.

    Any dtype; the gradient is `scatter_rows`, so x must be floating where it needs one.

    Raises:
        TypeError, ValueError: a malformed argument or an index outside of -1..n - 1.

    Examples:
        >>> ops.gather_rows(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, -1, 1]))
        tensor([[3, 4],
                [0, 0],
                [3, 4]])
    """
    args = "gather_rows", x, "index", index
    _check_form(*args)
    if not can_read_values(index):
        _check_range(*args, -1)
        return torch.ops.encfast.gather_rows(x, index)
    try:  # whoever serves the CPU reads every index; twice would be 4 % of a mask's time
        return torch.ops.encfast.gather_rows(x, index)
    except RuntimeError:
        _check_range(*args, -1)  # says what was expected, where that was the cause
        raise


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [N, ...] by number: [M, ...]. Repeated rows are fine, their gradients add.

    Args:
        x: [N, ...], any dtype.
        rows: [M] int64 in 0..N - 1, in any order.

    Returns:
        [M, ...] in the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: a malformed argument or a row outside of 0..N - 1.

    Examples:
        >>> ops.select_rows(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 1, 0]))
        tensor([[3, 4],
                [3, 4],
                [1, 2]])
    """
    _check_rows("select_rows", x, "rows", rows, 0)
    return torch.ops.encfast.gather_rows(x, rows)


def scatter_rows(x: Tensor, rows: Tensor, n: int) -> Tensor:
    """Puts row i of x [M, ...] at row rows[i] of a result of n rows; other rows are zeros.

    Args:
        x: [M, ...].
        rows: [M] int64 in 0..n - 1. Rows of x that share a place are added, in their order; x must
            then be float32, bfloat16, float16, float64, int32 or int64.
        n: rows of the result.

    Returns:
        [n, ...] in the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: a malformed argument or a row outside of 0..n - 1.

    Examples:
        >>> ops.scatter_rows(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 0]), 4)
        tensor([[3, 4],
                [0, 0],
                [1, 2],
                [0, 0]])
    """
    _check_count("scatter_rows", "n", n)
    _check_rows("scatter_rows", x, "rows", rows, 0, n)
    _check_same_rows("scatter_rows", x, "rows", rows)
    return torch.ops.encfast.scatter_rows(x, rows, n)


def find_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of a padded grid a mask keeps, without waiting for the device.

    Args:
        mask: [B, S] bool or integer 0/1; True keeps. Gaps are allowed. At most 2^31 - 1 entries.

    Returns:
        indices [B * S] int64: the kept rows b * S + s of the grid in ascending order, then -1, so
        that `gather_rows` makes zeros of what is left over; cu_seqlens [B + 1] int32: how many are
        kept before each sequence. The number of kept rows, cu_seqlens[-1], stays on the device.

    Raises:
        TypeError, ValueError: a malformed argument, or a mask value other than 0 and 1.

    Examples:
        >>> ops.find_rows(torch.tensor([[True, False, True], [False, True, False]]))
        (tensor([ 0,  2,  4, -1, -1, -1]), tensor([0, 2, 3], dtype=torch.int32))
    """
    _check_mask("find_rows", mask)
    return torch.ops.encfast.find_rows(mask)


def unpad(x: Tensor, mask: Tensor) -> Unpadded:
    """The rows of a padded grid that a mask keeps. For the border: reads the lengths on the host.

    Under `torch.export` no length is read: all B * S rows stay, the kept ones first. Those behind
    the last sequence are zeros and have index -1; max_seqlen is S.

    Args:
        x: [B, S, ...], any dtype.
        mask: [B, S] bool or integer 0/1; True keeps. Gaps are allowed, order is kept.

    Returns:
        Unpadded(data [N, ...], indices [N] int64, cu_seqlens [B + 1] int32, max_seqlen).

    Raises:
        TypeError, ValueError: a malformed argument, or a mask value other than 0 and 1.

    Examples:
        >>> x, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> rows = ops.unpad(x, mask)
        >>> rows.data, rows.cu_seqlens, rows.max_seqlen
        (tensor([5, 6, 7]), tensor([0, 2, 3], dtype=torch.int32), 2)
    """
    _check_grid(x, mask)
    indices, cu_seqlens = torch.ops.encfast.find_rows(mask)
    if torch.compiler.is_exporting():
        data = torch.ops.encfast.gather_rows(x.flatten(0, 1), indices)
        return Unpadded(data, indices, cu_seqlens, mask.shape[1])
    starts = cu_seqlens.tolist()  # the one wait for the device
    indices = indices[: starts[-1]].clone()  # a view would keep the place of every pad row
    data = torch.ops.encfast.gather_rows(x.flatten(0, 1), indices)
    max_seqlen = max((end - start for start, end in itertools.pairwise(starts)), default=0)
    return Unpadded(data, indices, cu_seqlens, max_seqlen)


def _check_grid(x: Tensor, mask: Tensor) -> None:
    check_tensor("unpad", "x", x)
    check_tensor("unpad", "mask", mask, 2, "[B, S]")
    check_device("unpad", "mask", mask, "x", x)
    if x.dim() < 2 or x.shape[:2] != mask.shape:
        raise ValueError(
            f"unpad: mask has shape {tuple(mask.shape)}, expected the first two dimensions of x, "
            f"which has shape {tuple(x.shape)}"
        )
    _check_mask("unpad", mask)


def _check_mask(op: str, mask: Tensor) -> None:
    check_tensor(op, "mask", mask, 2, "[B, S]")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"{op}: mask is {mask.dtype}, expected bool or an integer dtype")
    if mask.dtype != torch.bool:
        check_values(
            op,
            "mask",
            mask,
            lambda keep: (keep == 0) | (keep == 1),
            lambda: "expected 0 (pad) or 1 (keep)",
        )


def pad(x: Tensor, indices: Tensor, batch: int, seqlen: int, fill: float | None = None) -> Tensor:
    """Packed rows back to a grid: the inverse of `unpad`.

    Args:
        x: [N, ...], any dtype.
        indices: [N] int64, as `unpad` gave them: row b * seqlen + s of the grid, none twice.
        batch: B.
        seqlen: S.
        fill: value of the pad rows, zero by default.

    Returns:
        [B, S, ...], contiguous.

    Raises:
        TypeError, ValueError: a malformed argument, an index outside of 0..B * S - 1 or repeated.

    Examples:
        >>> ops.pad(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 3]), 2, 3)
        tensor([[7, 8, 0],
                [9, 0, 0]])
    """
    _check_count("pad", "batch", batch)
    _check_count("pad", "seqlen", seqlen)
    n = batch * seqlen
    _check_rows("pad", x, "indices", indices, 0, n)
    _check_same_rows("pad", x, "indices", indices)
    twice = "pad: indices holds a row twice, expected each grid row at most once"
    if can_read_values(indices) and _present(indices, n).count_nonzero() != indices.shape[0]:
        raise ValueError(twice)
    if can_assert_values(indices):
        assert_on_device(_present(indices, n).count_nonzero() == indices.shape[0], twice)
    grid = torch.ops.encfast.scatter_rows(x, indices, n)
    if fill is not None:
        absent = ~_present(indices, n)
        grid = grid.masked_fill(absent.reshape(-1, *[1] * (grid.dim() - 1)), fill)
    return grid.reshape(batch, seqlen, *x.shape[1:])


def _present(indices: Tensor, n: int) -> Tensor:
    # Row n is for the -1 of an exported grid.
    present = torch.zeros(n + 1, dtype=torch.bool, device=indices.device)
    return present.index_fill(0, torch.where(indices < 0, n, indices), True)[:n]


def backends() -> dict[str, str]:
    """Device type -> 'native', or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
