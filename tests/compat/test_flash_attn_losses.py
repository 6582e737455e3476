"""encfast.compat.flash_attn's cross entropy against F.cross_entropy in float64, and RMSNorm."""

import pytest
import torch
import torch.nn.functional as F

from encfast.compat.flash_attn.losses import cross_entropy
from encfast.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from encfast.compat.flash_attn.ops.rms_norm import RMSNorm, rms_norm
from encfast.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from encfast.testing import assert_close_to_reference

pytestmark = pytest.mark.quick

N, V = 37, 50
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 1.7},
    "z-loss": {"lse_square_scale": 0.01},
    "ignore_index": {"ignore_index": 3},
    "all": {
        "label_smoothing": 0.2,
        "logit_scale": 0.6,
        "lse_square_scale": 0.05,
        "ignore_index": 3,
    },
}


def expected(logits, labels, reduction="none", compute=torch.float64, **options):
    """Loss and its z-loss part by F.cross_entropy, every intermediate in `compute`."""
    ignored = options.get("ignore_index", -100)
    z = logits.to(compute) * options.get("logit_scale", 1.0)
    smoothing = options.get("label_smoothing", 0.0)
    loss = F.cross_entropy(
        z, labels, reduction="none", ignore_index=ignored, label_smoothing=smoothing
    )
    square = options.get("lse_square_scale", 0.0) * z.logsumexp(1).square()
    square = square.masked_fill(labels == ignored, 0)
    reduced = []
    for x in (loss + square, square):
        if reduction == "mean":
            x = x.sum() / (labels != ignored).sum()
        reduced.append(x.sum() if reduction == "sum" else x)
    return reduced


def make(dtype):
    labels = torch.randint(V, (N,))
    labels[::5] = 3
    labels[2] = -100
    return torch.randn(N, V).mul(3).to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [V, 2**20], ids=["row-by-row", "at-once"])
def test_losses_and_gradients(options, dtype, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK", chunk)
    options = OPTIONS[options]
    logits, labels = make(dtype)
    if "ignore_index" in options:
        labels[2] = 3
    weight = torch.rand(N)
    results = {}
    for name, compute in (("exact", torch.float64), ("plain", dtype), ("got", None)):
        leaf = logits.detach().to(compute or dtype).requires_grad_()
        if compute is None:
            losses = cross_entropy_loss(leaf, labels, **options)
            assert all(x.dtype == torch.float32 for x in losses)
            assert not losses[1].requires_grad
        else:
            losses = expected(leaf, labels, compute=compute, **options)
        loss, z_loss = losses
        (grad,) = torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), leaf)
        results[name] = (loss, z_loss, grad)
    for i, name in enumerate(("loss", "z_loss", "dlogits")):
        got, exact, plain = (results[k][i] for k in ("got", "exact", "plain"))
        if name == "z_loss" and "lse_square_scale" not in options:
            assert (got == 0).all()
            continue
        assert_close_to_reference(name, got, exact, plain.to(got.dtype), 3 if i == 2 else 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_module(options, reduction):
    options = OPTIONS[options]
    logits, labels = make(torch.float32)
    if "ignore_index" in options:
        labels[2] = 3
    want = expected(logits, labels, reduction, **options)
    loss = CrossEntropyLoss(reduction=reduction, **options)(logits, labels)
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
    both = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)(logits, labels)
    for got, exact in zip(both, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_float64_gradient():
    logits, labels = make(torch.float64)
    leaf = logits[:6].requires_grad_()
    options = OPTIONS["all"] | {"ignore_index": -100}

    def loss(x):
        return cross_entropy_loss(x, labels[:6], **options)[0]

    assert torch.autograd.gradcheck(loss, (leaf,))


def test_precomputed_lse():
    logits, labels = make(torch.float32)
    lse = logits.double().logsumexp(1).float()
    given, found = (cross_entropy_loss(logits, labels, x)[0] for x in (lse, None))
    torch.testing.assert_close(given, found)


def test_inplace_backward_overwrites_the_logits():
    logits, labels = make(torch.bfloat16)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = CrossEntropyLoss(inplace_backward=inplace, label_smoothing=0.1)(leaf, labels)
        grads.append(torch.autograd.grad(loss, leaf)[0])
        assert (grads[-1].data_ptr() == leaf.data_ptr()) == inplace
    assert torch.equal(*grads)


def test_what_is_ignored_does_not_matter():
    """NaN in an ignored row reaches neither loss nor gradient."""
    logits, labels = make(torch.float32)
    labels[4] = -100
    logits[4] = float("nan")
    leaf = logits.requires_grad_()
    loss = CrossEntropyLoss(lse_square_scale=0.1, label_smoothing=0.1)(leaf, labels)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and grad.isfinite().all() and (grad[4] == 0).all()


def test_no_rows():
    leaf = torch.randn(0, V, requires_grad=True)
    loss = CrossEntropyLoss(reduction="sum")(leaf, torch.zeros(0, dtype=torch.int64))
    assert loss == 0 and torch.autograd.grad(loss, leaf)[0].shape == (0, V)


X, Y = torch.randn(4, 6), torch.tensor([0, 5, 1, 2])
ERRORS = {
    "process_group is given": (lambda: CrossEntropyLoss(process_group=1), NotImplementedError),
    "cross_entropy_loss: process_group": (
        lambda: cross_entropy_loss(X, Y, process_group=1),
        NotImplementedError,
    ),
    "reduction is 'max', expected": (
        lambda: CrossEntropyLoss(reduction="max"),
        NotImplementedError,
    ),
    "labels holds 6, expected 0..5 or ignore_index, -100": (
        lambda: cross_entropy_loss(X, Y + 1),
        ValueError,
    ),
    "labels holds -100, expected 0..5 or ignore_index, 0": (
        lambda: cross_entropy_loss(X, Y.where(Y > 0, -100), ignore_index=0),
        ValueError,
    ),
    "3 labels for 4 rows": (lambda: cross_entropy_loss(X, Y[:3]), ValueError),
    "labels are torch.float32": (lambda: cross_entropy_loss(X, Y.float()), TypeError),
    "logits are torch.int64": (lambda: cross_entropy_loss(X.long(), Y), TypeError),
    r"logits has shape \(1, 4, 6\)": (lambda: cross_entropy_loss(X[None], Y), ValueError),
    "labels are on meta": (lambda: cross_entropy_loss(X, Y.to("meta")), ValueError),
    "label_smoothing is 1.5": (lambda: cross_entropy_loss(X, Y, None, 1.5), ValueError),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


def test_rms_norm():
    x, norm = torch.randn(3, 8), RMSNorm(8, eps=1e-3)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), want)
    weight = torch.rand(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), want * weight)
