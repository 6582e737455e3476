"""rank_loss as an op: gradcheck of the reference, opcheck, compile, errors, memory."""

import pytest
import torch
from fresh_python import python
from row_cases import DTYPES, FP32, name, rows

from encfast import ops, ref

NATIVE = ops.backends("rank_loss")["cpu"] == "native"
OPS = torch.ops.encfast


def features(n, m, d, dtype=FP32, layout="contiguous"):
    return rows((n, d), dtype, layout), rows((m, d), dtype, layout)


POSITIVES = torch.tensor([3, -1, 0, 3, 5])
EXCLUDED = torch.tensor([0, 1, -1, 5, 6])


@pytest.mark.quick
@pytest.mark.parametrize("directions", ["mean", "sum", "rows"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradcheck_of_the_reference_info_nce(directions, label_smoothing):
    a, b = features(5, 7, 3, torch.float64)
    scale = torch.tensor(1.7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (a, b, scale, torch.randn(2, 3).double())]
    assert torch.autograd.gradcheck(
        lambda a, b, scale, negatives: ref.info_nce(
            a,
            b,
            logit_scale=scale,
            negatives=negatives,
            positives=POSITIVES,
            directions=directions,
            label_smoothing=label_smoothing,
            excluded=None if label_smoothing else EXCLUDED,
            reduction="none",
        ),
        inputs,
    )


@pytest.mark.quick
def test_gradcheck_of_the_reference_siglip():
    a, b = features(5, 7, 3, torch.float64)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (1.7, -0.6)]
    assert torch.autograd.gradcheck(
        lambda a, b, scale, bias: ref.siglip(
            a, b, logit_scale=scale, logit_bias=bias, positives=POSITIVES, reduction="none"
        ),
        [x.requires_grad_() for x in (a, b, *scalars)],
    )


@pytest.mark.quick
@pytest.mark.parametrize("excluded", [None, EXCLUDED], ids=["all", "excluded"])
@pytest.mark.parametrize("both", [True, False])
def test_reference_parts_are_the_loss_and_its_gradients(both, excluded):
    a, b = features(5, 7, 3, torch.float64)
    scale = torch.tensor(1.7, dtype=torch.float64)
    a, b, scale = (x.requires_grad_() for x in (a, b, scale))
    row, col, positive, row_stats, col_stats = ref.rank_loss.info_nce_parts(
        a, b, scale, POSITIVES, excluded, both
    )
    options = {
        "logit_scale": scale,
        "positives": POSITIVES,
        "excluded": excluded,
        "reduction": "none",
    }
    want = ref.info_nce(a, b, **options, directions="sum" if both else "rows")
    torch.testing.assert_close(row + col if both else row, want)
    grads = [torch.randn(5).double(), torch.randn(len(col)).double(), torch.randn(5).double()]
    right = torch.autograd.grad(
        (row, col, positive) if both else (row, positive),
        (a, b, scale),
        grads if both else grads[::2],
        retain_graph=True,
    )
    found = ref.rank_loss.info_nce_bwd(
        *grads, a, b, scale, POSITIVES, excluded, row_stats, col_stats, both
    )
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("both", "excluded"), [(True, None), (False, None), (True, EXCLUDED)], ids=str
)
def test_opcheck_info_nce(dtype, both, excluded):
    a, b = features(5, 7, 6, dtype, "transposed")
    scale = torch.tensor(2.0)
    inputs = [x.detach().requires_grad_() for x in (a, b, scale)]
    chosen = (POSITIVES, excluded)
    torch.library.opcheck(OPS.info_nce.default, (*inputs, *chosen, both))
    row, col, positive, *stats = (x.detach() for x in OPS.info_nce(a, b, scale, *chosen, both))
    for wanted in ((True, True), (False, True), (True, False)):
        args = (row, col, positive, a, b, scale, *chosen, *stats, both, *wanted)
        torch.library.opcheck(OPS.info_nce_bwd.default, args)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck_siglip(dtype):
    a, b = features(5, 7, 6, dtype, "transposed")
    scalars = torch.tensor(2.0), torch.tensor(-1.0)
    inputs = [x.detach().requires_grad_() for x in (a, b, *scalars)]
    torch.library.opcheck(OPS.siglip.default, (*inputs, POSITIVES))
    for wanted in ((True, True), (False, True), (True, False)):
        args = (torch.randn(5), a, b, *scalars, POSITIVES, *wanted)
        torch.library.opcheck(OPS.siglip_bwd.default, args)


@pytest.mark.quick
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_compiles_whole_for_any_batch(op):
    loss = getattr(ops, op)

    def step(a, b, scale):
        return loss(a, b, logit_scale=scale.exp())

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9, 17):
        a, b = features(n, n, 8)
        inputs = [x.requires_grad_() for x in (a, b, torch.tensor(0.5))]
        want, got = step(*inputs), compiled(*inputs)
        assert torch.equal(got, want)
        expected = torch.autograd.grad(want, inputs)
        for x, y in zip(torch.autograd.grad(got, inputs), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.quick
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
def test_double_backward_raises(op):
    a, b = features(4, 4, 3)
    a.requires_grad_()
    (da,) = torch.autograd.grad(getattr(ops, op)(a, b, logit_scale=2.0), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="rank_loss: double backward"):
        da.sum().backward()


A, B, SCALE = torch.randn(4, 6), torch.randn(5, 6), torch.tensor(2.0)
POS = torch.tensor([0, 4, -1, 2])


def call(op="info_nce", a=A, b=B, logit_scale=SCALE, **options):
    return lambda: getattr(ops, op)(a, b, logit_scale=logit_scale, **options)


BOTH_ERRORS = {
    "a is list": ({"a": [1]}, TypeError),
    r"a has shape \(6,\), expected 2-D": ({"a": A[0]}, ValueError),
    "a is float64, expected .* encfast.ref": ({"a": A.double()}, TypeError),
    r"a has shape \(0, 6\), expected at least one row": ({"a": A[:0]}, ValueError),
    r"b has shape \(0, 6\), expected at least one row": ({"b": B[:0]}, ValueError),
    "b is bfloat16, expected float32, the dtype of a": ({"b": B.bfloat16()}, TypeError),
    "b is on meta": ({"b": B.to("meta")}, ValueError),
    "b has 5 channels, a has 6": ({"b": B[:, :5]}, ValueError),
    r"logit_scale has shape \(1,\), expected 0-D": ({"logit_scale": SCALE[None]}, ValueError),
    "logit_scale is int64": ({"logit_scale": SCALE.long()}, TypeError),
    "logit_scale is str": ({"logit_scale": "2"}, TypeError),
    "logit_scale is on meta": ({"logit_scale": SCALE.to("meta")}, ValueError),
    "logit_scale holds 0.0, expected a positive finite": ({"logit_scale": 0}, ValueError),
    "logit_scale holds -2.0": ({"logit_scale": -SCALE}, ValueError),
    "logit_scale holds inf": ({"logit_scale": SCALE / 0}, ValueError),
    "logit_scale holds nan": ({"logit_scale": SCALE * torch.nan}, ValueError),
    r"positives has shape \(1, 4\)": ({"positives": POS[None]}, ValueError),
    "positives is int32": ({"positives": POS.int()}, TypeError),
    "positives is on meta": ({"positives": POS.to("meta")}, ValueError),
    "positives has 3 entries, a has 4 rows": ({"positives": POS[:3]}, ValueError),
    r"positives holds 5, expected -1 \(none\) or one of the 5 rows": (
        {"positives": POS + 1},
        ValueError,
    ),
    "positives holds -2": ({"positives": POS - 1}, ValueError),
    "offset is 2, but a has 4 rows and b 5": ({"offset": 2}, ValueError),
    "offset is -1": ({"offset": -1}, ValueError),
    "reduction is 'avg', expected one of mean, sum, none": ({"reduction": "avg"}, ValueError),
}
INFO_NCE_ERRORS = {
    "directions is 'both'": ({"directions": "both"}, ValueError),
    "label_smoothing is 1.0": ({"label_smoothing": 1.0}, ValueError),
    "label_smoothing is -0.1": ({"label_smoothing": -0.1}, ValueError),
    r"negatives has shape \(0, 6\)": ({"negatives": B[:0]}, ValueError),
    "negatives has 4 channels, a has 6": ({"negatives": B[:, :4]}, ValueError),
    "negatives is float16": ({"negatives": B.half()}, TypeError),
    r"excluded has shape \(1, 4\)": ({"excluded": POS[None]}, ValueError),
    "excluded is int32": ({"excluded": POS.int()}, TypeError),
    "excluded is on meta": ({"excluded": POS.to("meta")}, ValueError),
    "excluded has 3 entries, a has 4 rows": ({"excluded": POS[:3]}, ValueError),
    "excluded holds 5, expected -1": ({"excluded": POS + 1}, ValueError),
    "excluded holds 2, expected another row of b than the positive": (
        {"positives": POS, "excluded": torch.tensor([4, 0, -1, 2])},
        ValueError,
    ),
    "label_smoothing is 0.1, expected 0 with excluded": (
        {"positives": POS, "excluded": POS - 1, "label_smoothing": 0.1},
        ValueError,
    ),
}
SIGLIP_ERRORS = {
    "logit_bias holds inf, expected a finite number": ({"logit_bias": float("inf")}, ValueError),
    r"logit_bias has shape \(1,\)": ({"logit_bias": SCALE[None]}, ValueError),
    "positives are given, expected none": ({"positives": POS, "negative_only": True}, ValueError),
}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("op", "message", "options", "kind"),
    [("info_nce", k, *v) for k, v in (BOTH_ERRORS | INFO_NCE_ERRORS).items()]
    + [("siglip", k, *v) for k, v in (BOTH_ERRORS | SIGLIP_ERRORS).items()],
)
def test_errors_name_argument_and_value(op, message, options, kind):
    with pytest.raises(kind, match=f"{op}: {message}"):
        call(op, **options)()


@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What Python checks, the kernel checks again: compiled graphs skip the Python check."""
    for a, b, scale, positives in (
        (A, B, SCALE, POS + 1),
        (A, B, SCALE, POS - 1),
        (A, B, SCALE, POS[:3]),
        (A, B, SCALE, POS.int()),
        (A[:0], B, SCALE, POS[:0]),
        (A, B[:0], SCALE, POS),
        (A, B[:, :5], SCALE, POS),
        (A, B.half(), SCALE, POS),
        (A, B, -SCALE, POS),
        (A, B, SCALE * torch.nan, POS),
        (A, B, SCALE[None], POS),
    ):
        for f in (
            lambda *args: OPS.info_nce(*args, None, True),
            lambda a, b, scale, positives: OPS.siglip(a, b, scale, SCALE, positives),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=r"info_nce|siglip"):
                f(a, b, scale, positives)
    for excluded in (POS + 1, POS - 2, POS[:3], POS.int(), POS, POS[None]):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="info_nce: excluded"):
            OPS.info_nce(A, B, SCALE, POS, excluded, True)


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
def test_direct_backward_calls_never_read_out_of_bounds():
    _, _, positive, rows_, columns = OPS.info_nce(A, B, SCALE, POS, None, True)
    good = [torch.ones(4)] * 3 + [A, B, SCALE, POS, None, rows_, columns]
    bad = {0: positive[:3], 1: positive[:3], 2: positive[:0], 7: POS, 8: rows_[:1], 9: rows_}
    for at, wrong in bad.items():
        args = [*good]
        args[at] = wrong
        with pytest.raises(RuntimeError, match="info_nce_bwd: "):
            OPS.info_nce_bwd(*args, True, True, True)
    with pytest.raises(RuntimeError, match="siglip_bwd: dloss"):
        OPS.siglip_bwd(torch.ones(3), A, B, SCALE, SCALE, POS, True, True)


# The peak starts again from what is resident, so that no earlier one hides this one.
PEAK = """
import torch
from encfast import ops
def resident(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))
n, d = {n}, {d}
a, b = (torch.randn(n, d, dtype=torch.{dtype}).requires_grad_() for _ in range(2))
scale = torch.tensor(3.0, requires_grad=True)
ops.{op}(a[:64], b[:64], logit_scale=scale).backward()
a.grad = b.grad = None
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = resident("VmHWM")
ops.{op}(a, b, logit_scale=scale).backward()
print(resident("VmHWM") - before)
"""


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the reference holds all logits")
@pytest.mark.parametrize("op", ["info_nce", "siglip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_holds_no_matrix_of_logits(op, dtype):
    n, d = 8192, 64
    kib = int(python("-c", PEAK.format(op=op, n=n, d=d, dtype=dtype)).split()[-1])
    grads = 2 * n * d * (4 if dtype == "float32" else 2) / 1024
    logits = n * n * 4 / 1024
    print(f"{kib} KiB, of which gradients {grads:.0f}; logits would be {logits:.0f}")
    assert kib < grads + 12 * 1024 < logits / 8


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the reference holds all logits")
def test_peak_memory_of_32768_pairs():
    """Their logits would take 4 GiB; the target is 64 MiB above features and their gradients."""
    n, d = 32768, 512
    kib = int(python("-c", PEAK.format(op="info_nce", n=n, d=d, dtype="float32")).split()[-1])
    above = kib / 1024 - 2 * n * d * 4 / 2**20
    print(f"{above:.1f} MiB above features and their gradients")
    assert above < 64
