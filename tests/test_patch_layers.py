"""Patch layers: projections, positions, plans of rows, and what blocks of image models need."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vision
from encfast import PackedBatch
from encfast.config import BlockConfig, with_drop_path
from encfast.layers import (
    Attention,
    Block,
    CrossAttention,
    DropPath,
    FixedPositions,
    LearnedPositions,
    PatchEmbed,
    Stack,
    resize_positions,
    sincos_positions,
)
from encfast.layers.base import init_normal
from encfast.patch_mask import PatchMask

pytestmark = pytest.mark.quick

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CASES = {  # patch, size
    "signal": ((5,), (35,)),
    "image": ((4, 2), (12, 10)),
    "clip": ((2, 3, 3), (4, 6, 9)),
}
SMALL = BlockConfig(dim=24, num_heads=3, ffn_dim=40)


def conv_rows(embed: PatchEmbed, images: torch.Tensor) -> torch.Tensor:
    """The same projection as the convolution it stands for."""
    dims = len(embed.patch)
    conv = CONVS[dims](embed.channels, embed.proj.out_features, embed.patch, embed.patch)
    with torch.no_grad():
        conv.weight.copy_(embed.proj.weight.view(conv.weight.shape))
        conv.bias.copy_(embed.proj.bias)
    return conv(images).flatten(2).transpose(1, 2).flatten(0, 1)


def batch(lengths, dim: int = 24) -> PackedBatch:
    return PackedBatch.from_lengths(torch.randn(sum(lengths), dim), lengths)


# Projections.


@pytest.mark.parametrize("case", CASES)
def test_patch_embed_is_a_strided_convolution(case):
    patch, size = CASES[case]
    embed, images = PatchEmbed(patch, 7, channels=2), torch.randn(3, 2, *size)
    expected = conv_rows(embed, images)
    torch.testing.assert_close(embed(images), expected, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([len(expected) - 1, 0, 4, 0])
    torch.testing.assert_close(embed(images, ids), expected[ids], rtol=1e-5, atol=1e-6)
    packed = embed.packed(images)
    assert packed.lengths().tolist() == [len(expected) // 3] * 3
    torch.testing.assert_close(packed.data, expected, rtol=1e-5, atol=1e-6)
    assert embed.grid(size) == tuple(n // p for n, p in zip(size, patch, strict=True))


def test_patch_embed_reads_nothing_but_the_patches_asked_for():
    embed, images = PatchEmbed((4, 4), 8), torch.full((2, 3, 8, 8), torch.nan)
    images[1, :, 4:, :4] = torch.randn(3, 4, 4)
    images.requires_grad_()
    rows = embed(images, torch.tensor([4 + 2]))
    assert rows.isfinite().all()
    rows.sum().backward()
    expected = torch.zeros_like(images, dtype=torch.bool)
    expected[1, :, 4:, :4] = True
    assert torch.equal(images.grad != 0, expected)


def test_patch_embed_normalises_uint8():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    embed = PatchEmbed((4, 4), 8, mean=mean, std=std)
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    scale, shift = (torch.tensor(v).view(3, 1, 1) for v in (std, mean))
    floating = (images / 255 - shift) / scale
    torch.testing.assert_close(embed(images), embed(floating), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        embed.pixels(images, channels_last=True)[3],
        floating[0, :, 4:, 4:].permute(1, 2, 0).flatten(),
        rtol=1e-5,
        atol=1e-5,
    )
    # bf16 would round the mean and the deviation of pixels themselves.
    half = PatchEmbed((4, 4), 8, mean=mean, std=std).to(torch.bfloat16)
    assert half.scale.dtype == half.shift.dtype == torch.float32
    assert half(images).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(images).dtype == torch.bfloat16


def test_images_of_different_sizes_make_one_batch():
    embed = PatchEmbed((4, 4), 8)
    images = [torch.randn(3, *size) for size in ((8, 12), (4, 4), (12, 8))]
    packed = embed.packed(images)
    assert packed.lengths().tolist() == [6, 1, 6]
    alone = torch.cat([embed(image[None]) for image in images])
    torch.testing.assert_close(packed.data, alone, rtol=1e-5, atol=1e-6)
    mask = PatchMask.from_noise(torch.rand(13), [2, 1, 0], cu_seqlens=packed.cu_seqlens)
    seen = embed.packed(images, mask)
    assert seen.lengths().tolist() == [2, 1, 0]
    torch.testing.assert_close(seen.data, packed.data[mask.visible], rtol=1e-5, atol=1e-6)
    assert embed.packed([]).lengths().tolist() == []
    with pytest.raises(ValueError, match=r"mask has \[6, 1, 6\] patches, the images \[6, 1\]"):
        embed.packed(images[:2], mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchEmbed((4, 0), 8), r"patch is \(4, 0\)"),
        (lambda: PatchEmbed((4,) * 4, 8), r"patch is \(4, 4, 4, 4\)"),
        (lambda: PatchEmbed((4, 4), 8, mean=(0.5,)), "mean has 1 and std 3 entries, expected 3"),
        (lambda: PatchEmbed((4, 4), 8)(torch.randn(1, 1, 8, 8)), r"shape \(1, 1, 8, 8\).*C=3"),
        (lambda: PatchEmbed((4, 4), 8)(torch.randn(1, 3, 8, 9)), r"size \(8, 9\)"),
        (lambda: PatchEmbed((4, 4), 8).packed([torch.randn(1, 8, 8)]), r"images\[0\] has shape"),
        (lambda: PatchEmbed((4, 4), 8).grid((8, 6)), r"size is \(8, 6\)"),
    ],
)
def test_patch_embed_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Positions.


@pytest.mark.parametrize(
    ("grid", "axes"), [((3, 5), (1, 0)), ((3, 5), None), ((2, 3, 4), None), ((6,), None)]
)
def test_sincos_by_the_formula(grid, axes):
    n = len(grid)
    dim = 2 * n * 4
    table = sincos_positions(grid, dim, axes=axes, class_token=True)
    assert table.shape == (1 + math.prod(grid), dim) and not table[0].any()
    order = axes or range(n)
    for p in (0, 1, math.prod(grid) - 1):
        place = [p // math.prod(grid[axis + 1 :]) % grid[axis] for axis in range(n)]
        expected = []
        for axis in order:
            angles = [place[axis] / 10_000 ** (i / 4) for i in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[1 + p], torch.tensor(expected))


def test_resized_positions():
    table = torch.randn(1 + 12, 6)
    same = resize_positions(table, (3, 4), (3, 4), class_token=True)
    assert same is table
    larger = resize_positions(table, (3, 4), (6, 5), class_token=True)
    assert torch.equal(larger[0], table[0])
    cells = table[1:].view(1, 3, 4, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(cells, size=(6, 5), mode="bicubic").permute(0, 2, 3, 1).reshape(30, 6)
    torch.testing.assert_close(larger[1:], expected)
    # Along time a line stays a line; half a step in, the borders repeat.
    line = resize_positions(torch.arange(4.0)[:, None], (4,), (8,)).flatten()
    assert line.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    # In a volume each axis is its own: a table that varies along one varies along no other.
    depth = torch.arange(2.0).repeat_interleave(6)[:, None]
    volume = resize_positions(depth, (2, 2, 3), (4, 3, 2)).view(4, 3, 2)
    assert torch.equal(volume, torch.tensor([0, 0.25, 0.75, 1]).view(4, 1, 1).expand(4, 3, 2))


def test_resizing_is_that_of_timm():
    embed = vision.importorskip("timm.layers.pos_embed")
    table = torch.randn(1, 1 + 16, 6)
    for antialias in (True, False):
        expected = embed.resample_abs_pos_embed(table, [7, 3], antialias=antialias)[0]
        actual = resize_positions(table[0], (4, 4), (7, 3), class_token=True, antialias=antialias)
        torch.testing.assert_close(actual, expected)


def test_position_modules():
    fixed = FixedPositions((3, 3), 8, axes=(1, 0), class_token=True).to(torch.bfloat16)
    assert torch.equal(fixed(), sincos_positions((3, 3), 8, axes=(1, 0), class_token=True))
    assert torch.equal(fixed((2, 5)), sincos_positions((2, 5), 8, axes=(1, 0), class_token=True))
    learned = LearnedPositions((3, 3), 8, class_token=True)
    assert learned() is learned.table
    learned((2, 5)).sum().backward()
    assert learned.table.grad[0].eq(1).all() and learned.table.grad[1:].any()
    deferred = FixedPositions((3, 3), 8, device="meta").to_empty(device="cpu")
    deferred.reset_parameters()
    assert torch.equal(deferred(), sincos_positions((3, 3), 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sincos_positions((3, 3), 10), "dim is 10, expected a multiple of 4 for 2 axes"),
        (lambda: sincos_positions((3, 3), 8, axes=(0, 0)), r"axes is \(0, 0\)"),
        (lambda: resize_positions(torch.randn(5, 2), (2, 2), (3, 3)), "table has 5 rows, expected"),
        (lambda: resize_positions(torch.randn(4, 2), (2, 2), (3,)), "expected 1 to 3 axes"),
    ],
)
def test_position_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Masks and plans.


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


def stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows) if rows else torch.empty(0, 5)


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("own_positions", [True, False])
def test_plans_build_what_a_loop_builds(kind, class_token, own_positions):
    mask, first = masks()[kind], int(class_token)
    ends = mask.cu_seqlens.tolist()
    longest = mask.max_patches
    rows, token, fill = torch.randn(mask.total, 5), torch.randn(5), torch.randn(5)
    tables = [torch.randn(first + longest, 5)] * (len(ends) - 1)
    positions = tables[0] if tables else torch.randn(first + 6, 5)
    if own_positions:
        tables = [torch.randn(first + b - a, 5) for a, b in itertools.pairwise(ends)]
        positions = torch.cat([*tables, torch.empty(0, 5)])
    visible = [part.tolist() for part in mask.visible_batch(mask.visible).split()]
    encoder, decoder = [], []
    for (start, end), table, ids in zip(itertools.pairwise(ends), tables, visible, strict=True):
        place = {p: first + p - start for p in range(start, end)}
        seen = {p: rows[p] + table[place[p]] for p in ids}
        head = [token + row for row in table[:first]]
        encoder.append(stacked(head + list(seen.values())))
        again = [seen.get(p, fill) + table[place[p]] for p in range(start, end)]
        decoder.append(stacked([row + table[0] for row in head] + again))
    options = {"class_token": class_token, "own_positions": own_positions}
    built = mask.visible_plan(**options).build(rows[mask.visible], token, positions)
    again = mask.full_plan(**options).build(built.data, fill, positions)
    for actual, expected in ((built, encoder), (again, decoder)):
        assert actual.batch_size == len(expected)
        assert actual.max_seqlen >= max(actual.lengths().tolist(), default=0)
        for a, b in zip(actual.split(), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", masks())
def test_the_complement_of_a_mask(kind):
    mask = masks()[kind]
    other = mask.complement()
    assert torch.equal(other.visible, mask.hidden) and torch.equal(other.hidden, mask.visible)
    assert torch.equal(other.restore[mask.hidden], torch.arange(len(mask.hidden)))
    assert (other.restore[mask.visible] == -1).all()
    assert torch.equal(other.cu_visible, mask.cu_hidden)
    assert torch.equal(other.cu_hidden, mask.cu_visible)
    assert torch.equal(other.hidden_grid(), ~mask.hidden_grid())
    ends = mask.cu_seqlens.tolist()
    numbers = [p for a, b in itertools.pairwise(ends) for p in range(b - a)]
    assert mask.patches_of(torch.arange(mask.total)).tolist() == numbers
    assert mask.hidden_batch(mask.hidden).lengths().tolist() == mask.cu_hidden.diff().tolist()


def test_masks_from_booleans():
    hidden = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool)
    for keep in (2, None):
        mask = PatchMask.from_hidden(hidden, keep)
        assert mask.visible.tolist() == [1, 2, 4, 7] and mask.hidden.tolist() == [0, 3, 5, 6]
        assert (mask.max_patches, mask.max_visible, mask.max_hidden) == (4, 2, 2)
    hidden[0, 1] = True
    mask = PatchMask.from_hidden(hidden)
    assert mask.cu_visible.tolist() == [0, 1, 3] and mask.visible.tolist() == [2, 4, 7]
    assert (mask.max_visible, mask.max_hidden) == (2, 3)
    assert torch.equal(mask.hidden_grid().view(2, 4), hidden)
    assert torch.equal(mask.to("cpu").visible, mask.visible)
    with pytest.raises(ValueError, match="leaves 1 patches of sequence 0 visible, keep=2"):
        PatchMask.from_hidden(hidden, 2)
    with pytest.raises(TypeError, match=r"hidden is torch.int64"):
        PatchMask.from_hidden(hidden.long())
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        PatchMask.from_hidden(hidden[0])


def test_patches_trace_whole():
    """Mask, projection and both plans in one graph, for batches of any size."""
    embed, token = PatchEmbed((4, 4), 8), nn.Parameter(torch.randn(8))
    positions = FixedPositions((2, 3), 8, class_token=True)

    def run(images, noise):
        mask = PatchMask.from_noise(noise, 2)
        x = mask.visible_plan().build(embed(images, mask.visible), token, positions())
        return mask.full_plan().build(x.data, token, positions()).data.square().mean()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 5, 2):
        images, noise = torch.randn(count, 3, 8, 12), torch.rand(count, 6)
        grads = [torch.autograd.grad(f(images, noise), [token]) for f in (run, compiled)]
        torch.testing.assert_close(*grads)


# Blocks.


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_layer_scale_multiplies_the_branches(kind, monkeypatch):
    config = dataclasses.replace(SMALL, norm_position=kind, layer_scale=0.3)
    block, x = Block(config), batch([4, 0, 3])
    assert block.scale1.eq(0.3).all() and block.scale2.eq(0.3).all()
    block.scale1.data.uniform_(0.1, 2)
    block.scale2.data.uniform_(0.1, 2)
    if kind == "pre":
        mid = x.data + block.scale1 * block.attn(x.with_data(block.norm1(x.data)))
        expected = mid + block.scale2 * block.mlp(block.norm2(mid))
    else:
        mid = block.norm1(x.data + block.scale1 * block.attn(x))
        expected = block.norm2(mid + block.scale2 * block.mlp(mid))
    for threshold in (2**60, 0):  # plain, and the op that adds, scales and norms in one pass
        monkeypatch.setattr("encfast.layers.norm._FUSED_ELEMENTS_TRAINING", threshold)
        actual = block(x).data
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(
            torch.autograd.grad(actual.sin().sum(), list(block.parameters())),
            torch.autograd.grad(expected.sin().sum(), list(block.parameters()), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_blocks_without_options_have_no_further_parameters():
    plain, scaled = Block(SMALL), Block(dataclasses.replace(SMALL, layer_scale=1.0))
    assert {n for n, _ in scaled.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        "scale1",
        "scale2",
    }
    plain.load_state_dict({n: p for n, p in scaled.state_dict().items() if "scale" not in n})
    x = batch([4, 3])
    assert torch.equal(plain(x).data, scaled(x).data)
    deferred = Block(scaled_config := dataclasses.replace(SMALL, layer_scale=1e-5), device="meta")
    deferred.to_empty(device="cpu")
    for module in deferred.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert deferred.scale1.eq(scaled_config.layer_scale).all()


def test_drop_path_drops_whole_sequences():
    lengths = [3, 0, 2, 5] * 200
    x, drop = batch(lengths, 4), DropPath(0.25).train()
    x = x.with_data(torch.ones_like(x.data))
    out = drop(x.data, x)
    parts = [part for part in x.with_data(out).split() if len(part)]
    factors = torch.stack([part[0, 0] for part in parts])
    assert all((part == part[0, 0]).all() for part in parts), "a sequence was torn"
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (factors == 0).float().mean() == pytest.approx(0.25, abs=0.06)
    assert drop.eval()(x.data, x) is x.data
    assert DropPath(0.0).train()(x.data, x) is x.data
    # Chosen rows take the factor of their sequence; a batch without rows is legal.
    drop.train()
    rows = torch.tensor([0, 4, 1, 9])
    torch.manual_seed(1)
    whole = drop(x.data, x)
    torch.manual_seed(1)
    assert torch.equal(drop(x.data[rows], x, rows), whole[rows])
    nothing = PackedBatch.from_lengths(torch.empty(0, 4), [0, 0])
    assert drop(torch.ones(2, 4), nothing, torch.tensor([-1, -1])).shape == (2, 4)
    assert drop(nothing.data, nothing).shape == (0, 4)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_dropped_block_hands_its_input_on(kind):
    config = dataclasses.replace(SMALL, norm_position=kind, drop_path=0.5, layer_scale=0.5)
    block, x = Block(config).train(), batch([4, 2] * 20)
    out = x.with_data(block(x).data).split()
    kept = x.data if kind == "pre" else block.norm2(block.norm1(x.data))
    dropped = [torch.allclose(a, b) for a, b in zip(out, x.with_data(kept).split(), strict=True)]
    assert 2 <= sum(dropped) <= 20, "both branches of a quarter of 40 sequences are dropped"
    block.eval()
    plain = Block(dataclasses.replace(config, drop_path=0.0))
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x).data, plain(x).data)


def test_drop_path_rises_over_the_depth():
    rates = [c.drop_path for c in with_drop_path(SMALL, 0.2, 5)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [c.drop_path for c in with_drop_path(SMALL, 0.2, 1)] == [0]
    stack = Stack(with_drop_path(SMALL, 0.2, 5))
    assert [block.drop_path1.p for block in stack.blocks] == pytest.approx(rates)


def test_keys_without_bias():
    config = dataclasses.replace(SMALL, qkv_bias="qv")
    layer, full, x = Attention(config), Attention(SMALL), batch([4, 0, 3])
    assert {n for n, _ in layer.qkv.named_parameters()} == {"weight", "q_bias", "v_bias"}
    assert isinstance(layer.qkv, nn.Linear)
    for bias in (layer.qkv.q_bias, layer.qkv.v_bias):
        assert not bias.any()
        bias.data.normal_()
    with torch.no_grad():
        full.qkv.weight.copy_(layer.qkv.weight)
        full.qkv.bias.copy_(torch.cat((layer.qkv.q_bias, torch.zeros(24), layer.qkv.v_bias)))
        full.out.load_state_dict(layer.out.state_dict())
    assert torch.equal(layer(x), full(x))
    init_normal(holder := nn.Sequential(layer), 0.02)
    assert not holder[0].qkv.q_bias.any() and not holder[0].qkv.v_bias.any()


@pytest.mark.parametrize(
    ("field", "value"), [("drop_path", 1.0), ("drop_path", -0.1), ("qkv_bias", "k")]
)
def test_block_option_errors(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


# Two batches.


@pytest.mark.parametrize("qkv_bias", [True, False, "qv"])
@pytest.mark.parametrize("extras", [True, False])
def test_cross_attention_equals_dense_one_sequence_at_a_time(qkv_bias, extras):
    config = dataclasses.replace(SMALL, num_heads=6, num_kv_heads=2, qkv_bias=qkv_bias, softcap=5.0)
    layer = CrossAttention(config, context_dim=10)
    queries, context = batch([4, 3, 0, 1]), batch([2, 5, 3, 1], 10)
    names = ("values", "query_positions", "key_positions")
    given = {}
    if extras:
        shapes = (context.data.shape, queries.data.shape, context.data.shape)
        given = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    values, q_pos, k_pos = (given.get(name) for name in names)
    q_rows = queries.data if q_pos is None else queries.data + q_pos
    k_rows = context.data if k_pos is None else context.data + k_pos
    v_rows = context.data if values is None else values
    expected = []
    for rows, keys, seen in zip(
        queries.with_data(q_rows).split(),
        context.with_data(k_rows).split(),
        context.with_data(v_rows).split(),
        strict=True,
    ):
        q = layer.q(rows).view(len(rows), 6, 4).transpose(0, 1)  # [H, L, D]
        k, v = (
            x.view(len(keys), 2, 4).transpose(0, 1).repeat_interleave(3, 0)
            for x in (layer.k(keys), layer.v(seen))
        )
        scores = 5 * torch.tanh(q @ k.transpose(1, 2) / 2 / 5)
        heads = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(rows), 24)
        expected.append(layer.out(heads))
    actual = layer(queries, context, **given)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert (layer.k.bias is None) == (qkv_bias is not True)
    assert (layer.q.bias is None) == (layer.v.bias is None) == (qkv_bias is False)


def test_cross_attention_to_nothing_is_the_output_bias():
    layer = CrossAttention(SMALL)
    out = layer(batch([2, 1]), batch([0, 3]))
    assert torch.equal(out[:2], layer.out.bias.expand(2, -1))
    with pytest.raises(ValueError, match="context has 1 sequences, the queries 2"):
        layer(batch([2, 1]), batch([3]))
    with pytest.raises(ValueError, match="no order of rows, got causal=True"):
        CrossAttention(dataclasses.replace(SMALL, causal=True))


def test_concatenated_sequences():
    a, b = batch([2, 0, 3, 0], 4), batch([1, 2, 0, 0], 4)
    a.data.requires_grad_()
    both = a.concat(b)
    for whole, *parts in zip(both.split(), a.split(), b.split(), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert both.max_seqlen >= 3
    both.data[:2].sum().backward()
    assert a.data.grad.sum() == 8
    with pytest.raises(ValueError, match="other has 1 sequences, expected 4"):
        a.concat(batch([3], 4))
