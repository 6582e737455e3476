"""The head and loss of masked language modelling: encfast against logits held whole or in chunks.

2048 tokens of which 15 % are to be predicted, ModernBERT's vocabulary, forward and backward with
the gradients of rows and weight. Peers get the masked rows alone where that is what they are used
for; `logits of all tokens` is how a model without packed rows computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, ReferenceGate, Setting, Variant
from timing import short_name
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encfast import ops, ref

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, weight, targets -> mean loss
IGNORE = -100
ROWS_PER_CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """Tokens, entries of the vocabulary, channels."""

    N: int
    V: int
    C: int


@dataclass(frozen=True)
class Inputs:
    """Rows and weight, leaves that need gradients, and what stood where a token is masked."""

    x: Tensor  # [N, C]
    weight: Tensor  # [V, C]
    targets: Tensor  # int64 [N], IGNORE where nothing is predicted

    @functools.cached_property
    def masked(self) -> Tensor:
        """The rows with a target."""
        return (self.targets != IGNORE).nonzero().squeeze(1)


def _inputs(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, s.V, (s.N,), generator=g)
    targets[torch.rand(s.N, generator=g) >= 0.15] = IGNORE
    return Inputs(
        torch.randn(s.N, s.C, generator=g).to(device, dtype).requires_grad_(),
        (torch.randn(s.V, s.C, generator=g) * s.C**-0.5).to(device, dtype).requires_grad_(),
        targets.to(device),
    )


def _logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def _fused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, targets)


def _fused_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def _chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    def part(rows: Tensor, of_rows: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, weight), of_rows, reduction="sum")

    pairs = zip(x.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True)
    parts = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum() / targets.numel()


def _reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ref.linear_cross_entropy(x, weight, targets)[0].mean()


def _call(i: Inputs, head: Head, masked: bool) -> Call:
    def run() -> tuple[Tensor, ...]:
        x, targets = (i.x[i.masked], i.targets[i.masked]) if masked else (i.x, i.targets)
        return torch.autograd.grad(head(x, i.weight, targets), (i.x, i.weight))

    # Most rows of x have no target and gradient 0.
    return Call(run, collect=lambda grads: (grads[0][i.masked], grads[1]))


def _known(i: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    wide = [t.detach().double().requires_grad_() for t in (i.x, i.weight)]
    call = _call(Inputs(*wide, i.targets), _reference, masked=True)
    plain = _call(i, _logits, masked=True)
    return call.collect(call.run()), plain.collect(plain.run())


_VARIANTS: dict[str, tuple[Head, bool]] = {
    "logits of all tokens": (_logits, False),
    "logits of masked rows": (_logits, True),
    "chunks, checkpoint": (_chunks, True),
    "F.linear_cross_entropy": (_fused, True),
    "F.linear_cross_entropy chunks": (_fused_chunks, True),
    "encfast": (ops.linear_cross_entropy, False),
}


def _spec(s: Shape, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    return BenchSpec(
        name=f"linear_cross_entropy/mlm-N{s.N}-V{s.V}-C{s.C}-{short_name(dtype)}",
        title=f"MLM head and loss fwd+bwd, {s.N} tokens, 15 % masked, V={s.V}, C={s.C}, "
        f"{short_name(dtype)}",
        inputs=lambda: _inputs(s, dtype, setting.device),
        variants=tuple(
            Variant(
                name,
                dtype,
                functools.partial(_call, head=head, masked=masked),
                ours=name == "encfast",
                torch_products=name != "encfast",
            )
            for name, (head, masked) in _VARIANTS.items()
        ),
        verify=ReferenceGate(_known, 3.0),
        flops=lambda i: 6.0 * i.masked.numel() * s.V * s.C,
        pairs=(("encfast", "logits of all tokens"), ("encfast", "F.linear_cross_entropy")),
        budget_s=0.1 if setting.suite == "tiny" else 20.0,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite. Not in `quick`: a call takes a second."""
    if setting.suite == "quick":
        return []
    shape = Shape(40, 300, 16) if setting.suite == "tiny" else Shape(2048, 50368, 768)
    return [_spec(shape, dtype, setting) for dtype in (torch.float32, torch.bfloat16)]
