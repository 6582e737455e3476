"""A whole mixture of experts, router to sum: encfast against the ways others compute it.

Mixtral's block at a smaller width: 512 tokens, each to 2 of E gated experts. `one-hot einsum` is
how GShard and DeepSpeed wrote it down: experts of equal room, matrices [T, E, room] of zeros and
ones that carry rows there and back, and choices that find no room dropped; `encfast, equal room`
drops the same ones. The others drop nothing. `encfast packed` is inference over weights packed
before. `dense` is one gated MLP of equal work: a bound that
no mixture can be asked to reach.

What the exchanges of expert parallelism would add on clusters is modelled, not measured
(`encfast.layers.AllToAllCost`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, all_of, error_gate
from timing import short_name
from torch import Tensor, nn

from encfast import ref
from encfast.config import BlockConfig
from encfast.inference import pack_experts
from encfast.layers import AllToAllCost, MoE, MoEConfig

TOP_K = 2
ROOM = 2.0  # of an expert in units of T / E: as many as there are choices
PACKED = "encfast packed"
LIMITED = ("one-hot einsum", "encfast, equal room")
CLUSTERS = (2, 4, 8, 32, 64, 128)  # processes, as far as they divide the experts
MB = 1e6

Layer = tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]  # and what gradients are taken of
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """T tokens, E experts, each C -> F -> C."""

    T: int
    E: int
    C: int
    F: int

    @property
    def expert(self) -> int:
        """Parameters of one."""
        return 3 * self.C * self.F

    @property
    def room(self) -> int:
        """Choices an expert has room for where that is limited."""
        return math.ceil(self.T / self.E * ROOM)


@dataclass(frozen=True)
class Inputs:
    """Rows, the block's weights, the gradient of the result, and what shortens gradients."""

    shape: Shape
    x: Tensor  # [T, C]
    router: nn.Parameter  # [E, C]
    up: nn.Parameter  # [E, 2F, C], the activated half first
    down: nn.Parameter  # [E, C, F]
    dout: Tensor  # [T, C]
    along: tuple[Tensor, Tensor]  # float64 [C], [F]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has gradients."""
        return self.x, self.router, self.up, self.down


def _inputs(s: Shape, dtype: torch.dtype) -> Inputs:
    """Each token's two experts are far ahead of the others, so that no rounding changes them."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    router = torch.linalg.qr(draw(s.C, s.E)).Q.T  # orthonormal rows
    chosen = torch.rand(s.T, s.E, generator=g).topk(TOP_K).indices
    x = draw(s.T, s.C)
    x = x - x @ router.T @ router + 3 * router[chosen[:, 0]] + 2 * router[chosen[:, 1]]
    up, down = draw(s.E, 2 * s.F, s.C) * s.C**-0.5, draw(s.E, s.C, s.F) * s.F**-0.5
    return Inputs(
        s,
        x.to(dtype).requires_grad_(),
        *(nn.Parameter(w.to(dtype)) for w in (router, up, down)),
        draw(s.T, s.C).to(dtype),
        (draw(s.C).double(), draw(s.F).double()),
    )


# ---- the block: from its inputs to a function of x ----


def _expert(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a, b = F.linear(rows, up).chunk(2, -1)
    return F.linear(F.silu(a) * b, down)


def _top_2(logits: Tensor) -> tuple[Tensor, Tensor]:
    gates, ids = logits.softmax(1, dtype=torch.float32).topk(TOP_K)
    return gates / gates.sum(1, keepdim=True), ids


def _loop(i: Inputs, choose: Choose = _top_2) -> Layer:
    def layer(x: Tensor) -> Tensor:
        gates, ids = choose(F.linear(x, i.router))
        out = torch.zeros_like(x)
        for e in range(i.shape.E):
            token, rank = torch.where(ids == e)
            y = _expert(x[token], i.up[e], i.down[e])
            out = out.index_add(0, token, y * gates[token, rank, None].to(y.dtype))
        return out

    return layer, i.leaves


def _one_hot_einsum(i: Inputs) -> Layer:
    """DeepSpeed's gate of two experts without its noise, its einsums, and a product per expert."""
    room = i.shape.room

    def layer(x: Tensor) -> Tensor:
        scores = F.linear(x.float(), i.router.float()).softmax(1)
        ids = scores.topk(TOP_K).indices
        gates, slots, before = [], [], 0
        for rank in range(TOP_K):
            chosen = F.one_hot(ids[:, rank], i.shape.E)
            place = (chosen.cumsum(0) - 1 + before) * chosen
            before = before + chosen.sum(0)
            chosen = chosen * (place < room)
            gates.append(scores * chosen)
            slots.append(F.one_hot(place.sum(1).clamp(max=room - 1), room).to(scores.dtype))
        total = sum(gate.sum(1, keepdim=True) for gate in gates).clamp(min=1e-20)
        parts = (
            torch.einsum("te,tc->tec", gate / total, slot)
            for gate, slot in zip(gates, slots, strict=True)
        )
        combine = functools.reduce(torch.add, parts)
        rows = torch.einsum("tec,tm->ecm", combine.bool().to(x.dtype), x)
        a, b = torch.einsum("ecm,efm->ecf", rows, i.up).chunk(2, -1)
        found = torch.einsum("ecf,emf->ecm", F.silu(a) * b, i.down)
        return torch.einsum("tec,ecm->tm", combine.to(x.dtype), found)

    return layer, i.leaves


def _transformers(i: Inputs) -> Layer:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    s = i.shape
    config = MixtralConfig(
        hidden_size=s.C,
        intermediate_size=s.F,
        num_local_experts=s.E,
        num_experts_per_tok=TOP_K,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = i.router
    block.experts.gate_up_proj, block.experts.down_proj = i.up, i.down
    return lambda x: block(x[None])[0], i.leaves


def _dense(i: Inputs) -> Layer:
    s = i.shape
    up, down = (w[:TOP_K].detach() for w in (i.up, i.down))
    up = torch.cat([half.flatten(0, 1) for half in up.view(TOP_K, 2, s.F, s.C).unbind(1)])
    down = down.transpose(0, 1).reshape(s.C, TOP_K * s.F)
    up, down = (w.contiguous().requires_grad_() for w in (up, down))
    return functools.partial(_expert, up=up, down=down), (i.x, up, down)


def _encfast(i: Inputs, limited: bool = False, packed: bool = False) -> Layer:
    s = i.shape
    heads = s.C // 8  # of no attention here, but a config must have some
    config = BlockConfig(
        s.C, heads, s.F, activation="silu", glu=True, up_bias=False, down_bias=False
    )
    kept = {"renormalise": "kept", "capacity_factor": ROOM} if limited else {"renormalise": True}
    with torch.device("meta"):
        block = MoE(config, MoEConfig(s.E, TOP_K, **kept))
    block.router.weight, block.experts.up, block.experts.down = i.router, i.up, i.down
    if packed:
        pack_experts(block, i.x.dtype)
    return lambda x: block(x).data, i.leaves


_LAYERS: dict[str, Callable[[Inputs], Layer]] = {
    "one-hot einsum": _one_hot_einsum,
    "Python loop": _loop,
    "transformers grouped_mm": _transformers,
    "dense": _dense,
    "encfast, equal room": functools.partial(_encfast, limited=True),
    "encfast": _encfast,
    PACKED: functools.partial(_encfast, packed=True),
}


def _call(i: Inputs, make: Callable[[Inputs], Layer], backward: bool, note: str = "") -> Call:
    layer, leaves = make(i)
    if not backward:
        return Call(torch.no_grad()(lambda: (layer(i.x),)), note=note)

    def run() -> tuple[Tensor, ...]:
        out = layer(i.x)
        return out, *torch.autograd.grad(out, leaves, i.dout)

    return Call(run, functools.partial(_shortened, i), note)


def _shortened(i: Inputs, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Weights' gradients times a vector: those of 128 experts in float64 would take gigabytes."""
    if len(found) < 5:
        return found
    *head, up, down = found
    return *head, _along(up, i.along[0]), _along(down, i.along[1])


def _along(stack: Tensor, vector: Tensor) -> Tensor:
    return torch.stack([one.double() @ vector for one in stack]).to(stack.dtype)


# ---- is it right? ----


def _choices(shape: Shape, limited: bool, logits: Tensor) -> tuple[Tensor, ...]:
    """Gates, ids, rows, slots and cu_seqlens by the reference; ids of dropped choices are -1."""
    rule, factor = ("kept", ROOM) if limited else ("chosen", None)
    gates, ids, rows, slots, ends, _ = ref.moe_route(
        logits, None, TOP_K, renormalise=rule, capacity_factor=factor
    )
    return gates, ids.masked_fill(slots < 0, -1), rows, slots, ends


def _dropped(i: Inputs, limited: bool) -> float:
    ids = _choices(i.shape, limited, F.linear(i.x, i.router).detach())[1]
    return (ids < 0).double().mean().item()


def _exact(i: Inputs, limited: bool, backward: bool) -> tuple[Tensor, ...]:
    """In float64, one expert's weights at a time."""
    x, router = (t.detach().double().requires_grad_() for t in (i.x, i.router))
    gates, _, rows, slots, ends = _choices(i.shape, limited, F.linear(x, router))
    sent = ref.moe_permute(x, rows, TOP_K)
    groups = list(itertools.pairwise(ends.tolist()))
    found = torch.zeros_like(sent)
    for e, (begin, end) in enumerate(groups):
        found[begin:end] = _expert(sent[begin:end], i.up[e].double(), i.down[e].double()).detach()
    found.requires_grad_()
    out = ref.moe_unpermute(found, gates, slots)
    if not backward:
        return (out.detach(),)
    dx, drouter, dfound = torch.autograd.grad(out, (x, router, found), i.dout.double())
    dsent, dup, ddown = torch.zeros_like(sent), [], []
    for e, (begin, end) in enumerate(groups):
        leaves = [
            t.detach().double().requires_grad_() for t in (sent[begin:end], i.up[e], i.down[e])
        ]
        drows, du, dd = torch.autograd.grad(_expert(*leaves), leaves, dfound[begin:end])
        dsent[begin:end] = drows
        dup.append(du @ i.along[0])
        ddown.append(dd @ i.along[1])
    (through,) = torch.autograd.grad(ref.moe_permute(x, rows, TOP_K), x, dsent)
    return out.detach(), dx + through, drouter, torch.stack(dup), torch.stack(ddown)


class _Verify:
    """Compares with float64, computed once for each rule of room."""

    def __init__(self, backward: bool) -> None:
        self._backward = backward
        self._known: dict[bool, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def __call__(self, i: Inputs, variant: Variant, found: tuple[Tensor, ...]) -> Gate:
        if variant.name == "dense":
            return Gate(True, "other maths of equal work")
        limited = variant.name in LIMITED
        if limited not in self._known:
            self._known[limited] = _exact(i, limited, self._backward), self._plain(i, limited)
        gates = [
            error_gate(f"{variant.name}, {what}", *three, 2.0 if what == "result" else 3.0)
            for what, *three in zip(
                ("result", "dx", "drouter", "dup", "ddown"),
                found,
                *self._known[limited],
                strict=False,
            )
        ]
        return all_of(gates, shown=0)

    def _plain(self, i: Inputs, limited: bool) -> tuple[Tensor, ...]:
        def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
            gates, ids, *_ = _choices(i.shape, limited, logits)
            return gates, ids

        call = _call(i, functools.partial(_loop, choose=choose), self._backward)
        return call.collect(call.run())


# ---- specs ----


def _bytes(s: Shape, backward: bool, element: int) -> float:
    """Each weight and row once; backward reads the weights again and writes their gradients."""
    weights, rows = s.E * s.expert, 2 * s.T * s.C
    return float(element * ((3 if backward else 1) * weights + (2 if backward else 1) * rows))


def _facts(s: Shape, backward: bool, dtype: torch.dtype) -> tuple[str, ...]:
    router = s.E * s.C
    active, total = (n * s.expert + router for n in (TOP_K, s.E))
    facts = [
        f"a token activates {active / 1e6:.3g} M of {total / 1e6:.4g} M parameters; "
        f"{_bytes(s, backward, dtype.itemsize) / MB:.4g} MB must move"
    ]
    if not backward:
        return tuple(facts)
    facts.append("expert parallelism, modelled: exchanges of this layer, forward and backward")
    for p in CLUSTERS:
        if s.E % p == 0:
            cost = AllToAllCost(p, 8, s.T, s.C, TOP_K, dtype.itemsize)
            flat, levels = (1e3 * cost.layer_seconds(hierarchical=h) for h in (False, True))
            facts.append(
                f"  {p} processes, 8 on a node, {s.T} tokens each: "
                f"{cost.token_bytes() / 1e3:.4g} kB per token; flat {flat:.3g} ms, "
                f"hierarchical {levels:.3g} ms"
            )
    return tuple(facts)


def _spec(s: Shape, backward: bool, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    def make(i: Inputs, name: str) -> Call:
        note = "" if name == "dense" else f"{_dropped(i, name in LIMITED):.1%} of choices dropped"
        return _call(i, _LAYERS[name], backward, note)

    what = "fwd+bwd" if backward else "fwd"
    names = [name for name in _LAYERS if not (backward and name == PACKED)]
    case = f"{what}-E{s.E}-T{s.T}-C{s.C}-F{s.F}-{short_name(dtype)}"
    return BenchSpec(
        name=f"moe/block-{case}",
        title=f"mixture {what}, {s.T} tokens, {TOP_K} of {s.E} experts, C={s.C}, F={s.F}, "
        f"{short_name(dtype)}",
        inputs=lambda: _inputs(s, dtype),
        variants=tuple(
            Variant(
                name,
                dtype,
                functools.partial(make, name=name),
                ours=name.startswith("encfast"),
                needs=("transformers",) if name.startswith("transformers") else (),
                torch_products=not name.startswith("encfast"),
            )
            for name in names
        ),
        verify=_Verify(backward),
        flops=lambda i: (6.0 if backward else 2.0) * s.T * TOP_K * s.expert,
        bytes=lambda i: _bytes(s, backward, dtype.itemsize),
        pairs=(
            *((name, "transformers grouped_mm") for name in names if name in ("encfast", PACKED)),
            ("encfast", "Python loop"),
            ("encfast", "dense"),
            ("encfast, equal room", "one-hot einsum"),
        ),
        budget_s={"tiny": 0.1, "full": 5.0}[setting.suite],
        facts=_facts(s, backward, dtype),
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of the block in a suite; too slow for the quick one, and for CPUs alone."""
    if setting.suite == "quick" or setting.device != "cpu":
        return []
    if setting.suite == "tiny":
        cases = ((False, torch.float32), (True, torch.bfloat16))
        return [_spec(Shape(40, 4, 24, 16), *case, setting) for case in cases]
    return [
        _spec(Shape(512, experts, 768, 1536), backward, dtype, setting)
        for experts in (8, 64, 128)
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
