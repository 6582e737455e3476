"""Contrastive losses against their formulas over all pairs, in float64."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vision
from encfast import contrastive
from encfast.testing import assert_close_to_reference

sys.path.insert(0, str(Path(__file__).parent / "ops"))

from row_cases import BF16, DTYPES, FP32, assert_same, name, results

pytestmark = pytest.mark.quick

REDUCTIONS = ["mean", "sum", "none"]
SCALE = torch.tensor(8.0)


def reduced(loss, kept, reduction):
    if reduction == "none":
        return loss
    return loss.sum() / (kept.sum().clamp(min=1) if reduction == "mean" else 1)


def logits(x, scale):
    """All logits of rows with themselves, the diagonal hidden."""
    wide = x.to(torch.promote_types(x.dtype, FP32))
    s = scale.to(wide.dtype) * wide @ wide.T
    return s.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)


def plain_nt_xent(a, b, logit_scale, reduction="mean"):
    n = len(a)
    right = torch.cat([torch.arange(n) + n, torch.arange(n)])
    return F.cross_entropy(logits(torch.cat([a, b]), logit_scale), right, reduction=reduction)


def plain_sup_con(features, logit_scale, labels, reduction="mean"):
    s = logits(features, logit_scale)
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
    count = same.sum(1)
    mean = s.masked_fill(~same, 0).sum(1) / count.clamp(min=1)
    loss = (s.logsumexp(1) - mean).where(count > 0, 0)
    return reduced(loss, count > 0, reduction)


def plain_max_margin(a, b, margin=0.2, reduction="mean"):
    s = a.to(torch.promote_types(a.dtype, FP32)) @ b.to(torch.promote_types(b.dtype, FP32)).T
    off, right = ~torch.eye(len(a), dtype=torch.bool), s.diagonal()
    terms = [(margin + s - right[:, None]).clamp(min=0), (margin + s.T - right[:, None]).clamp(0)]
    total = sum(t[off].sum() for t in terms)
    return total / (2 * off.sum()) if reduction == "mean" else total


def unit(n, d, dtype=FP32):
    return F.normalize(torch.randn(n, d), dim=-1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nt_xent(reduction, dtype):
    inputs = {"a": unit(97, 24, dtype), "b": unit(97, 24, dtype), "logit_scale": SCALE}
    grad = torch.randn(194) if reduction == "none" else torch.tensor(0.7)

    def ours(**i):
        return contrastive.nt_xent(**i, reduction=reduction)

    def plain(**i):
        return plain_nt_xent(**i, reduction=reduction)

    assert_same(ours, plain, plain, inputs, [grad], terms={"dlogit_scale": 10.0})


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_nt_xent_is_lightlys(temperature):
    """Loss and gradients through the normalisation, which lightly has inside."""
    theirs = vision.importorskip("lightly.loss").NTXentLoss(temperature=temperature)

    def ours(a, b):
        views = (F.normalize(x, dim=1) for x in (a, b))
        return contrastive.nt_xent(*views, logit_scale=1 / temperature)

    drawn = torch.randn(2, 97, 24)
    found = []
    for loss, dtype in ((ours, FP32), (theirs, torch.float64), (theirs, FP32)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in drawn]
        value = loss(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for what, got, wide, plain in zip(("loss", "da", "db"), *found, strict=True):
        few, factor = (4.0, 2.0) if what == "loss" else (1.0, 3.0)
        assert_close_to_reference(what, got, wide, plain, factor, eps_factor=few)
        assert (got - wide).abs().max() < 1e-6
        print(f"{what}: {(got - wide).abs().max():.1e} from lightly's in float64")


# Rows alone in their class, a class of many rows, labels that are no indices.
LABELS = torch.tensor([5, -7, 5, 90, 5, 90, 10**12, 5, 3, -7] * 12 + [1, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sup_con(reduction, dtype):
    labels = LABELS[torch.randperm(len(LABELS))]
    inputs = {"features": unit(len(labels), 24, dtype), "logit_scale": SCALE}
    grad = torch.randn(len(labels)) if reduction == "none" else torch.tensor(0.7)

    def ours(**i):
        return contrastive.sup_con(**i, labels=labels, reduction=reduction)

    def plain(**i):
        return plain_sup_con(**i, labels=labels, reduction=reduction)

    assert_same(ours, plain, plain, inputs, [grad], terms={"dlogit_scale": 10.0})


def test_sup_con_of_two_views_of_classes_of_one_is_nt_xent():
    a, b = unit(20, 8), unit(20, 8)
    labels = torch.arange(20).repeat(2)
    loss = contrastive.sup_con(torch.cat([a, b]), labels, logit_scale=2.0)
    torch.testing.assert_close(loss, contrastive.nt_xent(a, b, logit_scale=2.0))


def test_sup_con_rows_without_a_positive():
    """All alone: 0 and no gradient. One alone: no loss of its own, a negative of the others."""
    inputs = {"features": unit(6, 8), "logit_scale": SCALE}

    def loss(labels, **options):
        return lambda **i: contrastive.sup_con(**i, labels=labels, **options)

    found = results(loss(torch.arange(6)), inputs, [torch.tensor(1.0)])
    assert all((v == 0).all() for v in found.values())
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    found = results(loss(labels, reduction="none"), inputs, [torch.ones(6)])
    assert (found["out0"] > 0).tolist() == [True, True, False, True, True, True]
    assert found["dfeatures"][2].abs().sum() > 0


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_logits_of_ten_thousand_stay_finite(dtype):
    x, big = unit(40, 8, dtype), torch.tensor(1e4)
    labels = torch.arange(40) % 7
    grad = [torch.tensor(1.0)]
    for found in (
        results(
            lambda **i: contrastive.sup_con(**i, labels=labels),
            {"features": x, "logit_scale": big},
            grad,
        ),
        results(contrastive.nt_xent, {"a": x[:20], "b": x[20:], "logit_scale": big}, grad),
        results(contrastive.max_margin_loss, {"a": 100 * x, "b": 100 * x.flip(0)}, grad),
    ):
        assert all(v.isfinite().all() and v.abs().sum() > 0 for v in found.values())


def test_the_losses_compile_whole():
    def step(x, labels):
        loss = contrastive.sup_con(x, labels, logit_scale=2.0)
        return loss + contrastive.nt_xent(x[:6], x[6:], logit_scale=2.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, labels = unit(12, 8), torch.arange(12) % 5
    torch.testing.assert_close(compiled(x, labels), step(x, labels))


def test_triplet_loss_is_torchs_without_its_eps():
    inputs = {
        k: torch.randn(50, 9, dtype=torch.float64) for k in ("anchor", "positive", "negative")
    }
    inputs["positive"][3] = inputs["anchor"][3]  # no distance: no gradient, and no NaN
    theirs = torch.nn.TripletMarginLoss(margin=1.0, p=2, eps=0)
    grad = [torch.tensor(1.0).double()]
    ours = results(contrastive.triplet_loss, inputs, grad)
    want = results(
        lambda anchor, positive, negative: theirs(anchor, positive, negative), inputs, grad
    )
    assert 0.2 < (contrastive.triplet_loss(**inputs, reduction="none") > 0).double().mean() < 1
    for key, value in ours.items():
        torch.testing.assert_close(value, want[key], rtol=1e-6, atol=1e-9)


def test_the_mean_of_no_triplets_is_0():
    none = torch.randn(0, 4, requires_grad=True)
    contrastive.triplet_loss(none, none, none).backward()


@pytest.mark.parametrize("n", [30, 700])  # one tile of rows, and two
def test_hardest_triplets_against_a_loop(n):
    x = torch.randn(n, 5)
    labels = torch.randint(4, (n,))
    labels[:2] = torch.tensor([77, 78])  # alone in their classes
    anchors, positives, negatives = contrastive.hardest_triplets(x, labels)
    assert anchors.tolist() == list(range(2, n))
    for i, p, q in list(zip(anchors, positives, negatives, strict=True))[:: max(n // 30, 1)]:
        distance = (x[i].double() - x.double()).norm(dim=1)
        same = labels == labels[i]
        same[i] = False
        assert p == distance.where(same, -1).argmax()
        assert q == distance.where(labels != labels[i], torch.inf).argmin()


def test_hardest_triplets_of_one_class_are_none():
    found = contrastive.hardest_triplets(torch.randn(4, 3), torch.zeros(4))
    assert [len(x) for x in found] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("n", "reduction"), [(40, "mean"), (40, "sum"), (601, "mean")])
def test_max_margin(n, reduction, dtype):
    inputs = {"a": unit(n, 24, dtype), "b": unit(n, 24, dtype)}

    def ours(**i):
        return contrastive.max_margin_loss(**i, reduction=reduction)

    def plain(**i):
        return plain_max_margin(**i, reduction=reduction)

    assert_same(ours, plain, plain, inputs, [torch.tensor(0.7)])


def test_max_margin_of_one_pair_is_0():
    inputs = {"a": unit(1, 4), "b": unit(1, 4)}
    found = results(contrastive.max_margin_loss, inputs, [torch.tensor(1.0)])
    assert all((v == 0).all() for v in found.values())


X = torch.randn(4, 3)
ERRORS = {
    r"nt_xent: b has shape \(3, 3\), expected \(4, 3\)": (
        lambda: contrastive.nt_xent(X, X[:3], logit_scale=1.0),
        ValueError,
    ),
    r"info_nce: logit_scale holds -1.0": (
        lambda: contrastive.nt_xent(X, X, logit_scale=-1.0),
        ValueError,
    ),
    "sup_con: labels is torch.int32, expected int64": (
        lambda: contrastive.sup_con(X, torch.arange(4).int(), logit_scale=1.0),
        TypeError,
    ),
    r"sup_con: labels has shape \(3,\), features \(4, 3\)": (
        lambda: contrastive.sup_con(X, torch.arange(3), logit_scale=1.0),
        ValueError,
    ),
    "triplet_loss: margin is 0.0, expected a positive": (
        lambda: contrastive.triplet_loss(X, X, X, margin=0.0),
        ValueError,
    ),
    r"triplet_loss: negative has shape \(1, 3\), expected \(4, 3\)": (
        lambda: contrastive.triplet_loss(X, X, X[:1]),
        ValueError,
    ),
    "max_margin_loss: margin is nan": (
        lambda: contrastive.max_margin_loss(X, X, margin=float("nan")),
        ValueError,
    ),
    r"max_margin_loss: b has shape \(1, 3\)": (
        lambda: contrastive.max_margin_loss(X, X[:1]),
        ValueError,
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()
