"""rank_loss against its float64 reference: losses, options, gradients, accuracy, layouts."""

import functools

import pytest
import torch
import torch.nn.functional as F
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import BF16, DTYPES, FP32, assert_same, for_thread_counts, name, results, rows

from encfast import ops, ref

NATIVE = ops.backends("rank_loss")["cpu"] == "native"

# B, M and D: single rows, odd sizes, more than one chunk of rows, panel, piece and stripe.
SHAPES = {
    "one pair": (1, 1, 3),
    "one row": (1, 5, 2),
    "one column": (6, 1, 4),
    "odd": (13, 21, 37),
    "square": (64, 64, 64),
    "chunks": (390, 337, 33),
    "stripes": (970, 1930, 20),
    "many channels": (35, 67, 300),
}


def features(shape, dtype=FP32, layout="contiguous", scale=10.0):
    n, m, d = shape
    found = {"a": rows((n, d), dtype, layout), "b": rows((m, d), dtype, layout)}
    found = {k: (v / d**0.5).to(dtype) for k, v in found.items()}
    return found | {"logit_scale": torch.tensor(scale)}


def some_positives(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, shape[1], (shape[0],), generator=g)


def assert_loss(op, shape, dtype=FP32, layout="contiguous", *, inputs=None, **options):
    """The loss and all gradients; options that the reference takes too."""
    inputs = inputs or features(shape, dtype, layout)
    n, reduction = shape[0], options.get("reduction", "mean")
    grad = torch.randn(n) if reduction == "none" else torch.tensor(0.7)
    single = 1 in shape[:2]
    # Gradients of scale and bias are differences: of what positives and what all pairs pull.
    pull = (inputs["a"].double() * inputs["b"].double()[options["positives"]]).sum(1).abs().sum()
    rows_at_once = n if reduction == "mean" else 1
    terms = {"dlogit_scale": pull.item() / rows_at_once, "dlogit_bias": n / rows_at_once}
    assert_same(
        functools.partial(getattr(ops, op), **options),
        functools.partial(getattr(ref, op), **options),
        functools.partial(getattr(ref, op), **options),
        inputs,
        [grad],
        terms=terms,
        eps_factor=4.0 if n < 20 else 1.0,
        allow_degenerate=single,
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", ["mean", "rows"])
def test_info_nce_shapes(shape, dtype, directions):
    shape = SHAPES[shape]
    positives = some_positives(shape).clamp(min=0 if shape[0] == 1 else -1)
    assert_loss("info_nce", shape, dtype, positives=positives, directions=directions)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_siglip_shapes(shape, dtype):
    shape = SHAPES[shape]
    inputs = features(shape, dtype) | {"logit_bias": torch.tensor(-3.0)}
    assert_loss("siglip", shape, dtype, inputs=inputs, positives=some_positives(shape))


@pytest.mark.quick
@pytest.mark.parametrize("directions", ["mean", "sum", "rows"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_info_nce_options(directions, reduction, label_smoothing):
    shape = SHAPES["chunks"]
    options = {"directions": directions, "reduction": reduction, "label_smoothing": label_smoothing}
    assert_loss("info_nce", shape, positives=some_positives(shape), **options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("directions", ["mean", "rows"])
def test_info_nce_negatives(directions, dtype):
    shape = (40, 52, 48)
    inputs = features(shape, dtype) | {"negatives": rows((71, 48), dtype) / 7}
    positives = some_positives(shape)
    assert_loss("info_nce", shape, dtype, inputs=inputs, positives=positives, directions=directions)


# Panels, pieces and chunks that hold the excluded pairs alone, and several stripes.
EXCLUDED_SHAPES = [(3, 3, 5), (193, 193, 17), (40, 321, 48), (970, 1930, 20)]


def self_excluded(shape):
    """Positives, and excluded rows of which some are none: mostly row i of row i."""
    n, m, _ = shape
    own = torch.arange(n) % m
    positives = (own + 1 + torch.arange(n) % max(m - 2, 1)) % m
    return positives.where(torch.arange(n) % 7 != 3, -1), own.where(torch.arange(n) % 5 != 2, -1)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", EXCLUDED_SHAPES, ids=str)
@pytest.mark.parametrize("directions", ["mean", "rows"])
def test_excluded_pairs(shape, dtype, directions):
    positives, excluded = self_excluded(shape)
    options = {"positives": positives, "excluded": excluded, "directions": directions}
    assert_loss("info_nce", shape, dtype, **options)


@pytest.mark.quick
def test_excluded_pairs_of_negatives_count_on_from_b():
    shape = (40, 52, 48)
    inputs = features(shape) | {"negatives": rows((71, 48)) / 7}
    excluded = torch.arange(40) + 60
    options = {"positives": some_positives(shape), "excluded": excluded}
    assert_loss("info_nce", shape, inputs=inputs, **options)
    inputs["negatives"][8:48] = 1e3 * inputs["a"]  # each would be its row's largest by far
    loss = ops.info_nce(**inputs, **options, directions="rows", reduction="none")
    assert loss.max() < ops.info_nce(**inputs, positives=options["positives"], directions="rows")


@pytest.mark.quick
@pytest.mark.parametrize("directions", ["mean", "rows"])
@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 1, 4), (1, 5, 4)], ids=str)
def test_rows_and_columns_without_any_candidate_have_no_loss(shape, directions):
    inputs = features(shape)
    none = torch.zeros(shape[0], dtype=torch.int64)
    loss = functools.partial(
        ops.info_nce, positives=none - 1, excluded=none, directions=directions, reduction="sum"
    )
    assert all((v == 0).all() for v in results(loss, inputs, [torch.tensor(1.0)]).values())


@pytest.mark.quick
@pytest.mark.parametrize("directions", ["mean", "rows"])
def test_what_is_excluded_has_no_influence(directions):
    """Row 3 of b is excluded everywhere: loss and gradients are bit-equal for any finite values."""
    positives, excluded = torch.arange(30) + 4, torch.full((30,), 3)
    loss = functools.partial(
        ops.info_nce, positives=positives, excluded=excluded, directions=directions
    )
    inputs = features((30, 40, 16))
    first = results(loss, inputs, [torch.tensor(1.0)])
    inputs["b"][3] *= -1e4
    second = results(loss, inputs, [torch.tensor(1.0)])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (first["db"][3] == 0).all() and (first["db"][4:34] != 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_siglip_reductions(reduction):
    shape = SHAPES["chunks"]
    assert_loss("siglip", shape, positives=some_positives(shape), reduction=reduction)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_layouts(op, layout):
    shape = (50, 70, 45)
    inputs = features(shape)
    # One expanded row has no gradient of its own: only the candidates repeat.
    inputs["b"] = rows(shape[1:], FP32, layout) / 7
    if layout != "expanded":
        inputs["a"] = rows((50, 45), FP32, layout) / 7
    assert_loss(op, shape, inputs=inputs, positives=some_positives(shape), reduction="sum")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_matched_pairs_keep_small_losses_accurate(dtype):
    """log-sum-exp minus the positive's logit, both near 100, would lose losses of 1e-4."""
    n, d = 300, 96
    a = F.normalize(torch.randn(n, d), dim=-1)
    b = F.normalize(a + 0.02 * torch.randn(n, d), dim=-1)
    inputs = {"a": a.to(dtype), "b": b.to(dtype), "logit_scale": torch.tensor(25.0)}
    positives = torch.arange(n)
    with torch.no_grad():
        assert ops.info_nce(**inputs).item() < 0.1
    for reduction in ("mean", "none"):
        assert_loss("info_nce", (n, n, d), inputs=inputs, positives=positives, reduction=reduction)
    inputs["logit_bias"] = torch.tensor(-12.0)
    assert_loss("siglip", (n, n, d), inputs=inputs, positives=positives)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_logits_of_ten_thousand_stay_finite(op, dtype):
    inputs = features((60, 60, 16), dtype, scale=1e4)
    inputs["b"][0] = inputs["a"][0]
    x = 1e4 * inputs["a"].float() @ inputs["b"].float().T
    assert x.max() > 1e4 and x.min() < -1e4
    found = results(getattr(ops, op), inputs, [torch.tensor(1.0)])
    assert all(v.isfinite().all() and v.abs().sum() > 0 for v in found.values())
    # Softmax is decided by differences that rounding of the logits moves: the loss alone compares.
    wide = {k: v.double() for k, v in inputs.items()}
    positives = torch.arange(60)
    want = getattr(ref, op)(**wide, positives=positives)
    assert (found["out0"] - want).abs() <= 1e-6 * want


@pytest.mark.quick
def test_defaults_are_clip():
    inputs = features((30, 30, 20))
    x = inputs["logit_scale"] * inputs["a"] @ inputs["b"].T
    right = torch.arange(30)
    want = (F.cross_entropy(x, right) + F.cross_entropy(x.T, right)) / 2
    torch.testing.assert_close(ops.info_nce(**inputs), want)
    assert torch.equal(
        ops.info_nce(inputs["a"], inputs["b"], logit_scale=10.0), ops.info_nce(**inputs)
    )


@pytest.mark.quick
def test_offset_names_the_rows_of_one_process():
    inputs = features((8, 24, 20))
    x = inputs["logit_scale"] * inputs["a"] @ inputs["b"].T
    got = ops.info_nce(**inputs, offset=16, directions="rows")
    torch.testing.assert_close(got, F.cross_entropy(x, torch.arange(16, 24)))


@pytest.mark.quick
def test_siglip_blocks_of_other_processes_add_up():
    """open_clip's SigLipLoss: own pairs once, features of the others as negatives only."""
    a, b, scale = features((12, 36, 20)).values()
    options = {"logit_scale": scale, "logit_bias": -2.0}
    own, *others = b[12:24], b[:12], b[24:]
    parts = [ops.siglip(a, own, **options)]
    parts += [ops.siglip(a, other, **options, negative_only=True) for other in others]
    torch.testing.assert_close(sum(parts), ops.siglip(a, b, **options, offset=12))


@pytest.mark.quick
@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_rows_without_a_positive(smoothing):
    inputs = features((20, 30, 16))
    none = torch.full((20,), -1)
    found = results(
        functools.partial(ops.info_nce, positives=none, label_smoothing=smoothing),
        inputs,
        [torch.tensor(1.0)],
    )
    assert all((v == 0).all() for v in found.values())
    some = some_positives((20, 30, 16))
    some[:5], some[5:8] = -1, 3
    options = {"positives": some, "directions": "rows", "reduction": "none"}
    found = results(
        functools.partial(ops.info_nce, **options, label_smoothing=smoothing),
        inputs,
        [torch.ones(20)],
    )
    has = some >= 0
    assert (found["out0"][~has] == 0).all() and (found["out0"][has] > 0).all()
    assert (found["da"][~has] == 0).all() and (found["da"][has] != 0).any(1).all()


@pytest.mark.quick
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_nan_is_not_hidden(op):
    inputs = features((30, 40, 16))
    inputs["b"][35, 3] = float("nan")
    loss = getattr(ops, op)(**inputs, reduction="none")
    assert loss.isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("wanted", [("a",), ("b",), ("logit_scale",), ("a", "logit_scale")])
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_gradients_are_made_where_they_are_wanted(op, wanted):
    inputs = features((30, 40, 16))
    every = results(getattr(ops, op), inputs, [torch.tensor(1.0)])
    leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in inputs.items()}
    getattr(ops, op)(**leaves).backward()
    for key, leaf in leaves.items():
        assert torch.equal(leaf.grad, every[f"d{key}"]) if key in wanted else leaf.grad is None


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_bit_equal_for_any_thread_count(op, dtype):
    inputs = features((1000, 1201, 40), dtype)
    options = {"positives": some_positives((1000, 1201))}
    if op == "info_nce":
        options["positives"], options["excluded"] = self_excluded((1000, 1201, 40))
    loss = functools.partial(getattr(ops, op), **options)
    first, *others = for_thread_counts(lambda: results(loss, inputs, [torch.tensor(1.0)]))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 230),
    m=st.integers(1, 230),
    d=st.integers(1, 140),
    op=st.sampled_from(["info_nce", "siglip"]),
    dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(n, m, d, op, dtype, seed):
    torch.manual_seed(seed)
    inputs, positives = features((n, m, d), dtype, scale=5.0), some_positives((n, m), seed)
    options = {"positives": positives, "reduction": "sum"}
    got = results(functools.partial(getattr(ops, op), **options), inputs, [torch.tensor(1.0)])
    wide = {k: v.double() for k, v in inputs.items()}
    want = results(functools.partial(getattr(ref, op), **options), wide, [torch.tensor(1.0)])
    for key, value in got.items():
        limit = 2e-2 if value.dtype == BF16 else 1e-5
        assert (value - want[key]).abs().max() <= limit * max(1.0, want[key].abs().max()), key


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    cases = "shapes or excluded or negatives or layouts or small_losses or ten_thousand or nan"
    run_under_isa(isa, f"({cases}) and not every_isa", __file__)
