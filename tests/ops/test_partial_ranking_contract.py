"""partial_ranking as an op: gradcheck of the reference, opcheck, compile, errors, memory."""

import pytest
import torch
from fresh_python import python
from row_cases import DTYPES, FP32, name, rows

from encfast import ops, ref
from encfast.ref.partial_ranking import candidate_dots_bwd, partial_ranking_bwd

NATIVE = ops.backends("partial_ranking")["cpu"] == "native"
OPS = torch.ops.encfast

CANDIDATES = torch.tensor([[3, 0, 6], [1, 1, 2], [5, 4, 0], [6, 2, 3], [0, 5, 1]])
VALID = torch.tensor([3, 0, 1, 2, 3])
POSITIVES = torch.tensor([3, -1, 0, 3, 5])


def features(dtype=FP32, layout="contiguous", d=6):
    return rows((5, d), dtype, layout), rows((7, d), dtype, layout)


@pytest.mark.quick
def test_gradcheck_of_the_reference():
    a, b = features(torch.float64)
    scale = torch.tensor(1.7, dtype=torch.float64)

    def loss(a, b, scale):
        return ref.partial_ranking(ref.candidate_dots(a, b, CANDIDATES), scale, VALID)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (a, b, scale)])


@pytest.mark.quick
def test_reference_parts_are_the_gradients():
    a, b = (x.requires_grad_() for x in features(torch.float64))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    dots = ref.candidate_dots(a, b, CANDIDATES)
    dloss = torch.randn(5).double()
    loss = ref.partial_ranking(dots, scale, VALID)
    want = torch.autograd.grad(loss, (dots, scale, a, b), dloss, retain_graph=True)
    ddots, dscale = partial_ranking_bwd(dloss, dots, scale, VALID)
    found = ddots, dscale, *candidate_dots_bwd(ddots, a, b, CANDIDATES)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck(dtype):
    a, b = features(dtype, "transposed")
    torch.library.opcheck(OPS.hard_negatives.default, (a, b, 3, POSITIVES))
    leaves = [x.detach().requires_grad_() for x in (a, b)]
    torch.library.opcheck(OPS.candidate_dots.default, (*leaves, CANDIDATES))
    ddots, scale = torch.randn(5, 3), torch.tensor(2.0)
    for wanted in ((True, True), (False, True), (True, False)):
        args = (ddots, a, b, CANDIDATES, *wanted)
        torch.library.opcheck(OPS.candidate_dots_bwd.default, args)
    leaves = [ddots.requires_grad_(), scale.requires_grad_()]
    torch.library.opcheck(OPS.partial_ranking.default, (*leaves, VALID))
    args = (torch.randn(5), ddots.detach(), scale.detach(), VALID)
    torch.library.opcheck(OPS.partial_ranking_bwd.default, args)


@pytest.mark.quick
def test_compiles_whole_for_any_batch():
    def step(a, b, scale):
        with torch.no_grad():
            mined = ops.hard_negatives(a, b, 3)
            teacher = torch.sin(mined.float())
        candidates, valid = ops.teacher_order(mined, teacher, threshold=0.0)
        return ops.partial_ranking(
            a, b, logit_scale=scale.exp(), candidates=candidates, valid=valid
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9, 17):
        inputs = [x.requires_grad_() for x in (torch.randn(n, 8), torch.randn(n, 8))]
        inputs.append(torch.tensor(0.5, requires_grad=True))
        want, got = step(*inputs), compiled(*inputs)
        assert torch.equal(got, want)
        expected = torch.autograd.grad(want, inputs)
        for x, y in zip(torch.autograd.grad(got, inputs), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.quick
def test_double_backward_raises():
    a, b = features()
    a.requires_grad_()
    loss = ops.partial_ranking(a, b, logit_scale=2.0, candidates=CANDIDATES, valid=VALID)
    (da,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(NotImplementedError, match="partial_ranking: double backward"):
        da.sum().backward()


A, B = torch.randn(5, 6), torch.randn(7, 6)
GOOD = {"a": A, "b": B, "logit_scale": torch.tensor(2.0), "candidates": CANDIDATES, "valid": VALID}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("message", "options", "kind"),
    [
        (r"a has shape \(0, 6\), expected at least one row", {"a": A[:0]}, ValueError),
        ("b is bfloat16, expected float32", {"b": B.bfloat16()}, TypeError),
        ("b has 5 channels, a has 6", {"b": B[:, :5]}, ValueError),
        ("logit_scale holds 0.0, expected a positive finite", {"logit_scale": 0}, ValueError),
        ("logit_scale holds -2.0", {"logit_scale": -2.0}, ValueError),
        ("logit_scale holds inf", {"logit_scale": float("inf")}, ValueError),
        ("logit_scale holds nan", {"logit_scale": float("nan")}, ValueError),
        ("candidates is int32, expected int64", {"candidates": CANDIDATES.int()}, TypeError),
        (r"candidates has shape \(4, 3\), expected \[5, K\]", {"candidates": CANDIDATES[:4]},
         ValueError),
        (r"candidates has shape \(5, 0\)", {"candidates": CANDIDATES[:, :0]}, ValueError),
        (r"candidates has shape \(5,\)", {"candidates": CANDIDATES[:, 0]}, ValueError),
        ("candidates holds 7, expected one of the 7 rows of b", {"candidates": CANDIDATES + 1},
         ValueError),
        ("candidates holds -1", {"candidates": CANDIDATES - 1}, ValueError),
        ("valid holds 4, expected 0..3", {"valid": VALID + 1}, ValueError),
        ("valid holds -1", {"valid": VALID - 1}, ValueError),
        ("valid is int32", {"valid": VALID.int()}, TypeError),
        ("valid has 4 entries, expected one for each of 5", {"valid": VALID[:4]}, ValueError),
        ("reduction is 'mean', expected one of mean_query", {"reduction": "mean"}, ValueError),
    ],
)  # fmt: skip
def test_errors_of_partial_ranking(message, options, kind):
    with pytest.raises(kind, match=f"partial_ranking: {message}"):
        ops.partial_ranking(**GOOD | options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("message", "options", "kind"),
    [
        ("k is 0, expected 1..7, the number of candidates", {"k": 0}, ValueError),
        ("k is 8, expected 1..7", {"k": 8}, ValueError),
        ("k is float", {"k": 2.0}, TypeError),
        ("positives holds 3, which leaves 6 candidates, k is 7", {"k": 7}, ValueError),
        ("positives holds 7, expected -1", {"positives": POSITIVES + 2}, ValueError),
        (r"b has shape \(0, 6\)", {"b": B[:0]}, ValueError),
        ("offset is 3, but a has 5 rows and b 7", {"positives": None, "offset": 3}, ValueError),
    ],
)
def test_errors_of_hard_negatives(message, options, kind):
    with pytest.raises(kind, match=f"hard_negatives: {message}"):
        ops.hard_negatives(**{"a": A, "b": B, "k": 2, "positives": POSITIVES} | options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("message", "options", "kind"),
    [
        (r"scores has shape \(5, 2\), candidates has \(5, 3\)", {"scores": torch.ones(5, 2)},
         ValueError),
        ("scores is torch.int64, expected floating", {"scores": CANDIDATES}, TypeError),
        ("scores holds nan", {"scores": torch.full((5, 3), torch.nan)}, ValueError),
        ("candidates is float32", {"candidates": torch.ones(5, 3)}, TypeError),
        ("mask is float32", {"mask": torch.ones(5, 3)}, TypeError),
        (r"mask has shape \(5, 1\)", {"mask": torch.ones(5, 1, dtype=torch.bool)}, ValueError),
        ("threshold and top_m are given", {"threshold": 0.0, "top_m": 2}, ValueError),
        ("threshold is nan", {"threshold": float("nan")}, ValueError),
        ("top_m is -1", {"top_m": -1}, ValueError),
    ],
)  # fmt: skip
def test_errors_of_teacher_order(message, options, kind):
    with pytest.raises(kind, match=f"teacher_order: {message}"):
        ops.teacher_order(**{"candidates": CANDIDATES, "scores": torch.randn(5, 3)} | options)


@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What Python checks, the kernel checks again: compiled graphs skip the Python check."""
    dots, scale = torch.randn(5, 3), torch.tensor(2.0)
    for op, *args in (
        (OPS.hard_negatives, A, B, 8, POSITIVES),
        (OPS.hard_negatives, A, B, 7, POSITIVES),
        (OPS.hard_negatives, A, B, 0, POSITIVES),
        (OPS.hard_negatives, A, B, 2, POSITIVES + 2),
        (OPS.hard_negatives, A, B, 2, POSITIVES[:4]),
        (OPS.candidate_dots, A, B, CANDIDATES + 1),
        (OPS.candidate_dots, A, B, CANDIDATES - 1),
        (OPS.candidate_dots, A, B, CANDIDATES[:4]),
        (OPS.candidate_dots, A[:0], B, CANDIDATES[:0]),
        (OPS.candidate_dots, A, B[:, :5], CANDIDATES),
        (OPS.partial_ranking, dots, scale, VALID + 1),
        (OPS.partial_ranking, dots, scale, VALID - 1),
        (OPS.partial_ranking, dots, scale, VALID[:4]),
        (OPS.partial_ranking, dots, -scale, VALID),
        (OPS.partial_ranking, dots[:0], scale, VALID[:0]),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=op.__name__):
            op(*args)


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
def test_direct_backward_calls_never_read_out_of_bounds():
    dots, scale = torch.randn(5, 3), torch.tensor(2.0)
    for op, *args in (
        (OPS.candidate_dots_bwd, dots[:4], A, B, CANDIDATES, True, True),
        (OPS.candidate_dots_bwd, dots, A, B, CANDIDATES + 1, True, True),
        (OPS.partial_ranking_bwd, torch.ones(4), dots, scale, VALID),
        (OPS.partial_ranking_bwd, torch.ones(5), dots, scale, VALID + 1),
    ):
        with pytest.raises(RuntimeError, match="_bwd: "):
            op(*args)


# The peak starts again from what is resident, so that no earlier one hides this one.
PEAK = """
import torch
from encfast import ops
def resident(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))
n, m, d, k = {shape}
a, b = torch.randn(n, d).requires_grad_(), torch.randn(m, d).requires_grad_()
def mined():
    return ops.hard_negatives(a, b, k)
def loss(candidates):
    valid = torch.full((n,), k // 2)
    options = dict(logit_scale=0.1, candidates=candidates, valid=valid)
    ops.partial_ranking(a, b, **options).backward()
candidates = {setup}
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = resident("VmHWM")
{what}
print(resident("VmHWM") - before)
"""


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the reference holds [B, M] and [B, K, D]")
def test_peak_memory_grows_with_candidates():
    """K = 4096: twice [B, K] floats and what gradients need, where [B, K, K] would be 8 GiB."""
    shape = n, m, d, k = 128, 8192, 64, 4096
    run = PEAK.format(shape=shape, setup="mined()", what="loss(candidates)")
    kib = int(python("-c", run).split()[-1])
    scores, features_ = n * k * 4 / 1024, m * d * 4 / 1024
    grads = features_ + n * d * 4 / 1024
    block = 196 * m * 4 / 1024  # the rows of G at hand
    print(f"{kib} KiB; [B, K] floats {scores:.0f}, [M, D] {features_:.0f}, G {block:.0f}")
    assert kib < 3 * scores + grads + 2 * features_ + block + 6 * 1024 < n * k * k * 4 / 1024 / 200


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the reference holds [B, M]")
def test_peak_memory_of_mining_holds_no_matrix_of_products():
    shape = n, m, _, k = 4096, 8192, 64, 16
    kib = int(python("-c", PEAK.format(shape=shape, setup="None", what="mined()")).split()[-1])
    print(f"{kib} KiB; all products would be {n * m * 4 / 1024:.0f}")
    assert kib < n * k * 8 / 1024 + 4 * 1024 < n * m * 4 / 1024 / 16
