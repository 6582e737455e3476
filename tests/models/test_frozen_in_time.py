"""Frozen in Time: clips one by one and together, its losses, sizes, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import PackedBatch
from encfast.models._frozen_in_time_training import max_margin_loss
from encfast.models.frozen_in_time import CaptionedClips

from .common import assert_no_leak, assert_parity
from .frozen_in_time_nets import batch_of, tiny

# Clips of different lengths.


@pytest.mark.quick
def test_a_batch_is_its_clips_and_captions_one_by_one():
    model = tiny()
    batch = batch_of(model, (3, 1, 8, 4))
    both = model(batch.clips, batch.text)
    clips = [model.embed_clips(PackedBatch.from_list([c])) for c in batch.clips.split()]
    text = [model.embed_text(PackedBatch.from_list([t])) for t in batch.text.split()]
    assert_parity("clips", both.clips, torch.cat(clips))
    assert_parity("text", both.text, torch.cat(text))
    torch.testing.assert_close(both.clips.norm(dim=1), torch.ones(4))
    assert model(batch.clips).text is None and model(text=batch.text).clips is None


@pytest.mark.quick
def test_clips_do_not_see_each_other():
    model = tiny()
    results = []
    for seed in (1, 2):
        frames = batch_of(model, (3, 4, 2)).clips.data.clone()
        frames[:3] = torch.randn(
            3, *frames.shape[1:], generator=torch.Generator().manual_seed(seed)
        )
        frames.requires_grad_()
        out = model.embed_clips(PackedBatch.from_lengths(frames, [3, 4, 2]))[1]
        out[:5].sum().backward()
        assert frames.grad[3:7].any() and not frames.grad[:3].any() and not frames.grad[7:].any()
        results.append((out.detach(), frames.grad[3:7]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.quick
def test_captions_do_not_see_each_other():
    model = tiny(text_depth=2).eval()

    def rows(tokens: PackedBatch) -> torch.Tensor:
        return model.text.stack(model.text.embed(tokens)).data

    assert_no_leak(model, rows, vocab_size=model.config.vocab_size)


# Losses.


@pytest.mark.quick
def test_norm_softmax_is_the_sum_of_two_cross_entropies():
    model = tiny()
    batch = batch_of(model, (3, 1, 4, 2, 2))
    found = model(batch.clips, batch.text)
    logits = found.clips @ found.text.t() / 0.05
    right = torch.arange(5)
    expected = F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)
    loss = model.loss(batch)
    assert loss.total is loss.matching and model.config.temperature == 0.05
    assert_parity("loss", loss.total, expected)
    leaves = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss.total, leaves, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves)
    scale = max(g.abs().max() for g in theirs)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.quick
def test_max_margin_is_a_mean_over_wrong_pairs():
    model = tiny(objective="max-margin", margin=0.3)
    batch = batch_of(model, (3, 1, 4))
    found = model(batch.clips, batch.text)
    s = found.clips @ found.text.t()
    hinges = [
        F.relu(0.3 - s[i, i] + wrong)
        for i in range(3)
        for j in range(3)
        for wrong in (s[i, j], s[j, i])
        if i != j
    ]
    expected = torch.stack(hinges).mean()
    assert len(hinges) == 12 and expected > 0
    assert_parity("loss", model.loss(batch).total, expected)
    kept = torch.tensor([True, True, False])
    assert_parity("kept", max_margin_loss(s, 0.3, kept=kept), max_margin_loss(s[:2, :2], 0.3))
    assert max_margin_loss(s[:1, :1], 0.3) == 0


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["norm-softmax", "max-margin"])
def test_a_pair_without_frames_has_no_loss_of_its_own(objective):
    model = tiny(objective=objective)
    assert model.loss(batch_of(model, (0, 0))).total == 0
    assert model.loss(batch_of(model, ())).total == 0
    assert model.loss(batch_of(model, (2, 0, 3))).total > 0


# Sizes, errors.


@pytest.mark.quick
@pytest.mark.parametrize(
    ("variant", "total"),
    [
        ("base", 180_925_184),
        ("base-1f", 180_925_184 - 3 * 768),
        ("base-8f", 180_925_184 + 4 * 768),
        ("base-bert", 180_925_184 - 66_362_880 + 109_482_240),
    ],
)
def test_published_sizes(variant, total):
    """114,168,576 with 4 frames and 196,864 a projection; DistilBERT and BERT as published."""
    model = encfast.create(f"frozen_in_time/{variant}", device="meta")
    clips = sum(p.numel() for p in model.clips.parameters())
    assert clips == 114_168_576 + (model.config.frames - 4) * 768
    time = sum(p.numel() for b in model.clips.blocks for p in b.time.parameters())
    norms = sum(p.numel() for b in model.clips.blocks for p in b.norm3.parameters())
    assert clips - time - norms - model.clips.times.numel() == 85_798_656  # ViT-B/16
    assert sum(p.numel() for p in model.clip_proj.parameters()) == 196_864
    assert sum(p.numel() for p in model.text_proj.parameters()) == 196_864
    assert model.num_parameters() == total


@pytest.mark.quick
def test_bytes_are_centred_by_imagenet():
    model = tiny()
    pixels = torch.randint(256, (4, 3, *model.config.image_size), dtype=torch.uint8)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    floating = PackedBatch.from_lengths((pixels.float() / 255 - mean) / std, [3, 1])
    got = model.embed_clips(PackedBatch.from_lengths(pixels, [3, 1]))
    assert_parity("clips", got, model.embed_clips(floating))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "softmax"}, "objective 'softmax' is unknown; did you mean 'norm-softmax'"),
        ({"text": "brt"}, "text 'brt' is unknown; did you mean 'bert'"),
        ({"image_size": (16, 20)}, r"image_size is \(16, 20\), expected multiples of \(8, 8\)"),
        ({"frames": 0}, "frames must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"margin": float("inf")}, "margin must be positive and finite, got inf"),
        ({"time_init": "ones"}, "time_init must be 'zeros' or 'random', got 'ones'"),
    ],
    ids=str,
)
def test_refuses_a_config_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        encfast.create("frozen_in_time/tiny", device="meta", **fields)


@pytest.mark.quick
def test_refuses_what_does_not_fit():
    model = tiny()
    batch = batch_of(model)
    wrong = PackedBatch.from_lengths(torch.zeros(2, 3, 8, 8), [2])
    with pytest.raises(ValueError, match=r"clips has frames of \(8, 8\), expected \(16, 24\)"):
        model.embed_clips(wrong)
    fewer = CaptionedClips(batch.clips, PackedBatch.from_list(batch.text.split()[:3]))
    with pytest.raises(ValueError, match="text has 3 captions, expected 4"):
        model.loss(fewer)
    with pytest.raises(ValueError, match="position table"):
        model.embed_text(PackedBatch.from_lengths(torch.zeros(33, dtype=torch.int64), [33]))
    assert (
        encfast.create("frozen_in_time/tiny", time_init="random")
        .clips.blocks[0]
        .time.qkv.weight.any()
    )
