"""The Triton kernel of rotary against the reference in float64, run by Triton's interpreter."""

import pytest
import torch

from encfast.kernels import rotary as kernels
from encfast.ops.rotary import _triton
from encfast.ref.rotary import rotary as ref
from encfast.testing import assert_close_to_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tables(length, pairs, dtype=torch.float32):
    angles = torch.rand(length, pairs) * 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _check_turned(q, k, cos, sin, positions=None, interleaved=False, conjugate=False):
    got = kernels.rotary(q, k, cos, sin, positions, interleaved, conjugate)
    options = {"interleaved": interleaved, "conjugate": conjugate}
    for name, x, turned in zip("qk", (q, k), got, strict=True):
        if x is None:
            assert turned.shape == (0,) and turned.dtype == q.dtype
            continue
        wide = ref(x.double(), cos.double(), sin.double(), positions, **options)
        plain = ref(x, cos, sin, positions, **options)
        assert_close_to_reference(name, turned, wide, plain)
        assert turned.is_contiguous() and turned.dtype == x.dtype
        rest = 2 * cos.shape[1]
        assert torch.equal(turned[..., rest:], x[..., rest:])  # not a bit changes there
    return got


@pytest.mark.parametrize("conjugate", (False, True), ids=("ahead", "back"))
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "pairs"), [(32, 16), (32, 6), (7, 3), (2, 1), (80, 40)])
def test_q_and_k(head_size, pairs, dtype, interleaved, conjugate):
    q, k = torch.randn(23, 3, head_size).to(dtype), torch.randn(23, 2, head_size).to(dtype)
    positions = torch.randint(0, 50, (23,))
    _check_turned(q, k, *_tables(50, pairs), positions, interleaved, conjugate)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("pairs", (1, 64, 128))
def test_the_largest_head(pairs, interleaved):
    _check_turned(torch.randn(5, 2, 256), None, *_tables(5, pairs), None, interleaved)


@pytest.mark.parametrize("index", (torch.int32, torch.int64, None), ids=str)
def test_positions_of_either_integer_dtype_or_none(index):
    q, k = torch.randn(19, 2, 8), torch.randn(19, 1, 8)
    positions = None if index is None else torch.randint(0, 19, (38,), dtype=index)[::2]
    _check_turned(q, k, *_tables(19, 4), positions)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_another_dtype(dtype, table_dtype):
    _check_turned(torch.randn(9, 2, 12).to(dtype), None, *_tables(9, 6, table_dtype))


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
def test_views_give_the_bits_of_their_copies(interleaved):
    qkv = torch.randn(21, 5, 3 * 16)
    q, k = qkv[:, :3, 7:23], qkv[::, 3:, 30:46]  # heads with a gap between them
    cos, sin = _tables(42, 8)[0][::2], torch.randn(21, 20)[:, 3:11]
    got = _check_turned(q, k, cos, sin, None, interleaved)
    q, k, cos, sin = (t.contiguous() for t in (q, k, cos, sin))
    for mine, other in zip(
        got, kernels.rotary(q, k, cos, sin, None, interleaved, False), strict=True
    ):
        assert torch.equal(mine, other)


def test_elements_apart_and_expanded_heads():
    apart = torch.randn(13, 8, 4).transpose(1, 2)
    expanded = torch.randn(13, 1, 8).expand(13, 2, 8)
    cos, sin = (t.t().contiguous().t() for t in _tables(13, 3))  # columns apart
    _check_turned(apart, expanded, cos, sin)


def test_conjugate_is_the_adjoint():
    q, back = torch.randn(2, 17, 3, 12).unbind()
    angles = (*_tables(17, 5), None, False)
    ahead = kernels.rotary(q, None, *angles, False)[0].double()
    adjoint = kernels.rotary(back, None, *angles, True)[0].double()
    torch.testing.assert_close((ahead * back).sum(), (q * adjoint).sum(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("rows", "heads"), [(0, 3), (4, 0)])
def test_no_rows_or_heads(rows, heads):
    q, k = torch.randn(rows, heads, 8), torch.randn(rows, 2, 8)
    turned_q, turned_k = kernels.rotary(q, k, *_tables(rows, 4), None, False, False)
    assert turned_q.shape == q.shape
    assert turned_k.shape == k.shape and not turned_k.isnan().any()


def test_what_serves_the_op_checks_its_arguments():
    q, (cos, sin) = torch.randn(6, 2, 8), _tables(6, 4)
    got = _triton(q, None, cos, sin, None, True, False)[0]
    assert torch.equal(got, kernels.rotary(q, None, cos, sin, None, True, False)[0])
    with pytest.raises(ValueError, match="cos has 5 rows, q has 6"):
        _triton(q, None, cos[:5], sin[:5], None, False, False)
    with pytest.raises(ValueError, match="expected rows and head size of q"):
        _triton(q, q[:4], cos, sin, None, False, False)
