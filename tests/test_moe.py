"""The MoE layer against the dense einsum formulation, and what a layer owes its users."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import losses
from encfast.config import BlockConfig
from encfast.layers import (
    MLP,
    Block,
    Experts,
    MoE,
    MoEBlock,
    MoEConfig,
    MoEStack,
    ResidualMoE,
    pyramid,
    sum_losses,
)
from encfast.packed import PackedBatch

DIM = 24
CONFIG = BlockConfig(DIM, 2, 40, activation="gelu")
GATED = dataclasses.replace(CONFIG, glu=True, activation="silu", up_bias=False, down_bias=False)


def make(config: BlockConfig = CONFIG, kind: type = MoE, seed: int = 0, **moe) -> MoE | ResidualMoE:
    torch.manual_seed(seed)
    return kind(config, MoEConfig(**moe))


def rows(n: int = 37, seed: int = 1) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    """Expert e as a plain MLP."""
    bias = [None if b is None else b[e] for b in (experts.up_bias, experts.down_bias)]
    hidden = F.linear(x, experts.up[e], bias[0])
    if experts.glu:
        a, b = hidden.chunk(2, -1)
        hidden = experts.act(a) * b
    else:
        hidden = experts.act(hidden)
    return F.linear(hidden, experts.down[e], bias[1])


def einsum_moe(moe: MoE, x: Tensor, room: int | None) -> Tensor:
    """GShard's and DeepSpeed's formulation of top-1: one-hot dispatch and combine tensors."""
    probabilities = F.linear(x, moe.router.weight).softmax(-1)  # [T, E]
    tokens, experts = probabilities.shape
    capacity = tokens if room is None else room
    chosen = F.one_hot(probabilities.argmax(-1), experts)  # [T, E]
    place = (chosen.cumsum(0) - 1) * chosen  # [T, E]: place in the queue
    kept = chosen * (place < capacity)
    gate = (probabilities * kept).sum(-1)  # [T]
    where = F.one_hot((place * kept).sum(-1).clamp(max=capacity - 1), capacity)
    dispatch = (kept[:, :, None] * where[:, None, :]).to(x.dtype)  # [T, E, C]
    sent = torch.einsum("tec,td->ecd", dispatch, x)
    back = torch.stack([expert(moe.experts, e, sent[e]) for e in range(experts)])
    return torch.einsum("tec,ecd->td", gate[:, None, None] * dispatch, back)


@pytest.mark.quick
@pytest.mark.parametrize("config", [CONFIG, GATED], ids=["gelu-bias", "gated"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, None])
@pytest.mark.parametrize("experts", [1, 4, 32])
def test_equals_the_einsum_formulation(config, factor, experts):
    moe = make(config, num_experts=experts, capacity_factor=factor, min_capacity=1)
    room = None if factor is None else max(math.ceil(37 / experts * factor), 1)
    x, grad = rows().requires_grad_(), rows(seed=2)
    out = moe(x)
    found = torch.autograd.grad(out.data, [x, *moe.parameters()], grad)
    expected = einsum_moe(moe, x, room)
    wanted = torch.autograd.grad(expected, [x, *moe.parameters()], grad)
    assert out.data.abs().sum() > 0
    torch.testing.assert_close(out.data, expected, rtol=1e-5, atol=1e-5)
    names = ["x", *(n for n, _ in moe.named_parameters())]
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_top_2_is_the_weighted_sum_of_the_experts():
    moe = make(GATED, num_experts=5, top_k=2, renormalise=True)
    x = rows()
    gates, ids = moe.router(x).softmax(-1).topk(2)
    gates = gates / gates.sum(-1, keepdim=True)
    all_experts = torch.stack([expert(moe.experts, e, x) for e in range(5)], 1)  # [T, E, C]
    expected = (gates[..., None] * all_experts.gather(1, ids[..., None].expand(-1, -1, DIM))).sum(1)
    torch.testing.assert_close(moe(x).data, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_one_expert_is_an_mlp():
    moe, mlp = make(num_experts=1), MLP(CONFIG)
    with torch.no_grad():
        for name in ("up", "down"):
            getattr(mlp, name).weight.copy_(getattr(moe.experts, name)[0])
            getattr(mlp, name).bias.copy_(getattr(moe.experts, f"{name}_bias")[0])
    torch.testing.assert_close(moe(rows()).data, mlp(rows()), rtol=1e-5, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("kind", [MoE, ResidualMoE])
def test_padding_is_kept_out_of_routing_and_losses(kind):
    """A padded grid, poisoned, equals the packed rows: room, results, losses and gradients."""
    moe = make(kind=kind, num_experts=4, capacity_factor=0.75)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    grid = torch.randn(3, 4, DIM)
    batch = PackedBatch.pack(grid, mask)
    packed = moe(batch)
    poisoned = moe(grid.masked_fill(~mask[..., None], math.nan), mask=mask)
    assert isinstance(packed.data, PackedBatch)
    assert torch.equal(poisoned.data[mask], packed.data.data)
    for a, b in zip(poisoned.losses(), packed.losses(), strict=True):
        assert torch.equal(a, b)
    grads = [
        torch.autograd.grad(o.losses().balance + o.losses().z + d.sum(), list(moe.parameters()))
        for o, d in ((packed, packed.data.data), (poisoned, poisoned.data[mask]))
    ]
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_dropped_tokens_give_zero_and_are_counted():
    moe = make(num_experts=4, capacity_factor=0.5, min_capacity=0)
    with torch.no_grad():
        moe.router.weight.zero_()  # all logits equal: everyone to expert 0
    out = moe(rows(16))
    assert torch.equal(out.data[2:], torch.zeros(14, DIM))
    assert (out.data[:2] != 0).any(1).all()
    assert out.losses().dropped == 14 / 16


def test_training_and_evaluation_have_rules_of_their_own():
    moe = make(num_experts=4, capacity_factor=0.5, priority="random", noise="gumbel", jitter=0.3)
    x = rows()
    torch.manual_seed(0)
    first = moe(x)
    second = moe(x)
    assert not torch.equal(first.routing.expert_ids, second.routing.expert_ids)
    torch.manual_seed(0)
    assert torch.equal(moe(x).data, first.data)
    moe.eval()
    assert torch.equal(moe(x).data, moe(x).data)
    assert moe(x).losses().dropped == 0


def test_residual_mix():
    """Coefficients (1, 0) and (0, 1) leave one branch; the layer that makes them gets gradients."""
    layer = make(kind=ResidualMoE, num_experts=4)
    x = rows()
    layer(x).data.sum().backward()
    assert layer.coefficient.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.coefficient.weight.zero_()
        for bias, branch in (([50.0, -50.0], layer.moe(x).data), ([-50.0, 50.0], layer.mlp(x))):
            layer.coefficient.bias.copy_(torch.tensor(bias))
            torch.testing.assert_close(layer(x).data, branch)


def test_balance_is_one_at_balance_and_e_at_collapse():
    moe = make(num_experts=DIM)
    with torch.no_grad():
        moe.router.weight.copy_(1e4 * torch.eye(DIM))
    balanced = moe(torch.eye(DIM).repeat(3, 1)).losses()
    collapsed = moe(torch.eye(DIM)[:1].repeat(9, 1)).losses()
    assert balanced.balance.item() == pytest.approx(1.0)
    assert collapsed.balance.item() == pytest.approx(DIM)
    both = sum_losses([balanced, collapsed])
    assert both.balance.item() == pytest.approx(1.0 + DIM) and both.dropped == 0


def test_autocast_computes_experts_in_half_and_routes_in_float():
    moe = make(num_experts=4)
    plain = moe(rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(rows())
    assert out.data.dtype == torch.bfloat16 and out.logits.dtype == torch.float32
    assert torch.equal(out.routing.expert_ids, plain.routing.expert_ids)
    torch.testing.assert_close(out.data.float(), plain.data, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", [MoE, ResidualMoE])
def test_compiles_without_a_break(kind):
    layer = make(kind=kind, num_experts=4, capacity_factor=1.0, priority="random")
    graphs = 0

    def count(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    def run(x):
        out = layer(x)
        return out.data, out.losses()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for n in (5, 9, 17, 33):
        torch.manual_seed(n)
        data, terms = compiled(rows(n))
        torch.manual_seed(n)
        wanted, wanted_terms = run(rows(n))
        assert torch.equal(data, wanted) and all(map(torch.equal, terms, wanted_terms))
    assert graphs <= 2


def stack(experts: tuple[int | None, ...], **moe) -> MoEStack:
    torch.manual_seed(0)
    moes = [None if e is None else MoEConfig(e, **moe) for e in experts]
    return MoEStack([CONFIG] * len(experts), moes)


def test_stack_sums_losses_and_checkpointing_changes_nothing():
    model = stack((None, 4, None, 8), capacity_factor=1.0, priority="random")
    assert [type(b) for b in model.blocks] == [Block, MoEBlock, Block, MoEBlock]
    batch = PackedBatch.from_lengths(rows(20), [7, 0, 13])
    found = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        out, terms = model.forward_with_losses(batch)
        (out.data.square().sum() + terms.balance).backward()
        found.append([out.data, *terms, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(3)
    assert torch.equal(model(batch).data, found[0][0])


def test_stack_of_chosen_rows():
    model = stack((None, 4)).eval()
    batch = PackedBatch.from_lengths(rows(20), [7, 0, 13])
    chosen = torch.tensor([3, 19])
    some, _ = model.forward_with_losses(batch, rows=chosen)
    torch.testing.assert_close(some, model(batch).data[chosen])


def test_post_norm_block():
    config = dataclasses.replace(CONFIG, norm_position="post")
    block = MoEBlock(config, MoEConfig(1)).eval()
    batch = PackedBatch.from_lengths(rows(9), [4, 5])
    x, _ = block.forward_with_losses(batch)
    heads = block.attn.out(block.attn.heads(batch, None, None))
    first = block.norm1(heads + batch.data)
    torch.testing.assert_close(x, block.norm2(first + block.mlp(first).data))


def test_experts_are_plain_parameters_with_the_expert_first():
    moe = make(GATED, num_experts=6)
    shapes = {n: tuple(p.shape) for n, p in moe.named_parameters()}
    assert shapes == {
        "router.weight": (6, DIM),
        "experts.up": (6, 80, DIM),
        "experts.down": (6, DIM, 40),
    }
    with torch.device("meta"):
        empty = MoE(GATED, MoEConfig(6))
    assert all(p.is_meta for p in empty.parameters())
    copy = make(GATED, seed=5, num_experts=6)
    copy.load_state_dict(moe.state_dict())
    assert torch.equal(copy(rows()).data, moe(rows()).data)


def test_pyramid():
    assert pyramid((10, 32), (2, 64)) == (32,) * 10 + (64,) * 2
    with pytest.raises(ValueError, match=r"step \(0, 4\)"):
        pyramid((0, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts must be >= 1, got 0"),
        ({"num_experts": 4, "top_k": 5}, r"top_k is 5, expected 1\.\.4"),
        ({"num_experts": 4, "top_k": 0}, "top_k is 0"),
        ({"num_experts": 4, "capacity_factor": 0.0}, r"capacity_factor is 0\.0"),
        ({"num_experts": 4, "eval_capacity_factor": -1.0}, "eval_capacity_factor is -1"),
        ({"num_experts": 4, "capacity_factor": math.nan}, "capacity_factor is nan"),
        ({"num_experts": 4, "min_capacity": -1}, "min_capacity is -1"),
        ({"num_experts": 4, "jitter": 1.0}, r"jitter is 1\.0"),
        ({"num_experts": 4, "scoring": "tanh"}, "scoring is 'tanh'"),
        ({"num_experts": 4, "priority": "first"}, "priority is 'first'"),
        ({"num_experts": 4, "noise": "rsample"}, "noise is 'rsample'"),
        ({"num_experts": 4, "renormalise": "all"}, "renormalise is 'all'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**fields)


def test_call_errors():
    moe = make(num_experts=4)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(2, 5\)"):
        moe(torch.zeros(2, 5, DIM), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="beside a PackedBatch"):
        moe(PackedBatch.from_lengths(rows(4), [4]), mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        moe(torch.full((2, DIM), math.nan))
    with pytest.raises(ValueError, match="moes has 1 entries, expected 2"):
        MoEStack([CONFIG, CONFIG], [None])
    with pytest.raises(ValueError, match="terms is empty"):
        stack((None,)).forward_with_losses(PackedBatch.from_lengths(rows(4), [4]))
    with pytest.raises(ValueError, match="choices must be"):
        losses.load_balance_loss(moe(rows(3)).routing, choices="second")
