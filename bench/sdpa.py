"""The ways PyTorch offers to attention over ragged sequences: peers of bench/varlen_attn.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Call
from shapes import by_arrival, by_length
from timing import best_of
from torch import Tensor

BUCKET_SIZES = (4, 8, 16)
MIB = 2**20

Qkv = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Packed q, k, v and, for a backward pass, the gradient of the output."""

    lengths: tuple[int, ...]
    qkv: Qkv  # three [N, H, D] of fp32, holding values that bf16 holds exactly
    dout: Tensor | None  # [N, H, D], or None for the forward alone
    device: str
    alibi_slopes: Tensor | None = None  # fp32 [H]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1]."""
        ends = torch.tensor((0, *self.lengths)).cumsum(0, dtype=torch.int32)
        return ends.to(self.device)

    def pieces(self, x: Tensor) -> list[Tensor]:
        """[H, L_b, D] for each sequence, contiguous."""
        return [p.transpose(0, 1).contiguous() for p in x.split(list(self.lengths))]


def without_grad(call: Callable) -> Callable:
    """The call in inference mode."""

    @torch.inference_mode()
    def run():
        return call()

    return run


def _sdpa(inputs: Inputs, dtype: torch.dtype, batches: list[list[int]]) -> Call:
    """scaled_dot_product_attention on each batch of sequences, padded to its longest."""
    pieces = [inputs.pieces(x.to(dtype)) for x in (*inputs.qkv, inputs.dout) if x is not None]
    steps = []
    for batch in batches:
        tensors = [_grid([p[b] for b in batch]) for p in pieces]
        qkv = [x.requires_grad_(inputs.dout is not None) for x in tensors[:3]]
        mask = _mask([inputs.lengths[b] for b in batch], inputs.device)
        steps.append((qkv, mask, tensors[3:]))

    def forward() -> list[Tensor]:
        return [F.scaled_dot_product_attention(*qkv, attn_mask=mask) for qkv, mask, _ in steps]

    def backward() -> list[list[Tensor]]:
        outs = forward()
        grads = [torch.autograd.grad(o, s[0], s[2]) for o, s in zip(outs, steps, strict=True)]
        return [outs, *map(list, zip(*grads, strict=True))]

    def collect(grids: list[list[Tensor]]) -> tuple[Tensor, ...]:
        return tuple(_rows(g, batches, inputs.lengths) for g in grids)

    if inputs.dout is None:
        return Call(without_grad(lambda: [forward()]), collect)
    return Call(backward, collect)


def _grid(pieces: list[Tensor]) -> Tensor:
    """[B, H, S, D] from B of [H, L_b, D], padded with zeros."""
    longest = max(p.shape[1] for p in pieces)
    return torch.stack([F.pad(p, (0, 0, 0, longest - p.shape[1])) for p in pieces])


def _mask(lengths: list[int], device: str) -> Tensor | None:
    """bool [B, 1, 1, S], True for real keys; None without padding: SDPA is faster so."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    keep = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return keep[:, None, None]


def _rows(grids: list[Tensor], batches: list[list[int]], lengths: Sequence[int]) -> Tensor:
    """Packed [N, H, D], in the original order, from padded batches."""
    found = {
        b: row[:, : lengths[b]].transpose(0, 1)
        for batch, grid in zip(batches, grids, strict=True)
        for b, row in zip(batch, grid, strict=True)
    }
    return torch.cat([found[b] for b in range(len(lengths))])


def _dense_sdpa(
    inputs: Inputs, dtype: torch.dtype, grids: list[Tensor], bias: Tensor | None = None
) -> Call:
    """scaled_dot_product_attention on q, k, v (and dout) [B, H, S, D] of one length."""
    q, k, v = (x.detach().requires_grad_(inputs.dout is not None) for x in grids[:3])

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def collect(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in outputs)

    if inputs.dout is None:
        return Call(without_grad(forward), collect)
    return Call(lambda: (out := forward(), *torch.autograd.grad(out, (q, k, v), grids[3])), collect)


def _grids(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (and dout) as contiguous [B, H, S, D]."""
    tensors = [x.to(dtype) for x in (*inputs.qkv, inputs.dout) if x is not None]
    return [torch.stack(inputs.pieces(x)) for x in tensors]


def _sdpa_contiguous(inputs: Inputs, dtype: torch.dtype) -> Call:
    return _dense_sdpa(inputs, dtype, _grids(inputs, dtype))


def _sdpa_qkv_views(inputs: Inputs, dtype: torch.dtype) -> Call:
    """q, k, v are strided [B, H, S, D] views of one packed [B, S, 3, H, D]."""
    grids = _grids(inputs, dtype)
    qkv = torch.stack([x.transpose(1, 2) for x in grids[:3]], dim=2)
    views = [x.transpose(1, 2) for x in qkv.unbind(2)]
    douts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in grids[3:]]
    return _dense_sdpa(inputs, dtype, [*views, *douts])


def _sdpa_bias(inputs: Inputs, dtype: torch.dtype) -> Call:
    """ALiBi as SDPA takes it: an additive [1, H, S, S]."""
    length = inputs.lengths[0]
    positions = torch.arange(length, device=inputs.device)
    distance = (positions[:, None] - positions).abs()
    bias = (-inputs.alibi_slopes[:, None, None] * distance)[None].to(dtype)
    call = _dense_sdpa(inputs, dtype, _grids(inputs, dtype), bias)
    note = f"its bias takes {bias.nbytes / MIB:.1f} MiB before the call"
    return dataclasses.replace(call, note=note)


def _sdpa_padded(inputs: Inputs, dtype: torch.dtype) -> Call:
    return _sdpa(inputs, dtype, by_arrival(inputs.lengths, len(inputs.lengths)))


def _sdpa_loop(inputs: Inputs, dtype: torch.dtype) -> Call:
    return _sdpa(inputs, dtype, by_arrival(inputs.lengths, 1))


def _sdpa_sorted(inputs: Inputs, dtype: torch.dtype) -> Call:
    sizes = [s for s in BUCKET_SIZES if s <= len(inputs.lengths)] or [1]
    calls = {str(s): _sdpa(inputs, dtype, by_length(inputs.lengths, s)) for s in sizes}
    best = best_of({name: call.run for name, call in calls.items()}, inputs.device)
    return Call(calls[best].run, calls[best].collect, f"buckets of {best}")


def _sdpa_packed_loop(inputs: Inputs, dtype: torch.dtype) -> Call:
    """SDPA on views of each sequence's rows, and the outputs put together again."""
    lengths = list(inputs.lengths)
    return _sdpa_on_views(inputs, dtype, lambda x: x.split(lengths, dim=1))


def _sdpa_sliced_loop(inputs: Inputs, dtype: torch.dtype) -> Call:
    """The same by slices, as it is written at first: the gradient of each fills all rows."""
    ends = list(itertools.accumulate(inputs.lengths, initial=0))
    return _sdpa_on_views(inputs, dtype, lambda x: [x[:, a:b] for a, b in itertools.pairwise(ends)])


def _sdpa_on_views(
    inputs: Inputs, dtype: torch.dtype, cut: Callable[[Tensor], Sequence[Tensor]]
) -> Call:
    """SDPA on the views that `cut` makes of [H, N, D], one for each sequence."""
    q, k, v = (x.to(dtype).requires_grad_(inputs.dout is not None) for x in inputs.qkv)

    def forward() -> Tensor:
        pieces = zip(*(cut(x.transpose(0, 1)) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in qkv))[0] for qkv in pieces]
        return torch.cat(outs, dim=1).transpose(0, 1)

    if inputs.dout is None:
        return Call(without_grad(forward), collect=lambda out: (out,))
    dout = inputs.dout.to(dtype)
    return Call(lambda: (out := forward(), *torch.autograd.grad(out, (q, k, v), dout)))


PEERS = {
    "contiguous": _sdpa_contiguous,
    "qkv views": _sdpa_qkv_views,
    "materialised bias": _sdpa_bias,
    "loop": _sdpa_loop,
    "packed loop": _sdpa_packed_loop,
    "sliced loop": _sdpa_sliced_loop,
    "length-sorted": _sdpa_sorted,
    "padded": _sdpa_padded,
}
