"""uCLIP: heads, streaming retrieval, noise, losses; what is trained and what is not."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
import vision
from encfast.models.uclip import Anchors, MemoryBanks, Uclip, soft_retrieve

from .common import assert_parity


def tiny(**overrides) -> Uclip:
    return encfast.create("uclip/tiny", **overrides)


def batch_of(model: Uclip, size: int = 12, seed: int = 0) -> Anchors:
    return model.example_batch(torch.Generator().manual_seed(seed), batch_size=size)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("variant", "multilingual", "clip"),
    [
        ("minilm-clip", 690_944, 1_052_160),
        ("mpnet-clip", 1_971_200, 1_052_160),
        ("minilm-siglip2", 690_944, 1_971_200),
        ("mpnet-siglip2", 1_971_200, 1_971_200),
    ],
)
def test_published_sizes(variant, multilingual, clip):
    model = encfast.create(f"uclip/{variant}", device="meta")
    counts = [sum(p.numel() for p in m.parameters()) for m in (model.multilingual, model.clip)]
    assert counts == [multilingual, clip]
    published = {"minilm-clip": 1_743_104, "mpnet-clip": 3_023_360}
    assert model.num_parameters() == published.get(variant, multilingual + clip)


# Retrieval.


@pytest.mark.quick
@pytest.mark.parametrize("dim", [384, 512])
def test_streaming_is_the_dense_softmax(dim):
    """20,000 rows, 1,000 at a time, also with a last chunk that is shorter."""
    queries, memory = unit(16, dim), unit(20_000, dim, seed=1)
    q, m = queries.double(), memory.double()
    expected = F.normalize((q @ m.t() / 0.01).softmax(1) @ m, dim=-1)
    for chunk in (1000, 7777, 20_000, 50_000):
        found = soft_retrieve(queries, memory, chunk=chunk)
        assert_parity(f"chunk {chunk}", found, expected)
    nearest = memory[(queries @ memory.t()).argmax(1)]
    assert_parity("nearest", soft_retrieve(queries, memory, temperature=1e-6), nearest)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_retrieval_in_sixteen_bits_does_not_overflow(dtype):
    """Cosines of -1 and 1 over a temperature of 0.01; a bank alone may be of 16 bits."""
    memory = torch.cat((unit(50, 64), -unit(50, 64)))
    queries = unit(50, 64)
    expected = soft_retrieve(queries, memory)
    for found in (
        soft_retrieve(queries.to(dtype), memory.to(dtype), chunk=7),
        soft_retrieve(queries, memory.to(dtype), chunk=7),
    ):
        assert found.isfinite().all()
        assert (found.float() * expected).sum(1).min() > 0.999
    assert soft_retrieve(queries.to(dtype), memory).dtype == dtype


@pytest.mark.quick
def test_retrieval_has_no_gradient_and_refuses_what_does_not_fit():
    queries, memory = unit(3, 8).requires_grad_(), unit(5, 8)
    assert not soft_retrieve(queries, memory).requires_grad
    with pytest.raises(ValueError, match=r"queries has shape \(3, 8\) and memory \(5, 7\)"):
        soft_retrieve(queries, memory[:, :7])
    with pytest.raises(ValueError, match="memory has no rows"):
        soft_retrieve(queries, memory[:0])
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {wrong}, expected a positive"):
            soft_retrieve(queries, memory, temperature=wrong)
    with pytest.raises(ValueError, match="chunk is 0"):
        soft_retrieve(queries, memory, chunk=0)


# Losses.


def by_hand(model: Uclip, batch: Anchors) -> list[torch.Tensor]:
    """Pivot, retrieved and intra of a model without noise."""

    def head(m, x):
        y = m.up(x)
        if m.training:
            y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
        else:
            y = (y - m.norm.running_mean) / (m.norm.running_var + 1e-5).sqrt()
        y = m.down((y * m.norm.weight + m.norm.bias).relu())
        return y / y.norm(dim=1, keepdim=True)

    def nce(a, b):
        logits, right = 100 * a @ b.t(), torch.arange(len(a))
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)) / 2

    e, u = head(model.multilingual, batch.multilingual), head(model.multilingual, batch.sentences)
    t, v = head(model.clip, batch.clip), head(model.clip, batch.images)
    apart = (u - e + 1e-6).square().sum(1).sqrt() + (t - v + 1e-6).square().sum(1).sqrt()
    return [nce(e, t), nce(u, v), apart.mean() / 2]


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False])
def test_losses_are_those_by_hand(training):
    model = tiny(noise=0.0).train(training)
    batch = batch_of(model)
    expected = by_hand(model, batch)
    found = model.loss(batch)
    for name, reference in zip(("pivot", "retrieved", "intra"), expected, strict=True):
        assert_parity(name, getattr(found, name), reference)
    total = expected[0] + expected[1] + 0.1 * expected[2]
    assert_parity("total", found.total, total)
    theirs = torch.autograd.grad(total, list(model.parameters()))
    found.total.backward()
    largest = max(g.abs().max() for g in theirs)
    for (name, p), reference in zip(model.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(p.grad, reference, atol=2e-5 * largest, rtol=1e-4, msg=name)


@pytest.mark.quick
def test_contrastive_losses_are_open_clips():
    open_clip = vision.importorskip("open_clip")
    model = tiny(noise=0.0).eval()
    batch = batch_of(model)
    e, t = model.embed_sentences(batch.multilingual), model.embed_images(batch.clip)
    expected = open_clip.ClipLoss()(e, t, torch.tensor(100.0))
    assert_parity("pivot", model.loss(batch).pivot, expected)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["pivot", "retrieved", "intra"])
def test_a_loss_can_be_left_out(name):
    model = tiny(noise=0.0, **{f"{name}_weight": 0.0})
    weights = {"pivot": 1.0, "retrieved": 1.0, "intra": 0.1} | {name: 0.0}
    found = model.loss(batch_of(model))
    expected = sum(w * getattr(found, other) for other, w in weights.items())
    assert_parity("total", found.total, expected)
    assert getattr(found, name) > 0


@pytest.mark.quick
def test_noise_has_its_variance_and_is_fresh():
    model = tiny().train()
    zeros = torch.zeros(2000, 24)
    torch.manual_seed(0)
    expected = torch.randn_like(zeros)
    torch.manual_seed(0)
    assert_parity("direction", model.perturbed(zeros), F.normalize(expected, dim=-1))
    x = unit(2000, 24)
    first, second = model.perturbed(x), model.perturbed(x)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(first.norm(dim=1), torch.ones(2000))
    assert model.noise_std == pytest.approx(0.0632, rel=1e-3)
    # Before it is scaled back to length 1: seen where the features are so long that it is not.
    long = 1e4 * x
    moved = model.noise_std * torch.randn_like(long)
    assert moved.std().item() == pytest.approx(0.0632, rel=0.02)
    model.eval()
    assert torch.equal(model.perturbed(x), F.normalize(x, dim=-1))


@pytest.mark.quick
def test_evaluation_does_not_depend_on_the_batch():
    """One row alone as among 64; running averages mix what a head has seen."""
    model = tiny()
    for seed in range(5):
        model.loss(batch_of(model, seed=seed))
    assert model.clip.norm.running_mean.any() and model.multilingual.norm.running_mean.any()
    model.eval()
    features, sentences = unit(64, 24), unit(64, 16)
    for embed, x in ((model.embed_images, features), (model.embed_sentences, sentences)):
        assert_parity("row", embed(x[5:6]), embed(x)[5:6])
    assert torch.equal(model(features), model.embed_images(features))


@pytest.mark.quick
def test_running_averages_see_both_kinds_of_features():
    model = tiny(noise=0.0)
    twin = copy.deepcopy(model.clip)
    batch = batch_of(model)
    model.loss(batch)
    twin(batch.clip), twin(batch.images)
    assert_parity("mean", model.clip.norm.running_mean, twin.norm.running_mean)
    assert_parity("variance", model.clip.norm.running_var, twin.norm.running_var)


@pytest.mark.quick
def test_only_the_heads_are_trained():
    """50 steps on sentences alone: encoders keep their bits and take no gradient."""
    torch.manual_seed(0)
    clip, multilingual = (
        nn.Sequential(nn.Embedding(40, d), nn.Dropout(0.5), nn.BatchNorm1d(d)) for d in (24, 16)
    )
    before = [copy.deepcopy(m.state_dict()) for m in (clip, multilingual)]
    model = tiny()
    banks = MemoryBanks(unit(30, 24), unit(30, 16, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = copy.deepcopy(model.state_dict())
    for _ in range(50):
        ids = torch.randint(40, (16,))
        batch = banks.encode(clip, multilingual, ids, ids)
        optimizer.zero_grad()
        model.loss(batch).total.backward()
        optimizer.step()
    for encoder, state in zip((clip, multilingual), before, strict=True):
        assert not encoder.training
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not banks.images.requires_grad and not batch.clip.requires_grad
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), f"{name} has not moved"


@pytest.mark.quick
def test_refuses_what_does_not_fit():
    model = tiny()
    batch = batch_of(model, 4)
    wrong = Anchors(batch.clip[:3], batch.multilingual, batch.images, batch.sentences)
    with pytest.raises(ValueError, match=r"features have \[3, 4, 4, 4\] rows, expected one number"):
        model.loss(wrong)
    with pytest.raises(ValueError, match="noise must be >= 0 and finite, got -1"):
        tiny(noise=-1.0)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        tiny(temperature=0.0)
    with pytest.raises(ValueError, match="embed_dim must be >= 1, got 0"):
        tiny(embed_dim=0)
