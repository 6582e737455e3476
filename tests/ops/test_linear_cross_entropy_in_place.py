"""linear_cross_entropy with logits in the memory of the weight's gradient."""

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import by_the_op
from fresh_python import PEAK, python, run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import DTYPES, FP32, name, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from vocab_cases import IGNORE, assert_matches, operands, ours, targets_of

import encfast
from encfast import ops
from encfast.ops import _linear_cross_entropy_in_place as in_place
from encfast.ops import _vocab_slices as slices

NATIVE = ops.backends("linear_cross_entropy")["cpu"] == "native"
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded"),
]

OP = torch.ops.encfast.linear_cross_entropy_in_place.default
BWD = torch.ops.encfast.linear_cross_entropy_in_place_bwd.default
OPTIONS = {
    "plain": {},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0, "ignore_index": 3},
}
# Rows, V and C, with three slices of logits: all fit, in float32 at least; some; the first of two
# that fit begins where its gradient does.
CASES = {"all kept": (19, 8300, 24), "some kept": (40, 8300, 24), "as many as": (30, 8192, 20)}


def leaves_of(*shape, dtype=FP32):
    return [t.requires_grad_() for t in operands(*shape, dtype).values()]


def gradients(loss, leaves, **options):
    return torch.autograd.grad(loss, leaves, **options)


def loss_of(leaves, targets, **options):
    x, weight, bias = leaves
    return ops.linear_cross_entropy(x, weight, targets, bias, **options)


def assert_equal(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert want.abs().sum() > 0 and torch.equal(got, want)


def is_in_place(losses):
    return losses.grad_fn is not None and losses.grad_fn.name() == "InPlaceBackward"


@pytest.fixture
def memories(monkeypatch):
    """Addresses of the memory that forwards take for gradients."""
    found, take = [], in_place.new_memory

    def recorded(weight):
        memory = take(weight)
        found.append(memory.data_ptr())
        return memory

    monkeypatch.setattr(in_place, "new_memory", recorded)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_reference(case, options, dtype):
    m, v, c = CASES[case]
    options = OPTIONS[options]
    targets = torch.randint(0, v, (m,))
    targets[2] = options.get("ignore_index", IGNORE)
    assert is_in_place(ours(targets, **options)(*leaves_of(m, v, c, dtype=dtype)))
    assert_matches(operands(m, v, c, dtype), targets, **options)


@pytest.mark.quick
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 150),
    v=st.integers(1, 700),
    c=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    options=st.sampled_from(sorted(OPTIONS)),
    selected=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bits_are_those_of_the_functional_op(m, v, c, dtype, layout, options, selected, seed):
    """In slices of 64 columns: no gradient is written over logits that are still to be read."""
    torch.manual_seed(seed)
    options = {**OPTIONS[options], "ignore_index": IGNORE}
    inputs, targets, grad = operands(m, v, c, dtype, layout), targets_of(m, v), torch.randn(m)
    if selected:
        options["rows"] = torch.randint(0, m, (m,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_MOST_COLUMNS", 64)
        found = results(ours(targets, **options), inputs, [grad])
        with by_the_op():
            expected = results(ours(targets, **options), inputs, [grad])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("m", "c", "again"), [(30, 40, 0), (40, 40, 0), (50, 40, 2), (400, 40, 9), (400, 1, 10)]
)
def test_no_logits_are_computed_twice_while_they_fit(m, c, again, monkeypatch):
    """In ten slices of 64 columns."""
    multiplied, multiply = [], slices.VocabSlices._multiply

    def counted(self, j, weight):
        multiplied.append(j)
        return multiply(self, j, weight)

    monkeypatch.setattr(slices, "_MOST_COLUMNS", 64)
    monkeypatch.setattr(slices.VocabSlices, "_multiply", counted)
    leaves, targets = leaves_of(m, 640, c), torch.randint(0, 640, (m,))
    loss_of(leaves, targets).backward()
    assert multiplied == [*range(10), *reversed(range(again))]


@pytest.mark.quick
@pytest.mark.parametrize("why", ["all ignored", "no rows", "none selected", "no channels"])
def test_nothing_to_predict_or_to_multiply(why):
    m, c = 0 if why == "no rows" else 5, 0 if why == "no channels" else 4
    leaves = [torch.randn(m, c), torch.randn(9, c), torch.randn(9)]
    leaves = [t.requires_grad_() for t in leaves]
    targets = torch.full((m,), 2 if why == "no channels" else IGNORE)
    options = {"reduction": "none"}
    if why == "none selected":
        targets, options["rows"] = targets[:0], targets[:0]
    losses = loss_of(leaves, targets, **options)
    assert is_in_place(losses)
    dx, dweight, dbias = gradients(losses.sum(), leaves)
    assert dx.shape == (m, c) and dweight.shape == (9, c)
    assert (dx == 0).all() and (dweight == 0).all()
    if why == "no channels":
        expected = F.cross_entropy(leaves[2].expand(m, -1), targets, reduction="sum")
        torch.testing.assert_close(dbias, *gradients(expected, leaves[2:]))
    else:
        assert (dbias == 0).all()


@pytest.mark.quick
def test_the_gradient_of_the_weight_is_the_memory_of_its_logits(memories):
    """AccumulateGrad takes it as it is: no copy, and nothing beside it in its storage."""
    leaves = leaves_of(9, 300, 20)
    _, weight, _ = leaves
    loss_of(leaves, targets_of(9, 300)).backward()
    assert memories == [weight.grad.data_ptr()]
    assert weight.grad.untyped_storage().nbytes() == weight.nbytes
    first, held = weight.grad.clone(), weight.grad
    loss_of(leaves, targets_of(9, 300)).backward()
    assert weight.grad is held and len(memories) == 2
    assert not torch.equal(held, first)


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_a_second_backward_computes_all_logits_again(case, memories):
    """The first gradient, changed in place by then, lies where they were."""
    m, v, c = CASES[case]
    leaves, targets = leaves_of(m, v, c), torch.randint(0, v, (m,))
    _, weight, _ = leaves
    loss = loss_of(leaves, targets)
    loss.backward(retain_graph=True)
    expected = [t.grad.clone() for t in leaves]
    weight.grad.fill_(7)
    held = weight.grad
    assert memories == [held.data_ptr()]
    for t in leaves:
        t.grad = None
    for retain in (True, False):
        found = gradients(loss, leaves, retain_graph=retain)
        assert_equal(found, expected)
        assert found[1].data_ptr() != held.data_ptr() and (held == 7).all()
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, leaves)


@pytest.mark.quick
def test_gradients_of_x_alone_come_first():
    leaves, targets = leaves_of(30, 400, 24), targets_of(30, 400)
    expected = gradients(loss_of(leaves, targets), leaves)
    loss = loss_of(leaves, targets)
    assert_equal(gradients(loss, leaves[:1], retain_graph=True), expected[:1])
    assert_equal(gradients(loss, leaves), expected)


@pytest.mark.quick
def test_a_recorded_backward_and_its_own():
    leaves, targets = leaves_of(30, 400, 24), targets_of(30, 400)
    expected = gradients(loss_of(leaves, targets), leaves)
    loss = loss_of(leaves, targets)
    recorded = gradients(loss, leaves, create_graph=True)
    assert_equal([t.detach() for t in recorded], expected)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: double backward"):
        recorded[1].sum().backward()
    assert_equal(gradients(loss, leaves), expected)


def copies():
    """Every tensor that is saved is a copy, and so is every one that is asked for again."""
    return saved_tensors_hooks(torch.clone, torch.clone)


@pytest.mark.quick
@pytest.mark.parametrize("hooks", [copies, save_on_cpu])
def test_hooks_of_saved_tensors(hooks):
    leaves, targets = leaves_of(40, 400, 24), targets_of(40, 400)
    expected = gradients(loss_of(leaves, targets), leaves)
    with hooks():
        loss = loss_of(leaves, targets)
    for retain in (True, False):
        assert_equal(gradients(loss, leaves, retain_graph=retain), expected)


@pytest.mark.quick
def test_checkpoint_computes_the_logits_into_new_memory(memories):
    leaves, targets = leaves_of(40, 400, 24), targets_of(40, 400)
    expected = gradients(loss_of(leaves, targets), leaves)
    loss = checkpoint(loss_of, leaves, targets, use_reentrant=False)
    loss.backward(retain_graph=True)
    assert_equal([t.grad for t in leaves], expected)
    assert leaves[1].grad.data_ptr() == memories[-1] and len(memories) == 3
    assert_equal(gradients(loss, leaves), expected)


@pytest.mark.quick
def test_two_heads_on_one_weight_that_is_no_leaf():
    """Nor are the rows of one of them other than rows of that weight."""
    (x, weight, bias), targets = leaves_of(30, 400, 24), targets_of(30, 400)

    def heads(head):
        w = weight.tanh()
        return head(x, w, targets, bias) + head(w[:30], w, targets.roll(1), None)

    def plain(x, w, targets, bias):
        return F.cross_entropy(F.linear(x, w, bias), targets)

    expected = gradients(heads(plain), (x, weight, bias))
    loss = heads(ops.linear_cross_entropy)
    for retain in (True, False):
        for got, want in zip(
            gradients(loss, (x, weight, bias), retain_graph=retain), expected, strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.quick
def test_weights_in_any_layout():
    """The gradient of a transposed weight comes contiguous, and W.grad as the weight lies."""
    x, weight, _ = leaves_of(30, 400, 24)
    targets = targets_of(30, 400)
    turned = weight.detach().mT.contiguous().mT.requires_grad_()
    for w in (weight, turned):
        ops.linear_cross_entropy(x, w, targets).backward()
    assert_equal([turned.grad], [weight.grad])
    assert turned.grad.stride() == turned.stride()


def frozen_weight(x, weight, targets):
    return ops.linear_cross_entropy(x.requires_grad_(), weight, targets)


def without_gradients(x, weight, targets):
    with torch.no_grad():
        return ops.linear_cross_entropy(x, weight.requires_grad_(), targets)


def under_a_mode(x, weight, targets):
    with FlopCounterMode(display=False):
        return ops.linear_cross_entropy(x, weight.requires_grad_(), targets)


def of_fake_tensors(x, weight, targets):
    mode = FakeTensorMode()
    x, weight, targets = (mode.from_tensor(t) for t in (x, weight, targets))
    return ops.linear_cross_entropy(x, weight.requires_grad_(), targets, reduction="none")


def compiled(x, weight, targets):
    run = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    return run(x, weight.requires_grad_(), targets)


OTHERS = (
    frozen_weight,
    without_gradients,
    under_a_mode,
    of_fake_tensors,
    compiled,
)


@pytest.mark.quick
@pytest.mark.parametrize("call", OTHERS, ids=lambda call: call.__name__)
def test_others_get_the_functional_op(call, monkeypatch):
    asked = []
    tensors = operands(9, 40, 8)["x"], operands(9, 40, 8)["weight"], targets_of(9, 40)
    monkeypatch.setattr(in_place.InPlace, "apply", lambda *args: asked.append(args))
    call(*tensors)
    assert not asked


@pytest.mark.quick
def test_exportable_names_the_op_that_was_called():
    leaves, targets = leaves_of(9, 40, 8), targets_of(9, 40)
    with (
        encfast.exportable(),
        pytest.raises(NotImplementedError, match=r"encfast\.linear_cross_entropy has no form"),
    ):
        loss_of(leaves, targets)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("options", [(-100, None, None, None), (3, 0.1, 1e-3, 5.0)])
def test_opcheck(options, dtype):
    x, weight, bias = operands(9, 20, 6, dtype).values()
    targets = torch.randint(0, 20, (9,))
    head = x, weight, targets, bias, torch.tensor([4, 0, 4, 8, 1, 2, 3, 5, 6])
    memory = torch.zeros_like(weight)
    torch.library.opcheck(OP, (*head, *options, memory))
    _, lse = OP(*head, *options, memory)
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(BWD, (torch.randn(9), *head, lse, *options, memory, *wanted))


X, W, T = torch.randn(5, 6), torch.randn(8, 6), torch.tensor([0, 7, -100, 3, 1])
MEMORIES = {
    r"memory has shape \(8, 5\) .* expected \(8, 6\), contiguous": torch.empty(8, 5),
    r"memory has .* strides \(1, 8\), expected \(8, 6\), contiguous": torch.empty(6, 8).mT,
    r"memory has shape \(48,\)": torch.empty(48),
    "memory is bfloat16, expected float32, the dtype of weight": torch.empty(8, 6).bfloat16(),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", MEMORIES)
def test_errors_name_the_memory(message):
    head, options, memory = (X, W, T, None, None), (-100, None, None, None), MEMORIES[message]
    with pytest.raises((TypeError, ValueError), match=f"linear_cross_entropy_in_place: {message}"):
        OP(*head, *options, memory)
    lse = torch.zeros(5)
    with pytest.raises((TypeError, ValueError), match=f"in_place_bwd: {message}"):
        BWD(lse, *head, lse, *options, memory, True, True)


@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    options, memory, lse = (-100, None, None, None), torch.empty(8, 6), torch.zeros(5)
    with pytest.raises(ValueError, match="targets holds 8"):
        OP(X, W, T + 1, None, None, *options, memory)
    for dloss, its_lse, targets, what in (
        (lse[:4], lse, T, "in_place_bwd: dloss has shape"),
        (lse, lse[:4], T, "in_place_bwd: lse has shape"),
        (lse, lse.half(), T, "in_place_bwd: lse is float16"),
        (lse, lse, T + 1, "targets holds 8"),
    ):
        with pytest.raises((TypeError, ValueError), match=what):
            BWD(dloss, X, W, targets, None, None, its_lse, *options, memory, True, True)


MEMORY = (
    PEAK
    + """
M, V, C = 307, 50368, 320
x, weight = (torch.randn(n, C).requires_grad_() for n in (M, V))
targets = torch.randint(0, V, (M,))
few = torch.where(torch.arange(M) < 4, targets, -100)
def run(targets):
    encfast.ops.linear_cross_entropy(x, weight, targets).backward()
run(few)  # threads and MKL's buffers
x.grad = weight.grad = None
print(peak(lambda: run(targets)), weight.nbytes)
"""
)


@pytest.mark.quick
def test_peak_memory():
    """All 59 MiB of logits are kept, in the memory of W.grad; beside it are slices of 4 MiB."""
    found, grad = map(int, python("-c", MEMORY, OMP_NUM_THREADS="1").split()[-2:])
    assert found <= grad + 10 * 2**20, f"{(found - grad) / 2**20:.1f} MiB"


@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine(isa):
    """Where the CPU multiplies no bfloat16, logits are in float32 and gradients are not."""
    run_under_isa(isa, "(match_reference or bits or second) and not every_isa", __file__)
