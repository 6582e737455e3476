"""flash-attn's moves between a padded grid and packed rows, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from encfast import ops

from ._arguments import require

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows indices [m] of input [n, ...]: [m, ...]. Gradients of a repeated row add."""
    return ops.select_rows(input, indices.long())


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Row i of values [m, ...] at row indices[i] of `first_axis_dim` rows, the others zero.

    Rows that share a place are added.
    """
    return ops.scatter_rows(values, indices.long(), first_axis_dim)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows indices [m], as of `index_first_axis`, and input for a residual connection."""
    return ops.select_rows(input, indices.long()), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a grid that a mask keeps. Reads the lengths on the host, once.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: [B, S] bool or int, nonzero keeps.
        unused_mask: [B, S] rows that are kept as well, but not in use.

    Returns:
        rows [N, ...], indices int64 [N] in the flattened grid, cu_seqlens int32 [B + 1], the
        largest length, and int32 [B], the rows in use of each sequence.

    Raises:
        TypeError, ValueError: a malformed argument.
    """
    op = "unpad_input"
    used = kept = _mask(op, "attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        kept = used | _mask(op, "unused_mask", unused_mask, hidden_states)
    rows = ops.unpad(hidden_states, kept)
    return (*rows, used.sum(1, dtype=torch.int32))


def _mask(op: str, name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    if not isinstance(hidden_states, Tensor):
        came = type(hidden_states).__name__
        raise TypeError(f"{op}: hidden_states is {came}, expected a torch.Tensor")
    require(op, name, mask, 2, "[B, S]")
    if mask.is_floating_point():
        raise TypeError(f"{op}: {name} is {mask.dtype}, expected bool or int, nonzero to keep")
    if hidden_states.shape[:2] != mask.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(mask.shape)}, hidden_states "
            f"{tuple(hidden_states.shape)}; expected [B, S] and [B, S, ...]"
        )
    return mask != 0


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Like `unpad_input` for rows of a grid that hold several sequences behind each other.

    Args:
        hidden_states: [B, S, ...].
        attention_mask_in_length: int [B, S]; the nonzero entries of a row are the lengths of the
            sequences in it, in their order. [[2, 3, 0, 0, 0, 0]]: two, then three, then padding.

    Returns:
        rows [N, ...], indices int64 [N], cu_seqlens int32 over all sequences, the largest length.
    """
    op, name = "unpad_input_for_concatenated_sequences", "attention_mask_in_length"
    present = _mask(op, name, attention_mask_in_length, hidden_states)
    filled = attention_mask_in_length.sum(1, keepdim=True)
    seqlen = hidden_states.shape[1]
    if filled.numel() and filled.max() > seqlen:
        raise ValueError(f"{op}: {name} has lengths of {int(filled.max())} in a row of {seqlen}")
    rows = ops.unpad(hidden_states, torch.arange(seqlen, device=filled.device) < filled)
    lengths = attention_mask_in_length[present].to(torch.int32)
    cu_seqlens = lengths.new_zeros(lengths.shape[0] + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    return rows.data, rows.indices, cu_seqlens, max(lengths.tolist(), default=0)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed rows back to a grid, zeros elsewhere.

    Args:
        hidden_states: [N, ...].
        indices: int64 [N], the place of each row in the flattened grid, as `unpad_input` gives it.
        batch: B.
        seqlen: S.

    Returns:
        [B, S, ...].
    """
    return ops.pad(hidden_states, indices.long(), batch, seqlen)
