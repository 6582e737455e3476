"""permute_rows, unpermute_rows and jitter_rows: forward, every gradient, and what must not leak."""

import functools

import pytest
import torch
from row_cases import BF16, DTYPES, FP32, assert_same, for_thread_counts, name, results, rows

from encfast import ops, ref

CHANNELS = (1, 7, 16, 37, 64, 100)


def routed(n=23, experts=5, top_k=3, factor=2.0, seed=0):
    """A routing with dropped choices and a row that is no token."""
    torch.manual_seed(seed)
    mask = torch.arange(n) != 4
    routing = ops.route_tokens(torch.randn(n, experts), top_k, mask=mask, capacity_factor=factor)
    assert routing.dropped().any() and routing.cu_seqlens[-1] > n * top_k / 2
    return routing


def unpermuted(routing, y, gates):
    return ops.unpermute_rows(y, routing, gates=gates)


def compare(routing, channels, dtype, layout="contiguous"):
    n, k = routing.slots.shape
    x, y = rows((n, channels), dtype, layout), rows((n * k, channels), dtype, layout)
    permute = functools.partial(ref.moe_permute, rows=routing.rows, top_k=k)
    grad = rows((n * k, channels), dtype, layout)
    ours = functools.partial(ops.permute_rows, routing=routing)
    assert_same(ours, permute, permute, {"x": x}, [grad])
    unpermute = functools.partial(ref.moe_unpermute, slots=routing.slots)
    grad = rows((n, channels), dtype, layout)
    inputs = {"y": y, "gates": torch.rand(n, k) + 0.1}
    ours = functools.partial(unpermuted, routing)
    # Single products of a few channels, which plain PyTorch may hit exactly.
    assert_same(ours, unpermute, unpermute, inputs, [grad], eps_factor=2.0)


@pytest.mark.quick
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_forward_and_gradients_match_the_reference(dtype, channels):
    compare(routed(), channels, dtype)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_layouts_match_the_reference(dtype, layout):
    compare(routed(), 21, dtype, layout)


@pytest.mark.quick
@pytest.mark.parametrize("top_k", [1, 4, 5, 9])
def test_any_number_of_choices(top_k):
    """More choices than are summed in registers at a time, in one round or several."""
    compare(routed(n=20, experts=9, top_k=top_k, factor=top_k * 0.8), 37, BF16)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_permutation_is_exact(dtype):
    routing = routed()
    x = torch.randn(23, 33).to(dtype)
    got, kept = ops.permute_rows(x, routing), int(routing.cu_seqlens[-1])
    assert torch.equal(got[:kept], x[routing.rows[:kept].long() // 3]) and not got[kept:].any()
    ids = routing.expert_ids.flatten()[routing.rows[:kept].long()]
    owner = torch.arange(5).repeat_interleave(routing.loads().long())
    assert torch.equal(ids.long(), owner)


@pytest.mark.quick
def test_every_choice_once_is_the_identity():
    """Each expert the identity and gates that sum to 1: the tokens themselves."""
    routing = ops.route_tokens(torch.randn(50, 8), 3, renormalise=True)
    x = torch.randn(50, 40)
    back = ops.unpermute_rows(ops.permute_rows(x, routing), routing)
    torch.testing.assert_close(back, x)


@pytest.mark.quick
def test_all_tokens_at_one_expert_and_experts_without_any():
    logits = torch.zeros(30, 6)
    logits[:, 3] = 5
    routing = ops.route_tokens(logits, 1)
    assert routing.loads().tolist() == [0, 0, 0, 30, 0, 0]
    x = torch.randn(30, 8)
    assert torch.equal(ops.permute_rows(x, routing), x)
    torch.testing.assert_close(ops.unpermute_rows(x, routing), x * routing.gates)


@pytest.mark.quick
def test_half_types_are_summed_in_float32():
    """256 + 1 + 1 is 258 in bfloat16 where it is rounded once; step by step it stays 256."""
    routing = ops.route_tokens(torch.randn(4, 3), 3)
    y = torch.ones(12, 20, dtype=BF16)
    y[routing.slots[:, 0].long()] = 256.0
    out = ops.unpermute_rows(y, routing, gates=torch.ones(4, 3))
    assert (out == 258).all()


@pytest.mark.quick
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_unused_rows_never_reach_output_or_gradient(poison):
    routing = routed()
    kept = int(routing.cu_seqlens[-1])
    y, gates, grad = torch.randn(69, 9), torch.rand(23, 3), torch.randn(23, 9)
    call = functools.partial(unpermuted, routing)
    clean = results(call, {"y": y, "gates": gates}, [grad])
    y, gates = y.clone(), gates.clone()
    y[kept:] = poison
    gates[routing.slots < 0] = poison
    poisoned = results(call, {"y": y, "gates": gates}, [grad])
    for key, value in clean.items():
        assert torch.equal(value, poisoned[key]), key
    assert not clean["dy"][kept:].any() and not clean["dgates"][routing.slots < 0].any()
    assert not clean["out0"][4].any()  # no token
    # A token nobody kept, and gradients of rows behind the kept ones.
    x, dy = torch.randn(23, 9), torch.randn(69, 9)
    call = functools.partial(ops.permute_rows, routing=routing)
    clean = results(call, {"x": x}, [dy])
    x[(routing.slots < 0).all(1)], dy[kept:] = poison, poison
    poisoned = results(call, {"x": x}, [dy])
    assert all(torch.equal(clean[key], poisoned[key]) for key in clean)


@pytest.mark.quick
def test_any_number_of_threads():
    routing = routed(n=700, experts=6, top_k=2, factor=1.7)
    y, gates, grad = torch.randn(1400, 130), torch.rand(700, 2), torch.randn(700, 130)
    x, rng = torch.randn(700, 130), torch.tensor([1, 2])

    def run():
        moved = results(functools.partial(unpermuted, routing), {"y": y, "gates": gates}, [grad])
        permuted = results(functools.partial(ops.permute_rows, routing=routing), {"x": x}, [y])
        return [*moved.values(), *permuted.values(), ops.jitter_rows(x, 0.1, rng=rng)]

    first, *others = for_thread_counts(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.quick
def test_a_whole_layer_against_one_hot_matrices():
    """DeepSpeed's einsums: dispatch by a mask [N, E, C], combine by gates [N, E, C]."""
    n, experts, channels = 32, 4, 12
    x = torch.randn(n, channels)
    weight = torch.randn(experts, channels, channels) / 3
    router = torch.randn(channels, experts)

    def dense(x, router, weight, room):
        p = (x @ router).softmax(1)
        chosen = torch.nn.functional.one_hot(p.argmax(1), experts)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(1)
        kept = torch.nn.functional.one_hot(place, n)[:, :room] * 1.0
        combine = torch.einsum("ne,nc->nec", p * chosen, kept)
        inside = torch.einsum("nec,nm->ecm", (combine > 0).to(x.dtype), x)
        return torch.einsum("nec,ecm->nm", combine, torch.einsum("ecm,emk->eck", inside, weight))

    def indexed(x, router, weight, factor):
        routing = ops.route_tokens(x @ router, 1, capacity_factor=factor)
        y = ops.permute_rows(x, routing)
        experts_of = torch.searchsorted(routing.cu_seqlens[1:], torch.arange(n).int(), right=True)
        y = torch.einsum("nm,nmk->nk", y, weight[experts_of.clamp(max=experts - 1)])
        return ops.unpermute_rows(y, routing)

    for factor, room in ((0.5, 4), (1.0, 8), (2.0, 16)):
        leaves = [t.clone().requires_grad_() for t in (x, router, weight)]
        want, got = dense(*leaves, room), indexed(*leaves, factor)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        grad = torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad(got, leaves, grad),
            torch.autograd.grad(want, leaves, grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("channels", [1, 37, 130])
def test_jitter_draws_the_references_numbers(dtype, channels):
    rng, x = torch.tensor([7, 2**40 + 9]), rows((11, channels), dtype, "strided")
    got = ops.jitter_rows(x, 0.01, rng=rng)
    assert torch.equal(got, ref.moe_jitter(x, rng, 0.01))
    leaf = x.detach().requires_grad_()
    grad = torch.randn(11, channels).to(dtype)
    (dx,) = torch.autograd.grad(ops.jitter_rows(leaf, 0.01, rng=rng), leaf, grad)
    assert torch.equal(dx, ref.moe_jitter(grad, rng, 0.01))


@pytest.mark.quick
def test_jitter_is_uniform_around_one():
    torch.manual_seed(4)
    factors = ops.jitter_rows(torch.ones(500, 200), 0.2)
    assert factors.min() > 0.8 and factors.max() < 1.2
    assert abs(factors.mean() - 1) < 1e-3 and abs(factors.var() - 0.04 / 3) < 2e-4
    assert torch.equal(ops.jitter_rows(torch.ones(3, 4), 0.0), torch.ones(3, 4))


@pytest.mark.quick
def test_double_backward_of_moves():
    """The two moves are each other's adjoint, and jitter its own."""
    routing = routed()
    x = torch.randn(23, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.permute_rows(x, routing).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert torch.equal(second, 2 * (routing.slots >= 0).sum(1, keepdim=True).expand_as(x).float())
    y = torch.randn(69, 4, requires_grad=True)
    out = ops.unpermute_rows(y, routing)
    (dy,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dy.sum().backward()
