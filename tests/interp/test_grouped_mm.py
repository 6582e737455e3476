"""The Triton kernels of grouped_mm against the reference in float64, by Triton's interpreter."""

import pytest
import torch

from encfast.kernels import _config
from encfast.kernels import grouped_mm as kernels
from encfast.ops.grouped_mm import _triton_fwd
from encfast.ref.grouped_mm import grouped_mm as ref_fwd
from encfast.ref.grouped_mm import grouped_mm_bwd as ref_bwd
from encfast.testing import assert_close_to_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("out", "dx", "dweight", "dbias")

# Lengths of the groups, rows beyond them, C and F; tiles are 16, 32 or 64 each way.
CASES = {
    "one group": ((37,), 0, 80, 48),
    "one row": ((1,), 0, 3, 2),
    "empty groups and one row": ((0, 33, 0, 1), 0, 65, 33),
    "rows beyond": ((3, 40), 22, 48, 32),
    "none but beyond": ((0, 0), 35, 16, 16),
    "all in one": ((0, 70, 0), 0, 32, 64),
    "whole tiles": ((32, 0, 64), 32, 64, 32),
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def operands(lengths, beyond, c, f, dtype=FP32):
    n, e = sum(lengths) + beyond, len(lengths)
    return (
        torch.randn(n, f).to(dtype),
        torch.randn(n, c).to(dtype),
        (torch.randn(e, f, c) / c**0.5).to(dtype),
        torch.randn(e, f),
    )


def run(dout, x, weight, cu, bias):
    out = kernels.grouped_mm(x, weight, cu, bias)
    return out, *kernels.grouped_mm_bwd(dout, x, weight, cu, True, True, True)


def reference(dout, x, weight, cu, bias):
    return ref_fwd(x, weight, cu, bias), *ref_bwd(dout, x, weight, cu)


def check(dout, x, weight, cu, bias):
    """All four results against the rule of encfast.testing."""
    found = run(dout, x, weight, cu, bias)
    wide = None if bias is None else bias.double()
    exact = reference(dout.double(), x.double(), weight.double(), cu, wide)
    plain = reference(dout, x, weight, cu, bias)
    lengths = cu.diff()
    for name, got, *both in zip(NAMES, found, exact, plain, strict=True):
        assert_close_to_reference(
            name,
            got,
            *both,
            2.0 if name == "out" else 3.0,
            eps_factor=4.0 if got.numel() < 1000 else 1.0,
            # Zeros are what empty groups and rows beyond have.
            allow_degenerate=(lengths == 0).any().item() or got.numel() < 10 or cu[-1] < len(x),
        )
        assert got.is_contiguous() and got.dtype == (FP32 if name == "dbias" else x.dtype)
    assert (found[0][cu[-1] :] == 0).all() and (found[1][cu[-1] :] == 0).all()
    for gradient in found[2:]:
        assert (gradient[lengths == 0] == 0).all()
    return found


@pytest.mark.parametrize("case", CASES)
def test_cases_match_the_reference(case):
    dout, x, weight, bias = operands(*CASES[case])
    check(dout, x, weight, offsets(CASES[case][0]), bias)


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize("case", ("one group", "empty groups and one row"))
def test_half_precision_matches_the_reference(case, dtype):
    dout, x, weight, bias = operands(*CASES[case], dtype)
    check(dout, x, weight, offsets(CASES[case][0]), bias.to(dtype))


def test_no_bias_and_one_of_another_dtype():
    dout, x, weight, bias = operands((9, 4), 0, 20, 18, BF16)
    cu = offsets((9, 4))
    check(dout, x, weight, cu, None)
    found = check(dout, x, weight, cu, bias)
    assert not torch.equal(found[0], kernels.grouped_mm(x, weight, cu, bias.to(BF16)))


@pytest.mark.parametrize("kind", ("MANY", "FEW", "ODD"))
def test_every_kind_of_tile_serves_any_call(kind, monkeypatch):
    monkeypatch.setattr(kernels, "_kind", lambda tensors, few: getattr(kernels, kind))
    check(*operands((35, 3), 6, 80, 16)[:3], offsets((35, 3)), None)
    check(*operands((1, 17), 0, 35, 33)[:3], offsets((1, 17)), None)


def test_the_kind_of_a_call():
    """By rows per group, and by what Triton knows to be multiples of 16."""
    aligned, odd = torch.empty(64, 32), torch.empty(64, 33)
    assert kernels._kind((aligned, aligned.t()), False) == kernels.MANY
    assert kernels._kind((aligned, aligned.t()), True) == kernels.FEW
    for x in (odd, aligned[:, 1:], odd[:, :32], odd.t()):
        assert kernels._kind((aligned, x), True) == kernels.ODD


@pytest.mark.parametrize("n", (64, 65))
def test_few_rows_on_average_take_their_own_tile(n, monkeypatch):
    kinds = []
    monkeypatch.setattr(
        kernels, "_launch", lambda run, name, dtype, kind, sizes: kinds.append(kind)
    )
    kernels.grouped_mm(torch.empty(n, 16), torch.empty(2, 16, 16), offsets((n, 0)), None)
    assert kinds == [kernels.FEW if n == 64 else kernels.MANY]


LAYOUTS = {
    "columns of wider rows": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "channels apart": lambda x: x.mT.contiguous().mT,
    "no side contiguous": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_the_bits_of_their_copies(layout):
    dout, x, weight, bias = operands((9, 0, 28), 3, 32, 16)
    cu, view = offsets((9, 0, 28)), LAYOUTS[layout]
    found = check(view(dout), view(x), view(weight), cu.repeat_interleave(2)[::2], view(bias))
    for got, wanted in zip(found, run(dout, x, weight, cu, bias), strict=True):
        assert torch.equal(got, wanted)


def test_one_weight_for_all_groups_and_one_row_for_all():
    dout, x, weight, bias = operands((9, 20), 0, 48, 32)
    weight, x, dout = weight[:1].expand(2, 32, 48), x[:1].expand(29, 48), dout[:1].expand(29, 32)
    check(dout, x, weight, offsets((9, 20)), bias[:1].expand(2, 32))


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_rows_beyond_the_groups_may_hold_anything(dtype):
    dout, x, weight, bias = operands((7, 0, 12), 20, 35, 41, dtype)
    cu = offsets((7, 0, 12))
    clean = run(dout, x, weight, cu, bias)
    dout[19:], x[19:] = float("nan"), float("nan")
    for got, wanted in zip(run(dout, x, weight, cu, bias), clean, strict=True):
        assert wanted.abs().sum() > 0 and torch.equal(got, wanted)


def test_nan_stays_in_its_row_and_its_group():
    dout, x, weight, bias = operands((5, 40), 0, 20, 18)
    cu = offsets((5, 40))
    x[30] = float("nan")
    out, dx, dweight, dbias = run(dout, x, weight, cu, bias)
    assert out.isnan().all(1).nonzero().tolist() == [[30]] and out.isnan().sum() == 18
    assert dweight[1].isnan().all()
    assert not any(t.isnan().any() for t in (dx, dweight[0], dbias))


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(70, 53), torch.randn(1, 40, 53)
    whole = kernels.grouped_mm(x, weight, offsets((70,)), None)
    for n in (1, 5, 33):
        assert torch.equal(kernels.grouped_mm(x[:n], weight, offsets((n,)), None), whole[:n])


def test_what_is_not_wanted_is_empty_and_the_rest_the_same():
    dout, x, weight, bias = operands((5, 8), 0, 20, 18, BF16)
    cu = offsets((5, 8))
    _, *every = run(dout, x, weight, cu, bias)
    for i in range(3):
        wanted = [i == j for j in range(3)]
        found = kernels.grouped_mm_bwd(dout, x, weight, cu, *wanted)
        for got, want, full in zip(found, wanted, every, strict=True):
            assert got.dtype == full.dtype
            assert torch.equal(got, full) if want else got.shape == (0,)


@pytest.mark.parametrize(
    ("n", "e", "c", "f"), [(0, 2, 8, 6), (3, 2, 0, 5), (3, 2, 4, 0), (3, 0, 4, 5)], ids=str
)
def test_sizes_of_zero(n, e, c, f):
    """No rows, channels, columns or groups: zeros, or the bias where a sum has no terms."""
    x, weight, bias = torch.randn(n, c), torch.randn(e, f, c), torch.randn(e, f)
    cu = torch.tensor([0, *(min(i + 1, n) for i in range(e))], dtype=torch.int32)
    out, dx, dweight, dbias = run(torch.randn(n, f), x, weight, cu, bias)
    assert torch.equal(out, ref_fwd(x, weight, cu, bias))
    assert torch.equal(dx, torch.zeros(n, c))
    assert torch.equal(dweight, torch.zeros(e, f, c))
    assert dbias.shape == (e, f) and dbias.isfinite().all() and (n > 0 or (dbias == 0).all())


def test_what_serves_the_op_checks_its_arguments():
    _, x, weight, bias = operands((2, 3), 0, 6, 8)
    cu = offsets((2, 3))
    served = _triton_fwd(x, weight, cu, bias)
    assert torch.equal(served, kernels.grouped_mm(x, weight, cu, bias))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 8, 5\)"):
        _triton_fwd(x, weight[..., :5], cu, bias)


def test_tiles_are_those_of_the_vendor(monkeypatch):
    monkeypatch.setattr(_config, "target", lambda: "gfx942")
    assert kernels._candidates(BF16) == list(kernels._TILES["gfx90a"][2])
    monkeypatch.setattr(_config, "target", lambda: "sm_86")
    found = kernels._candidates(BF16)
    assert len(set(found)) == len(found) and set(kernels._HOPPER[2]) <= set(found)
