"""linear_kl against its float64 reference: heads, temperature, slices, gradients, errors."""

import pytest
import torch
from fresh_python import run_under_isa
from kl_cases import assert_matches, exact, operands, ours
from row_cases import BF16, DTYPES, FP32, name, results

from encfast import ops
from encfast.ops import _vocab_slices as slices
from encfast.ref.linear_kl import linear_kl_bwd

NATIVE = ops.backends("linear_kl")["cpu"] == "native"
OP = torch.ops.encfast.linear_kl.default
BWD = torch.ops.encfast.linear_kl_bwd.default

# Rows, V, channels of student and teacher, temperature. Some dozens of rows: where both sides round
# logits to bfloat16, the largest error of a few losses is a matter of the draw.
CASES = {
    "one row": (1, 7, 5, 3, None),
    "odd": (83, 67, 13, 29, None),
    "warm": (83, 67, 13, 29, 3.0),
    "cold": (64, 128, 32, 32, 0.5),
    "slices": (76, 8300, 24, 40, 2.0),
}
KEPT = {"all kept": 4 * 76 * 8300 * 2, "some kept": 2 * 76 * 4096 * 4 + 16, "none kept": 0}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_reference(case, dtype):
    assert_matches(CASES[case], dtype)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("kept", KEPT)
def test_logits_that_are_kept_and_that_are_not(kept, dtype, monkeypatch):
    monkeypatch.setattr(slices, "KEPT_BYTES", KEPT[kept])
    assert_matches(CASES["slices"], dtype)


@pytest.mark.quick
def test_reference_gradients():
    student, teacher = operands((4, 5, 3, 2, 2.0))
    teacher = tuple(t.double() for t in teacher)
    leaves = [t.double().requires_grad_() for t in student.values()]
    f = exact(teacher, 2.0)
    assert torch.autograd.gradcheck(f, leaves)
    dloss = torch.randn(4).double()
    expected = torch.autograd.grad(f(*leaves), leaves, dloss)
    x, weight, bias = (t.detach() for t in leaves)
    found = linear_kl_bwd(dloss, x, weight, *teacher[:2], bias, teacher[2], 2.0)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_a_student_that_is_its_teacher(dtype):
    x, weight, bias = operands((20, 60, 16, 1, None), dtype)[0].values()
    leaf = x.clone().requires_grad_()
    loss = ops.linear_kl(leaf, weight, x, weight, bias=bias, teacher_bias=bias, reduction="sum")
    (dx,) = torch.autograd.grad(loss, leaf)
    assert loss.abs() < 1e-4 and dx.abs().max() < 1e-5


@pytest.mark.quick
def test_entries_that_neither_has_add_nothing():
    case = (12, 40, 16, 20, None)
    student, (tx, tw, tb) = operands(case)
    student["bias"][30:], tb[30:] = -torch.inf, -torch.inf
    found = results(ours((tx, tw, tb), None), student, [torch.tensor(1.0)])
    cut = {k: v if k == "x" else v[:30] for k, v in student.items()}
    expected = results(ours((tx, tw[:30], tb[:30]), None), cut, [torch.tensor(1.0)])
    torch.testing.assert_close(found["out0"], expected["out0"])
    torch.testing.assert_close(found["dx"], expected["dx"])


@pytest.mark.quick
def test_reductions_and_weights():
    student, teacher = operands(CASES["warm"])
    weights = torch.rand(83)
    losses = ours(teacher, 3.0, reduction="none")(**student)
    reduced = {
        reduction: ours(teacher, 3.0, reduction=reduction, weights=weights)(**student)
        for reduction in ("none", "sum", "mean")
    }
    torch.testing.assert_close(reduced["none"], losses * weights)
    torch.testing.assert_close(reduced["sum"], (losses * weights).sum())
    torch.testing.assert_close(reduced["mean"], (losses * weights).sum() / weights.sum())
    torch.testing.assert_close(ours(teacher, 3.0)(**student), losses.mean())


@pytest.mark.quick
def test_no_rows():
    student, teacher = operands((0, 9, 4, 3, None))
    found = results(ours(teacher, None), student, [torch.tensor(1.0)])
    assert found["dx"].shape == (0, 4) and found["dweight"].shape == (9, 4)
    assert all((value == 0).all() for value in found.values())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck(dtype):
    student, (tx, tw, tb) = operands((6, 20, 5, 4, 2.0), dtype)
    x, weight, bias = (t.requires_grad_() for t in student.values())
    for biases in ((bias, tb), (None, None)):
        torch.library.opcheck(OP, (x, weight, tx, tw, *biases, None, False))
    head = x.detach(), weight.detach(), tx, tw, bias.detach(), tb, 2.0
    _, lse, kept = OP(*head, False)
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(BWD, (torch.randn(6), *head, lse, kept, *wanted))


def test_compiles_whole():
    student, teacher = operands(CASES["warm"])
    f = ours(teacher, 3.0, weights=torch.rand(83))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    grad = [torch.tensor(0.5)]
    found, expected = results(compiled, student, grad), results(f, student, grad)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.quick
def test_double_backward_raises():
    student, teacher = operands(CASES["odd"])
    student["x"].requires_grad_()
    loss = ours(teacher, None)(**student)
    (dx,) = torch.autograd.grad(loss, student["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_kl: double backward"):
        dx.sum().backward()


X, W, TX, TW = torch.randn(5, 6), torch.randn(8, 6), torch.randn(5, 3), torch.randn(8, 3)


def call(*args, **options):
    return lambda: ops.linear_kl(*args, **options)


ERRORS = {
    "x is list": (call([1], W, TX, TW), TypeError),
    "x is float64, expected .* encfast.ref": (call(X.double(), W, TX, TW), TypeError),
    r"weight has shape \(8, 5\)": (call(X, W[:, :5], TX, TW), ValueError),
    "teacher_x is bfloat16, expected float32": (
        call(X, W, TX.bfloat16(), TW.bfloat16()),
        TypeError,
    ),
    r"teacher_x has shape \(4, 3\), expected 5 rows": (call(X, W, TX[:4], TW), ValueError),
    r"teacher_x has shape \(3,\)": (call(X, W, TX[0], TW), ValueError),
    "teacher_x is on meta": (call(X, W, TX.to("meta"), TW.to("meta")), ValueError),
    r"teacher_weight has shape \(8, 2\)": (call(X, W, TX, TW[:, :2]), ValueError),
    r"teacher_weight has shape \(7, 3\), expected 8 rows": (call(X, W, TX, TW[:7]), ValueError),
    r"bias has shape \(7,\)": (call(X, W, TX, TW, bias=torch.ones(7)), ValueError),
    r"teacher_bias has shape \(7,\)": (call(X, W, TX, TW, teacher_bias=torch.ones(7)), ValueError),
    "temperature is 0, expected a finite number > 0": (
        call(X, W, TX, TW, temperature=0),
        ValueError,
    ),
    "temperature is nan": (call(X, W, TX, TW, temperature=float("nan")), ValueError),
    "temperature is inf": (call(X, W, TX, TW, temperature=float("inf")), ValueError),
    r"weights has shape \(4,\), expected \(5,\)": (
        call(X, W, TX, TW, weights=torch.ones(4)),
        ValueError,
    ),
    "weights holds -1.0": (call(X, W, TX, TW, weights=-torch.ones(5)), ValueError),
    "reduction is 'avg'": (call(X, W, TX, TW, reduction="avg"), ValueError),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=f"linear_kl: {message}"):
        call()


@pytest.mark.quick
def test_direct_calls_check_too():
    for args in ((X, W, TX[:4], TW), (X, W[:, :5], TX, TW), (X, W, TX, TW[:7])):
        with pytest.raises((ValueError, TypeError), match="linear_kl"):
            OP(*args, None, None, None, True)
    if NATIVE:
        head, wanted = (X, W, TX, TW, None, None, None), (True, True, True)
        _, lse, kept = OP(*head, True)
        for dloss, its_lse, memory, what in (
            (torch.ones(4), lse, kept, "dloss"),
            (torch.ones(5), lse[0], kept, "lse"),
            (torch.ones(5), lse, kept[:7], "kept"),
        ):
            with pytest.raises(ValueError, match=f"_bwd: {what}"):
                BWD(dloss, *head, its_lse, memory, *wanted)


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    cases = "(match or kept or neither or its_teacher) and not every_isa"
    run_under_isa(isa, cases, __file__)
