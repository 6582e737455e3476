"""Tokens to experts and back: routing, dispatch and combine, the experts themselves left out.

`one-hot einsum` is how GShard and DeepSpeed write it down, with matrices [T, E, C] of zeros and
ones; `argsort + index` is the better plain PyTorch: topk, a stable sort of the choices by expert,
index_select there and index_add_ back. A clone of the rows at the experts and one of the tokens is
what any of them has to move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, error_gate
from torch import Tensor

from encfast import ops, ref

FLOOR = "clone of the rows"
SORTED = "argsort + index"
ONE_HOT = "one-hot einsum"


@dataclass(frozen=True)
class Router:
    """How many choices there are, and whether some find no room."""

    name: str
    tokens: int
    experts: int
    top_k: int
    channels: int
    capacity_factor: float | None  # None: dropless

    @property
    def room(self) -> int:
        """Choices an expert has room for."""
        if self.capacity_factor is None:
            return self.tokens
        return math.ceil(self.tokens / self.experts * self.capacity_factor)


@dataclass(frozen=True)
class Inputs:
    """Tokens, their logits, and the gradient that comes back."""

    router: Router
    x: Tensor  # [T, C]
    logits: Tensor  # float32 [T, E]
    grad: Tensor  # [T, C]


def _inputs(router: Router, dtype: torch.dtype, device: str) -> Inputs:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(router.tokens, router.channels, generator=make).to(device, dtype)
    logits = torch.randn(router.tokens, router.experts, generator=make).to(device)
    grad = torch.randn(x.shape, generator=make).to(device, dtype)
    return Inputs(router, x, logits, grad)


# ---- the layer without its experts: f(router, x, logits) -> [T, C] ----


def _encfast(r: Router, x: Tensor, logits: Tensor) -> Tensor:
    routing = ops.route_tokens(logits, r.top_k, capacity_factor=r.capacity_factor)
    return ops.unpermute_rows(ops.permute_rows(x, routing), routing)


def _gates(r: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    gates, ids = logits.softmax(1).topk(r.top_k)
    return gates, ids


def _sort(r: Router, ids: Tensor) -> Tensor:
    """Kept choices by expert, numbered in the order (rank, token)."""
    owner = ids.T.flatten()
    order = owner.argsort(stable=True)
    if r.capacity_factor is None:
        return order
    counts = owner.bincount(minlength=r.experts)
    place = torch.arange(len(order), device=ids.device) - (counts.cumsum(0) - counts)[owner[order]]
    return order[place < r.room]


def _argsort_index(r: Router, x: Tensor, logits: Tensor) -> Tensor:
    gates, ids = _gates(r, logits)
    order = _sort(r, ids)
    tokens = order % r.tokens
    rows = x.index_select(0, tokens)
    weights = gates.T.flatten()[order].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, tokens, rows * weights[:, None])


def _one_hot_einsum(r: Router, x: Tensor, logits: Tensor) -> Tensor:
    """DeepSpeed's top-1 gate and its two einsums."""
    gates, ids = _gates(r, logits)
    chosen = F.one_hot(ids[:, 0], r.experts)
    place = (chosen.cumsum(0) - 1) * chosen
    chosen = chosen * (place < r.room)
    slots = F.one_hot(place.sum(1).clamp(max=r.room - 1), r.room).to(logits.dtype)
    combine = torch.einsum("te,tc->tec", gates * chosen, slots)
    dispatch = combine.bool().to(x.dtype)
    rows = torch.einsum("tec,tm->ecm", dispatch, x)
    return torch.einsum("tec,ecm->tm", combine.to(x.dtype), rows)


_LAYERS: dict[str, Callable[[Router, Tensor, Tensor], Tensor]] = {
    ONE_HOT: _one_hot_einsum,
    SORTED: _argsort_index,
    "encfast": _encfast,
}


def _forward(layer: Callable, i: Inputs) -> Call:
    return Call(lambda: (layer(i.router, i.x, i.logits),))


def _both(layer: Callable, i: Inputs) -> Call:
    x, logits = (t.detach().requires_grad_() for t in (i.x, i.logits))

    def run() -> tuple[Tensor, ...]:
        out = layer(i.router, x, logits)
        return out, *torch.autograd.grad(out, (x, logits), i.grad)

    return Call(run)


def _floor(i: Inputs) -> Call:
    rows = i.x.repeat_interleave(i.router.top_k, 0)

    def run() -> tuple[Tensor, ...]:
        rows.clone()
        return (i.x.clone(),)

    return Call(run)


def _reference(i: Inputs, dtype: torch.dtype, backward: bool) -> tuple[Tensor, ...]:
    """The layer by encfast.ref in another dtype."""
    r = i.router
    x, logits = (t.detach().to(dtype).requires_grad_() for t in (i.x, i.logits))
    gates, _, rows, slots, _, _ = ref.moe_route(
        logits, None, r.top_k, capacity_factor=r.capacity_factor
    )
    out = ref.moe_unpermute(ref.moe_permute(x, rows, r.top_k), gates, slots)
    if not backward:
        return (out.detach(),)
    return out.detach(), *torch.autograd.grad(out, (x, logits), i.grad.to(dtype))


def _verify(i: Inputs, variant: Variant, found: tuple[Tensor, ...]) -> Gate:
    if variant.name == FLOOR:
        return Gate(torch.equal(found[0], i.x), "equal bits")
    exact = _reference(i, torch.float64, len(found) > 1)
    # Plain PyTorch at the width of the rows, which the one-hot products have too.
    plain = _argsort_index(i.router, i.x, i.logits)
    low = (plain,) if len(found) == 1 else _both(_argsort_index, i).run()
    for k, (got, want, peer) in enumerate(zip(found, exact, low, strict=True)):
        gate = error_gate(variant.name, got, want, peer, 2.0 if k == 0 else 3.0)
        if not gate.ok:
            return gate
    return gate


# ---- routing alone ----


def _route(i: Inputs) -> Call:
    r = i.router
    return Call(
        lambda: ops.route_tokens(i.logits, r.top_k, capacity_factor=r.capacity_factor),
        collect=lambda routing: routing.rows[: int(routing.cu_seqlens[-1])].long(),
    )


def _route_plainly(i: Inputs) -> Call:
    r = i.router
    return Call(
        lambda: _sort(r, _gates(r, i.logits)[1]),
        collect=lambda order: order % r.tokens * r.top_k + order // r.tokens,
    )


def _verify_route(i: Inputs, variant: Variant, order: Tensor) -> Gate:
    r = i.router
    _, _, rows, _, ends, _ = ref.moe_route(
        i.logits, None, r.top_k, capacity_factor=r.capacity_factor
    )
    ok = torch.equal(order, rows[: int(ends[-1])].long())
    return Gate(ok, "equal order" if ok else "choices in another order")


# ---- specs ----


def _specs(router: Router, dtype: torch.dtype, setting: Setting) -> list[BenchSpec]:
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    layers = {n: f for n, f in _LAYERS.items() if n != ONE_HOT or router.top_k == 1}

    def spec(name: str, title: str, makers: dict[str, Callable[[Any], Call]], **rest: Any):
        return BenchSpec(
            name=f"moe_route/{name}-{router.name}-{short}",
            title=f"{title}, {router.name}: T={router.tokens}, E={router.experts}, "
            f"K={router.top_k}, C={router.channels}, {short}",
            inputs=lambda: _inputs(router, dtype, setting.device),
            variants=tuple(
                Variant(n, dtype, make, ours=n == "encfast", torch_products=n == ONE_HOT)
                for n, make in makers.items()
            ),
            pairs=tuple(("encfast", peer) for peer in makers if peer not in ("encfast", FLOOR)),
            budget_s={"tiny": 0.1, "quick": 1.0, "full": 5.0}[setting.suite],
            **rest,
        )

    moved = 2.0 * router.top_k + router.top_k + 1.0  # rows of a token
    found = [
        spec(
            "layer-fwd",
            "tokens to experts and back",
            {n: functools.partial(_forward, f) for n, f in layers.items()} | {FLOOR: _floor},
            verify=_verify,
            bytes=lambda i: moved * i.x.nbytes,
        ),
        spec(
            "layer-fwd+bwd",
            "tokens to experts and back, and their gradients",
            {n: functools.partial(_both, f) for n, f in layers.items()},
            verify=_verify,
            bytes=lambda i: (2 * moved + router.top_k) * i.x.nbytes,
        ),
    ]
    if dtype == torch.float32:
        found.append(
            spec(
                "route",
                "choices and their order",
                {SORTED: _route_plainly, "encfast": _route},
                verify=_verify_route,
                bytes=lambda i: 2.0 * i.logits.nbytes,
            )
        )
    return found


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return _specs(Router("switch", 40, 4, 1, 8, 1.0), torch.float32, setting)
    routers = (
        Router("switch", 2048, 64, 1, 1024, 1.0),
        Router("dropless", 2048, 8, 2, 1024, None),
    )
    if setting.suite == "quick":
        both = _specs(routers[0], torch.float32, setting)
        return [spec for spec in both if "fwd+bwd" in spec.name]
    dtypes = (torch.float32, torch.bfloat16)
    return [s for r in routers for dtype in dtypes for s in _specs(r, dtype, setting)]
