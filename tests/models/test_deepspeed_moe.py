"""DeepSpeed-MoE: sizes, capacity and balance in its layers, distillation, recipes and inference.

Sheet, checks 1 (einsum oracle) and 4 (residual mix) are tests/test_moe.py; check 7 is
bench/moe_route.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch
from encfast.data.text import TextBatch
from encfast.layers import Experts, MoE, MoEBlock, ResidualMoE
from encfast.losses import load_balance_loss
from encfast.models.deepspeed_moe import (
    RECIPES,
    VARIANTS,
    DeepSpeedMoE,
    StagedDistillation,
    distillation_loss,
    param_groups,
)
from encfast.registry import get_config

from .common import assert_no_leak, assert_parity, random_tokens

VOCAB = VARIANTS["tiny"].vocab_size
RAGGED = [40, 0, 7, 1, 60]


def tiny(name: str = "tiny", seed: int = 0, **fields) -> DeepSpeedMoE:
    """Without dropout."""
    torch.manual_seed(seed)
    return encfast.create(f"deepspeed_moe/{name}", dropout=0.0, attn_dropout=0.0, **fields)


def mixtures(model: DeepSpeedMoE) -> list[MoE]:
    return [m for m in model.modules() if isinstance(m, MoE)]


def routings(model: DeepSpeedMoE, batch: TextBatch) -> list:
    """What each mixture decided while the loss was computed."""
    found, handles = [], []
    for moe in mixtures(model):
        handles.append(moe.register_forward_hook(lambda m, i, out: found.append(out.routing)))
    model.loss(batch)
    for handle in handles:
        handle.remove()
    return found


def batch_of(lengths=RAGGED, seed: int = 0) -> TextBatch:
    return TextBatch(random_tokens(lengths, VOCAB, seed))


def parameters(name: str) -> int:
    return encfast.describe(f"deepspeed_moe/{name}").parameters


# Sizes.


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("125m", 0.125),
        ("350m", 0.356),
        ("1.3b", 1.316),
        ("6.7b", 6.658),
        ("350m-moe-128", 13.15),
        ("350m-pr-moe-32-64", 4.12),
        ("350m-mos", 3.54),
        ("1.3b-moe-128", 52.5),
        ("1.3b-pr-moe-64-128", 31.4),
        ("1.3b-mos", 26.9),
    ],
)
def test_parameter_counts(name, billions):
    """Sheet, check 5: the paper's totals (4B, 13B, 31B, 52B, 27B are these, rounded)."""
    assert parameters(name) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.quick
def test_published_ratios():
    """PR-MoE is smaller than MoE; MoS is 3.7 times smaller at 350M and twice at 1.3B."""
    for base, pr, mos in (("350m", "32-64", 3.71), ("1.3b", "64-128", 1.95)):
        full, pyramid, student = (
            parameters(f"{base}-{kind}") for kind in ("moe-128", f"pr-moe-{pr}", "mos")
        )
        assert student < pyramid < full
        assert full / student == pytest.approx(mos, rel=0.01)


@pytest.mark.quick
@pytest.mark.parametrize("base", ["350m", "1.3b"])
def test_a_token_passes_as_much_as_in_the_dense_base(base):
    """Mixtures add their gates, residual ones an MLP and two coefficients per layer besides."""
    dense, moe, pyramid = (
        encfast.create(f"deepspeed_moe/{n}", device="meta")
        for n in (base, f"{base}-moe-128", next(v for v in VARIANTS if v.startswith(f"{base}-pr")))
    )
    dim, config = dense.config.dim, pyramid.config
    assert dense.activated_parameters() == dense.num_parameters()
    assert moe.activated_parameters() == dense.num_parameters() + 12 * 128 * dim
    mlp = 8 * dim * dim + 5 * dim
    extra = sum(config.experts) * dim + 12 * (mlp + 2 * dim + 2)
    assert pyramid.activated_parameters() == dense.num_parameters() + extra


@pytest.mark.quick
def test_mixtures_stand_in_every_other_layer():
    model = encfast.create("deepspeed_moe/350m-mos", device="meta")
    places = [i for i, b in enumerate(model.stack.blocks, 1) if isinstance(b, MoEBlock)]
    assert places == list(range(2, 21, 2))
    kinds = [model.stack.blocks[i - 1].mlp for i in places]
    assert all(isinstance(mlp, ResidualMoE) for mlp in kinds)
    assert [mlp.moe.num_experts for mlp in kinds] == [32] * 8 + [64] * 2
    assert model._no_split_modules == ["Block", "MoEBlock"]
    assert encfast.create("deepspeed_moe/350m", device="meta")._no_split_modules == ["Block"]


@pytest.mark.quick
def test_initialisation():
    model = tiny("tiny-pr", experts=(8, 16), dim=128)
    std, joins = 0.014, 0.014 / math.sqrt(8)
    for block in model.stack.blocks:
        residual = isinstance(block, MoEBlock)
        mlp = block.mlp.mlp if residual else block.mlp
        drawn = [(block.attn.qkv.weight, std), (block.attn.out.weight, joins)]
        drawn += [(mlp.up.weight, std), (mlp.down.weight, joins)]
        if residual:
            moe = block.mlp.moe
            drawn += [(moe.experts.up, std), (moe.experts.down, joins)]
            assert not torch.equal(moe.experts.up[0], moe.experts.up[1])
            # nn.Linear's own: uniform up to 1 / sqrt(C).
            bound = 1 / math.sqrt(128)
            for weight in (moe.router.weight, block.mlp.coefficient.weight):
                assert 0.8 * bound < weight.abs().max() <= bound
        for weight, deviation in drawn:
            assert weight.std().item() == pytest.approx(deviation, rel=0.03)
    biases = [p for n, p in model.named_parameters() if "bias" in n and "coefficient" not in n]
    assert not any(b.any() for b in biases)
    assert model.lm_head.weight is model.embed.word.weight


# Capacity and balance.


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "tiny-pr"])
@pytest.mark.parametrize("priority", ["position", "random"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_capacity_in_training(name, priority, factor):
    """Sheet, check 2: each expert keeps min(load, C); by position only late tokens go without."""
    model = tiny(name, priority=priority, capacity_factor=factor).train()
    found = routings(model, batch_of())
    assert factor == 2.0 or any(routing.dropped().any() for routing in found)
    for routing in found:
        room = max(math.ceil(sum(RAGGED) / routing.num_experts * factor), 4)
        ids = routing.expert_ids[:, 0]
        loads = ids.long().bincount(minlength=routing.num_experts)
        assert torch.equal(routing.loads().long(), loads.clamp(max=room))
        dropped = routing.dropped()[:, 0]
        assert not routing.gates[dropped].any()
        if priority == "position":
            for e in range(routing.num_experts):
                queue = dropped[ids == e]
                assert torch.equal(queue, torch.arange(len(queue)) >= room)


@pytest.mark.quick
def test_an_expert_has_room_for_four():
    """Of 9 tokens and 64 experts ceil(T / E) would be one; experts without a token stay empty."""
    model = tiny(experts=(64, 64)).train()
    with torch.no_grad():
        for moe in mixtures(model):
            moe.router.weight.zero_()
            moe.router.weight[5] = 1e-3
            moe.router.weight[7] = -1e-3  # two experts share the tokens, by the sign of their sum
    for routing in routings(model, batch_of([9])):
        chosen = routing.expert_ids[:, 0].long().bincount(minlength=64)
        assert set(chosen.nonzero().flatten().tolist()) <= {5, 7} and chosen.max() > 4
        assert torch.equal(routing.loads().long(), chosen.clamp(max=4))
    model.loss(batch_of([9])).total.backward()
    for moe in mixtures(model):
        norms = moe.experts.up.grad.flatten(1).norm(dim=1)
        assert norms[[5, 7]].any() and not norms[[e for e in range(64) if e not in (5, 7)]].any()


@pytest.mark.quick
def test_random_selection_is_uniform_over_positions():
    """Sheet, check 2: who of 64 equal tokens finds one of 16 places, 400 times, by chi-square."""
    model = tiny(experts=(4, 4), priority="random").train()
    tokens = PackedBatch.from_lengths(torch.full((64,), 3), [64])
    with torch.no_grad():
        model.embed.position.weight.zero_()
        for moe in mixtures(model):
            moe.router.weight.zero_()  # all to expert 0
    torch.manual_seed(0)
    kept, rounds = torch.zeros(64), 400
    with torch.no_grad():
        for _ in range(rounds):
            kept += ~routings(model, TextBatch(tokens))[0].dropped()[:, 0]
    expected = rounds * 16 / 64
    assert kept.sum() == rounds * 16
    # Each position is kept with p = 1/4; draws without replacement leave 63 degrees of freedom.
    chi_square = ((kept - expected) ** 2 / (expected * 0.75)).sum().item() * 63 / 64
    assert 34 < chi_square < 103, chi_square  # 0.001 on either side


@pytest.mark.quick
def test_balance_is_the_experts_number_times_sum_of_me_ce():
    """Sheet, check 3, summed over layers, dropped tokens counted; weighted by 0.01 in the total."""
    model = tiny("tiny-pr", capacity_factor=0.5).train()
    batch, expected = batch_of(), 0.0
    for routing in routings(model, batch):
        me = routing.probabilities.mean(0)
        ids = routing.expert_ids[:, 0].long()
        ce = F.one_hot(ids, routing.num_experts).float().mean(0)
        expected += routing.num_experts * (me * ce).sum()
        assert_parity("layer", load_balance_loss(routing), routing.num_experts * (me * ce).sum())
    losses = model.loss(batch)
    assert_parity("balance", losses.balance, expected)
    assert_parity("total", losses.total, losses.lm + 0.01 * expected)
    assert 0 < losses.dropped < 1
    grads = torch.autograd.grad(losses.balance, [m.router.weight for m in mixtures(model)])
    assert all(g.any() for g in grads)


@pytest.mark.quick
def test_dense_models_have_no_router():
    losses = tiny(experts=()).loss(batch_of())
    assert losses.balance is losses.dropped is losses.kd is None
    assert torch.equal(losses.total, losses.lm)


@pytest.mark.quick
def test_top_2_option():
    """Twice the room; the weights of the experts that had some sum to 1."""
    model = tiny(top_k=2).train()
    for routing in routings(model, batch_of()):
        room = math.ceil(sum(RAGGED) / 4 * 2)
        assert routing.loads().max() <= room
        kept = (routing.slots >= 0).any(1)
        assert_parity("weights", routing.gates.sum(1)[kept], torch.ones(int(kept.sum())))
    dense = tiny(experts=())
    mlp = 8 * 64**2 + 5 * 64
    gates = 2 * 4 * 64
    assert model.activated_parameters() == dense.num_parameters() + 2 * mlp + gates


@pytest.mark.quick
@pytest.mark.parametrize("policy", [{"rsample": True}, {"jitter": 0.5}], ids=str)
def test_noise_policies_act_in_training_alone(policy):
    """RSample changes choices and not the weights' softmax; Jitter changes what the gate reads."""
    model, plain = tiny(**policy), tiny()
    noisy = routings(model.train(), batch_of())[0]
    clean = routings(plain.train(), batch_of())[0]
    assert not torch.equal(noisy.expert_ids, clean.expert_ids)
    same = torch.equal(noisy.probabilities, clean.probabilities)
    assert same == ("rsample" in policy)
    with torch.no_grad():
        tokens = batch_of().tokens
        assert torch.equal(model.eval()(tokens).data, plain.eval()(tokens).data)


# Distillation and training.


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_kl_divergence_per_token(temperature):
    model = tiny("tiny-pr", kd_temperature=temperature, kd_weight=0.5).train()
    teacher = tiny("tiny-pr", seed=1, depth=6, experts=(2, 2, 4)).eval()
    batch = batch_of()
    losses = model.distill(batch, teacher)
    with torch.no_grad():
        p, q = (m.logits(m(batch.tokens).data) for m in (teacher, model))
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (p, q))
    divergence = (p.exp() * (p - q)).sum(-1)
    inner = torch.ones(len(p), dtype=torch.bool)
    inner[[39, 46, 47, 107]] = False  # the last of a text predicts nothing
    assert_parity("kd", losses.kd, temperature**2 * divergence[inner].mean())
    assert_parity("total", losses.total, losses.lm + 0.01 * losses.balance + 0.5 * losses.kd)
    assert torch.equal(losses.lm, model.loss(batch).lm)
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.quick
def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    model = tiny("tiny-pr").train()
    teacher = tiny("tiny-pr", capacity_factor=1.0, eval_capacity_factor=1.0).eval()
    logits = teacher.logits(teacher(batch_of().tokens).data)
    losses = model.distill(batch_of(), logits)
    assert losses.kd.abs() < 1e-7
    assert torch.equal(losses.kd, model.distill(batch_of(), teacher).kd)
    other, every = logits.roll(1, 0), torch.ones(len(logits), dtype=torch.bool)
    assert distillation_loss(logits, other, every, 1.0) > 1e-4
    assert distillation_loss(logits, other, ~every, 1.0) == 0


@pytest.mark.quick
def test_staged_distillation_drops_the_teacher_at_its_cutoff():
    student, teacher = tiny("tiny-pr"), tiny("tiny-pr", seed=1).eval()
    stages = StagedDistillation(cutoff=3)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    for step in range(5):
        losses = stages.loss(student, batch_of(), teacher, step)
        assert (losses.kd is None) == (step >= 3)
    assert len(calls) == 3
    assert torch.equal(losses.total, student.loss(batch_of()).total)
    assert StagedDistillation().cutoff == 400_000


@pytest.mark.quick
def test_published_recipes():
    assert set(RECIPES) == {v for v in VARIANTS if not v.startswith("tiny")}
    moe, pyramid = RECIPES["350m-moe-128"], RECIPES["350m-pr-moe-32-64"]
    assert (moe.lr, moe.min_lr, pyramid.lr, pyramid.min_lr) == (2e-4, 2e-6, 3e-4, 1e-6)
    assert RECIPES["1.3b-moe-128"].lr == RECIPES["1.3b-pr-moe-64-128"].lr == 1.2e-4
    assert moe.factor(0) == 0 and moe.factor(375e6) == 1
    assert moe.factor(187.5e6) == 0.5
    assert moe.factor(300e9) == pytest.approx(0.01)
    assert RECIPES["350m"].factor(260e9) == pytest.approx(0.1)
    for name, recipe in RECIPES.items():
        assert (recipe.tokens, recipe.warmup, recipe.max_length) == (300e9, 375e6, 2048)
        assert recipe.clip_norm == 1.0
        base = name.split("-")[0]
        assert recipe.batch_size == RECIPES[base].batch_size
        assert recipe.decay >= RECIPES[base].decay and recipe.lr <= RECIPES[base].lr


@pytest.mark.quick
def test_biases_of_experts_do_not_decay():
    model = tiny("tiny-pr")
    decayed, kept = param_groups(model)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert {id(p) for g in (decayed, kept) for p in g["params"]} == set(names)
    for p in kept["params"]:
        assert names[id(p)].endswith("bias") or ".norm" in names[id(p)] or "norm." in names[id(p)]
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    ids = {id(p) for p in kept["params"]}
    assert id(experts.up_bias) in ids and id(experts.up) not in ids
    optimizer = RECIPES["350m-moe-128"].optimizer(model)
    model.loss(batch_of()).total.backward()
    optimizer.step()
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.95)] * 2


# Inference.


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "tiny-pr"])
def test_neighbours_do_not_leak(name):
    """No token is dropped in evaluation: company at an expert costs nobody its place."""
    model = tiny(name).eval()
    assert_no_leak(model, lambda t: model.logits(model(t).data), vocab_size=VOCAB)


@pytest.mark.quick
def test_later_tokens_change_nothing_before_them():
    model = tiny("tiny-pr").eval()
    tokens = random_tokens([60], VOCAB)
    changed = tokens.with_data(tokens.data.clone())
    changed.data[40:] = 5
    with torch.no_grad():
        a, b = model(tokens).data, model(changed).data
    assert torch.equal(a[:40], b[:40]) and not torch.allclose(a[40:], b[40:])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "tiny-pr"])
def test_cached_decoding_equals_full_forward(name):
    model = tiny(name).eval()
    parts = ([40, 1, 0, 9], [1, 1, 5, 1], [1, 0, 30, 3])
    lengths = [sum(column) for column in zip(*parts, strict=True)]
    tokens = random_tokens(lengths, VOCAB)
    texts, done, caches, out = tokens.split(), [0] * 4, model.new_caches(), [[], [], [], []]
    with torch.no_grad():
        full = model(tokens)
        for part in parts:
            step = [t[d : d + n] for t, d, n in zip(texts, done, part, strict=True)]
            hidden = model(PackedBatch.from_list(step), caches=caches)
            for rows, piece in zip(out, hidden.split(), strict=True):
                rows.append(piece)
            done = [d + n for d, n in zip(done, part, strict=True)]
    assert_parity("cached rows", torch.cat([torch.cat(rows) for rows in out]), full.data)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "tiny-pr"])
def test_greedy_generation_equals_recomputing(name):
    model = tiny(name, init_std=0.2).eval()
    prompts = random_tokens([20, 1, 7], VOCAB)
    texts = model.generate(prompts, 8, eos_id=-1)
    for prompt, text in zip(prompts.split(), texts, strict=True):
        assert len(text) == len(prompt) + 8
        with torch.no_grad():
            scores = model.logits(model(PackedBatch.from_list([text])).data)
        assert torch.equal(scores.argmax(-1)[len(prompt) - 1 : -1], text[len(prompt) :])
    assert len({tuple(t[-8:].tolist()) for t in texts}) > 1
    stop = int(texts[1][3])
    stopped = model.generate(prompts, 8, eos_id=stop)
    first = texts[1].tolist().index(stop, 1)
    assert torch.equal(stopped[1], texts[1][: first + 1])


@pytest.mark.quick
def test_only_the_rows_asked_for():
    model = tiny("tiny-pr").eval()
    tokens, rows = random_tokens(RAGGED, VOCAB), torch.tensor([0, 39, 107])
    with torch.no_grad():
        assert_parity("rows", model(tokens, rows=rows), model(tokens).data[rows])


@pytest.mark.quick
def test_evaluation_drops_nothing_unless_asked():
    dropless, published = (tiny(eval_capacity_factor=f).eval() for f in (None, 1.0))
    with torch.no_grad():
        assert dropless.loss(batch_of()).dropped == 0
        assert published.loss(batch_of()).dropped > 0
        for routing in routings(published, batch_of()):
            assert routing.loads().max() <= math.ceil(sum(RAGGED) / routing.num_experts)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": (4,)}, "experts has 1 entries, expected 2"),
        ({"experts": (4, 0)}, "num_experts must be >= 1, got 0"),
        ({"expert_interval": 0}, "expert_interval must be >= 1, got 0"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"top_k": 3}, "top_k must be 1 or 2, got 3"),
        ({"top_k": 2, "rsample": True}, "rsample is top-1's"),
        ({"top_k": 2, "experts": (1, 4)}, r"top_k is 2, expected 1\.\.1"),
        ({"capacity_factor": 0.0}, r"capacity_factor is 0\.0"),
        ({"kd_temperature": 0.0}, "kd_temperature must be > 0"),
        ({"eos_id": 512}, "eos_id = 512"),
        ({"dropout": 1.0}, "attn_out_dropout"),
        ({"expert": ()}, "did you mean 'experts'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        get_config("deepspeed_moe/tiny", **fields)


@pytest.mark.quick
def test_call_errors():
    model = tiny(max_positions=8)
    with pytest.raises(ValueError, match="a sequence has 9 tokens"):
        model(random_tokens([9], VOCAB))
    with pytest.raises(ValueError, match="a text has 9 tokens"):
        model.eval().generate(random_tokens([6], VOCAB), 4, eos_id=-1)
    assert len(model.generate(random_tokens([6], VOCAB), 3, eos_id=-1)[0]) == 9
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate(random_tokens([3, 0], VOCAB), 1)
    with pytest.raises(ValueError, match="teacher is in training mode"):
        model.distill(batch_of([4]), tiny())
    with pytest.raises(ValueError, match=r"teacher has logits \(4, 9\), expected \(4, 512\)"):
        model.distill(batch_of([4]), torch.zeros(4, 9))
    with pytest.raises(ValueError, match="cutoff must be >= 0"):
        StagedDistillation(-1)
