"""DupMAE's bag of words: largest vocabulary scores of each text, their loss, forward and backward.

BERT's vocabulary and width, texts of MS MARCO's lengths. `logits` is how it is written: the scores
of all rows, and the largest of each text's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import BenchSpec, Call, ReferenceGate, Setting, Variant
from torch import Tensor

from encfast import PackedBatch, losses, ops, ref

Pooled = Callable[[Tensor, Tensor, PackedBatch], Tensor]  # x, weight, words -> [B, V]


@dataclass(frozen=True)
class Inputs:
    """Rows and weight, leaves that need gradients, and the words of each text."""

    x: Tensor  # [N, C]
    weight: Tensor  # [V, C]
    words: PackedBatch  # int64 [N]


def _inputs(count: int, longest: int, v: int, c: int) -> Inputs:
    """Numbers of so few bits that scores are exact: all choose the same rows."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 3, longest + 1, (count,), generator=g)
    n = int(lengths.sum())
    x, weight = (torch.randint(-31, 32, (rows, c), generator=g) / 32 for rows in (n, v))
    ids = torch.randint(0, v, (n,), generator=g)
    words = PackedBatch.from_lengths(ids, lengths)
    return Inputs(x.requires_grad_(), (weight / 8).requires_grad_(), words)


def _logits(x: Tensor, weight: Tensor, words: PackedBatch) -> Tensor:
    parts = (x @ weight.mT).split(words.lengths().tolist())
    return torch.stack([part.max(0).values for part in parts])


def _ours(x: Tensor, weight: Tensor, words: PackedBatch) -> Tensor:
    return ops.linear_seg_max(x, weight, words.cu_seqlens)


def _reference(x: Tensor, weight: Tensor, words: PackedBatch) -> Tensor:
    return ref.linear_seg_max(x, weight, words.cu_seqlens)[0]


def _call(i: Inputs, pooled: Pooled) -> Call:
    def run() -> tuple[Tensor, ...]:
        loss = losses.bag_of_words_loss(pooled(i.x, i.weight, i.words), i.words)
        return loss.detach(), *torch.autograd.grad(loss, (i.x, i.weight))

    return Call(run)


def _known(i: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    wide = [t.detach().double().requires_grad_() for t in (i.x, i.weight)]
    return _call(Inputs(*wide, i.words), _reference).run(), _call(i, _logits).run()


def specs(setting: Setting) -> list[BenchSpec]:
    """The bench of this op: no GPU kernel, and too long for the quick suite."""
    if setting.device != "cpu" or setting.suite == "quick":
        return []
    count, longest, v, c = (3, 9, 300, 16) if setting.suite == "tiny" else (16, 128, 30_522, 768)
    variants = {"logits": _logits, "encfast": _ours}
    return [
        BenchSpec(
            name=f"linear_seg_max/bow-B{count}-L{longest}-V{v}-C{c}-fp32",
            title=f"bag of words fwd+bwd, {count} texts of {longest // 3} to {longest} tokens, "
            f"V={v}, C={c}, fp32",
            inputs=lambda: _inputs(count, longest, v, c),
            variants=tuple(
                Variant(
                    name,
                    torch.float32,
                    functools.partial(_call, pooled=pooled),
                    ours=name == "encfast",
                    torch_products=name != "encfast",
                )
                for name, pooled in variants.items()
            ),
            verify=ReferenceGate(_known, 3.0),
            # Forward of all rows; backward of what was chosen.
            flops=lambda i: 2.0 * (i.words.total + 2 * count) * v * c,
            pairs=(("encfast", "logits"),),
            budget_s=0.1 if setting.suite == "tiny" else 20.0,
        )
    ]
