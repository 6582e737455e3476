"""route_tokens and sort_choices: choices exactly, gates and gradients by the tolerance rule."""

import moe_oracle
import numpy as np
import pytest
import torch
from row_cases import BF16, DTYPES, FP32, assert_same, for_thread_counts, name, rows

from encfast import ops, ref
from encfast.ref.moe_noise import gumbel, priority_keys, uniform, words
from encfast.ref.moe_route import moe_route_bwd

OP = torch.ops.encfast.moe_route


def decisions(routing):
    found = routing.expert_ids, routing.rows, routing.slots, routing.cu_seqlens
    assert all(x.dtype == torch.int32 for x in found)
    return found


def draw_case(seed):
    """Logits with ties, infinities, NaN and zeros of both signs, and every option by chance."""
    make = np.random.default_rng(seed)
    n, experts = int(make.integers(0, 90)), int(make.choice([1, 2, 3, 7, 8, 16, 17, 33, 64]))
    top_k = int(make.choice([1, min(2, experts), experts, make.integers(1, experts + 1)]))
    logits = torch.from_numpy(make.standard_normal((n, experts)).astype(np.float32))
    if make.random() < 0.4:
        logits = (logits * 2).round()
    if make.random() < 0.3:
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
        chosen = torch.from_numpy(make.integers(0, 5, (n, experts)))
        logits = torch.where(
            torch.from_numpy(make.random((n, experts)) < 0.3), special[chosen], logits
        )
    logits = logits.to(DTYPES[make.integers(3)])
    mask = torch.from_numpy(make.random(n) < 0.7) if make.random() < 0.4 else None
    factor = float(make.choice([0.1, 0.5, 1.0, 1.3, 2.0])) if make.random() < 0.7 else None
    least = int(make.integers(0, 6))
    priority = ["position", "random"][make.integers(2)]
    noise = [None, None, "gumbel", "gumbel_rest"][make.integers(4)]
    rng = torch.from_numpy(make.integers(0, 2**40, 2))
    return logits, mask, top_k, factor, least, priority, noise, rng


def expected(logits, mask, top_k, factor, least, priority, noise, rng):
    n, experts = logits.shape
    wide = logits.float()
    noised = None if noise is None else (wide + gumbel(rng, n, experts)).numpy()
    keys = priority_keys(rng, n, top_k).numpy() if priority == "random" else None
    return moe_oracle.route(
        wide.numpy(),
        top_k,
        mask=None if mask is None else mask.numpy(),
        noised=noised,
        rest=noise == "gumbel_rest",
        factor=factor,
        least=least,
        keys=keys if factor is not None else None,
    )


@pytest.mark.quick
@pytest.mark.parametrize("block", range(8))
def test_routing_is_exact(block):
    """200 random cases, integer by integer; called past the check that NaN does not pass."""
    for seed in range(25 * block, 25 * block + 25):
        logits, mask, top_k, factor, least, priority, noise, rng = case = draw_case(seed)
        rule = ("softmax", "none", factor, least, priority, noise, rng)
        for serve in (OP, ref.moe_route):
            found = serve(logits, mask, top_k, *rule)
            for got, want in zip(found[1:5], expected(*case), strict=True):
                assert np.array_equal(got.numpy(), want), (seed, serve)


@pytest.mark.quick
@pytest.mark.parametrize("experts", [4, 70])
def test_many_tiles_and_any_number_of_threads(experts):
    """More choices than a task has, at experts whose choices come from all tasks."""
    torch.manual_seed(1)
    logits = (torch.randn(3000, experts) * 3).round()
    mask, rng = torch.rand(3000) < 0.8, torch.tensor([5, 6])
    for priority, noise in (("position", None), ("random", "gumbel")):
        case = (logits, mask, 3, 1.0, 0, priority, noise, rng)
        runs = for_thread_counts(lambda case=case: OP(*case[:3], "softmax", "kept", *case[3:]))
        for got, want in zip(runs[0][1:5], expected(*case), strict=True):
            assert np.array_equal(got.numpy(), want)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def weigh(logits, **options):
    routing = ops.route_tokens(logits, **options)
    return routing.gates, routing.probabilities


def weigh_by_reference(logits, top_k, mask=None, scoring="softmax", renormalise="none", **options):
    named = {"capacity_factor": None, "min_capacity": 0, "priority": "position"} | options
    out = ref.moe_route(logits, mask, top_k, scoring, renormalise, **named)
    return out[0], out[5]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", ["none", "chosen", "kept"])
def test_gates_and_gradients_match_the_reference(dtype, scoring, renormalise):
    torch.manual_seed(2)
    for n, experts, top_k in ((37, 5, 2), (9, 64, 8), (40, 19, 3), (6, 4, 4)):
        logits = torch.randn(n, experts) * 2
        grads = [torch.randn(n, top_k), torch.randn(n, experts)]
        options = {
            "top_k": top_k,
            "scoring": scoring,
            "renormalise": renormalise,
            "capacity_factor": 1.5 * top_k,
            "mask": torch.arange(n) % 5 != 3,
        }
        assert_same(
            lambda logits, options=options: weigh(logits, **options),
            lambda logits, options=options: weigh_by_reference(logits, **options),
            lambda logits, options=options: weigh_by_reference(logits, **options),
            {"logits": logits.to(dtype)},
            grads,
        )


@pytest.mark.quick
@pytest.mark.parametrize("wanted", ["gates", "probabilities"])
def test_a_gradient_of_one_result_alone(wanted):
    logits = torch.randn(20, 6, dtype=torch.float64)
    grad = torch.randn(20, 2 if wanted == "gates" else 6)
    found = []
    for x in (logits.float().requires_grad_(), logits.clone().requires_grad_()):
        if x.dtype == FP32:
            out = getattr(ops.route_tokens(x, 2, renormalise=True), wanted)
        else:
            out = weigh_by_reference(x, 2, renormalise="chosen")[wanted == "probabilities"]
        found.append(torch.autograd.grad(out, x, grad.to(x.dtype))[0])
    torch.testing.assert_close(found[0].double(), found[1], atol=1e-6, rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", ["none", "chosen", "kept"])
def test_reference_gradients(scoring, renormalise):
    """gradcheck in float64, and the reference's backward against autograd of its forward."""
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    options = {"scoring": scoring, "renormalise": renormalise, "capacity_factor": 0.8}
    options["mask"] = torch.arange(7) != 2
    torch.autograd.gradcheck(lambda x: weigh_by_reference(x, 3, **options), logits)
    rule = scoring, renormalise, 0.8, 0, "position", None, None
    out = ref.moe_route(logits, options["mask"], 3, *rule)
    grads = [torch.randn_like(out[0]), torch.randn_like(out[5])]
    (want,) = torch.autograd.grad([out[0], out[5]], logits, grads)
    args = out[5].detach(), out[1], out[3], scoring, renormalise
    torch.testing.assert_close(moe_route_bwd(*grads, *args), want)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout):
    logits = rows((30, 9), BF16, layout)
    dense = logits.contiguous()
    for got, want in zip(
        decisions(ops.route_tokens(logits, 3)), decisions(ops.route_tokens(dense, 3)), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.quick
def test_published_gates():
    """Mixtral: a softmax over the chosen logits; Switch and DeepSpeed top-1: p of all experts."""
    logits = torch.randn(50, 8)
    routing = ops.route_tokens(logits, 2, renormalise=True)
    best = logits.topk(2)
    assert torch.equal(routing.expert_ids.long(), best.indices)
    torch.testing.assert_close(routing.gates, best.values.softmax(1))
    switch = ops.route_tokens(logits, 1, capacity_factor=0.5)
    kept = switch.slots >= 0
    torch.testing.assert_close(switch.gates[kept], logits.softmax(1).amax(1)[kept.squeeze(1)])
    assert not switch.gates[~kept].any() and (~kept).any()
    deepseek = ops.route_tokens(logits, 2, scoring="sigmoid", renormalise=True)
    scores = best.values.sigmoid()
    torch.testing.assert_close(deepseek.gates, scores / scores.sum(1, keepdim=True))


@pytest.mark.quick
def test_second_choices_queue_behind_all_first_ones():
    """GShard's top-2 over dense one-hot masks; gates over the kept choices, as in DeepSpeed."""
    n, experts, room = 40, 4, 13
    logits = torch.randn(n, experts)
    routing = ops.route_tokens(
        logits, 2, capacity_factor=1.0, min_capacity=room, renormalise="kept"
    )
    p, top = logits.softmax(1), logits.topk(2).indices
    first, second = (torch.nn.functional.one_hot(top[:, j], experts) for j in (0, 1))
    places = first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0)
    first, second = (m * (at < room) for m, at in zip((first, second), places, strict=True))
    weights = torch.stack([(p * m).sum(1) for m in (first, second)], 1)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(FP32).eps)
    torch.testing.assert_close(routing.gates, weights)
    assert torch.equal(routing.loads().long(), (first + second).sum(0))
    assert routing.dropped().sum() == 2 * n - routing.cu_seqlens[-1] and routing.dropped().any()


@pytest.mark.quick
def test_late_tokens_are_dropped_by_position():
    logits = torch.zeros(100, 4)
    logits[:, 2] = 1
    routing = ops.route_tokens(logits, 1, capacity_factor=1.0)
    assert routing.rows[:25].tolist() == list(range(25)) and (routing.rows[25:] == -1).all()
    assert routing.cu_seqlens.tolist() == [0, 0, 0, 25, 25]


@pytest.mark.quick
def test_random_priority_is_uniform_over_positions():
    """Chi-square over who of 40 tokens is kept in 2000 draws of 10."""
    logits, times = torch.zeros(40, 1), torch.zeros(40)
    draws = 2000
    for seed in range(draws):
        rng = torch.tensor([seed, 77])
        routing = ops.route_tokens(
            logits, 1, capacity_factor=0.25, priority="random", rng=rng, min_capacity=0
        )
        assert routing.cu_seqlens[-1] == 10
        kept = routing.rows[:10]
        assert (kept.diff() > 0).all()  # in the order of their tokens
        times[kept.long()] += 1
    share = 0.25
    chi_square = ((times - draws * share) ** 2 / (draws * share * (1 - share))).sum()
    assert chi_square < 39 + 4 * (2 * 39) ** 0.5


@pytest.mark.quick
def test_gumbel_noise_draws_from_the_softmax():
    """The noised first choice has the distribution of the softmax; p itself stays as it was."""
    row = torch.tensor([1.0, 0.0, -1.0, 0.5])
    logits = row.expand(20000, 4)
    torch.manual_seed(3)
    routing = ops.route_tokens(logits, 1, noise="gumbel")
    share = routing.expert_ids.flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(share, row.softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(routing.gates[:, 0], row.softmax(0)[routing.expert_ids[:, 0].long()])
    rest = ops.route_tokens(logits, 2, noise="gumbel_rest").expert_ids
    assert (rest[:, 0] == 0).all()
    share = rest[:, 1].bincount(minlength=4) / 20000
    torch.testing.assert_close(share[1:], row[1:].softmax(0), atol=0.015, rtol=0)


@pytest.mark.quick
def test_gumbel_numbers():
    """-log(-log(u)) to the last places of float32, and its mean and variance."""
    rng = torch.tensor([11, 12])
    found = gumbel(rng, 2000, 50).double()
    u = uniform(words(rng, 2000, 50, 1)).double()
    assert ((u > 0) & (u < 1)).all()
    exact = -(-u.log()).log()
    # Near u = 1/e the result passes through 0: the last place of the inner logarithm remains.
    assert ((found - exact).abs() <= 2.0**-22 * exact.abs().clamp(min=1)).all()
    assert abs(found.mean() - 0.5772) < 0.02 and abs(found.var() - 1.6449) < 0.05


@pytest.mark.quick
def test_a_seed_repeats_a_step():
    logits = torch.randn(64, 8)
    options = {"priority": "random", "noise": "gumbel", "capacity_factor": 1.0}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(ops.route_tokens(logits, 2, **options))
    assert torch.equal(runs[0].rows, runs[1].rows) and not torch.equal(runs[0].rows, runs[2].rows)


@pytest.mark.quick
def test_padding_is_kept_out_of_everything():
    """A batch and the same with rows of NaN between its tokens: equal choices, room, gradients."""
    logits = torch.randn(30, 6, requires_grad=True)
    where = torch.randperm(50)[:30].sort().values
    mask = torch.zeros(50, dtype=torch.bool).index_fill(0, where, True)
    padded = torch.full((50, 6), torch.nan).index_copy(0, where, logits.detach()).requires_grad_()
    options = {"capacity_factor": 0.9, "renormalise": "kept", "min_capacity": 2}
    alone = ops.route_tokens(logits, 2, **options)
    among = ops.route_tokens(padded, 2, mask=mask, **options)
    for field in ("gates", "expert_ids", "slots", "probabilities"):
        assert torch.equal(getattr(among, field)[where], getattr(alone, field)), field
    assert torch.equal(among.cu_seqlens, alone.cu_seqlens)
    assert (among.expert_ids[~mask] == -1).all() and (among.slots[~mask] == -1).all()
    assert not among.gates[~mask].any() and not among.probabilities[~mask].any()
    assert not among.dropped()[~mask].any()
    grad = torch.randn(50, 2)
    (want,) = torch.autograd.grad(alone.gates, logits, grad[where])
    (got,) = torch.autograd.grad(among.gates, padded, grad)
    assert torch.equal(got[where], want) and not got[~mask].any()


@pytest.mark.quick
def test_nan_stays_in_its_row():
    """Past the check: a row of NaN goes to the lowest ids, a NaN among numbers comes last."""
    logits = torch.randn(12, 5)
    clean = OP(logits, None, 2, "softmax", "chosen", None, 0, "position", None, None)
    poisoned = logits.clone()
    poisoned[4], poisoned[7, 3] = torch.nan, torch.nan
    found = OP(poisoned, None, 2, "softmax", "chosen", None, 0, "position", None, None)
    assert found[1][4].tolist() == [0, 1] and 3 not in found[1][7].tolist()
    others = torch.ones(12, dtype=torch.bool).index_fill(0, torch.tensor([4, 7]), False)
    assert found[0][~others].isnan().all()
    assert torch.equal(found[0][others], clean[0][others])
    assert torch.equal(found[5][others], clean[5][others])
    args = found[5], found[1], found[3], "softmax", "chosen", FP32
    dlogits = torch.ops.encfast.moe_route_bwd(torch.ones(12, 2), torch.randn(12, 5), *args)
    assert dlogits[others].isfinite().all() and dlogits[~others].isnan().all()


@pytest.mark.quick
def test_edges():
    for n, experts, top_k in ((0, 3, 2), (5, 1, 1), (4, 3, 3), (1, 1, 1)):
        logits = torch.randn(n, experts, requires_grad=True)
        routing = ops.route_tokens(logits, top_k, capacity_factor=1.0, priority="random")
        assert routing.num_tokens == n and routing.top_k == top_k
        assert routing.num_experts == experts and routing.cu_seqlens[-1] <= n * top_k
        (grad,) = torch.autograd.grad(routing.gates.sum(), logits)
        assert grad.shape == logits.shape and grad.isfinite().all()
    one = ops.route_tokens(torch.randn(5, 1), 1)
    assert (one.gates == 1).all() and one.rows.tolist() == [0, 1, 2, 3, 4]
    nobody = ops.route_tokens(torch.randn(5, 3), 2, mask=torch.zeros(5, dtype=torch.bool))
    assert not nobody.cu_seqlens.any() and (nobody.rows == -1).all() and not nobody.gates.any()


@pytest.mark.quick
def test_large_numbers_overflow_nothing():
    logits = torch.tensor([[1e38, -1e38, 3e38], [-200.0, -201.0, -300.0], [100.0, 99.0, -100.0]])
    for scoring in ("softmax", "sigmoid"):
        routing = ops.route_tokens(logits, 2, scoring=scoring, renormalise=True)
        assert routing.gates.isfinite().all() and routing.probabilities.isfinite().all()
        plain = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
        torch.testing.assert_close(routing.probabilities, plain, atol=1e-30, rtol=1e-6)


@pytest.mark.quick
def test_given_choices_are_sorted():
    ids = torch.tensor([[2, 0], [0, -1], [2, 1], [0, 2]], dtype=torch.int32)
    gates = torch.rand(4, 2)
    routing = ops.sort_choices(ids, gates, 4)
    assert routing.cu_seqlens.tolist() == [0, 3, 4, 7, 7]
    assert routing.rows.tolist() == [2, 6, 1, 5, 0, 4, 7, -1]
    assert routing.slots.tolist() == [[4, 2], [0, -1], [5, 3], [1, 6]]
    assert routing.probabilities is None and routing.gates is gates
    moved = routing.to("meta")
    assert moved.rows.is_meta and moved.probabilities is None
