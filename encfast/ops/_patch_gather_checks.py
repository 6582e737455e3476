"""Argument checks of `encfast.ops.patch_gather`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import (
    FLOAT_DTYPES,
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_range,
    check_tensor,
)

PIXEL_DTYPES = (*FLOAT_DTYPES, torch.uint8)


def check_select(op, noise, cu_seqlens, cu_keep) -> None:
    check_tensor(op, "noise", noise, 1, "[N]")
    check_dtype(op, "noise", noise, torch.float32)
    for name, ends in (("cu_seqlens", cu_seqlens), ("cu_keep", cu_keep)):
        check_tensor(op, name, ends, 1, "[B + 1]")
        check_dtype(op, name, ends, torch.int32)
        check_device(op, name, ends, "noise", noise)
    if cu_seqlens.shape != cu_keep.shape or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens has {cu_seqlens.shape[0]} entries, cu_keep {cu_keep.shape[0]}, "
            "expected B + 1 each"
        )


def check_counts(op, noise, cu_seqlens, cu_keep, keep) -> None:
    check_cu_seqlens_values(op, "cu_seqlens", cu_seqlens, noise.shape[0], "max_seqlen", None)
    check_cu_seqlens_values(op, "cu_keep", cu_keep, keep, "keep", None)
    if can_read_values(cu_keep):
        excess = cu_keep.diff() > cu_seqlens.diff()
        if excess.any():
            b = int(excess.nonzero()[0])
            raise ValueError(
                f"{op}: keep is {int(cu_keep.diff()[b])} for sequence {b}, which has "
                f"{int(cu_seqlens.diff()[b])} patches"
            )
    elif can_assert_values(cu_keep):
        assert_on_device(
            cu_keep.diff() <= cu_seqlens.diff(), f"{op}: keep is more than a sequence has patches"
        )


def check_geometry(op: str, shape: Sequence[int], patch: Sequence[int]) -> None:
    """shape = [B, C, *size], each size a multiple of the patch's."""
    if len(patch) not in (1, 2, 3) or any(not p >= 1 for p in patch):
        raise ValueError(f"{op}: patch is {tuple(patch)}, expected 1 to 3 sizes >= 1")
    if len(shape) != 2 + len(patch):
        raise ValueError(
            f"{op}: image has shape {tuple(shape)}, expected [B, C, *size] with {len(patch)} "
            f"sizes, as many as patch {tuple(patch)} has"
        )
    for size, p in zip(shape[2:], patch, strict=True):
        if size % p:
            raise ValueError(
                f"{op}: image has size {tuple(shape[2:])}, expected multiples of the patch "
                f"{tuple(patch)}; crop, pad or interpolate it"
            )


def num_patches(shape: Sequence[int], patch: Sequence[int]) -> int:
    count = 1  # a loop: math.prod of a generator breaks a graph
    for size, p in zip(shape[2:], patch, strict=True):
        count *= size // p
    return count


def check_gather(image, ids, patch, scale, shift, dtype) -> None:
    op = "gather_patches"
    check_tensor(op, "image", image)
    check_dtype(op, "image", image, *PIXEL_DTYPES)
    check_geometry(op, image.shape, patch)
    check_tensor(op, "ids", ids, 1, "[M]")
    check_dtype(op, "ids", ids, torch.int64)
    check_device(op, "ids", ids, "image", image)
    n = image.shape[0] * num_patches(image.shape, patch)
    check_range(op, "ids", ids, 0, n, lambda: f"expected 0 <= b * P + p < {n}")
    for name, x in (("scale", scale), ("shift", shift)):
        if x is not None:
            _check_channels(op, name, x, image, image.shape[1])
            if x.requires_grad:
                raise ValueError(f"{op}: {name} requires a gradient, expected constants")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}, expected float32, bfloat16 or float16")


def _check_channels(op: str, name: str, x: Tensor, like: Tensor, channels: int) -> None:
    check_tensor(op, name, x, 1, "[C]")
    check_dtype(op, name, x, *FLOAT_DTYPES)
    check_device(op, name, x, "x" if op == "restore_rows" else "image", like)
    if x.shape[0] != channels:
        raise ValueError(f"{op}: {name} has {x.shape[0]} entries, expected {channels} channels")


def check_restore(x, index, fill, add, add_index) -> None:
    op = "restore_rows"
    check_tensor(op, "x", x, 2, "[n, C]")
    check_dtype(op, "x", x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.patch_gather")
    check_tensor(op, "index", index, 1, "[M]")
    check_dtype(op, "index", index, torch.int64)
    check_device(op, "index", index, "x", x)
    n = x.shape[0]
    check_range(op, "index", index, -1, n, lambda: f"expected -1 <= row < {n}")
    if fill is not None:
        _check_channels(op, "fill", fill, x, x.shape[1])
    if add is None:
        if add_index is not None:
            raise ValueError(f"{op}: add_index came without add, expected the rows it points to")
        return
    check_tensor(op, "add", add, 2, "[A, C]")
    check_dtype(op, "add", add, *FLOAT_DTYPES)
    check_device(op, "add", add, "x", x)
    if add.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: add has {add.shape[1]} channels, x has {x.shape[1]}")
    _check_added(index, add.shape[0], add_index)


def _check_added(index, n_add, add_index) -> None:
    op, m = "restore_rows", index.shape[0]
    if add_index is None:
        if m and (n_add == 0 or m % n_add):
            raise ValueError(
                f"{op}: add has {n_add} rows, expected a divisor of the {m} rows of the result, or "
                "add_index"
            )
        return
    check_tensor(op, "add_index", add_index, 1, "[M]")
    check_dtype(op, "add_index", add_index, torch.int64)
    check_device(op, "add_index", add_index, "index", index)
    if add_index.shape != index.shape:
        raise ValueError(
            f"{op}: add_index has {add_index.shape[0]} entries, index has {index.shape[0]}"
        )
    check_range(op, "add_index", add_index, 0, n_add, lambda: f"expected 0 <= row < {n_add}")
