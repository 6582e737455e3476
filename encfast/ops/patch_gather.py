"""Which patches of an image, clip or volume a model sees: chosen, gathered, and put back.

    select_patches:  of each sequence the `keep` patches with the least noise, and the others
    gather_patches:  rows of pixels of the patches asked for; no other pixel is read
    restore_rows:    out[i] = (x[index[i]], or fill where index[i] is -1) + add[add_index[i]]

Conventions. Patches of an image are numbered over its grid, the last axis fastest; patch p of
image b has the id b * P + p, as its row among the tokens [B * P, C] or [N, C] of a batch has: an id
is what `gather_rows` takes. Pixels of a patch stand in the order of a convolution's weight,
[C, *patch], or with `channels_last` in that of MAE's targets, [*patch, C]. Noise goes up; NaN
counts as the largest number, equals go by position. Empty sequences, no patches kept and none
hidden are legal.

What restores a decoder's sequence (visible rows, mask token, positions) also builds an encoder's
(patches, class token, positions): both are one `restore_rows` with another index.

Sources: He et al., Masked Autoencoders (arXiv:2111.06377), whose per-sample shuffling this is;
Tian et al., SparK (arXiv:2301.03580) for norms over visible positions (`masked_norm`).

Backends: C++ on the CPU and CUDA; elsewhere the reference.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ref.patch_gather import fold_patches as _ref_fold
from ..ref.patch_gather import gather_patches as _ref_gather
from ..ref.patch_gather import restore_rows as _ref_restore
from ..ref.patch_gather import restore_rows_bwd as _ref_restore_bwd
from ..ref.patch_gather import select_patches as _ref_select
from . import _backends
from ._checks import check_tensor
from ._patch_gather_checks import (
    check_counts,
    check_gather,
    check_geometry,
    check_restore,
    check_select,
    num_patches,
)
from .add_norm import add_norm
from .pad import gather_rows, scatter_rows

DISPATCHER_OPS = ("select_patches", "gather_patches", "restore_rows", "restore_rows_bwd")

torch.library.define(
    "encfast::select_patches",
    "(Tensor noise, Tensor cu_seqlens, Tensor cu_keep, SymInt keep, bool ordered) "
    "-> (Tensor visible, Tensor hidden, Tensor restore)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::gather_patches",
    "(Tensor image, Tensor ids, SymInt[] patch, bool channels_last, Tensor? scale, Tensor? shift, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::restore_rows",
    "(Tensor x, Tensor index, Tensor? fill, Tensor? add, Tensor? add_index) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Gradients of parameters are float32, [0] where they are not wanted. That of x is scatter_rows.
torch.library.define(
    "encfast::restore_rows_bwd",
    "(Tensor dout, Tensor index, Tensor? add_index, SymInt n_add, bool want_dfill, bool want_dadd) "
    "-> (Tensor dfill, Tensor dadd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class PatchSelection(NamedTuple):
    """What `select_patches` returns; ids are rows of the packed tokens."""

    visible: Tensor  # [K] int64: the kept ids, sequence by sequence
    hidden: Tensor  # [N - K] int64: the others
    restore: Tensor  # [N] int64: place of each patch in `visible`, -1 where it is hidden
    cu_keep: Tensor  # [B + 1] int32: cu_seqlens of the visible rows


@torch.library.register_fake("encfast::select_patches")
def _fake_select(noise, cu_seqlens, cu_keep, keep, ordered):
    n = noise.shape[0]
    return (
        noise.new_empty(keep, dtype=torch.int64),
        noise.new_empty(n - keep, dtype=torch.int64),
        noise.new_empty(n, dtype=torch.int64),
    )


@torch.library.register_fake("encfast::gather_patches")
def _fake_gather(image, ids, patch, channels_last, scale, shift, dtype):
    return image.new_empty((ids.shape[0], image.shape[1] * math.prod(patch)), dtype=dtype)


@torch.library.register_fake("encfast::restore_rows")
def _fake_restore(x, index, fill, add, add_index):
    return x.new_empty((index.shape[0], x.shape[1]))


@torch.library.register_fake("encfast::restore_rows_bwd")
def _fake_restore_bwd(dout, index, add_index, n_add, want_dfill, want_dadd):
    channels = dout.shape[1]
    return (
        dout.new_empty(channels if want_dfill else 0, dtype=torch.float32),
        dout.new_empty((n_add, channels) if want_dadd else 0, dtype=torch.float32),
    )


def _setup_gather(ctx, inputs, output) -> None:
    image, ids, patch, channels_last, scale, _, _ = inputs
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(ids, scale)
        ctx.shape, ctx.dtype = image.shape, image.dtype
        ctx.patch, ctx.channels_last = patch, channels_last


def _gather_backward(ctx, drows):
    ids, scale = ctx.saved_tensors
    n = ctx.shape[0] * num_patches(ctx.shape, ctx.patch)
    rows = torch.ops.encfast.scatter_rows(drows.float(), ids, n)
    dimage = _ref_fold(rows, ctx.shape, ctx.patch, ctx.channels_last)
    if scale is not None:
        dimage = dimage * scale.float().view(-1, *[1] * len(ctx.patch))
    return dimage.to(ctx.dtype), *[None] * 6


def _setup_restore(ctx, inputs, output) -> None:
    x, index, fill, add, add_index = inputs
    ctx.n, ctx.n_add = x.shape[0], 0 if add is None else add.shape[0]
    ctx.dtypes = [None if p is None else p.dtype for p in (fill, add)]
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(index, add_index)


def _restore_backward(ctx, dout):
    index, add_index = ctx.saved_tensors
    need_x, _, need_fill, need_add, _ = ctx.needs_input_grad
    dx = torch.ops.encfast.scatter_rows(dout, index, ctx.n) if need_x else None
    dfill = dadd = None
    if need_fill or need_add:
        dfill, dadd = torch.ops.encfast.restore_rows_bwd(
            dout, index, add_index, ctx.n_add, need_fill, need_add
        )
    fill_dtype, add_dtype = ctx.dtypes
    return (
        dx,
        None,
        dfill.to(fill_dtype) if dfill is not None and need_fill else None,
        dadd.to(add_dtype) if dadd is not None and need_add else None,
        None,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "restore_rows: double backward for fill and add is not implemented; "
        "encfast.ref.patch_gather has one"
    )


torch.library.register_autograd(
    "encfast::gather_patches", _gather_backward, setup_context=_setup_gather
)
torch.library.register_autograd(
    "encfast::restore_rows", _restore_backward, setup_context=_setup_restore
)
torch.library.register_autograd(
    "encfast::restore_rows_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _reference_select(noise, cu_seqlens, cu_keep, keep, ordered):
    check_select("select_patches", noise, cu_seqlens, cu_keep)
    check_counts("select_patches", noise, cu_seqlens, cu_keep, keep)
    return _ref_select(noise, cu_seqlens, cu_keep, ordered)


def _reference_gather(image, ids, patch, channels_last, scale, shift, dtype):
    check_gather(image, ids, patch, scale, shift, dtype)
    return _ref_gather(image, ids, patch, channels_last, scale, shift, dtype)


def _reference_restore(x, index, fill, add, add_index):
    check_restore(x, index, fill, add, add_index)
    return _ref_restore(x, index, fill, add, add_index)


def _reference_restore_bwd(dout, index, add_index, n_add, want_dfill, want_dadd):
    dfill, dadd = _ref_restore_bwd(dout, index, add_index, n_add if want_dadd else 0)
    return dfill if want_dfill else dfill.new_empty(0), dadd if want_dadd else dadd.new_empty(0)


for _op, _reference in (
    ("select_patches", _reference_select),
    ("gather_patches", _reference_gather),
    ("restore_rows", _reference_restore),
    ("restore_rows_bwd", _reference_restore_bwd),
):
    _backends.register_reference("patch_gather", _op, _reference)
    _backends.register_cuda("patch_gather", _op, _reference)


def select_patches(
    noise: Tensor,
    keep: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    ordered: bool = True,
) -> PatchSelection:
    """Keeps exactly `keep` patches of each sequence: those with the least noise.

    Args:
        noise: [B, P] float32, one number per patch; or [N] with `cu_seqlens`, where sequences
            differ in length (mixed resolutions). torch.rand makes the choice uniform.
        keep: patches to keep of each sequence, in 0..P; with `cu_seqlens` one number for each of
            the B sequences, on the host.
        cu_seqlens: int32 [B + 1].
        ordered: list ids in ascending order; otherwise in that of their noise, which is a random
            order (MAE's shuffle).

    Returns:
        PatchSelection(visible [K], hidden [N - K], restore [N], cu_keep [B + 1]). Ids are rows of
        the packed tokens, b * P + p in the first case.

    Raises:
        TypeError, ValueError: a malformed argument, or a `keep` outside of 0..P.

    Examples:
        >>> noise = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.8, 0.7, 0.1, 0.6]])
        >>> chosen = ops.select_patches(noise, 2)
        >>> chosen.visible, chosen.cu_keep
        (tensor([1, 3, 6, 7]), tensor([0, 2, 4], dtype=torch.int32))
        >>> chosen.restore
        tensor([-1,  0, -1,  1, -1, -1,  2,  3])
    """
    op = "select_patches"
    check_tensor(op, "noise", noise)
    if cu_seqlens is None:
        noise, cu_seqlens, cu_keep, total = _equal_sequences(noise, keep)
        check_select(op, noise, cu_seqlens, cu_keep)
    else:
        cu_keep, total = _running_sum(cu_seqlens, keep)
        check_select(op, noise, cu_seqlens, cu_keep)
        check_counts(op, noise, cu_seqlens, cu_keep, total)
    if noise.requires_grad:  # a call less, which counts beside a kernel of 40 us
        noise = noise.detach()
    visible, hidden, restore = torch.ops.encfast.select_patches(
        noise, cu_seqlens, cu_keep, total, ordered
    )
    return PatchSelection(visible, hidden, restore, cu_keep)


def _equal_sequences(noise: Tensor, keep: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    check_tensor("select_patches", "noise", noise, 2, "[B, P], or [N] with cu_seqlens")
    batch, patches = noise.shape
    _check_keep(keep, patches)
    steps = torch.arange(batch + 1, dtype=torch.int32, device=noise.device)
    return noise.flatten(), steps * patches, steps * keep, batch * keep


def _check_keep(keep: object, patches: int) -> None:
    if not isinstance(keep, int | torch.SymInt) or isinstance(keep, bool):
        raise TypeError(f"select_patches: keep is {type(keep).__name__}, expected an int")
    if not 0 <= keep <= patches:
        raise ValueError(f"select_patches: keep is {keep}, expected 0..{patches}, the patches")


def _running_sum(cu_seqlens: Tensor, keep: Any) -> tuple[Tensor, int]:
    check_tensor("select_patches", "cu_seqlens", cu_seqlens, 1, "[B + 1]")
    counts = keep.tolist() if isinstance(keep, Tensor) else keep
    if isinstance(counts, int) or len(counts) != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"select_patches: keep is {keep}, expected a number for each of the "
            f"{cu_seqlens.shape[0] - 1} sequences"
        )
    if any(k < 0 for k in counts):
        raise ValueError(f"select_patches: keep holds {min(counts)}, expected 0 or more")
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(cu_seqlens.device), sum(counts)


def gather_patches(
    image: Tensor,
    ids: Tensor | None,
    patch: Sequence[int],
    *,
    channels_last: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Pixels of the patches asked for, one patch a row, as a linear projection reads them.

    Args:
        image: [B, C, *size] with 1 to 3 sizes (sequence, image, clip or volume), each a multiple
            of the patch's; float32, bfloat16, float16 or uint8. Any strides.
        ids: [M] int64, b * P + p, in any order; None: all B * P patches.
        patch: the size of a patch along each axis.
        channels_last: pixels of a row in the order [*patch, C] instead of [C, *patch].
        scale, shift: [C] or None: pixel * scale + shift, as normalisation by mean and standard
            deviation is. Constants.
        dtype: of the rows; by default the image's, and float32 for uint8.

    Returns:
        [M, C * prod(patch)]. Differentiable in `image`.

    Raises:
        TypeError, ValueError: a malformed argument, an image that the patch does not divide, or an
            id outside of 0..B * P - 1.

    Numerics: float32 inside, rounded once.

    Examples:
        >>> image = torch.arange(16, dtype=torch.float32).view(1, 1, 4, 4)
        >>> ops.gather_patches(image, torch.tensor([3, 0]), (2, 2))
        tensor([[10., 11., 14., 15.],
                [ 0.,  1.,  4.,  5.]])
    """
    check_tensor("gather_patches", "image", image)
    patch = tuple(patch)
    if dtype is None:
        dtype = image.dtype if image.dtype.is_floating_point else torch.float32
    if ids is None:
        check_geometry("gather_patches", image.shape, patch)
        n = image.shape[0] * num_patches(image.shape, patch)
        ids = torch.arange(n, device=image.device)
    check_gather(image, ids, patch, scale, shift, dtype)
    return torch.ops.encfast.gather_patches(image, ids, patch, channels_last, scale, shift, dtype)


def fold_patches(
    rows: Tensor, shape: Sequence[int], patch: Sequence[int], *, channels_last: bool = False
) -> Tensor:
    """All patches back to an image: the inverse of `gather_patches`, in plain PyTorch.

    Args:
        rows: [B * P, C * prod(patch)], any dtype.
        shape: (B, C, *size) of the result.
        patch, channels_last: as in `gather_patches`.

    Returns:
        `shape`, in the dtype of rows.

    Raises:
        TypeError, ValueError: rows of another shape, or sizes that the patch does not divide.

    Examples:
        >>> image = torch.randn(2, 3, 8, 8)
        >>> rows = ops.gather_patches(image, None, (4, 4))
        >>> torch.equal(ops.fold_patches(rows, image.shape, (4, 4)), image)
        True
    """
    op, patch = "fold_patches", tuple(patch)
    check_tensor(op, "rows", rows, 2, "[B * P, C * prod(patch)]")
    check_geometry(op, shape, patch)
    expected = (shape[0] * num_patches(shape, patch), shape[1] * math.prod(patch))
    if tuple(rows.shape) != expected:
        raise ValueError(f"{op}: rows has shape {tuple(rows.shape)}, expected {expected}")
    return _ref_fold(rows, shape, patch, channels_last)


def restore_rows(
    x: Tensor,
    index: Tensor,
    fill: Tensor | None = None,
    *,
    add: Tensor | None = None,
    add_index: Tensor | None = None,
) -> Tensor:
    """Rows back at their places, a shared row in the gaps, positions added, in one pass.

    Args:
        x: [n, C] float32, bfloat16 or float16: the visible rows.
        index: [M] int64 in -1..n - 1: which row of x stands where; -1 takes `fill`. Rows may be
            used more than once, or not at all.
        fill: [C] or None (zeros): the mask token. Parameters may be of another dtype than x.
        add: [A, C] or None: rows to add, such as positions.
        add_index: [M] int64 in 0..A - 1; by default i % A, and A divides M: the same rows for each
            sequence of A.

    Returns:
        [M, C] in x's dtype. Differentiable in x, fill and add.

    Raises:
        TypeError, ValueError: a malformed argument, or an index out of range.

    Numerics: sums in float32, rounded once. Gradients of fill and add are summed in float32 in a
    fixed order: bit-equal from run to run and for any number of threads.

    Examples:
        >>> mask_token = torch.tensor([0.5])
        >>> ops.restore_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([0, -1, 1]), mask_token)
        tensor([[1.0000],
                [0.5000],
                [2.0000]])
    """
    check_restore(x, index, fill, add, add_index)
    return torch.ops.encfast.restore_rows(x, index, fill, add, add_index)


def masked_norm(
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layernorm",
    eps: float | None = None,
) -> Tensor:
    """Norm of the visible rows of a dense map, zeros elsewhere (SparK's sparse LayerNorm).

    Args:
        x: [N, C], the map's rows.
        rows: [M] int64 in 0..N - 1, each at most once: the visible ones.
        weight, bias, kind, eps: as in `add_norm`.

    Returns:
        [N, C] in the dtype of x.

    Raises:
        TypeError, ValueError: a malformed argument, or a row out of range.

    Examples:
        >>> ops.masked_norm(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([1]), eps=0.0)
        tensor([[ 0.,  0.],
                [-1.,  1.]])
    """
    normed = add_norm(gather_rows(x, rows), None, weight, bias, kind=kind, eps=eps)
    assert isinstance(normed, Tensor)
    return scatter_rows(normed, rows, x.shape[0])


def backends() -> dict[str, str]:
    """Device type -> 'native', or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
