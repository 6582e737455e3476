"""The Triton kernels of glu against the reference in float64, run by Triton's interpreter."""

import pytest
import torch

from encfast.kernels import _rows
from encfast.kernels import glu as kernels
from encfast.ops.glu import _triton_fwd
from encfast.ref.glu import glu as ref_glu
from encfast.ref.glu import glu_bwd as ref_glu_bwd
from encfast.testing import assert_close_to_reference

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
HALVES = ("plain", "first", "second")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_both_ways(x, bias, activation, half="first", dout=None):
    """The forward, dx and dbias of one case against the rule of encfast.testing."""
    gated, second = half != "plain", half == "second"
    options = {
        "activation": activation,
        "gated": gated,
        "activated": "second" if second else "first",
    }
    wide_bias = None if bias is None else bias.double()

    out = kernels.glu(x, bias, activation, gated, second)
    expected = ref_glu(x.double(), bias=wide_bias, **options)
    assert_close_to_reference("out", out, expected, ref_glu(x, bias=bias, **options))
    assert out.is_contiguous() and out.dtype == x.dtype

    dout = torch.randn(out.shape).to(x.dtype) if dout is None else dout
    dx, dbias = kernels.glu_bwd(dout, x, bias, activation, gated, second, True)
    wide = ref_glu_bwd(dout.double(), x.double(), wide_bias, **options)
    narrow = ref_glu_bwd(dout, x, bias, **options)
    assert_close_to_reference("dx", dx, wide[0], narrow[0], 3.0)
    assert_close_to_reference("dbias", dbias, wide[1], narrow[1], 3.0)
    assert dx.is_contiguous() and dx.dtype == x.dtype and dbias.dtype == torch.float32
    return out, dx, dbias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_both_ways(activation, half, dtype):
    x = (
        2 * torch.randn(21, 140) + 0.5
    )  # two stripes of columns, the second with a rest, also of rows
    _check_both_ways(x.to(dtype), torch.randn(140).to(dtype), activation, half)


@pytest.mark.parametrize("shape", [(1, 2), (2,), (3, 5, 6), (1, 130), (17, 128), (16, 64)], ids=str)
def test_shapes_and_no_bias(shape):
    _check_both_ways(torch.randn(shape), None, "silu")


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_another_dtype_is_added_unrounded(dtype, bias_dtype):
    _check_both_ways(torch.randn(9, 34).to(dtype), torch.randn(34).to(bias_dtype), "gelu")


def test_dbias_over_several_groups_of_rows():
    x, bias = torch.randn(400, 6), torch.randn(6)  # groups of 8 steps of 16 rows: 4 of them
    _check_both_ways(x, bias, "gelu_tanh")


def test_more_steps_where_there_would_be_too_many_groups(monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_GROUPS", 2)
    _check_both_ways(torch.randn(400, 6), torch.randn(6), "silu", "second")


def test_partials_fill_several_tiles_of_the_sum(monkeypatch):
    monkeypatch.setattr(kernels, "_MIN_STEPS", 1)
    monkeypatch.setattr(_rows, "_LINES", 2)
    _check_both_ways(torch.randn(90, 70), torch.randn(70), "relu")  # 6 groups, 3 stripes of C


def _as_view(kind):
    if kind == "columns of a wider matrix":
        return torch.randn(13, 60)[:, 7:47]
    if kind == "every other row":
        return torch.randn(26, 40)[::2]
    if kind == "channels apart":
        return torch.randn(40, 13).t()
    if kind == "one row expanded":
        return torch.randn(1, 40).expand(13, 40)
    return torch.randn(13, 3, 40).transpose(0, 1)


@pytest.mark.parametrize(
    "kind",
    [
        "columns of a wider matrix",
        "every other row",
        "channels apart",
        "one row expanded",
        "leading dimensions swapped",
    ],
)
def test_views_give_the_bits_of_their_copies(kind):
    x, bias = _as_view(kind), torch.randn(80)[::2]
    dout = torch.randn(20, *x.shape[:-1]).movedim(0, -1)
    got = _check_both_ways(x, bias, "gelu", dout=dout)
    same = _check_both_ways(x.contiguous(), bias.contiguous(), "gelu", dout=dout.contiguous())
    for mine, other in zip(got, same, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy, for what becomes infinity
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out_values_have_finite_gradients(activation, half):
    far = torch.tensor([-1e25, -1e4, -60.0, -0.0, 0.0, 60.0, 1e4, 1e25]).repeat(3, 1)
    gated, second = half != "plain", half == "second"
    x = (
        far
        if not gated
        else torch.cat((torch.ones_like(far), far) if second else (far, torch.ones_like(far)), 1)
    )
    out = kernels.glu(x, None, activation, gated, second)
    dout = torch.ones_like(out)
    dx, _ = kernels.glu_bwd(dout, x, None, activation, gated, second, False)
    at = far.shape[1] if second else 0
    slope = dx[0, at : at + far.shape[1]]
    middle = 0.0 if activation == "relu" else 0.5
    torch.testing.assert_close(out[0], far[0].clamp(min=0))
    torch.testing.assert_close(slope, torch.tensor([0, 0, 0, middle, middle, 1, 1, 1]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation):
    x = torch.randn(3, 10)
    x[1, 2] = float("nan")
    out = kernels.glu(x, None, activation, False, False)
    assert out.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("want_dbias", (True, False))
def test_no_rows(shape, want_dbias):
    x = torch.empty(shape)
    out = kernels.glu(x, torch.ones(8), "gelu", True, False)
    assert out.shape == (*shape[:-1], 4)
    dx, dbias = kernels.glu_bwd(out, x, torch.ones(8), "gelu", True, False, want_dbias)
    assert dx.shape == shape
    assert torch.equal(dbias, torch.zeros(8 if want_dbias else 0))


def test_dbias_that_is_not_wanted_is_empty_and_dx_the_same():
    x, bias, dout = torch.randn(21, 40), torch.randn(40), torch.randn(21, 20)
    dx, dbias = kernels.glu_bwd(dout, x, bias, "silu", True, False, False)
    assert dbias.shape == (0,) and dbias.dtype == torch.float32
    assert torch.equal(dx, kernels.glu_bwd(dout, x, bias, "silu", True, False, True)[0])


def test_what_serves_the_op_checks_its_arguments():
    x, bias = torch.randn(3, 10), torch.randn(10)
    assert torch.equal(
        _triton_fwd(x, bias, "gelu", True, True), kernels.glu(x, bias, "gelu", True, True)
    )
    with pytest.raises(ValueError, match="bias has 10 entries, x has 8 channels"):
        _triton_fwd(x[:, :8], bias, "gelu", True, False)
    with pytest.raises(ValueError, match="expected two halves"):
        _triton_fwd(x[:, :7], None, "gelu", True, False)
