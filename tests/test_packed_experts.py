"""Experts over packed weights against the experts they were made from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from encfast.config import BlockConfig
from encfast.inference import PackedExperts, pack_experts
from encfast.layers import Experts, MoE, MoEBlock, MoEConfig, MoEStack, ResidualMoE
from encfast.packed import PackedBatch

PLAIN = BlockConfig(24, 2, 40)
GATED = dataclasses.replace(PLAIN, glu=True, activation="silu", up_bias=False, down_bias=False)
ENDS = torch.tensor([0, 5, 5, 6, 30], dtype=torch.int32)  # an empty group, and rows beyond the last


@pytest.mark.quick
@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["gelu-bias", "gated"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.int8, 2e-2)]
)
def test_equals_experts(config, dtype, tolerance):
    torch.manual_seed(0)
    experts = Experts(config, 4)
    packed = PackedExperts(experts, dtype)
    rows = torch.randn(33, 24)
    rows[30:] = math.nan
    wanted, found = experts(rows, ENDS).detach(), packed(rows, ENDS)
    assert found.dtype == rows.dtype and torch.equal(found[30:], torch.zeros(3, 24))
    error = (found[:30] - wanted[:30]).norm() / wanted[:30].norm()
    assert wanted[:30].norm() > 0 and error < tolerance
    assert torch.equal(packed(rows, torch.zeros(5, dtype=torch.int32)), torch.zeros(33, 24))


def test_packs_every_mixture_of_a_model():
    torch.manual_seed(0)
    moes = [None, MoEConfig(4), MoEConfig(8, top_k=2, residual=True)]
    model = MoEStack([PLAIN] * 3, moes).eval()
    batch = PackedBatch.from_lengths(torch.randn(20, 24), [7, 0, 13])
    wanted, losses = model.forward_with_losses(batch)
    same = pack_experts(model)
    found, packed_losses = model.forward_with_losses(batch)
    assert same is model and not model.training
    assert not any("experts" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(found.data, wanted.data, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_losses, losses)
    kinds = [type(b.mlp.moe if isinstance(b.mlp, ResidualMoE) else b.mlp) for b in model.blocks[1:]]
    assert kinds == [MoE, MoE] and isinstance(model.blocks[1], MoEBlock)


def test_int8_takes_a_quarter_of_the_bytes():
    experts = Experts(BlockConfig(256, 4, 512), 4)
    wide, narrow = (PackedExperts(experts, d).nbytes for d in (torch.float32, torch.int8))
    assert narrow < 0.27 * wide


def test_keeps_copies():
    experts = Experts(PLAIN, 4)
    packed = PackedExperts(experts)
    rows = torch.randn(30, 24)
    before = packed(rows, ENDS)
    with torch.no_grad():
        for stack in experts.parameters():
            stack.zero_()
    assert torch.equal(packed(rows, ENDS), before)


def test_errors():
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        PackedExperts(Experts(PLAIN, 2), torch.float16)
    with pytest.raises(NotImplementedError, match="experts are on meta"):
        PackedExperts(Experts(PLAIN, 2, device="meta"))
    odd = Experts(PLAIN, 2)
    odd.act = torch.tanh
    with pytest.raises(NotImplementedError, match=r"experts\.act is .*tanh"):
        PackedExperts(odd)
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        pack_experts(nn.Linear(2, 2))
    model = nn.ModuleList([MoE(PLAIN, MoEConfig(2)), MoE(PLAIN, MoEConfig(2))])
    model[1].experts.act = torch.tanh
    with pytest.raises(NotImplementedError, match=r"experts\.act"):
        pack_experts(model)
    assert all(type(m.experts) is Experts for m in model)
