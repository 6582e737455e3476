"""Contrastive losses over all pairs: encfast against the formulas and a tiled recompute.

CLIP's loss and SigLIP's between two sets of features, SimCLR's (`nt_xent`) and SupCon between all
rows of both.

`plain` is how it is written: the matrix of logits, cross entropy along both of its dimensions.
`checkpoint` does that for 512 rows at a time and computes them again for the gradients, after which
columns are put together. `tiled` is the better algorithm in plain PyTorch: both log-sum-exps in one
pass over tiles of 512 rows, then the gradients in a second one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, all_of, error_gate
from timing import short_name
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encfast import contrastive, ops, ref

Found = tuple[Tensor, ...]  # loss, and the gradients of a, b and logit_scale
TILE = 512
HUGE = 32_768  # pairs: their matrix takes 4 GiB, and whoever holds it takes several


@dataclass(frozen=True)
class Inputs:
    """Normalised features of pairs, and CLIP's first scale."""

    a: Tensor  # [B, D]
    b: Tensor  # [B, D]
    scale: Tensor


def _inputs(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(n, d, generator=g), dim=-1)
    b = F.normalize(a + 0.25 * torch.randn(n, d, generator=g), dim=-1)
    return Inputs(a.to(device, dtype), b.to(device, dtype), torch.tensor(1 / 0.07, device=device))


def _by_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor], i: Inputs) -> Found:
    leaves = [x.detach().requires_grad_() for x in (i.a, i.b, i.scale)]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def _plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(a.dtype) * a @ b.T
    right = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def _checkpointed(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    def sums(rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = (scale.to(a.dtype) * rows @ b.T).float()
        return logits.logsumexp(1), logits.logsumexp(0)

    parts = [checkpoint(sums, rows, use_reentrant=False) for rows in a.split(TILE)]
    rows, columns = torch.cat([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    right = scale * (a.float() * b.float()).sum(1)
    return ((rows + columns.logsumexp(0)) / 2 - right).mean()


def _tiled(i: Inputs) -> Found:
    a, b, n = i.a, i.b, len(i.a)
    scale = i.scale.to(a.dtype)
    tiles = range(0, n, TILE)
    rows, columns, right = a.new_empty(n), a.new_full((n,), -torch.inf), a.new_empty(n)
    for t in tiles:
        logits = scale * a[t : t + TILE] @ b.T
        rows[t : t + TILE] = logits.logsumexp(1)
        columns = torch.logaddexp(columns, logits.logsumexp(0))
        right[t : t + TILE] = logits.diagonal(t)
    da, db, dscale = torch.empty_like(a), torch.zeros_like(b), torch.zeros_like(i.scale)
    for t in tiles:
        products = a[t : t + TILE] @ b.T
        logits = scale * products
        g = (logits - rows[t : t + TILE, None]).exp_().add_((logits - columns).exp_())
        g.diagonal(t).sub_(2)
        g /= 2 * n
        dscale += (g * products).sum().float()
        da[t : t + TILE] = scale * (g @ b)
        db.addmm_(g.T, a[t : t + TILE], alpha=float(scale))
    return ((rows + columns) / 2 - right).mean(), da, db, dscale


def _siglip_plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(a.dtype) * a @ b.T - 10
    signs = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def _logits_of_others(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    x = torch.cat([a, b])
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (scale.to(x.dtype) * x @ x.T).masked_fill(own, -torch.inf)


def _nt_xent_plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = _logits_of_others(a, b, scale)
    return F.cross_entropy(logits, torch.arange(len(logits), device=a.device).roll(len(a)))


def _labels(a: Tensor) -> Tensor:
    """Both views of four things are a class."""
    return (torch.arange(len(a), device=a.device) // 4).repeat(2)


def _sup_con_plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    labels = _labels(a)
    same = (labels[:, None] == labels).fill_diagonal_(False)
    logs = _logits_of_others(a, b, scale).log_softmax(1)
    return -(logs.where(same, 0).sum(1) / same.sum(1)).mean()


def _ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return ops.info_nce(a, b, logit_scale=scale)


def _siglip_ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return ops.siglip(a, b, logit_scale=scale, logit_bias=-10.0)


def _nt_xent_ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return contrastive.nt_xent(a, b, logit_scale=scale)


def _sup_con_ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return contrastive.sup_con(torch.cat([a, b]), _labels(a), logit_scale=scale)


_OF_ALL_ROWS = {"nt_xent": _nt_xent_plain, "sup_con": _sup_con_plain}


def _reference(loss: str, i: Inputs) -> Found:
    bias = {"logit_bias": torch.tensor(-10.0, dtype=i.scale.dtype)} if loss == "siglip" else {}

    def value(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        if loss in _OF_ALL_ROWS:
            wide = torch.promote_types(a.dtype, torch.float32)
            return _OF_ALL_ROWS[loss](a.to(wide), b.to(wide), scale)
        positives = torch.arange(len(a), device=a.device)
        return getattr(ref, loss)(a, b, logit_scale=scale, positives=positives, **bias)

    return _by_autograd(value, i)


class _Verify:
    """encfast's loss and gradients by the tolerance rule. Peers round logits to their dtype and sum
    in it, so for them loss and gradients of features need only be near."""

    def __init__(self, reference: Callable[[Inputs], Found]) -> None:
        self._reference = reference
        self._known: tuple[Found, Found] | None = None

    def __call__(self, i: Inputs, variant: Variant, found: Found) -> Gate:
        if self._known is None:
            wide = Inputs(*(x.double() for x in (i.a, i.b, i.scale)))
            self._known = self._reference(wide), self._reference(i)
        if not variant.ours:
            return _near(found, self._known[0], 1e-4 if i.a.dtype == torch.float32 else 0.1)
        # The gradient of the scale is a difference: of what positives and what all pairs pull.
        pull = (i.a.double() * i.b.double()).sum(1).abs().mean().item()
        gates = [
            error_gate(variant.name, got, exact, plain, 3.0, term)
            for got, exact, plain, term in zip(
                found, *self._known, (0.0, 0.0, 0.0, pull), strict=True
            )
        ]
        return all_of(gates, shown=1)


def _near(found: Found, exact: Found, limit: float) -> Gate:
    errors = [
        ((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)
    ]
    return Gate(max(errors[:3]) < limit, f"relative error {max(errors[:3]):.1e}")


_PEERS: dict[str, dict[str, Callable[[Inputs], Found]]] = {
    "info_nce": {
        "plain": functools.partial(_by_autograd, _plain),
        "checkpoint": functools.partial(_by_autograd, _checkpointed),
        "tiled": _tiled,
        "encfast": functools.partial(_by_autograd, _ours),
    },
    "siglip": {
        "plain": functools.partial(_by_autograd, _siglip_plain),
        "encfast": functools.partial(_by_autograd, _siglip_ours),
    },
    "nt_xent": {
        "plain": functools.partial(_by_autograd, _nt_xent_plain),
        "encfast": functools.partial(_by_autograd, _nt_xent_ours),
    },
    "sup_con": {
        "plain": functools.partial(_by_autograd, _sup_con_plain),
        "encfast": functools.partial(_by_autograd, _sup_con_ours),
    },
}


def _spec(loss: str, n: int, d: int, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    def variant(name: str, run: Callable[[Inputs], Found]) -> Variant:
        make = lambda i: Call(functools.partial(run, i))  # noqa: E731
        ours = name == "encfast"
        return Variant(name, dtype, make, ours=ours, torch_products=not ours)

    peers, reference = _PEERS[loss], functools.partial(_reference, loss)
    if n == HUGE:
        peers, reference = {name: peers[name] for name in ("tiled", "encfast")}, _tiled
    rows = 2 * n if loss in _OF_ALL_ROWS else n
    return BenchSpec(
        name=f"rank_loss/{loss}-B{n}-D{d}-fwd+bwd-{short_name(dtype)}",
        title=f"{loss} fwd+bwd, {n} pairs, D={d}, {short_name(dtype)}",
        inputs=lambda: _inputs(n, d, dtype, setting.device),
        variants=tuple(variant(name, run) for name, run in peers.items()),
        verify=_Verify(reference),
        # What is counted is what the formula needs; computing logits again is not.
        flops=lambda i: 6.0 * rows * rows * d,
        pairs=tuple(("encfast", peer) for peer in peers if peer != "encfast"),
        budget_s={"tiny": 0.1, "quick": 2.0, "full": 10.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite. Not in `quick`: a call takes a second."""
    if setting.suite == "quick":
        return []
    tiny = setting.suite == "tiny"
    sizes_of = {"info_nce": (1024, 4096, HUGE), "siglip": (1024, 4096)}
    found = []
    for loss in _PEERS:
        sizes = (40,) if tiny else sizes_of.get(loss, (2048,))
        for n in sizes:
            # The largest takes minutes, most of them in float64: once is enough.
            for dtype in (torch.float32, torch.bfloat16)[: 1 if n == HUGE else 2]:
                found.append(_spec(loss, n, 16 if tiny else 512, dtype, setting))
    return found
