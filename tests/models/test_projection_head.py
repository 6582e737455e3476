"""Projection heads: the fixed one, the symmetric ReLU, the linear theory, and probes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import contrastive
from encfast.data import ImageBatch
from encfast.models._projection_head_nets import Reweight, SymmetricReLU
from encfast.models.projection_head import (
    ProjectionHeadConfig,
    balanced_net,
    blend_digits,
    descend,
    feature_moments,
    probe_accuracy,
    spectral_contrastive_loss,
)

HEADS = ("none", "linear", "mlp", "mlp3", "symmetric", "reweight")


def tiny(**overrides):
    return encfast.create("projection_head/tiny", **overrides)


def small_mlp(size, width=64, **overrides):
    fields = {"encoder": "mlp", "image_size": (size,), "widths": (width, width)}
    return tiny(**fields | {"head_hidden": width, "head_out": width} | overrides)


# Heads.


@pytest.mark.quick
@pytest.mark.parametrize("kappa", [1.05, 1.5])
def test_the_fixed_head_is_kappa_to_the_minus_i(kappa):
    head = Reweight(512, kappa)
    z = (torch.rand(3, 512) + 0.5).requires_grad_()
    want = torch.tensor([kappa**-i for i in range(512)], dtype=torch.float64)
    u = head(z)
    normal = want > 2**-125  # below, float32 has fewer digits and then none
    torch.testing.assert_close((u / z)[0][normal].double(), want[normal], rtol=1e-6, atol=0)
    assert (u[:, want < 1e-46] == 0).all()
    assert not list(head.parameters())
    u.sum().backward()
    torch.testing.assert_close(z.grad[0][normal].double(), want[normal], rtol=1e-6, atol=0)
    other = Reweight(512, 2.0)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(z), u)


@pytest.mark.quick
def test_the_symmetric_head_starts_as_the_identity():
    model = small_mlp(12, head="symmetric")
    x = 3 * torch.randn(50, 12)
    found = model(x)
    torch.testing.assert_close(found.after, found.before, rtol=0, atol=1e-6)
    relu = SymmetricReLU()
    with torch.no_grad():
        relu.threshold.fill_(0.5)
    x = torch.linspace(-2, 2, 41)
    want = torch.where(x.abs() < 0.5, 0, x - 0.5 * x.sign())
    torch.testing.assert_close(relu(x), want)


@pytest.mark.quick
def test_a_symmetric_relu_drops_weak_features_that_the_first_layer_keeps():
    """The paper's diagonal network: layer 1 has every feature, layer 2 the strong ones alone."""
    weights, relu = torch.tensor([1.0, 0.6, 0.2]), SymmetricReLU()
    with torch.no_grad():
        relu.threshold.fill_(0.3)
    signs = 2.0 * torch.randint(2, (40, 3)) - 1
    before, after = signs * weights, relu(signs * weights)
    labels = (signs[:, 2] > 0).long()
    assert probe_accuracy(before, labels, before, labels) == 1
    assert (after[:, 2] == 0).all() and (after[:, :2] != 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", ["simclr", "supcon", "supervised", "spectral"])
def test_every_objective_trains_every_head(head, objective):
    model = small_mlp(12, 24, head=head, objective=objective, head_out=16)
    batch = model.example_batch(torch.Generator().manual_seed(0), batch_size=12)
    found = model(batch.images)
    assert found.before.shape == (12, 24)
    assert found.after.shape == (12, 16 if head in ("linear", "mlp", "mlp3") else 24)
    assert torch.equal(model(batch.images, False), found.before)
    assert torch.equal(model(batch.images, True), found.after)
    loss = model.loss(batch)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    u, v = (model(x, True) for x in (batch.images, batch.targets))
    a, b = F.normalize(u, dim=1), F.normalize(v, dim=1)
    want = {
        "simclr": lambda: contrastive.nt_xent(a, b, logit_scale=2.0),
        "supcon": lambda: contrastive.sup_con(
            torch.cat([a, b]), batch.labels.repeat(2), logit_scale=2.0
        ),
        "supervised": lambda: F.cross_entropy(model.classifier(u), batch.labels),
        "spectral": lambda: spectral_contrastive_loss(u, v),
    }
    torch.testing.assert_close(loss.total, want[objective]())


@pytest.mark.quick
def test_objectives_say_what_they_lack():
    batch = ImageBatch(torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"'simclr' needs batch\.targets"):
        tiny().loss(batch)
    for objective in ("supcon", "supervised"):
        with pytest.raises(ValueError, match=f"'{objective}' needs batch.labels"):
            tiny(objective=objective).loss(batch)
    with pytest.raises(ValueError, match=r"images has shape \(4, 3, 9, 8\), expected \[B"):
        tiny()(torch.randn(4, 3, 9, 8))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("head 'mpl' is unknown; did you mean 'mlp'", {"head": "mpl"}),
        ("kappa must be > 1, got 1.0", {"kappa": 1.0}),
        ("temperature must be positive and finite, got 0", {"temperature": 0}),
        ("widths has 2 stages, blocks 4", {"widths": (8, 8)}),
    ],
)
def test_configs_name_what_is_wrong(message, fields):
    with pytest.raises(ValueError, match=message):
        ProjectionHeadConfig(**fields)


@pytest.mark.quick
def test_published_sizes():
    resnet = encfast.create("projection_head/supcon-resnet50", device="meta", head="none")
    assert resnet.num_parameters() == 23_508_032  # torchvision's resnet50 without its classifier
    model = encfast.create("projection_head/simclr-cifar", device="meta")
    assert model.config.dim == 512
    mlp = sum(p.numel() for p in model.head.parameters())
    assert mlp == 512 * 512 + 512 + 512 * 128 + 128
    fixed = encfast.create("projection_head/simclr-cifar", device="meta", head="reweight")
    assert fixed.num_parameters() == model.num_parameters() - mlp


@pytest.mark.quick
def test_the_encoder_is_transformers_resnet():
    """A ResNet of both kinds of block by another hand, with the same weights in order."""
    transformers = pytest.importorskip("transformers")
    for bottleneck in (False, True):
        outputs = [4 * w if bottleneck else w for w in (8, 16)]
        theirs = transformers.ResNetModel(
            transformers.ResNetConfig(
                embedding_size=8,
                hidden_sizes=outputs,
                depths=[2, 1],
                layer_type="bottleneck" if bottleneck else "basic",
            )
        )
        ours = tiny(blocks=(2, 1), bottleneck=bottleneck, small_images=False).encoder
        kinds = (nn.Conv2d, nn.BatchNorm2d)

        # Theirs lists a block's shortcut first, ours last.
        def layers(net, kinds=kinds):
            found = [m for m in net.named_modules() if isinstance(m[1], kinds)]
            main = [m for n, m in found if "shortcut" not in n and "downsample" not in n]
            return main + [m for n, m in found if "shortcut" in n or "downsample" in n]

        for x, y in zip(layers(ours), layers(theirs), strict=True):
            x.load_state_dict(y.state_dict())
        images = torch.randn(2, 3, 40, 40)
        want = theirs(images).pooler_output.flatten(1)
        torch.testing.assert_close(ours(images), want, rtol=1e-5, atol=1e-5)


# Data.


@pytest.mark.quick
def test_digits_are_blended_inside_the_digit_alone():
    images, digits = torch.rand(40, 3, 32, 32), torch.zeros(40, 28, 28)
    digits[:, 8:20, 8:20] = 1
    blended = blend_digits(images, digits, strength=0.7)
    torch.testing.assert_close(blended[:, :, 15, 15], 0.3 * images[:, :, 15, 15] + 0.7)
    changed = (blended != images).any(1)
    assert not changed[:, :8].any() and not changed[:, :, 24:].any() and changed[:, 16, 16].all()
    generator = torch.Generator().manual_seed(0)
    some = blend_digits(images, digits, drop=0.5, generator=generator)
    kept = (some != images).flatten(1).any(1)
    assert 8 < kept.sum() < 32
    assert torch.equal(some[kept], blended[kept])


# Losses and theory.


@pytest.mark.quick
def test_spectral_contrastive_loss_against_all_pairs():
    a, b = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    s = a @ b.T
    want = -2 * s.diagonal().mean() + s[~torch.eye(9, dtype=torch.bool)].square().mean()
    got = spectral_contrastive_loss(a, b)
    torch.testing.assert_close(got, want)
    for x, y in zip(
        torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.quick
def test_the_descent_follows_the_loss():
    g = torch.Generator().manual_seed(0)
    second, pairs = feature_moments(torch.rand(3, generator=g).double() + 0.5, torch.rand(3) / 2)
    w1, w2 = (w.requires_grad_() for w in balanced_net(3, aligned=False, generator=g))
    w = w2 @ w1
    root = second.sqrt()
    loss = -2 * (w @ pairs @ w.T).trace() + (root @ w.T @ w @ root).square().sum()
    d1, d2 = torch.autograd.grad(loss, (w1, w2))
    new1, new2 = descend(w1.detach(), w2.detach(), second, pairs, rate=0.01, steps=1)
    torch.testing.assert_close(new1, w1 - 0.01 * d1)
    torch.testing.assert_close(new2, w2 - 0.01 * d2)


def test_linear_theory():
    """Balance is kept, singular values square, and gains after the head are (1 - alpha) / phi."""
    strengths = torch.tensor([1.0, 1.2, 0.8, 1.5, 0.6, 1.1, 0.9, 1.3], dtype=torch.float64)
    destroyed = torch.tensor([0, 0.2, 0.5, 0.1, 0.3, 0.4, 0.05, 0.25], dtype=torch.float64)
    w1, w2 = balanced_net(8, generator=torch.Generator().manual_seed(0))
    second, pairs = feature_moments(strengths, destroyed)
    w1, w2 = descend(w1, w2, second, pairs, rate=2e-3, steps=40_000)
    assert (w1 @ w1.T - w2.T @ w2).abs().max() < 1e-8
    before, after = torch.linalg.svdvals(w1), torch.linalg.svdvals(w2 @ w1)
    assert ((after - before.square()) / after).abs().max() < 1e-6
    gain = (w2 @ w1).norm(dim=0)  # of each feature, a coordinate of x
    torch.testing.assert_close(gain, (1 - destroyed) / strengths, rtol=1e-6, atol=0)
    spread = [(x.max() / x.min()).log() for x in (w1.norm(dim=0), gain)]
    torch.testing.assert_close(spread[1], 2 * spread[0], rtol=1e-6, atol=0)
    print(f"log(max / min) of gains {spread[0]:.3f} before the head, {spread[1]:.3f} behind it")


@pytest.mark.quick
def test_gradient_flow_keeps_the_balance_of_any_start():
    """What finite steps lose of it is in proportion to their rate: flow loses nothing."""
    second, pairs = feature_moments(torch.linspace(0.6, 1.4, 4).double(), torch.zeros(4).double())
    drifts = []
    for halvings in range(3):
        start = balanced_net(4, aligned=False, generator=torch.Generator().manual_seed(1))
        rate, steps = 4e-3 / 2**halvings, 300 * 2**halvings
        w1, w2 = descend(*start, second, pairs, rate=rate, steps=steps)
        drifts.append((w1 @ w1.T - w2.T @ w2).abs().max().item())
    assert drifts[0] > 1e-5
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.1)
    assert drifts[1] / drifts[2] == pytest.approx(2, rel=0.1)


@pytest.mark.quick
def test_the_probe_is_linear_and_sees_classes():
    x = torch.randn(400, 6)
    labels = (x @ torch.randn(6, 3)).argmax(1)
    assert probe_accuracy(x[:300], labels[:300], x[300:], labels[300:]) > 0.8
    assert probe_accuracy(x[:300], labels[:300].flip(0), x[300:], labels[300:]) < 0.6
