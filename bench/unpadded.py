"""Attention over packed rows as others offer it on GPUs: peers of bench/varlen_attn.py.

All read the packed [N, H, D] that encfast reads, except flex_attention, which gets its contiguous
[1, H, N, D] and a block mask of the documents made outside of the timed call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Call
from sdpa import Inputs, without_grad
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """One way to attend; what it cannot do it does not claim."""

    make: Callable[[Inputs, torch.dtype], Call]
    needs: tuple[str, ...] = ()
    alibi: bool = True
    float32: bool = False


def _call(inputs: Inputs, tensors: list[Tensor], attend: Callable, collect: Callable) -> Call:
    """`attend(q, k, v)`, with the gradients of all three where the inputs ask for them."""
    *qkv, dout = tensors if inputs.dout is not None else (*tensors, None)
    leaves = [x.detach().requires_grad_(dout is not None) for x in qkv]
    if dout is None:
        return Call(without_grad(lambda: attend(*leaves)), lambda out: (collect(out),))
    return Call(
        lambda: (out := attend(*leaves), *torch.autograd.grad(out, leaves, dout)),
        lambda found: tuple(map(collect, found)),
    )


def _packed(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in (*inputs.qkv, inputs.dout) if x is not None]


def _flash_attn(inputs: Inputs, dtype: torch.dtype) -> Call:
    from flash_attn import flash_attn_varlen_func

    cu, longest = inputs.cu_seqlens, max(inputs.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = inputs.alibi_slopes
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, alibi_slopes=slopes)

    return _call(inputs, _packed(inputs, dtype), attend, lambda x: x)


def _torch_varlen(inputs: Inputs, dtype: torch.dtype) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = inputs.cu_seqlens, max(inputs.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, cu, cu, longest, longest)

    return _call(inputs, _packed(inputs, dtype), attend, lambda x: x)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(inputs: Inputs, dtype: torch.dtype) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(inputs.lengths, device=inputs.device)
    document = torch.repeat_interleave(lengths)
    slopes, N = inputs.alibi_slopes, int(lengths.sum())

    def same_document(b, h, q, k):
        return document[q] == document[k]

    def add_slope(score, b, h, q, k):
        return score - slopes[h] * (q - k).abs()

    mask = create_block_mask(same_document, None, None, N, N, device=inputs.device)
    flex = functools.partial(
        _compiled_flex(), score_mod=None if slopes is None else add_slope, block_mask=mask
    )
    grids = [x.transpose(0, 1)[None].contiguous() for x in _packed(inputs, dtype)]
    return _call(inputs, grids, flex, lambda x: x[0].transpose(0, 1))


UNPADDED = {
    "flash-attn": Peer(_flash_attn, needs=("flash_attn",)),
    "torch varlen_attn": Peer(_torch_varlen, alibi=False),
    "flex_attention": Peer(_flex, float32=True),
}
