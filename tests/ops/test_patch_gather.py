"""The family as a whole: errors, compiled graphs, every ISA, and a masked autoencoder's batch."""

import mmap

import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo
from fresh_python import run_under_isa
from hypothesis import given, settings
from row_cases import BF16, DTYPES, FP16, FP32, name

from encfast import ops

NATIVE = ops.backends("patch_gather")["cpu"] == "native"
OPS = torch.ops.encfast


def cu_seqlens(*lens):
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_hidden_pixels_and_rows_never_reach_a_batch(dtype):
    """From image to decoder's input and back: NaN in what is hidden leaves every bit as it was."""
    clean = torch.randn(3, 2, 8, 12).to(dtype)
    weight, mask, pos = torch.randn(24, 8), torch.randn(8), torch.randn(8, 8)
    chosen = ops.select_patches(torch.rand(3, 8), 3)
    outcomes = []
    for poison in (None, float("nan"), float("inf")):
        pixels = ops.gather_patches(clean, None, (4, 3)).clone()
        if poison is not None:
            pixels[chosen.hidden] = poison
        image = ops.fold_patches(pixels, clean.shape, (4, 3)).requires_grad_()
        leaves = [p.to(dtype).requires_grad_() for p in (weight, mask, pos)]
        rows = ops.gather_patches(image, chosen.visible, (4, 3)) @ leaves[0]
        out = ops.restore_rows(rows, chosen.restore, leaves[1], add=leaves[2])
        grads = torch.autograd.grad(out.float().sin().sum(), [image, *leaves])
        outcomes.append([out.detach(), *grads])
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))
    assert all(torch.isfinite(x).all() for x in outcomes[0])


NOISE, IMAGE = torch.rand(2, 6), torch.randn(2, 3, 4, 6)
IDS, X, INDEX = torch.tensor([0, 11, 3]), torch.randn(4, 5), torch.tensor([0, -1, 3, 3])
ADD = torch.randn(2, 5)
NOISE_1D, CU = torch.rand(6), cu_seqlens(2, 4)


def select(keep, cu=CU, noise=NOISE_1D):
    return lambda: ops.select_patches(noise, keep, cu_seqlens=cu)


def gather(image=IMAGE, ids=IDS, patch=(2, 2), **options):
    return lambda: ops.gather_patches(image, ids, patch, **options)


def restore(x=X, index=INDEX, fill=None, **options):
    return lambda: ops.restore_rows(x, index, fill, **options)


ERRORS = {
    "select_patches: noise is list": (lambda: ops.select_patches([0.5], 1), TypeError),
    r"select_patches: noise has shape \(6,\), expected 2-D": (
        lambda: ops.select_patches(NOISE_1D, 1),
        ValueError,
    ),
    "select_patches: noise is bfloat16, expected float32": (
        lambda: ops.select_patches(NOISE.to(BF16), 1),
        TypeError,
    ),
    "select_patches: keep is float, expected an int": (
        lambda: ops.select_patches(NOISE, 0.25),
        TypeError,
    ),
    "select_patches: keep is bool": (lambda: ops.select_patches(NOISE, True), TypeError),
    "select_patches: keep is 7, expected 0..6": (lambda: ops.select_patches(NOISE, 7), ValueError),
    "select_patches: keep is -1": (lambda: ops.select_patches(NOISE, -1), ValueError),
    "select_patches: keep is 2, expected a number for each of the 2": (select(2), ValueError),
    r"select_patches: keep is \[1\], expected a number for each": (select([1]), ValueError),
    "select_patches: keep holds -1": (select([1, -1]), ValueError),
    "select_patches: keep is 3 for sequence 0, which has 2": (select([3, 1]), ValueError),
    "select_patches: cu_seqlens is int64": (select([1, 1], CU.long()), TypeError),
    "select_patches: cu_seqlens starts at 1": (select([1, 1], CU + 1), ValueError),
    "select_patches: cu_seqlens ends at 6": (select([1, 1], CU, torch.rand(7)), ValueError),
    "select_patches: cu_seqlens is list": (select([1, 1], [0, 2, 6]), TypeError),
    "select_patches: cu_seqlens is on meta": (select([1, 1], CU.to("meta")), ValueError),
    "gather_patches: image is list": (gather([1.0]), TypeError),
    "gather_patches: image is float64": (gather(IMAGE.double(), dtype=FP32), TypeError),
    r"gather_patches: patch is \(2, 0\)": (gather(patch=(2, 0)), ValueError),
    r"gather_patches: patch is \(\)": (gather(patch=()), ValueError),
    r"gather_patches: image has shape .* with 3 sizes": (gather(patch=(2, 2, 2)), ValueError),
    r"gather_patches: image has size \(4, 6\), expected multiples of the patch \(3, 2\)": (
        gather(patch=(3, 2)),
        ValueError,
    ),
    "gather_patches: ids is int32": (gather(ids=IDS.int()), TypeError),
    r"gather_patches: ids has shape \(1, 3\)": (gather(ids=IDS[None]), ValueError),
    r"gather_patches: ids holds 12, expected 0 <= b \* P \+ p < 12": (
        gather(ids=IDS + 1),
        ValueError,
    ),
    "gather_patches: ids holds -1": (gather(ids=IDS - 1), ValueError),
    "gather_patches: ids is on meta": (gather(ids=IDS.to("meta")), ValueError),
    "gather_patches: scale has 2 entries, expected 3": (gather(scale=torch.ones(2)), ValueError),
    "gather_patches: shift is int64": (gather(shift=torch.ones(3).long()), TypeError),
    "gather_patches: scale requires a gradient": (
        gather(scale=torch.ones(3, requires_grad=True)),
        ValueError,
    ),
    "gather_patches: dtype is torch.int64": (gather(dtype=torch.int64), TypeError),
    r"fold_patches: rows has shape \(12, 11\), expected \(12, 12\)": (
        lambda: ops.fold_patches(torch.ones(12, 11), IMAGE.shape, (2, 2)),
        ValueError,
    ),
    r"fold_patches: patch is \(2, 2, 2, 2\)": (
        lambda: ops.fold_patches(torch.ones(12, 12), IMAGE.shape, (2, 2, 2, 2)),
        ValueError,
    ),
    "restore_rows: x is list": (restore([1.0]), TypeError),
    "restore_rows: x is float64, expected .*encfast.ref.patch_gather": (
        restore(X.double()),
        TypeError,
    ),
    r"restore_rows: x has shape \(1, 4, 5\)": (restore(X[None]), ValueError),
    "restore_rows: index is int32": (restore(index=INDEX.int()), TypeError),
    "restore_rows: index holds 4, expected -1 <= row < 4": (restore(index=INDEX + 1), ValueError),
    "restore_rows: index holds -2": (restore(index=INDEX - 1), ValueError),
    "restore_rows: fill has 4 entries, expected 5": (restore(fill=torch.ones(4)), ValueError),
    "restore_rows: fill is int64": (restore(fill=torch.ones(5).long()), TypeError),
    "restore_rows: fill is on meta": (restore(fill=torch.ones(5, device="meta")), ValueError),
    "restore_rows: add_index came without add": (restore(add_index=INDEX), ValueError),
    "restore_rows: add has 4 channels, x has 5": (restore(add=ADD[:, :4]), ValueError),
    "restore_rows: add is float64": (restore(add=ADD.double()), TypeError),
    "restore_rows: add has 3 rows, expected a divisor of the 4": (
        restore(add=torch.ones(3, 5)),
        ValueError,
    ),
    "restore_rows: add has 0 rows": (restore(add=ADD[:0]), ValueError),
    "restore_rows: add_index holds 2, expected 0 <= row < 2": (
        restore(add=ADD, add_index=torch.tensor([0, 1, 2, 0])),
        ValueError,
    ),
    "restore_rows: add_index holds -1": (restore(add=ADD, add_index=INDEX), ValueError),
    "restore_rows: add_index has 3 entries, index has 4": (
        restore(add=ADD, add_index=torch.zeros(3).long()),
        ValueError,
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


BAD_CALLS = {
    "cu_seqlens decreases": lambda: OPS.select_patches(
        NOISE_1D, torch.tensor([0, 7, 6]).int(), cu_seqlens(1, 1), 2, True
    ),
    "cu_seqlens ends": lambda: OPS.select_patches(NOISE_1D[:5], CU, cu_seqlens(1, 1), 2, True),
    "cu_seqlens has 3 entries": lambda: OPS.select_patches(NOISE_1D, CU, cu_seqlens(2), 2, True),
    "cu_keep ends": lambda: OPS.select_patches(NOISE_1D, CU, cu_seqlens(1, 1), 3, False),
    "cu_keep starts": lambda: OPS.select_patches(NOISE_1D, CU, cu_seqlens(1, 1) + 1, 2, False),
    "keep is 3 for sequence 0": lambda: OPS.select_patches(NOISE_1D, CU, cu_seqlens(3, 1), 4, True),
    "keep is 9": lambda: OPS.select_patches(NOISE_1D, CU, cu_seqlens(4, 5), 9, True),
    "noise is": lambda: OPS.select_patches(NOISE_1D.double(), CU, cu_seqlens(1, 1), 2, True),
    "image has s": lambda: OPS.gather_patches(IMAGE, IDS, [3, 2], False, None, None, FP32),
    "image .* dim": lambda: OPS.gather_patches(IMAGE, IDS, [2], False, None, None, FP32),
    "patch (has|is)": lambda: OPS.gather_patches(IMAGE, IDS, [], False, None, None, FP32),
    "dtype is": lambda: OPS.gather_patches(IMAGE, IDS, [2, 2], False, None, None, torch.int64),
    "scale has": lambda: OPS.gather_patches(IMAGE, IDS, [2, 2], False, ADD[0], None, FP32),
    "fill has": lambda: OPS.restore_rows(X, INDEX, ADD[0, :3], None, None),
    "add_index came": lambda: OPS.restore_rows(X, INDEX, None, None, INDEX),
    "add_index holds -1": lambda: OPS.restore_rows(X, INDEX, None, ADD, INDEX),
    "add has 3": lambda: OPS.restore_rows(X, INDEX, None, torch.ones(3, 5), None),
    "add has 4 chan": lambda: OPS.restore_rows(X, INDEX, None, ADD[:, :4], None),
    "index has 3 entries, dout": lambda: OPS.restore_rows_bwd(X, INDEX[:3], None, 2, True, True),
    "add_index holds 3": lambda: OPS.restore_rows_bwd(X, INDEX, INDEX.abs(), 2, True, True),
    "n_add is -1": lambda: OPS.restore_rows_bwd(X, INDEX, None, -1, True, True),
    "add has 3 rows, index": lambda: OPS.restore_rows_bwd(X, INDEX, None, 3, False, True),
}


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("message", BAD_CALLS)
def test_direct_calls_are_checked_again(message):
    """A compiled graph skips the Python checks; the kernels must not."""
    with pytest.raises((RuntimeError, ValueError), match=message):
        BAD_CALLS[message]()


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.parametrize("value", [-2, 12, 2**40, -(2**62)])
def test_direct_calls_never_read_out_of_bounds(value):
    index = torch.tensor([0, value, 1, 2])
    for call in (
        lambda: OPS.gather_patches(IMAGE, index, [2, 2], False, None, None, FP32),
        lambda: OPS.restore_rows(X, index, None, None, None),
        lambda: OPS.restore_rows(X, INDEX, None, ADD, index),
        lambda: OPS.restore_rows_bwd(X, INDEX, index, 2, True, True),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


INT32 = st.one_of(st.integers(-3, 12), st.sampled_from((2**31 - 1, -(2**31))))


@pytest.mark.host
@given(
    ends=st.lists(INT32, min_size=1, max_size=5),
    kept=st.lists(INT32, min_size=1, max_size=5),
    keep=st.integers(-1, 12),
    ordered=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_corrupted_counts_are_refused(ends, kept, keep, ordered):
    """Directly, as a compiled graph would call: the right selection or an exception."""
    noise = torch.rand(10)
    cu, cu_keep = (torch.tensor(x, dtype=torch.int32) for x in (ends, kept))
    lens, keeps = cu.long().diff(), cu_keep.long().diff()
    valid = len(ends) == len(kept) and ends[0] == kept[0] == 0 and ends[-1] == 10
    valid = valid and kept[-1] == keep and bool((lens >= keeps).all() and (keeps >= 0).all())
    if valid:
        visible, hidden, _ = OPS.select_patches(noise, cu, cu_keep, keep, ordered)
        assert sorted([*visible.tolist(), *hidden.tolist()]) == list(range(10))
        return
    with pytest.raises((RuntimeError, ValueError)):
        OPS.select_patches(noise, cu, cu_keep, keep, ordered)


@pytest.mark.quick
def test_one_graph_serves_every_shape():
    """A whole masked batch, fullgraph: sizes are SymInts, forward and backward."""

    def step(image, noise, weight, mask, pos, keep):
        chosen = ops.select_patches(noise, keep)
        rows = ops.gather_patches(image, chosen.visible, (2, 3), scale=mask[:3].detach()) @ weight
        return ops.restore_rows(rows, chosen.restore, mask, add=pos)

    graphs = []

    def backend(module, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(module)
        return aot_eager(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for batch, height, width, keep in ((2, 4, 6, 2), (3, 8, 6, 3), (5, 6, 9, 8), (4, 10, 12, 5)):
        image = torch.randn(batch, 3, height, width)
        patches = height // 2 * (width // 3)
        inputs = [torch.randn(18, 7), torch.randn(7), torch.randn(patches, 7)]
        noise = torch.rand(batch, patches)
        found = []
        for f in (compiled, step):
            leaves = [x.clone().requires_grad_() for x in (image, *inputs)]
            out = f(leaves[0], noise, *leaves[1:], keep)
            found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
    torch._dynamo.reset()
    assert len(graphs) <= 2


def other_isas():
    isas = OPS.cpu_isas().split(",") if NATIVE else []
    return [isa for isa in isas if isa != OPS.cpu_isa()]


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", other_isas())
def test_every_isa_of_this_machine_matches_the_reference(isa):
    """The ISA is chosen once per process, so each but ours runs the cases in its own."""
    cases = "match_the_reference or matches_reference or exact or never_reach or thread_count"
    files = ("patch_gather_select", "patch_gather_pixels", "patch_gather_restore")
    run_under_isa(isa, cases, *(f"tests/ops/test_{name}.py" for name in files))


@pytest.mark.host
def test_pixels_and_rows_more_than_two_gibi_elements_apart():
    """Offsets beyond 32 bits; the mapping reserves address space, few pages are touched."""
    stride, size = 2**31 + 5, 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * (2 * stride + size), flags=flags)
    x = torch.frombuffer(memory, dtype=FP16).as_strided((3, size), (stride, 1))
    x.copy_(torch.randn(3, size))
    index, ids = torch.tensor([2, -1, 0, 1]), torch.tensor([5, 0, 2])
    small, add = x.clone(), torch.randn(2, size)
    for options in ({}, {"add": add}):
        got = ops.restore_rows(x, index, **options)
        assert torch.equal(got, ops.restore_rows(small, index, **options))
    assert torch.equal(
        ops.gather_patches(x.unsqueeze(1), ids, (4,)),
        ops.gather_patches(small.unsqueeze(1), ids, (4,)),
    )
