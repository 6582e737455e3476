"""What linear_cross_entropy promises to PyTorch: opcheck, compile, checkpoints, errors."""

import pytest
import torch
import torch._dynamo.testing
from row_cases import BF16, DTYPES, FP32, name
from torch.utils.checkpoint import checkpoint

from encfast import ops

NATIVE = ops.backends("linear_cross_entropy")["cpu"] == "native"
OP = torch.ops.encfast.linear_cross_entropy.default
BWD = torch.ops.encfast.linear_cross_entropy_bwd.default
OPTIONS = {
    "plain": (-100, None, None, None),
    "all": (3, 0.1, 1e-3, 5.0),
}


def operands(m=9, v=20, c=6, dtype=FP32):
    """One target is 3, which may be the one to ignore."""
    x, weight = torch.randn(c, m).to(dtype).mT, torch.randn(v, c).to(dtype)
    targets = torch.randint(0, v, (m,))
    targets[1] = 3
    return x, weight, targets, torch.randn(v)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options, dtype):
    x, weight, targets, bias = operands(dtype=dtype)
    unkept = (x, weight, targets, bias, None, *OPTIONS[options], False)
    torch.library.opcheck(OP, unkept)
    # Memory of logits that are not kept is not initialised; with all rows predicted there is none.
    targets = targets.clamp(min=4)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    chosen = torch.tensor([4, 0, 4, 8, 1, 2, 3, 5, 6]) if options == "all" else None
    head = (*leaves[:2], targets, leaves[2] if options == "all" else None, chosen)
    torch.library.opcheck(OP, (*head, *OPTIONS[options], True))
    head = [t if t is None else t.detach() for t in head]
    _, lse, kept = OP(*head, *OPTIONS[options], True)
    for wanted in ((True, True, True), (False, True, False), (True, False, False)):
        args = (torch.randn(9), *head, lse, kept, *OPTIONS[options], *wanted)
        torch.library.opcheck(BWD, args)


@pytest.mark.quick
def test_double_backward_raises():
    x, weight, targets, _ = operands()
    x = x.detach().requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, targets)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: double backward"):
        dx.sum().backward()


def mean_and_gradients(f, x, weight, targets, bias):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    loss = f(leaves[0], leaves[1], targets, leaves[2])
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_and_once_for_all_sizes(reduction):
    def loss(x, weight, targets, bias):
        options = {"label_smoothing": 0.1, "reduction": reduction, "weights": targets.abs() + 1.0}
        return ops.linear_cross_entropy(x.tanh(), weight, targets, bias, **options).sum()

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=graphs, fullgraph=True, dynamic=True)
    for m in (9, 17, 33):
        inputs = operands(m=m)
        for got, want in zip(
            mean_and_gradients(compiled, *inputs), mean_and_gradients(loss, *inputs), strict=True
        ):
            torch.testing.assert_close(got, want)
    assert graphs.frame_count == 1


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    inputs = operands()
    expected = mean_and_gradients(ops.linear_cross_entropy, *inputs)
    found = mean_and_gradients(
        lambda *a: checkpoint(ops.linear_cross_entropy, *a, use_reentrant=reentrant), *inputs
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.quick
def test_autocast_casts_nothing():
    inputs = operands()
    expected = mean_and_gradients(ops.linear_cross_entropy, *inputs)
    with torch.autocast("cpu", dtype=BF16):
        found = mean_and_gradients(ops.linear_cross_entropy, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the reference keeps nothing")
def test_nothing_is_kept_without_gradients(monkeypatch):
    from encfast.ops import _linear_cross_entropy_cpu as cpu

    kept, multiply = [], cpu.VocabSlices

    def recorded(x, weight, memory, dtype):
        kept.append(memory.numel())
        return multiply(x, weight, memory, dtype)

    monkeypatch.setattr(cpu, "VocabSlices", recorded)
    x, weight, targets, _ = operands()
    ops.linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        ops.linear_cross_entropy(x.detach().requires_grad_(), weight, targets)
    ops.linear_cross_entropy(x.detach().requires_grad_(), weight, targets)
    assert kept == [0, 0, 9 * 20]


X, W, T = torch.randn(5, 6), torch.randn(8, 6), torch.tensor([0, 7, -100, 3, 1])


def call(*args, **options):
    return lambda: ops.linear_cross_entropy(*args, **options)


ERRORS = {
    "x is list": (call([1], W, T), TypeError),
    r"x has shape \(6,\)": (call(X[0], W, T), ValueError),
    "x is float64, expected .* encfast.ref": (call(X.double(), W, T), TypeError),
    r"weight has shape \(6,\)": (call(X, W[0], T), ValueError),
    "weight is bfloat16, expected float32, the dtype of x": (call(X, W.bfloat16(), T), TypeError),
    "weight is on meta": (call(X, W.to("meta"), T), ValueError),
    r"weight has shape \(8, 5\), expected \[V, 6\]": (call(X, W[:, :5], T), ValueError),
    r"weight has shape \(0, 6\), .* V > 0": (call(X, W[:0], T), ValueError),
    r"bias has shape \(1, 8\)": (call(X, W, T, torch.ones(1, 8)), ValueError),
    "bias is int64": (call(X, W, T, torch.ones(8).long()), TypeError),
    "bias is on meta": (call(X, W, T, torch.ones(8, device="meta")), ValueError),
    r"bias has shape \(7,\), expected \(8,\)": (call(X, W, T, torch.ones(7)), ValueError),
    r"targets has shape \(1, 5\)": (call(X, W, T[None]), ValueError),
    "targets is int32": (call(X, W, T.int()), TypeError),
    "targets is on meta": (call(X, W, T.to("meta")), ValueError),
    r"targets has shape \(4,\), expected \(5,\), one for each row of x": (
        call(X, W, T[:4]),
        ValueError,
    ),
    "targets holds 8, expected 0..7, .* or ignore_index -100": (call(X, W, T + 1), ValueError),
    "targets holds -100, .* ignore_index -1": (call(X, W, T, ignore_index=-1), ValueError),
    r"rows has shape \(1, 5\)": (call(X, W, T, rows=T[None]), ValueError),
    "rows is int32": (call(X, W, T, rows=T.int()), TypeError),
    "rows is on meta": (call(X, W, T, rows=T.to("meta")), ValueError),
    "rows holds -100, expected 0..4": (call(X, W, T, rows=T), ValueError),
    "rows holds 5, expected 0..4": (call(X, W, T, rows=torch.arange(1, 6)), ValueError),
    r"targets has shape \(5,\), expected \(3,\), one for each entry of rows": (
        call(X, W, T, rows=torch.arange(3)),
        ValueError,
    ),
    "weights is list": (call(X, W, T, weights=[1.0]), TypeError),
    r"weights has shape \(5, 1\)": (call(X, W, T, weights=torch.ones(5, 1)), ValueError),
    "weights is int64": (call(X, W, T, weights=T), TypeError),
    "weights is on meta": (call(X, W, T, weights=torch.ones(5, device="meta")), ValueError),
    r"weights has shape \(4,\), expected \(5,\)": (
        call(X, W, T, weights=torch.ones(4)),
        ValueError,
    ),
    "weights holds -1.0, expected finite numbers >= 0": (
        call(X, W, T, weights=-torch.ones(5)),
        ValueError,
    ),
    "weights holds nan": (call(X, W, T, weights=torch.full((5,), torch.nan)), ValueError),
    "weights holds inf": (call(X, W, T, weights=torch.full((5,), torch.inf)), ValueError),
    "label_smoothing is 1.5, expected 0..1": (call(X, W, T, label_smoothing=1.5), ValueError),
    "label_smoothing is nan": (call(X, W, T, label_smoothing=float("nan")), ValueError),
    "z_loss is -1": (call(X, W, T, z_loss=-1), ValueError),
    "z_loss is inf": (call(X, W, T, z_loss=float("inf")), ValueError),
    "softcap is 0, expected a finite number > 0": (call(X, W, T, softcap=0), ValueError),
    "softcap is nan": (call(X, W, T, softcap=float("nan")), ValueError),
    "reduction is 'avg', expected one of": (call(X, W, T, reduction="avg"), ValueError),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=f"linear_cross_entropy: {message}"):
        call()


@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What the public function checks, the op checks again: compiled graphs skip the first."""
    options = (-100, None, None, None)
    for x, weight, targets, bias, chosen in (
        (X, W, T + 1, None, None),
        (X, W, T[:4], None, None),
        (X, W, T.int(), None, None),
        (X, W[:, :5], T, None, None),
        (X, W.half(), T, None, None),
        (X, W, T, torch.ones(7), None),
        (X, W, T, None, T),
    ):
        with pytest.raises((ValueError, TypeError), match="linear_cross_entropy"):
            OP(x, weight, targets, bias, chosen, *options, True)
    if NATIVE:
        head, wanted = (X, W, T, None, None), (True, True, True)
        _, lse, kept = OP(*head, *options, True)
        for dloss, its_lse, memory, what in (
            (torch.ones(4), lse, kept, "dloss"),
            (torch.ones(5).half(), lse, kept, "dloss"),
            (torch.ones(5), lse[:4], kept, "lse"),
            (torch.ones(5), lse, kept[:7], "kept"),
        ):
            with pytest.raises((ValueError, TypeError), match=f"_bwd: {what}"):
                BWD(dloss, *head, its_lse, memory, *options, *wanted)


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
def test_kernels_check_what_they_are_given():
    scan, grad = torch.ops.encfast.vocab_scan, torch.ops.encfast.vocab_grad
    logits, targets, table = torch.randn(3, 8), torch.tensor([0, 1, 2]), torch.zeros(4, 3)
    for args in (
        (logits.double(), None, targets, 0, 0.0, table),
        (logits[0], None, targets, 0, 0.0, table),
        (logits, torch.ones(7), targets, 0, 0.0, table),
        (logits, None, targets[:2], 0, 0.0, table),
        (logits, None, targets.int(), 0, 0.0, table),
        (logits, None, targets, 0, -1.0, table),
        (logits, None, targets, 0, 0.0, table[:3]),
        (logits, None, targets, 0, 0.0, table.double()),
        (logits, None, targets, 0, 0.0, torch.zeros(3, 4).mT),
    ):
        with pytest.raises(RuntimeError, match="vocab_scan: "):
            scan(*args)
        with pytest.raises(RuntimeError, match="vocab_grad: "):
            grad(*args, torch.empty_like(logits))
    for memory in (torch.empty(3, 7), torch.empty(8, 3).mT, torch.empty(3, 8).half()):
        with pytest.raises(RuntimeError, match="vocab_grad: grad"):
            grad(logits, None, targets, 0, 0.0, table, memory)
