"""The Triton kernels of add_norm against the reference in float64, run by Triton's interpreter."""

import pytest
import torch
from row_cases import ADD_NORM_PARTS as PARTS
from row_cases import BF16, DTYPES, FP16, FP32, LAYOUTS, assert_same, name, rows
from sanitizer import sanitized
from torch._subclasses.fake_tensor import FakeTensorMode

from encfast import ops, ref
from encfast.kernels import _rows
from encfast.kernels import add_norm as kernels
from encfast.ops.add_norm import _triton_bwd, _triton_fwd
from encfast.ref.add_norm import add_norm_bwd as ref_bwd
from encfast.testing import assert_close_to_reference

KINDS = ("layernorm", "rmsnorm")
ORDER = ("x", "residual", "weight", "bias", "branch_scale")


def _make(shape, parts="scaled", dtypes=(FP32,) * 3, layout="contiguous", offset=0.0):
    """The five tensors of the op, None for what is not there; dtypes of x, residual, parameters."""
    x, residual = (rows(shape, dtype, layout) for dtype in dtypes[:2])
    x = x + offset if offset else x  # a sum would be a copy
    parameters = ((torch.randn(shape[-1]) * 0.5 + 1).to(dtypes[2]) for _ in range(3))
    tensors = dict(zip(ORDER, (x, residual, *parameters), strict=True))
    return [tensors[key] if key in ("x", *PARTS[parts]) else None for key in ORDER]


def _wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def _assert_as_promised(op, args, results):
    """Shapes, strides and dtypes are those of the op's fake, which compiled graphs rely on."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        promised = op(*fakes)
    for got, promise in zip(results, promised, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (
            promise.shape,
            promise.stride(),
            promise.dtype,
        )


def _reference(tensors, kind, eps):
    x, residual, weight, bias, scale = tensors
    return ref.add_norm(x, residual, weight, bias, branch_scale=scale, kind=kind, eps=eps)


def _check_both_ways(tensors, kind="layernorm", eps=None, grads=None, **options):
    """The forward and every gradient of one case against the rule of encfast.testing."""
    x, residual, weight, bias, scale = tensors
    has_sum = residual is not None or scale is not None
    args = (*tensors, kind, eps, True)
    outs = kernels.add_norm(*args)
    _assert_as_promised(torch.ops.encfast.add_norm, args, outs)
    exact, plain = _reference(_wide(*tensors), kind, eps), _reference(tensors, kind, eps)
    for key, got, wide, narrow in zip(
        ("y", "total", "mean", "rstd"), outs, exact, plain, strict=True
    ):
        if got.numel():
            assert_close_to_reference(key, got, wide, narrow, **options)

    y, total, mean, rstd = outs
    if grads is None:
        grads = [torch.randn(x.shape).to(y.dtype) for _ in range(1 + has_sum)]
    dy, dtotal_in = grads if has_sum else (*grads, None)
    branch = None if scale is None else x
    args = (dy, dtotal_in, total if has_sum else x, mean, rstd, branch, weight, scale, kind)
    args += (weight is not None, bias is not None)
    results = kernels.add_norm_bwd(*args)
    _assert_as_promised(torch.ops.encfast.add_norm_bwd, args, results)
    wide_grads = ref_bwd(
        *_wide(dy, dtotal_in), *exact[1:], *_wide(branch, weight, scale), kind=kind
    )
    plain_grads = ref_bwd(dy, dtotal_in, *plain[1:], branch, weight, scale, kind=kind)
    names = ("dtotal", "dx", "dweight", "dbias", "dbranch_scale")
    for key, got, wide, narrow in zip(names, results, wide_grads, plain_grads, strict=True):
        if got.numel():
            assert_close_to_reference(key, got, wide, narrow, 3.0, **options)
    return *outs, *results


# Of numpy, for the rows of a tile beyond the last one, which nobody reads.
eps_of_0 = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")


@pytest.fixture
def narrow_registers(monkeypatch):
    """Rows of more than 32 channels do not fit, and are cut into stripes of 16."""
    monkeypatch.setattr(kernels, "_WIDEST", (32, 32))
    monkeypatch.setattr(kernels, "_STRIPE", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_every_option_both_ways(parts, kind, dtype):
    _check_both_ways(_make((21, 75), parts, (dtype,) * 3), kind)


MIXED = [(BF16, FP32, FP32), (FP32, BF16, BF16), (BF16, BF16, FP32), (FP16, BF16, FP32)]
MIXED += [(FP32, FP32, BF16), (BF16, BF16, FP16)]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(map(name, d)))
@pytest.mark.parametrize("kind", KINDS)
def test_rows_promote_and_parameters_do_not(dtypes, kind):
    tensors = _make((13, 34), dtypes=dtypes)
    y, total, _, _, dtotal, dx, *_ = _check_both_ways(tensors, kind)
    assert y.dtype == total.dtype == dtotal.dtype == torch.promote_types(*dtypes[:2])
    assert dx.dtype == dtypes[0]


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 5, 6), (2, 2, 3, 16), (70, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(shape, kind):
    _check_both_ways(_make(shape), kind)


@pytest.mark.parametrize("channels", [3, 15, 16, 17, 64, 65, 300])
def test_channel_counts(channels):
    _check_both_ways(_make((5, channels)))


@eps_of_0
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_channel(kind):
    """LayerNorm of one channel is its bias, RMSNorm its sign; no gradient passes through either."""
    x, w, b = torch.tensor([[3.0], [-2.0], [0.5]]), torch.tensor([2.0]), torch.tensor([0.25])
    eps = 0.0 if kind == "rmsnorm" else None
    y, _, mean, rstd = kernels.add_norm(x, None, w, b, None, kind, eps, True)
    want = torch.full((3, 1), 0.25) if kind == "layernorm" else x.sign() * 2 + 0.25
    torch.testing.assert_close(y, want)
    dy = torch.tensor([[1.0], [2.0], [4.0]])
    dtotal, _, dweight, dbias, _ = kernels.add_norm_bwd(
        dy, None, x, mean, rstd, None, w, None, kind, True, True
    )
    torch.testing.assert_close(dtotal, torch.zeros(3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(dweight, torch.tensor([0.0 if kind == "layernorm" else 3.0]))
    torch.testing.assert_close(dbias, torch.tensor([7.0]))


@pytest.mark.usefixtures("narrow_registers")
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", ("x", "affine", "scaled"))
def test_rows_wider_than_registers(parts, kind, dtype):
    _check_both_ways(_make((19, 75), parts, (dtype,) * 3), kind)


@pytest.mark.usefixtures("narrow_registers")
@pytest.mark.parametrize("channels", (32, 33, 48))
def test_widths_at_the_limit_of_registers(channels):
    with sanitized() as launches:
        _check_both_ways(_make((18, channels)))
    assert ("add_norm_wide_kernel" in launches) == (channels > 32)
    assert ("add_norm_bwd_means_kernel" in launches) == (channels > 32)


_SLOW = (pytest.param(channels, marks=pytest.mark.slow) for channels in (4096, 8192, 8193))


@pytest.mark.parametrize("channels", (4097, *_SLOW))
def test_wide_rows_as_they_are(channels, monkeypatch):
    """From 4097 to 8192 channels, registers hold a row in the forward and not in the backward."""
    monkeypatch.setattr(_rows, "_COLUMNS", 1024)  # 32 at a time would take the interpreter long
    _check_both_ways(_make((3, channels)))


def test_parameters_over_several_groups_of_rows():
    with sanitized() as launches:
        _check_both_ways(_make((300, 6)))  # tiles of 64 rows, a group each: 5 of them
    assert launches == ["add_norm_kernel", "add_norm_bwd_kernel", "sum_partials_kernel"]


def test_more_rows_where_there_would_be_too_many_groups(monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_GROUPS", 2)
    _check_both_ways(_make((301, 6)), "rmsnorm")


def test_partials_fill_several_tiles_of_the_sum(monkeypatch):
    monkeypatch.setattr(kernels, "_MIN_ROWS", 1)
    monkeypatch.setattr(_rows, "_LINES", 2)
    _check_both_ways(_make((10, 130)))  # tiles of 2 rows: 5 groups, and 5 stripes of C


def _same_bits(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_the_bits_of_their_copies(layout, dtype):
    shape = (4, 5, 33)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]  # so that no stride stands for another
    x, _, *parameters = _make(shape, dtypes=(dtype,) * 3, layout=layout)
    residual = rows(shape, dtype, other)
    parameters = [p.repeat_interleave(2)[::2] for p in parameters]
    grads = [rows(shape, dtype, layout), rows(shape, dtype, other)]
    options = {"allow_degenerate": layout == "expanded"}  # one mean for all
    results = _check_both_ways([x, residual, *parameters], grads=grads, **options)
    copies = [t.contiguous() for t in (x, residual, *parameters)]
    grads = [grad.contiguous() for grad in grads]
    assert _same_bits(results, _check_both_ways(copies, grads=grads, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plain_view_is_its_own_sum(layout):
    """Without residual and branch_scale the backward reads x itself, wherever it lies."""
    tensors = _make((4, 5, 33), "affine", layout=layout)
    _check_both_ways(tensors, allow_degenerate=layout == "expanded")


def test_bit_equal_twice():
    tensors = _make((70, 40), dtypes=(BF16, FP32, BF16))
    grads = [torch.randn(70, 40) for _ in range(2)]
    first = _check_both_ways(tensors, grads=grads)
    assert _same_bits(first, _check_both_ways(tensors, grads=grads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", (False, True))
def test_a_large_mean_does_not_cancel(kind, wide, request):
    """The variance of rows around 1000 by sums of squares would have three digits."""
    if wide:
        request.getfixturevalue("narrow_registers")
    _check_both_ways(_make((6, 70), "affine", offset=1000.0), kind)


@eps_of_0
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_eps(kind, eps):
    _check_both_ways(_make((9, 40), "affine"), kind, eps)


def test_the_default_of_eps():
    x = torch.full((2, 8), 1e-3)
    args = (x, None, None, None, None, "rmsnorm")
    rstd = kernels.add_norm(*args, None, False)[3]
    assert torch.equal(rstd, kernels.add_norm(*args, 1e-5, False)[3])
    torch.testing.assert_close(rstd, torch.full((2,), (1e-6 + 1e-5) ** -0.5))


@pytest.mark.parametrize("wide", (False, True))
def test_the_sum_is_rounded_before_its_norm(wide, request):
    """y is the norm of the very sum that is returned, and does not depend on returning it."""
    if wide:
        request.getfixturevalue("narrow_registers")
    x, residual = rows((20, 96), BF16), rows((20, 96), BF16)
    rest = (None, None, None, "layernorm", None)
    y, total, *_ = kernels.add_norm(x, residual, *rest, True)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, kernels.add_norm(total, None, *rest, False)[0])
    again, nothing, *_ = kernels.add_norm(x, residual, *rest, False)
    assert torch.equal(y, again) and nothing.shape == (0,)


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_row_stays_one_row(kind, wide, request):
    if wide:
        request.getfixturevalue("narrow_registers")
    tensors, grads = _make((7, 40)), [torch.randn(7, 40) for _ in range(2)]
    clean = _check_both_ways(tensors, kind, grads=grads)
    tensors[0][2, 3] = float("nan")
    spoilt = _check_both_ways(tensors, kind, grads=grads, allow_degenerate=True)
    others = torch.arange(7) != 2
    for before, after in zip(clean, spoilt, strict=True):
        if len(before) == 7:  # what has a row for each row
            assert torch.equal(before[others], after[others])
            assert after[2].isnan().any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(shape, kind):
    *_, dweight, dbias, dscale = _check_both_ways(_make(shape), kind, allow_degenerate=True)
    for gradient in (dweight, dbias, dscale):
        assert torch.equal(gradient, torch.zeros(8))


@pytest.mark.parametrize("want_dweight", (False, True))
@pytest.mark.parametrize("want_dbias", (False, True))
@pytest.mark.parametrize("scaled", (False, True))
def test_gradients_that_are_not_wanted_are_empty_and_the_others_the_same(
    want_dweight, want_dbias, scaled
):
    x, residual, weight, bias, scale = _make((21, 40), "scaled" if scaled else "residual")
    _, total, mean, rstd = kernels.add_norm(
        x, residual, weight, bias, scale, "layernorm", None, True
    )
    branch = x if scaled else None
    args = (torch.randn(21, 40), None, total, mean, rstd, branch, weight, scale, "layernorm")
    everything = kernels.add_norm_bwd(*args, True, True)
    args += (want_dweight, want_dbias)
    some = kernels.add_norm_bwd(*args)
    _assert_as_promised(torch.ops.encfast.add_norm_bwd, args, some)
    wanted = (True, scaled, want_dweight, want_dbias, scaled)
    for got, all_of_it, want in zip(some, everything, wanted, strict=True):
        assert torch.equal(got, all_of_it) if want else got.shape == (0,)


@pytest.mark.usefixtures("triton_serves_add_norm")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_through_autograd(parts, kind):
    """What the op saves is what these kernels expect, and each gradient goes where it belongs."""
    tensors = dict(zip(ORDER, _make((11, 36), parts, (BF16, FP32, BF16)), strict=True))
    inputs = {key: t for key, t in tensors.items() if t is not None}
    outputs = 2 if {"residual", "branch_scale"} & inputs.keys() else 1
    grads = [torch.randn(11, 36).to(BF16) for _ in range(outputs)]

    def reference(**inputs):
        return ref.add_norm(**inputs, kind=kind)[:outputs]

    with sanitized() as launches:
        assert_same(
            lambda **a: ops.add_norm(**a, kind=kind, return_sum=outputs == 2),
            reference,
            reference,
            inputs,
            grads,
        )
    assert launches[:2] == ["add_norm_kernel", "add_norm_bwd_kernel"]


def test_what_serves_the_op_checks_its_arguments():
    x, weight = torch.randn(3, 10), torch.randn(10)
    rest = (None, None, "layernorm", None, True)
    served = _triton_fwd(x, None, weight, *rest)
    assert _same_bits(served, kernels.add_norm(x, None, weight, *rest))
    _, _, mean, rstd = served
    args = (x, None, x, mean, rstd, None, weight, None, "layernorm", True, True)
    assert _same_bits(_triton_bwd(*args), kernels.add_norm_bwd(*args))
    with pytest.raises(ValueError, match="weight has 10 entries, x has 8 channels"):
        _triton_fwd(x[:, :8], None, weight, *rest)
    with pytest.raises(ValueError, match="kind is 'batchnorm'"):
        _triton_fwd(x, None, weight, None, None, "batchnorm", None, True)
