"""Frozen in Time: parity with timm, DistilBERT and masked attention; its zeros, losses, frames."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
import vision
from encfast import PackedBatch, ops, weights
from encfast.models import _frozen_in_time_video as video
from encfast.models._frozen_in_time_names import image_names, text_names
from encfast.models._frozen_in_time_training import grow_times, max_margin_loss
from encfast.models.frozen_in_time import (
    TRAINING,
    CaptionedClips,
    Curriculum,
    FrozenInTime,
    sample_frames,
)

from .common import assert_gradient_parity, assert_no_leak, assert_parity

QUIET = {"text_dropout": 0.0, "text_attn_dropout": 0.0}
SQUARE = {"image_size": (32, 32), "dim": 48, "num_heads": 4, "ffn_dim": 80}  # 16 patches


def tiny(*, noise: float = 0.1, **overrides) -> FrozenInTime:
    """A model whose parameters are all moved off their start, the attention in time's too."""
    model = encfast.create("frozen_in_time/tiny", **QUIET | overrides)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def batch_of(model: FrozenInTime, lengths=(3, 1, 4, 2), seed: int = 0) -> CaptionedClips:
    return model.example_batch(torch.Generator().manual_seed(seed), lengths=lengths)


# One frame: a plain vision transformer.


def timm_vit(config) -> nn.Module:
    timm = vision.importorskip("timm")
    vit = timm.create_model(
        "vit_base_patch16_224",
        pretrained=False,
        num_classes=0,
        img_size=config.image_size,
        patch_size=config.patch_size[0],
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.ffn_dim / config.dim,
    )
    return randomised(vit)


def transformers_vit(config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size[0],
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_dim,
            layer_norm_eps=config.norm_eps,
        ),
        add_pooling_layer=False,
    )
    return randomised(vit)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def transformers_names(config) -> list[weights.Tied]:
    """Of the clip tower's image part in ViTModel; timm's names with these parts replaced."""
    parts = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    }
    entries = []
    for tied in image_names(config):
        (name,) = tied.theirs
        if name.startswith("blocks."):
            continue
        start = next(p for p in parts if name.startswith(p))
        theirs = (parts[start] + name.removeprefix(start),)
        entries.append(weights.Tied(tied.ours, theirs, shapes=tied.shapes))
    for i in range(config.depth):
        for tied in weights.vit_block(f"clips.blocks.{i}", f"layers.{i}"):
            ours = tied.ours.replace(".attn.", ".space.")
            entries.append(weights.Tied(ours, tied.theirs))
    return entries


@pytest.mark.quick
@pytest.mark.parametrize("peer", ["timm", "transformers"])
@pytest.mark.parametrize("time", ["zeros", "nothing behind it"])
def test_one_frame_is_a_plain_vit(peer, time):
    """With the attention in time as it starts, and with a trained one that is switched off."""
    model = encfast.create("frozen_in_time/tiny", **QUIET | SQUARE, frames=4)
    if time != "zeros":
        model = tiny(**SQUARE, frames=4)
        for block in model.clips.blocks:
            nn.init.zeros_(block.time.out.weight)
            nn.init.zeros_(block.time.out.bias)
        nn.init.zeros_(model.clips.times)
    if peer == "timm":
        theirs, names = timm_vit(model.config), image_names(model.config)
        model.load_image_model(theirs.state_dict())
    else:
        theirs, names = transformers_vit(model.config), transformers_names(model.config)
        kept = set(model.state_dict()) - {n.ours for n in names}
        weights.load(model, theirs.state_dict(), names, keep=kept)
    images = torch.randn(3, 3, 32, 32)
    expected = theirs(images)
    expected = expected if peer == "timm" else expected.last_hidden_state[:, 0]
    got = model.clips(PackedBatch.from_lengths(images, [1, 1, 1]))
    assert_parity("class rows", got, expected)
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    (got * probe).sum().backward()
    for name, p in model.named_parameters():
        if name not in {n.ours for n in names}:
            p.grad = None
    assert_gradient_parity(model, theirs, names)
    loud = tiny(**SQUARE, frames=4)
    own = loud.clips(PackedBatch.from_lengths(images, [1, 1, 1]))
    still = copy.deepcopy(loud)
    for block in still.clips.blocks:
        block.time.zero()
    other = still.clips(PackedBatch.from_lengths(images, [1, 1, 1]))
    assert (own - other).abs().max() > 0.01, "a trained attention in time changes one frame too"


# Attention within groups.


def full_mask(kind: str, frames: int, patches: int) -> torch.Tensor:
    """`[rows, rows]` of one clip: which key a query sees."""
    frame, place = (
        torch.arange(frames * patches) // patches,
        torch.arange(frames * patches) % patches,
    )
    of = place if kind == "time" else frame
    mask = torch.ones(1 + frames * patches, 1 + frames * patches, dtype=torch.bool)
    mask[1:, 1:] = of[:, None] == of
    return mask


def masked(attention: video.GroupAttention, x: torch.Tensor, kind: str, patches: int):
    """The rows of one clip under the full boolean mask."""
    q, k, v = attention.qkv(x).chunk(3, 1)
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for y in (q, k, v))
    mask = full_mask(kind, (x.shape[0] - 1) // patches, patches)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out(out.transpose(0, 1).flatten(1))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["time", "space"])
@pytest.mark.parametrize("frames", [[1], [3], [4], [8], [3, 0, 8, 1, 4]], ids=str)
def test_groups_are_a_full_mask(kind, frames):
    """Outputs and every gradient against a loop over clips, also of different lengths."""
    config = encfast.registry.get_config("frozen_in_time/tiny", **SQUARE).block()
    attention, patches = video.GroupAttention(config), 6
    batch = PackedBatch.from_lengths(torch.empty(sum(frames), 0), frames)
    geometry = video.SpaceTime.of(batch, patches)
    rows = [1 + n * patches for n in frames]
    assert geometry.clips.diff().tolist() == rows and geometry.max_rows == max(rows)
    x = torch.randn(sum(rows), config.dim, requires_grad=True)
    probe = torch.randn(sum(rows), config.dim)
    results = []
    for attend in (
        lambda: attention(x, getattr(geometry, kind)),
        lambda: torch.cat([masked(attention, part, kind, patches) for part in x.split(rows)]),
    ):
        out = attend()
        leaves = [x, *attention.parameters()]
        results.append((out, *torch.autograd.grad((out * probe).sum(), leaves)))
    names = ("out", "dx", "dqkv.weight", "dqkv.bias", "dout.weight", "dout.bias")
    for name, ours, theirs in zip(names, *results, strict=True):
        assert_parity(name, ours, theirs, 1e-5)
    alone = attention.class_rows(x, geometry.clips, geometry.max_rows)
    assert_parity("class rows alone", alone, results[1][0][geometry.clips[:-1].long()])


@pytest.mark.quick
def test_gradients_of_the_shared_row_repeat():
    model = tiny()
    batch = batch_of(model, (4, 0, 7))
    grads = []
    for _ in range(3):
        model.zero_grad()
        model.loss(batch).total.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize(("frames", "fewer"), [(4, 3.85), (8, 7.55)])
def test_fewer_scores_than_joint_attention(frames, fewer, monkeypatch):
    """Counted in the calls of a block on ViT-B/16's 196 patches, and by the config."""
    config = encfast.registry.get_config("frozen_in_time/base", dim=32, num_heads=1, ffn_dim=32)
    block = video.SpaceTimeBlock(config.block())
    clip = PackedBatch.from_lengths(torch.empty(frames, 0), [frames])
    geometry = video.SpaceTime.of(clip, config.num_patches)
    counted = []

    def count(q, k, v, cu_seqlens_q, *, cu_seqlens_k, **_):
        lengths = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
        counted.append(int((lengths[0] * lengths[1]).sum()))
        return torch.zeros_like(q)

    monkeypatch.setattr(ops, "varlen_attn", count)
    rows = 1 + frames * config.num_patches
    block(torch.zeros(rows, 32), geometry)
    assert len(counted) == 2
    assert sum(counted) == config.attention_scores(frames)
    joint = config.attention_scores(frames, joint=True)
    assert joint == rows**2
    assert joint / sum(counted) == pytest.approx(fewer, abs=0.005)


# The block.


@pytest.mark.quick
def test_the_residual_comes_from_the_input_of_the_block():
    """Without the attention in space only the MLP is left, whatever the attention in time does."""
    model = tiny(frames=4)
    block = model.clips.blocks[0]
    geometry = video.SpaceTime.of(batch_of(model).clips, model.config.num_patches)
    x = torch.randn(int(geometry.clips[-1]), model.config.dim)
    assert block.time(block.norm3(x), geometry.time).abs().max() > 0.01
    nn.init.zeros_(block.space.out.weight)
    nn.init.zeros_(block.space.out.bias)
    assert_parity("rows", block(x, geometry), x + block.mlp(block.norm2(x)))


@pytest.mark.quick
def test_a_block_is_its_formula():
    model = tiny(frames=8)
    block, patches = model.clips.blocks[0], model.config.num_patches
    lengths = [3, 8, 1]
    geometry = video.SpaceTime.of(batch_of(model, lengths).clips, patches)
    rows = [1 + n * patches for n in lengths]
    x = torch.randn(sum(rows), model.config.dim)
    expected = []
    for part in x.split(rows):
        a = part + masked(block.time, block.norm3(part), "time", patches)
        y = part + masked(block.space, block.norm1(a), "space", patches)
        expected.append(y + block.mlp(block.norm2(y)))
    expected = torch.cat(expected)
    assert_parity("rows", block(x, geometry), expected)
    first = geometry.clips[:-1].long()
    assert_parity("class rows", block(x, geometry, class_only=True), expected[first])


@pytest.mark.quick
def test_zeros_at_the_start():
    """No order of frames changes a fresh model; repeated frames are not one frame."""
    model = encfast.create("frozen_in_time/tiny", **QUIET)
    for block in model.clips.blocks:
        assert not block.time.qkv.weight.any() and not block.time.qkv.bias.any()
        assert (block.time.out.weight == 1).all() and not block.time.out.bias.any()
    assert not model.clips.times.any()
    frames = torch.randn(4, 3, *model.config.image_size)
    order = torch.tensor([2, 0, 3, 1])

    def embedded(model, frames):
        return model.embed_clips(PackedBatch.from_lengths(frames, [len(frames)]))

    assert_parity("embedding", embedded(model, frames[order]), embedded(model, frames))
    moved = tiny(noise=0.3)
    changed = embedded(moved, frames[order]) - embedded(moved, frames)
    assert changed.abs().max() > 1e-3
    repeated = embedded(model, frames[:1].expand(4, -1, -1, -1)) - embedded(model, frames[:1])
    assert repeated.abs().max() > 1e-3, "the class key is one of 1 + 4 P, not of 1 + P"


@pytest.mark.quick
def test_times_are_added_to_patches_alone():
    """Positions are the place's and the frame's; the class row has no time."""
    model = tiny(frames=5)
    tower, c = model.clips, model.config
    table = tower._positions(3).unflatten(0, (-1,))
    places = tower.positions.table
    assert torch.equal(table[0], places[0])
    for f in range(3):
        rows = table[1 + f * c.num_patches : 1 + (f + 1) * c.num_patches]
        assert torch.equal(rows, places[1:] + tower.times[f])
    model.loss(batch_of(model, (3, 2, 1))).total.backward()
    assert tower.times.grad[:3].any() and not tower.times.grad[3:].any()


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


# Captions.


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_captions_are_read_by_transformers_models(kind):
    transformers = pytest.importorskip("transformers")
    model = tiny(text=kind, text_depth=2, text_dim=48, text_heads=4)
    c = model.config
    sizes = {"vocab_size": c.vocab_size, "max_position_embeddings": c.max_positions}
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=c.text_ffn_dim,
            **sizes,
        )
        theirs = randomised(transformers.BertModel(config))
    else:
        config = transformers.DistilBertConfig(
            dim=48, n_layers=2, n_heads=4, hidden_dim=c.text_ffn_dim, **sizes
        )
        theirs = randomised(transformers.DistilBertModel(config))
    model.load_text_model(theirs.state_dict())
    text = batch_of(model).text
    outputs = [theirs(ids[None]) for ids in text.split()]
    if kind == "bert":
        expected = torch.cat([out.pooler_output for out in outputs])
    else:
        expected = torch.cat([out.last_hidden_state[:, 0] for out in outputs])
    assert_parity("first rows", model.text(text), expected)
    joint = F.linear(F.relu(expected), model.text_proj.weight, model.text_proj.bias)
    got = model.embed_text(text)
    assert_parity("embeddings", got, F.normalize(joint, dim=-1))
    probe = torch.randn_like(got)
    model.zero_grad()
    (F.normalize(joint, dim=-1) * probe).sum().backward()
    model.zero_grad()
    (got * probe).sum().backward()
    model.text_proj.zero_grad()
    assert_gradient_parity(model, theirs, text_names(c))


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


# Frames.


@pytest.mark.quick
@pytest.mark.parametrize(("frames", "length"), [(4, 40), (4, 41), (8, 9), (1, 7), (3, 3)], ids=str)
def test_sampled_frames_come_from_equal_intervals(frames, length):
    edges = [length * i // frames for i in range(frames + 1)]
    middles = [(a + b - 1) // 2 for a, b in itertools.pairwise(edges)]
    assert sample_frames(frames, length, how="middle").tolist() == middles
    generator = torch.Generator().manual_seed(0)
    seen = torch.stack([sample_frames(frames, length, generator=generator) for _ in range(300)])
    for column, a, b in zip(seen.t(), edges[:-1], edges[1:], strict=True):
        assert set(column.tolist()) == set(range(a, b)), "every frame of an interval, no other"
    starts = sample_frames(frames, length, start=1).tolist()
    assert starts == [min(a + 1, b - 1) for a, b in itertools.pairwise(edges)]


@pytest.mark.quick
def test_sampled_frames_of_short_videos():
    for how in ("random", "middle"):
        assert sample_frames(8, 3, how=how).tolist() == [0, 1, 2]
        assert sample_frames(8, 0, how=how).tolist() == []
    with pytest.raises(ValueError, match="frames is 0, length 3 and start None"):
        sample_frames(0, 3)
    with pytest.raises(ValueError, match="how is 'mean', expected 'random' or 'middle'"):
        sample_frames(2, 3, how="mean")


@pytest.mark.quick
def test_tables_of_times_grow():
    table = torch.randn(3, 5)
    zeros, near, linear = (grow_times(table, 6, how) for how in ("zeros", "nearest", "bilinear"))
    assert torch.equal(zeros[:3], table) and not zeros[3:].any()
    assert torch.equal(near, table.repeat_interleave(2, 0))
    expected = F.interpolate(table[None, None], size=(6, 5), mode="bilinear")[0, 0]
    torch.testing.assert_close(linear, expected)
    for how in ("zeros", "nearest", "bilinear"):
        assert torch.equal(grow_times(table, 2, how), table[:2])
    with pytest.raises(ValueError, match="growth 'zero' is unknown; did you mean 'zeros'"):
        grow_times(table, 4, "zero")


@pytest.mark.quick
def test_a_curriculum_starts_where_the_last_stage_ended():
    """Grown to 4 frames, the first step on one frame is that of the model before."""
    first = tiny(frames=1)
    batch = batch_of(first, (1, 1, 1))
    grown = first.with_frames(4)
    assert grown.config.frames == 4 and grown.clips.times.shape[0] == 4
    assert torch.equal(grown.loss(batch).total, first.loss(batch).total)
    assert grown.clips.times.data_ptr() != first.clips.times.data_ptr()
    assert torch.equal(grown.with_frames(1).clips.times, first.clips.times)
    four = batch_of(first, (4, 4))
    assert grown.loss(four).total > 0
    with pytest.raises(ValueError, match="up to 4 frames, the table of times has 1"):
        first.loss(four)


@pytest.mark.quick
def test_curricula_and_their_cost():
    published = Curriculum()
    config = encfast.registry.get_config("frozen_in_time/base")
    one, four = config.attention_scores(1), config.attention_scores(4)
    cost = published.cost(config.attention_scores)
    assert cost == pytest.approx((one + 0.1 * four) / (1.1 * four))
    assert 0.30 < cost < 0.33
    assert [published.frames_at(s, 100) for s in (0, 99, 100, 109, 500)] == [1, 1, 4, 4, 4]
    three = Curriculum((1, 4, 8), (1.0, 0.1, 0.05))
    assert [three.frames_at(s, 100) for s in (99, 109, 110, 114)] == [1, 4, 8, 8]
    with pytest.raises(ValueError, match="frames has 2 stages and shares 1"):
        Curriculum((1, 4), (1.0,))
    (group,) = TRAINING.optimizer(tiny()).param_groups
    assert group["lr"] == 3e-5


# Names, sizes, errors.


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_published_names_are_complete(kind):
    model, other = tiny(text=kind), tiny(text=kind)
    tensors = weights.export(model, model.reference_names())
    for name in (
        "video_model.blocks.1.timeattn.qkv.weight",
        "video_model.temporal_embed",
        "vid_proj.0.weight",
        "txt_proj.1.bias",
    ):
        assert name in tensors
    weights.load(other, tensors, other.reference_names())
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


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
