"""Frozen in Time: attention within groups against a full mask, its block, its zeros."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import PackedBatch, ops
from encfast.models import _frozen_in_time_video as video

from .common import assert_parity
from .frozen_in_time_nets import QUIET, SQUARE, batch_of, tiny

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
