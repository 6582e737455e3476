"""linear_cross_entropy against its float64 reference: options, rows, slices, gradients."""

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import by_the_op
from fresh_python import PEAK, python, run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import BF16, DTYPES, FP32, assert_same, for_thread_counts, name, results
from vocab_cases import IGNORE, assert_matches, exact, operands, ours, plain, targets_of

from encfast import ops
from encfast.ops import _linear_cross_entropy_cpu as cpu
from encfast.ops import _vocab_slices as slices

NATIVE = ops.backends("linear_cross_entropy")["cpu"] == "native"

# Rows, V and C: one of each, odd sizes, whole vectors, more than one slice, as many targets ignored
# as counted.
CASES = {
    "one row": (1, 7, 5),
    "one entry": (6, 1, 4),
    "odd": (21, 67, 13),
    "whole vectors": (16, 128, 32),
    "slices": (19, 8300, 24),
}
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0, "ignore_index": 3},
}
KEPT = {"all kept": slices.KEPT_BYTES, "some kept": 19 * 4096 * 4 + 16, "none kept": 0}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_reference(case, dtype):
    m, v, c = CASES[case]
    assert_matches(operands(m, v, c, dtype), targets_of(m, v))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_reference(options, dtype):
    given_options = OPTIONS[options]
    targets = targets_of(30, 75, given_options.get("ignore_index", IGNORE))
    assert_matches(operands(30, 75, 40, dtype), targets, **given_options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("kept", KEPT)
def test_logits_that_are_kept_and_that_are_not(kept, dtype, monkeypatch):
    monkeypatch.setattr(slices, "KEPT_BYTES", KEPT[kept])
    m, v, c = CASES["slices"]
    with by_the_op():
        assert_matches(operands(m, v, c, dtype), torch.randint(0, v, (m,)), **OPTIONS["all"])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts_match_reference(layout, dtype):
    # With fewer rows the largest rounding of their logits is a matter of the draw.
    assert_matches(operands(92, 50, 36, dtype, layout), targets_of(92, 50))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_selected_rows(dtype):
    """In any order, some twice, some of them ignored; the others get gradient 0."""
    chosen = torch.tensor([7, 0, 7, 19, 3, 11, 12])
    targets = torch.tensor([5, 40, 6, IGNORE, 1, 0, 40])
    inputs = operands(20, 41, 30, dtype)
    assert_matches(inputs, targets, rows=chosen)
    dx = results(ours(targets, rows=chosen), inputs, [torch.ones(7)])["dx"]
    assert (dx[[0, 3, 7, 11, 12]].abs().sum(1) > 0).all()
    assert (dx.abs().sum(1) == 0).sum() == 15


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_ignored_rows_may_hold_anything(dtype):
    targets, inputs = targets_of(30, 50), operands(30, 50, 20, dtype)
    grad = torch.randn(30)

    def all_with(poison):
        inputs["x"][targets == IGNORE], grad[targets == IGNORE] = poison, poison
        return results(ours(targets), inputs, [grad])

    clean, poisoned = all_with(1.0), all_with(float("nan"))
    for key, value in poisoned.items():
        assert value.abs().sum() > 0 and torch.equal(value, clean[key]), key
    assert (poisoned["dx"][targets == IGNORE] == 0).all()
    assert (poisoned["out0"][targets == IGNORE] == 0).all()


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the reference multiplies all rows")
def test_ignored_rows_are_not_multiplied(monkeypatch):
    multiplied = []

    class Counted(slices.VocabSlices):
        def __init__(self, x, *others):
            multiplied.append(x.shape[0])
            super().__init__(x, *others)

    monkeypatch.setattr(cpu, "VocabSlices", Counted)
    targets = torch.full((50,), IGNORE)
    targets[[3, 20, 44]] = torch.tensor([1, 2, 3])
    x, weight = torch.randn(50, 8, requires_grad=True), torch.randn(9, 8)
    ops.linear_cross_entropy(x, weight, targets).backward()
    assert multiplied == [3, 3]


def test_reference_is_cross_entropy():
    inputs = {k: v.double() for k, v in operands(30, 50, 20).items()}
    targets = targets_of(30, 50)
    for options in ({}, {"label_smoothing": 0.3}, {"ignore_index": 7}):
        drawn = targets.masked_fill(targets == IGNORE, 7) if "ignore_index" in options else targets
        expected = F.cross_entropy(F.linear(*inputs.values()), drawn, reduction="none", **options)
        torch.testing.assert_close(exact(drawn, **options)(**inputs), expected)


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS)
def test_reference_gradients(options):
    """Of the reference by finite differences, and those the fallback computes by formula."""
    options = OPTIONS[options]
    chosen, m = torch.tensor([2, 0, 0, 3]), 4
    targets = torch.tensor([1, 3, IGNORE, 4])
    targets[2] = options.get("ignore_index", IGNORE)
    leaves = [t.double().requires_grad_() for t in operands(m, 5, 3).values()]
    f = exact(targets, rows=chosen, **options)
    assert torch.autograd.gradcheck(f, leaves)
    dloss = torch.randn(m).double()
    expected = torch.autograd.grad(f(*leaves), leaves, dloss)
    x, weight, bias = (t.detach() for t in leaves)
    from encfast.ref.linear_cross_entropy import linear_cross_entropy_bwd

    found = linear_cross_entropy_bwd(dloss, x, weight, targets, bias, chosen, **options)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(reduction, weighted):
    """Scaled, so that the gradient that comes in is not 1; weights have gradients too."""
    targets, inputs = targets_of(30, 50), operands(30, 50, 20)
    if weighted:
        inputs["weights"] = torch.rand(30) * 3

    def reduced(losses, weights):
        w = torch.ones_like(losses) if weights is None else weights
        total = (w * losses).sum()
        mean = total / (w * (targets != IGNORE)).sum()
        return 3 * {"none": w * losses, "sum": total, "mean": mean}[reduction]

    assert_same(
        lambda x, weight, bias, weights=None: (
            3
            * ops.linear_cross_entropy(
                x, weight, targets, bias, weights=weights, reduction=reduction
            )
        ),
        lambda x, weight, bias, weights=None: reduced(exact(targets)(x, weight, bias), weights),
        lambda x, weight, bias, weights=None: reduced(plain(targets)(x, weight, bias), weights),
        inputs,
        [torch.randn(30) if reduction == "none" else torch.tensor(0.7)],
        eps_factor=4.0,
    )


@pytest.mark.quick
def test_mean_is_that_of_pytorch():
    targets, inputs = targets_of(40, 60), operands(40, 60, 20)
    found = ops.linear_cross_entropy(inputs["x"], inputs["weight"], targets, inputs["bias"])
    torch.testing.assert_close(found, F.cross_entropy(F.linear(*inputs.values()), targets))


@pytest.mark.quick
@pytest.mark.parametrize("why", ["all ignored", "no rows", "none selected", "weights of 0"])
def test_a_mean_over_nothing_is_0_with_gradients_0(why):
    m = 0 if why == "no rows" else 5
    inputs = operands(m, 9, 4)
    targets = torch.full((m,), 2 if why == "weights of 0" else IGNORE)
    options = {}
    if why == "none selected":
        targets, options = targets[:0], {"rows": targets[:0]}
    if why == "weights of 0":
        options = {"weights": torch.zeros(5)}
    found = results(
        lambda x, weight, bias: ops.linear_cross_entropy(x, weight, targets, bias, **options),
        inputs,
        [torch.tensor(1.0)],
    )
    assert found["dx"].shape == (m, 4) and found["dweight"].shape == (9, 4)
    assert all((value == 0).all() for value in found.values())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_finite_at_logits_of_ten_thousand(dtype):
    x = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [1e4, 1e4], [0.0, 0.0]]).to(dtype)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).to(dtype)
    targets = torch.tensor([0, 0, 2, 1])
    inputs = {"x": x, "weight": weight, "bias": torch.zeros(3)}
    found = results(ours(targets, z_loss=1e-4), inputs, [torch.ones(4)])
    wide = {k: v.double() for k, v in inputs.items()}
    expected = results(exact(targets, z_loss=1e-4), wide, [torch.ones(4)])
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-2, atol=1e-6)
    assert found["out0"][1] > 1e4 and found["out0"].isfinite().all()


@pytest.mark.quick
def test_an_entry_with_bias_minus_infinity_is_not_in_the_vocabulary():
    inputs = operands(12, 40, 16)
    inputs["bias"][30:] = -torch.inf
    targets = torch.randint(0, 30, (12,))
    found = results(ours(targets), inputs, [torch.ones(12)])
    cut = {"x": inputs["x"], "weight": inputs["weight"][:30], "bias": inputs["bias"][:30]}
    expected = results(ours(targets), cut, [torch.ones(12)])
    torch.testing.assert_close(found["out0"], expected["out0"])
    torch.testing.assert_close(found["dx"], expected["dx"])
    assert (found["dweight"][30:] == 0).all() and (found["dbias"][30:] == 0).all()


@pytest.mark.quick
def test_nan_reaches_the_loss():
    inputs = operands(3, 20, 8)
    inputs["x"][1, 2] = torch.nan
    losses = ours(torch.tensor([1, 2, 3]))(**inputs)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.quick
def test_the_backward_may_run_twice(monkeypatch):
    """Kept logits are read, never turned into their gradient."""
    monkeypatch.setattr(slices, "KEPT_BYTES", KEPT["some kept"])
    m, v, c = CASES["slices"]
    leaves = [t.requires_grad_() for t in operands(m, v, c).values()]
    with by_the_op():
        loss = ops.linear_cross_entropy(*leaves[:2], targets_of(m, v), leaves[2])
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.quick
def test_tied_weight():
    """The gradient of an embedding that is also the head is the sum of both."""
    weight, ids = torch.randn(40, 16), torch.randint(0, 40, (25,))
    targets = targets_of(25, 40)

    def loss(head):
        return lambda weight: head(weight[ids].tanh(), weight)

    assert_same(
        loss(lambda x, w: ops.linear_cross_entropy(x, w, targets)),
        loss(lambda x, w: F.cross_entropy(x @ w.mT, targets)),
        loss(lambda x, w: F.cross_entropy(x @ w.mT, targets)),
        {"weight": weight},
        [torch.tensor(1.0)],
        eps_factor=4.0,
    )


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_kernels_are_bit_equal_for_any_thread_count(dtype):
    logits, targets = torch.randn(60, 3000).to(dtype), torch.randint(0, 3000, (60,))
    coefficients = torch.rand(4, 60) + 5

    def both():
        stats, grad = torch.zeros(4, 60), torch.empty_like(logits)
        torch.ops.encfast.vocab_scan(logits, None, targets, 0, 0.0, stats)
        torch.ops.encfast.vocab_grad(logits, None, targets, 0, 0.0, coefficients, grad)
        return stats, grad

    first, *others = for_thread_counts(both)
    assert first[0].isfinite().all() and first[1].isfinite().all()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.quick
def test_the_same_bits_in_every_run():
    m, v, c = CASES["slices"]
    inputs, targets, grad = operands(m, v, c), targets_of(m, v), torch.randn(m)
    first, second = (results(ours(targets), inputs, [grad]) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


MEMORY = (
    PEAK
    + """
M, V, C = 307, 50368, 64
x, weight = (torch.randn(n, C).requires_grad_() for n in (M, V))
targets = torch.randint(0, V, (M,))
heads = {
    "ours": lambda: encfast.ops.linear_cross_entropy(x, weight, targets),
    "logits": lambda: torch.nn.functional.cross_entropy(x @ weight.mT, targets),
}
few = torch.where(torch.arange(M) < 4, targets, -100)
encfast.ops.linear_cross_entropy(x, weight, few).backward()  # threads and MKL's buffers
peaks = {}
for name, head in heads.items():
    peaks[name] = peak(lambda: torch.autograd.grad(head(), (x, weight)))
print(*peaks.values(), weight.nbytes)
"""
)


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the reference holds all logits")
def test_peak_memory():
    """W.grad + 25 MiB, with logits of 59 MiB."""
    found, logits, grad = map(int, python("-c", MEMORY, OMP_NUM_THREADS="1").split()[-3:])
    assert found <= grad + 25 * 2**20, f"{found / 2**20:.1f} MiB"
    assert logits > grad + 100 * 2**20


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    v=st.integers(1, 90),
    c=st.integers(1, 60),
    dtype=st.sampled_from([FP32, BF16]),
    options=st.sampled_from(sorted(OPTIONS)),
    selected=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fuzz(m, v, c, dtype, options, selected, seed):
    torch.manual_seed(seed)
    options = {**OPTIONS[options], "ignore_index": IGNORE}
    inputs, targets = operands(m, v, c, dtype), targets_of(m, v)
    if selected:
        options["rows"] = torch.randint(0, m, (m,))
    grad = torch.randn(m)
    found = results(ours(targets, **options), inputs, [grad])
    wide = {k: t.double() for k, t in inputs.items()}
    expected = results(exact(targets, **options), wide, [grad])
    limit = 5e-2 if dtype == BF16 else 1e-4
    for key, value in found.items():
        scale = max(1.0, expected[key].abs().max().item())
        assert (value - expected[key]).abs().max() <= limit * scale, key


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    cases = "match or kept or selected or anything or ten_thousand or infinity or nan_reaches"
    run_under_isa(isa, f"({cases}) and not every_isa", __file__)
