"""MoE layers against transformers with copied weights: Switch's top-1 and Mixtral's top-2."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from encfast import losses
from encfast.config import BlockConfig
from encfast.layers import MoE, MoEConfig

from .models.common import assert_parity

DIM, FFN, EXPERTS, TOKENS = 24, 40, 6, 50


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    return module


def rows(seed: int = 1) -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def switch_pair(capacity: int | None) -> tuple[MoE, switch.SwitchTransformersSparseMLP]:
    """Ours has room for `capacity` tokens of TOKENS; theirs, per sequence, for as many of one."""
    config = transformers.SwitchTransformersConfig(
        d_model=DIM,
        d_ff=FFN,
        num_experts=EXPERTS,
        expert_capacity=TOKENS if capacity is None else capacity,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    theirs = randomise(switch.SwitchTransformersSparseMLP(config))
    block = BlockConfig(DIM, 2, FFN, activation="relu", up_bias=False, down_bias=False)
    # Half a token less: a product that rounds up must not make room for one more.
    factor = None if capacity is None else (capacity - 0.5) * EXPERTS / TOKENS
    moe = MoE(block, MoEConfig(EXPERTS, capacity_factor=factor))
    with torch.no_grad():
        moe.router.weight.copy_(theirs.router.classifier.weight)
        for e in range(EXPERTS):
            expert = theirs.experts[f"expert_{e}"]
            moe.experts.up[e].copy_(expert.wi.weight)
            moe.experts.down[e].copy_(expert.wo.weight)
    return moe, theirs


@pytest.mark.quick
@pytest.mark.parametrize("capacity", [1, 5, 9, None])
def test_switch_routes_alike(capacity):
    """Same expert, same weight, same victims by position, equal logits and balance."""
    moe, theirs = switch_pair(capacity)
    x = rows()
    one_hot, weights, logits = theirs.router(x[None])
    routing = moe(x).routing
    chosen = logits[0].argmax(-1)
    assert torch.equal(routing.expert_ids[:, 0].long(), chosen)
    kept = one_hot[0].any(-1)
    assert torch.equal(~routing.dropped()[:, 0], kept)
    assert kept.all() == (capacity is None)
    assert_parity("weights", routing.gates[kept, 0], weights[0, kept, 0], 1e-6)
    balance = switch.load_balancing_loss_func(logits.softmax(-1), chosen[None])
    assert_parity("balance", losses.load_balance_loss(routing), balance, 1e-6)
    assert_parity("z", losses.router_z_loss(moe(x).logits), switch.router_z_loss_func(logits), 1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("capacity", [5, None])
def test_switch_computes_alike(capacity):
    moe, theirs = switch_pair(capacity)
    x, y = (rows().requires_grad_() for _ in range(2))
    grad = rows(2)
    out, reference = moe(x).data, theirs(y[None])[0]
    assert_parity("output", out, reference)
    out.backward(grad)
    reference.backward(grad)
    assert_parity("input gradient", x.grad, y.grad)
    assert_parity("gate", moe.router.weight.grad, theirs.router.classifier.weight.grad)
    for ours, name in (("up", "wi"), ("down", "wo")):
        stack = [getattr(theirs.experts[f"expert_{e}"], name).weight for e in range(EXPERTS)]
        expected = torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in stack])
        assert_parity(ours, getattr(moe.experts, ours).grad, expected)


@pytest.mark.quick
def test_mixtral_computes_alike():
    """Top-2 of renormalised softmax weights, gated SiLU experts: output and every gradient."""
    config = transformers.MixtralConfig(
        hidden_size=DIM,
        intermediate_size=FFN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        router_jitter_noise=0.0,
    )
    config._experts_implementation = "eager"
    theirs = randomise(MixtralSparseMoeBlock(config))
    block = BlockConfig(DIM, 2, FFN, activation="silu", glu=True, up_bias=False, down_bias=False)
    moe = MoE(block, MoEConfig(EXPERTS, top_k=2, renormalise=True))
    pairs = (
        ("gate", moe.router.weight, theirs.gate.weight),
        ("up", moe.experts.up, theirs.experts.gate_up_proj),
        ("down", moe.experts.down, theirs.experts.down_proj),
    )
    with torch.no_grad():
        for _, ours, other in pairs:
            ours.copy_(other)
    x, y = (rows().requires_grad_() for _ in range(2))
    found, reference = moe(x), theirs(y[None])[0]
    assert_parity("output", found.data, reference)
    found.data.backward(rows(2))
    reference.backward(rows(2))
    assert_parity("input gradient", x.grad, y.grad)
    for name, ours, other in pairs:
        assert_parity(name, ours.grad, other.grad)
    balance = load_balancing_loss_func((theirs.gate(y[None])[0],), EXPERTS, 2)
    assert_parity("balance", losses.load_balance_loss(found.routing, choices="all"), balance, 1e-6)
    assert not math.isclose(balance.item(), 2.0, rel_tol=1e-3)
