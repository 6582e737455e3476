"""The Triton kernels of rank_loss against the reference in float64, by Triton's interpreter."""

import functools

import pytest
import torch
from row_cases import BF16, FP16, FP32, assert_same, name, rows

from encfast import ops, ref
from encfast.kernels import _logits
from encfast.kernels import rank_loss as kernels
from encfast.ops.rank_loss import _triton_info_nce, _triton_siglip

pytestmark = pytest.mark.usefixtures("triton_serves_rank_loss")

# B, M and D; tiles are 32 by 32 with steps of 64 terms (32 where rows lie at no multiple of 16).
SHAPES = {"one pair": (1, 1, 3), "one row": (1, 5, 2), "odd": (13, 37, 35), "whole": (32, 64, 64)}


def features(shape, dtype=FP32):
    n, m, d = shape
    a, b = rows((n, d)) * 3 / d**0.5, rows((m, d)) * 3 / d**0.5
    return {"a": a.to(dtype), "b": b.to(dtype), "logit_scale": torch.tensor(4.0)}


def some_positives(shape):
    """Some rows have none, some share one."""
    n, m, _ = shape
    return torch.randint(-1 if n > 1 else 0, m, (n,))


def assert_matches(op, inputs, positives, **options):
    n = len(positives)
    grad = torch.randn(n) if options.get("reduction") == "none" else torch.tensor(0.7)
    # Gradients of scale and bias are what is left of pulls that cancel.
    pull = (inputs["a"].double() * inputs["b"].double()[positives]).sum(1).abs().sum().item()
    bound = (
        functools.partial(f, positives=positives, **options)
        for f in (getattr(ops, op), getattr(ref, op), getattr(ref, op))
    )
    terms = {"dlogit_scale": pull, "dlogit_bias": n}
    assert_same(*bound, inputs, [grad], terms, 4.0, allow_degenerate=n < 3)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_match_the_reference(shape, dtype):
    shape = SHAPES[shape]
    inputs, positives = features(shape, dtype), some_positives(shape)
    assert_matches("info_nce", inputs, positives)
    inputs["logit_bias"] = torch.tensor(-2.0)
    assert_matches("siglip", inputs, positives, reduction="sum")


@pytest.mark.parametrize("directions", ["mean", "rows"])
def test_excluded_pairs_and_every_loss_apart(directions):
    shape = (20, 20, 16)
    inputs, own = features(shape), torch.arange(20)
    options = {"excluded": own, "directions": directions, "reduction": "none"}
    assert_matches("info_nce", inputs, (own + 7) % 20, **options)
    some = own.where(own % 2 == 0, -1)
    assert_matches("info_nce", features(shape, FP16), (own + 1) % 20, excluded=some)


def test_several_parts_and_slices(monkeypatch):
    attributes = {"_PROGRAMS": 1, "_MOST_STEPS": 1, "SLOT_BYTES": 0, "_LEAST_COLUMNS": 32}
    for attribute, value in attributes.items():
        monkeypatch.setattr(_logits, attribute, value)
    monkeypatch.setattr(kernels, "_ROWS", 16)
    shape = (37, 70, 20)
    inputs, positives = features(shape), some_positives(shape)
    assert_matches("info_nce", inputs, positives, excluded=(positives + 40) % 70)
    inputs["logit_bias"] = torch.tensor(-2.0)
    assert_matches("siglip", inputs, positives)


def test_views_and_scalars_of_another_dtype():
    a, b = rows((9, 16), BF16, "strided"), rows((12, 16), BF16, "transposed")
    positives, scale = torch.arange(18)[::2] % 12, torch.tensor(2.0, dtype=BF16)
    for op, scalars in ((ops.info_nce, {}), (ops.siglip, {"logit_bias": scale})):
        found = []
        for x, y, p in ((a, b, positives), (a.contiguous(), b.contiguous(), positives.clone())):
            leaves = [t.detach().requires_grad_() for t in (x, y, scale)]
            loss = op(*leaves[:2], logit_scale=leaves[2], positives=p, **scalars)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        assert found[0][-1].dtype == BF16
        assert all(torch.equal(g, w) for g, w in zip(*found, strict=True))


def test_finite_at_large_logits():
    a = torch.eye(6, requires_grad=True)
    for op in (ops.info_nce, ops.siglip):
        loss = op(a, torch.eye(6), logit_scale=1e4, reduction="none")
        wanted = torch.zeros(6) if op is ops.info_nce else 5 * torch.full((6,), 2.0).log()
        torch.testing.assert_close(loss, wanted)
        wrong = op(a, torch.eye(6), logit_scale=1e4, positives=(torch.arange(6) + 1) % 6)
        assert wrong >= 1e4 and torch.autograd.grad(wrong, a)[0].isfinite().all()


def test_small_losses_of_pairs_that_are_far_apart():
    """log(1 + e^-12), which a sum 1 + e would round to 0 or to a multiple of eps."""
    a, b = torch.full((3, 1), -1.0), torch.ones(4, 1)
    none = torch.full((3,), -1)
    loss = ops.siglip(a, b, logit_scale=12.0, positives=none, reduction="none")
    wanted = 4 * torch.tensor(-12.0).double().exp().log1p()
    torch.testing.assert_close(loss.double(), wanted.expand(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
def test_what_is_not_wanted_is_empty_and_the_rest_the_same(dtype):
    a, b, scale = features((9, 12, 8), dtype).values()
    positives, bias = torch.arange(9), torch.tensor(0.5)
    *losses, row_stats, col_stats = kernels.info_nce(a, b, scale, positives, None, True)
    grads = [torch.randn_like(loss) for loss in losses]
    nce = functools.partial(
        kernels.info_nce_bwd, *grads, a, b, scale, positives, None, row_stats, col_stats, True
    )
    sigmoid = functools.partial(kernels.siglip_bwd, grads[0], a, b, scale, bias, positives)
    for bwd in (nce, sigmoid):
        da, db, *scalars = bwd(True, True)
        assert (da.dtype, db.dtype, scalars[0].dtype) == (dtype, dtype, FP32)
        none, alone, *_ = bwd(False, True)
        assert none.shape == (0,) and torch.equal(alone, db)
        alone, none, *again = bwd(True, False)
        assert none.shape == (0,) and torch.equal(alone, da) and torch.equal(again[0], scalars[0])


def test_what_serves_the_ops_checks_its_arguments():
    a, b, scale = features((5, 6, 4)).values()
    with pytest.raises(ValueError, match="positives holds 6"):
        _triton_info_nce(a, b, scale, torch.full((5,), 6), None, True)
    with pytest.raises(ValueError, match="logit_scale holds -1"):
        _triton_siglip(a, b, -torch.ones(()), scale, torch.arange(5))
