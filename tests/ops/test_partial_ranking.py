"""partial_ranking against its float64 reference: mining, products, the loss and all gradients."""

import functools

import pytest
import torch
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import BF16, DTYPES, FP32, assert_same, for_thread_counts, name, results, rows

from encfast import ops, ref

NATIVE = ops.backends("partial_ranking")["cpu"] == "native"

# B, M, D and K: products with the chosen rows (K < M / 8) and with all; single rows and candidates;
# more than one block of rows, of columns and of a ranking.
SHAPES = {
    "one": (1, 1, 3, 1),
    "one candidate": (6, 40, 5, 1),
    "gathered": (33, 500, 37, 20),
    "gathered, more channels": (20, 900, 300, 66),
    "all": (50, 67, 33, 60),
    "all in place": (200, 192, 64, 130),
    "blocks": (210, 300, 40, 250),
}


def features(shape, dtype=FP32, layout="contiguous", scale=5.0):
    n, m, d, _ = shape
    found = {"a": rows((n, d), dtype, layout), "b": rows((m, d), dtype, layout)}
    found = {k: (v / d**0.5).to(dtype) for k, v in found.items()}
    return found | {"logit_scale": torch.tensor(scale)}


def ranking(shape, seed=0):
    """Candidates, some of them twice, and valid prefixes: none, all, and between."""
    g = torch.Generator().manual_seed(seed)
    n, m, _, k = shape
    valid = torch.randint(0, k + 1, (n,), generator=g)
    valid[:2] = torch.tensor([k, 0])[: min(n, 2)]
    candidates = torch.rand(n, m, generator=g).argsort(1)[:, :k]
    if k > 3:
        candidates[:, 3] = candidates[:, 0]
    return {"candidates": candidates, "valid": valid}


def expected(a, b, logit_scale, *, candidates, valid, reduction="none"):
    loss = ref.partial_ranking(ref.candidate_dots(a, b, candidates), logit_scale, valid)
    total = {"mean_query": len(loss), "mean_term": valid.sum().clamp(min=1), "sum": 1}
    return loss if reduction == "none" else loss.sum() / total[reduction]


def assert_loss(shape, inputs, reduction="none", **options):
    chosen = ranking(shape) | {"reduction": reduction}
    grad = torch.rand(shape[0]) + 0.5 if reduction == "none" else torch.tensor(0.7)
    reference = functools.partial(expected, **chosen)
    assert_same(
        functools.partial(ops.partial_ranking, **chosen), reference, reference, inputs, [grad],
        allow_degenerate=shape[3] == 1, **options,
    )  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    shape = SHAPES[shape]
    assert_loss(shape, features(shape, dtype))


@pytest.mark.quick
@pytest.mark.parametrize("reduction", ["mean_query", "mean_term", "sum", "none"])
def test_reductions(reduction):
    shape = SHAPES["gathered"]
    assert_loss(shape, features(shape), reduction)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("shape", ["gathered", "all"])
def test_layouts(shape, layout):
    shape = SHAPES[shape]
    assert_loss(shape, features(shape, layout=layout))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", ["gathered", "all"])
def test_dots(shape, dtype):
    shape = SHAPES[shape]
    inputs, candidates = features(shape, dtype), ranking(shape)["candidates"]
    inputs.pop("logit_scale")
    reference = functools.partial(ref.candidate_dots, candidates=candidates)
    grad = torch.randn(candidates.shape)
    assert_same(
        functools.partial(ops.candidate_dots, candidates=candidates), reference, reference,
        inputs, [grad],
    )  # fmt: skip


def double_loop(a, b, tau, candidates, valid):
    """The paper's sum, as it is printed."""
    losses = []
    for v, row, count in zip(a, candidates.tolist(), valid.tolist(), strict=True):
        s = [v @ b[c] / tau for c in row]
        terms = [
            (s[j].exp() / sum(s[k].exp() for k in range(j, len(s)))).log() for j in range(count)
        ]
        losses.append(-sum(terms, torch.zeros((), dtype=torch.float64)))
    return torch.stack(losses)


@pytest.mark.quick
def test_equals_the_double_loop_of_the_paper():
    shape = (32, 200, 24, 16)
    inputs, chosen = features(shape), ranking(shape)
    leaves = {k: v.double().requires_grad_() for k, v in inputs.items()}
    want = double_loop(leaves["a"], leaves["b"], 1 / leaves["logit_scale"], **chosen)
    want_grads = torch.autograd.grad(want.sum(), list(leaves.values()))
    op = functools.partial(ops.partial_ranking, **chosen, reduction="none")
    found = results(op, inputs, [torch.ones(32)])
    torch.testing.assert_close(found["out0"].double(), want, rtol=1e-5, atol=1e-5)
    for key, grad in zip(("da", "db", "dlogit_scale"), want_grads, strict=True):
        torch.testing.assert_close(found[key].double(), grad, rtol=1e-5, atol=1e-4)


@pytest.mark.quick
def test_rows_without_a_valid_candidate_are_exactly_zero():
    shape = SHAPES["gathered"]
    chosen = ranking(shape)
    chosen["valid"][::2] = 0
    found = results(
        functools.partial(ops.partial_ranking, **chosen, reduction="none"),
        features(shape), [torch.ones(33)],
    )  # fmt: skip
    assert (found["out0"][::2] == 0).all() and (found["da"][::2] == 0).all()
    assert found["da"][1::2].abs().sum(1).count_nonzero() > 10
    chosen["valid"].zero_()
    for reduction in ("mean_query", "mean_term", "sum"):
        found = results(
            functools.partial(ops.partial_ranking, **chosen, reduction=reduction),
            features(shape), [torch.tensor(1.0)],
        )  # fmt: skip
        assert all((v == 0).all() for v in found.values())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
@pytest.mark.parametrize("seed", [2, 4, 38])
def test_logits_of_ten_thousand(dtype, order, seed):
    """Reference sums jump, and exponentials vanish, within a block and between blocks.

    With R in one float the scale's gradient was up to 7.5 times as far off as plain PyTorch's for
    these seeds.
    """
    torch.manual_seed(seed)
    n, k = 8, 200
    x = torch.randn(n, k).mul(5e3).clamp(-1e4, 1e4)
    x[:, 0], x[:, -1] = 1e4, -1e4
    x = x if order == "random" else x.sort(1, descending=order == "falling").values
    b = x[:1].T.to(dtype).contiguous()  # [K, 1]: one channel
    a = torch.linspace(0.5, 1, n)[:, None].to(dtype)
    chosen = {"candidates": torch.arange(k).expand(n, k), "valid": torch.arange(n) * 28}
    inputs = {"a": a, "b": b, "logit_scale": torch.tensor(1.0)}
    op = functools.partial(ops.partial_ranking, **chosen, reduction="none")
    found = results(op, inputs, [torch.ones(n)])
    assert all(value.isfinite().all() for value in found.values())
    # An order is decided by differences of logits, which float32 rounds by up to 1e-3: gradients
    # are as good as those of plain PyTorch and no better.
    reference = functools.partial(expected, **chosen)
    assert_same(op, reference, reference, inputs, [torch.ones(n)])


@pytest.mark.quick
def test_nan_is_not_hidden():
    shape = SHAPES["gathered"]
    chosen, inputs = ranking(shape), features(shape)
    chosen["valid"].fill_(5)
    inputs["b"][chosen["candidates"][4, 9], 2] = torch.nan
    assert ops.partial_ranking(**inputs, **chosen, reduction="none")[4].isnan()


@pytest.mark.quick
@pytest.mark.parametrize("wanted", [("a",), ("b",), ("logit_scale",), ("a", "logit_scale")])
@pytest.mark.parametrize("shape", ["gathered", "all"])
def test_gradients_are_made_where_they_are_wanted(shape, wanted):
    shape = SHAPES[shape]
    inputs, chosen = features(shape), ranking(shape)
    every = results(functools.partial(ops.partial_ranking, **chosen), inputs, [torch.tensor(1.0)])
    leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in inputs.items()}
    ops.partial_ranking(**leaves, **chosen).backward()
    for key, leaf in leaves.items():
        assert torch.equal(leaf.grad, every[f"d{key}"]) if key in wanted else leaf.grad is None


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(300, 2000, 40, 30), (500, 700, 40, 300)], ids=["few", "many"])
def test_bit_equal_for_any_thread_count(shape):
    inputs, chosen = features(shape, BF16), ranking(shape)
    loss = functools.partial(ops.partial_ranking, **chosen)

    def everything():
        mined = ops.hard_negatives(inputs["a"], inputs["b"], shape[3])
        return results(loss, inputs, [torch.tensor(1.0)]) | {"mined": mined}

    first, *others = for_thread_counts(everything)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


# ---- Mining ----


def whole_numbers(n, m, d, dtype=FP32):
    """Features whose products are exact and often equal."""
    return (torch.randint(-3, 4, size).to(dtype) for size in ((n, d), (m, d)))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [(1, 2, 3, 1), (7, 40, 5, 39), (200, 1200, 20, 16), (100, 3000, 8, 500), (5, 1000, 100, 1)],
)
def test_hard_negatives_are_the_largest_products_ties_to_the_lower_row(n, m, d, k, dtype):
    a, b = whole_numbers(n, m, d, dtype)
    positives = torch.randint(-1, m, (n,))
    found = ops.hard_negatives(a, b, k, positives)
    assert torch.equal(found, ref.hard_negatives(a, b, k, positives))
    assert not (found == positives[:, None]).any()


@pytest.mark.quick
def test_hard_negatives_of_numbers_that_are_none():
    """NaN comes last, infinities where they belong; the positive never, however large."""
    a = torch.ones(2, 1)
    b = torch.tensor([[1.0], [torch.nan], [torch.inf], [-torch.inf], [2.0], [9.0]])
    positives = torch.tensor([5, -1])
    found = ops.hard_negatives(a, b, 5, positives)
    assert found[0].tolist() == [2, 4, 0, 3, 1]
    assert found[1].tolist() == [2, 5, 4, 0, 3]


@pytest.mark.quick
def test_hard_negatives_have_no_gradient():
    a, b = (x.requires_grad_() for x in whole_numbers(4, 9, 3))
    assert not ops.hard_negatives(a, b, 2).requires_grad


# ---- The teacher's order ----


@pytest.mark.quick
def test_teacher_order_sorts_falling_and_keeps_ties():
    candidates = torch.tensor([[7, 3, 9, 1]])
    scores = torch.tensor([[0.5, 2.0, 0.5, -1.0]])
    for rule, valid in (
        ({}, 4),
        ({"threshold": 0.5}, 3),
        ({"threshold": 5.0}, 0),
        ({"top_m": 2}, 2),
        ({"top_m": 9}, 4),
        ({"top_m": 0}, 0),
        ({"mask": torch.tensor([[False, True, True, True]])}, 1),
    ):
        order, count = ops.teacher_order(candidates, scores, **rule)
        assert order.tolist() == [[3, 7, 9, 1]] and count.tolist() == [valid], rule


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(2, 300),
    d=st.integers(1, 140),
    k=st.integers(1, 299),
    dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(n, m, d, k, dtype, seed):
    torch.manual_seed(seed)
    shape = (n, m, d, min(k, m - 1))
    inputs, chosen = features(shape, dtype), ranking(shape, seed)
    got = results(
        functools.partial(ops.partial_ranking, **chosen, reduction="sum"), inputs,
        [torch.tensor(1.0)],
    )  # fmt: skip
    wide = {key: v.double() for key, v in inputs.items()}
    want = results(
        functools.partial(expected, **chosen, reduction="sum"), wide, [torch.tensor(1.0)]
    )
    for key, value in got.items():
        limit = 2e-2 if value.dtype == BF16 else 2e-5
        assert (value - want[key]).abs().max() <= limit * max(1.0, want[key].abs().max()), key
    a, b = whole_numbers(n, m, d)
    positives = torch.randint(-1, m, (n,))
    mined = ops.hard_negatives(a, b, shape[3], positives)
    assert torch.equal(mined, ref.hard_negatives(a, b, shape[3], positives))


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    cases = "shapes or ten_thousand or nan or largest or numbers"
    run_under_isa(isa, f"({cases}) and not every_isa", __file__)
