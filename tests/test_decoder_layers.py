"""What decoders over an encoder's levels are made of: plans with a hidden suffix, cross blocks."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from encfast import PackedBatch, ops
from encfast.config import BlockConfig
from encfast.data import random_mask
from encfast.layers import CrossBlock, PatchEncoder, Stack
from encfast.patch_mask import PatchMask

pytestmark = pytest.mark.quick

SMALL = BlockConfig(24, 4, 32)


def batch(lengths: list[int], channels: int = 24) -> PackedBatch:
    return PackedBatch.from_lengths(torch.randn(sum(lengths), channels), lengths)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """[L, C] and twice [M, C] -> [L, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


# Plans.


def masks() -> dict[str, PatchMask]:
    ends = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    return {
        "equal": PatchMask.from_noise(torch.rand(3, 6), 2),
        "shuffled": PatchMask.from_noise(torch.rand(3, 6), 2, ordered=False),
        "none": PatchMask.from_noise(torch.rand(2, 3), 0),
        "all": PatchMask.all_visible(2, 3),
        "empty": PatchMask.from_noise(torch.rand(0, 6), 2),
        "ragged": PatchMask.from_noise(torch.rand(11), [1, 0, 1, 4], cu_seqlens=ends),
    }


@pytest.mark.parametrize("kind", masks())
def test_the_suffix_plan_builds_what_a_loop_builds(kind):
    mask = masks()[kind]
    rows, token, fill = torch.randn(mask.total, 5), torch.randn(5), torch.randn(5)
    table = torch.randn(1 + max(mask.max_patches, 6), 5)
    encoded = mask.visible_plan().build(rows[mask.visible], token, table)
    built = mask.suffix_plan().build(encoded.data, fill, table)
    kinds = (mask.visible_batch(mask.visible).split(), mask.hidden_batch(mask.hidden).split())
    starts = mask.cu_seqlens[:-1].tolist()
    assert built.batch_size == len(starts)
    assert built.max_seqlen >= max(built.lengths().tolist(), default=0)
    for actual, head, seen, unseen, start in zip(
        built.split(), encoded.split(), *kinds, starts, strict=True
    ):
        visible = [head[0] + table[0]]
        visible += [head[1 + i] + table[1 + p - start] for i, p in enumerate(seen.tolist())]
        hidden = [fill + table[1 + p - start] for p in unseen.tolist()]
        torch.testing.assert_close(actual, torch.stack(visible + hidden))
    suffix = mask.hidden_batch(mask.suffix_rows()).split()
    for ids, end, unseen in zip(suffix, built.cu_seqlens[1:].tolist(), kinds[1], strict=True):
        assert ids.tolist() == list(range(end - len(unseen), end))


def test_random_masks_list_patches_in_order_or_not():
    ordered, shuffled = (
        random_mask(20, (4, 3, 2), 6, ordered=order, generator=torch.Generator().manual_seed(0))
        for order in (True, False)
    )
    assert torch.equal(ordered.hidden_grid(), shuffled.hidden_grid())
    for name, count in (("visible", 6), ("hidden", 18)):
        rows = [getattr(mask, name).view(20, count) for mask in (ordered, shuffled)]
        assert torch.equal(rows[0], rows[1].sort(1).values)
        assert not torch.equal(rows[0], rows[1])


# Blocks.


@pytest.mark.parametrize("some", [False, True], ids=["all", "rows"])
def test_a_cross_block_equals_dense_one_sequence_at_a_time(some):
    block = CrossBlock(SMALL, context_dim=10)
    x, context = batch([4, 3, 0, 1]), batch([2, 5, 3, 1], 10)
    lengths = [2, 1, 0, 1] if some else [4, 3, 0, 1]
    ids = [torch.randperm(n)[:m] for n, m in zip([4, 3, 0, 1], lengths, strict=True)]
    offsets = x.cu_seqlens[:-1].tolist()
    chosen = PackedBatch.from_list([i + o for i, o in zip(ids, offsets, strict=True)])
    expected = []
    for rows, seen, kept in zip(x.split(), context.split(), ids, strict=True):
        q, k, v = block.attn.qkv(block.norm0(rows)).chunk(3, -1)
        rows = rows + block.attn.out(dense(q, k, v, 4))
        cross, normed = block.cross, block.norm1(rows)
        found = dense(cross.q(normed), cross.k(seen), cross.v(seen), 4)
        rows = rows + cross.out(found)
        rows = rows + block.mlp.down(F.gelu(block.mlp.up(block.norm2(rows))))
        expected.append(rows[kept] if some else rows)
    actual = block(x, context, chosen if some else None)
    assert actual.lengths().tolist() == lengths
    torch.testing.assert_close(actual.data, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_a_cross_block_drops_whole_branches_of_sequences():
    config = dataclasses.replace(SMALL, drop_path=0.5)
    block = CrossBlock(config).train()
    x = PackedBatch.from_lengths(torch.randn(1, 24).expand(3 * 64, -1).clone(), [3] * 64)
    context = x.with_data(torch.randn(2, 24)[0].expand(3 * 64, -1).clone())
    results = block(x, context).data.view(64, 3, 24)
    torch.testing.assert_close(results, results[:, :1].expand(-1, 3, -1))
    # Each of three branches is dropped or not: up to eight results.
    assert 4 <= len((results[:, 0] * 1e4).round().unique(dim=0)) <= 8
    untouched = (results == x.data.view(64, 3, 24)).all((1, 2)).sum()
    assert 1 <= untouched <= 24, "an eighth of the sequences skips all three"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_position": "post"}, "norm_position='post'"),
        ({"layer_scale": 0.1}, "layer_scale=0.1"),
        ({"first_norm": False}, "first_norm=False"),
        ({"window": (2, 2)}, r"window=\(2, 2\)"),
    ],
)
def test_cross_block_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        CrossBlock(dataclasses.replace(SMALL, **fields))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_levels_are_what_blocks_return(checkpointing):
    stack, x = Stack([SMALL] * 4).train(), batch([3, 0, 5])
    stack.gradient_checkpointing = checkpointing
    outputs = [x]
    for block in stack.blocks:
        outputs.append(block(outputs[-1]))
    last, levels = stack.levels(x, (2, 0, 3))
    assert torch.equal(last.data, outputs[4].data) and torch.equal(last.data, stack(x).data)
    for level, index in zip(levels, (3, 1, 4), strict=True):
        assert torch.equal(level.data, outputs[index].data)
    for bad in (4, -1):
        with pytest.raises(ValueError, match=rf"which holds {bad}, expected blocks 0\.\.3"):
            stack.levels(x, (0, bad))


def test_an_encoder_without_class_token_whose_positions_are_learned():
    encoder = PatchEncoder((4, 6), (2, 2), [SMALL] * 2, class_token=False, learned_positions=True)
    images, mask = torch.randn(3, 3, 4, 6), random_mask(3, (2, 3), 2)
    assert "class_token" not in dict(encoder.named_parameters())
    assert encoder.positions.table.shape == (6, 24) and encoder.positions.table.requires_grad
    rows = encoder.embed(images) + encoder.positions.table.repeat(3, 1)
    for ids, seen in ((mask.visible, mask), (torch.arange(18), None)):
        x = PackedBatch.from_lengths(rows[ids], [len(ids) // 3] * 3)
        expected = encoder.norm(encoder.stack(x).data)
        torch.testing.assert_close(encoder(images, seen).data, expected)
    last, (level,) = encoder.levels(images, (0,), mask)
    torch.testing.assert_close(last.data, encoder(images, mask).data)
    first = encoder.stack.blocks[0](PackedBatch.from_lengths(rows[mask.visible], [2] * 3))
    torch.testing.assert_close(level.data, first.data)


def test_gathered_patches_are_in_the_order_of_the_voxels_with_channels_last():
    """An index volume on a grid that is no cube, and back."""
    shape, patch, grid = (2, 3, 4, 6, 10), (2, 3, 5), (2, 2, 2)
    volume = torch.arange(2 * 3 * 4 * 6 * 10, dtype=torch.float32).view(shape)
    rows = ops.gather_patches(volume, None, patch, channels_last=True)
    places = itertools.product(range(2), *(range(n) for n in grid))
    for row, (b, i, j, k) in zip(rows, places, strict=True):
        cell = volume[b, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 5 * k : 5 * k + 5]
        voxels = [cell[:, x, y, z] for x in range(2) for y in range(3) for z in range(5)]
        assert torch.equal(row, torch.cat(voxels))
    assert torch.equal(ops.fold_patches(rows, shape, patch, channels_last=True), volume)
