"""Hi-End-MAE: parity in the order of the raster, hidden voxels, and the levels it reads."""

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import ops, weights
from encfast.data import ImageBatch, random_mask
from encfast.models.hi_end_mae import HiEndMae
from encfast.patch_mask import PatchMask

from .common import assert_gradient_parity, assert_parity
from .dense_hi_end_mae import DenseHiEndMae, patches, table

DEEP = {"depth": 12, "levels": (3, 6, 9), "decoder_depth": 2}


def tiny(**overrides) -> HiEndMae:
    return encfast.create("hi_end_mae/tiny", **overrides)


def segmenting(**overrides) -> HiEndMae:
    return tiny(task="segmentation", **overrides)


def volumes(model: HiEndMae, count: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.config.channels, *model.config.image_size, generator=generator)


def masked(model: HiEndMae, count: int = 3, seed: int = 1) -> PatchMask:
    return model.draw_mask(count, generator=torch.Generator().manual_seed(seed))


def twins(**overrides) -> tuple[HiEndMae, DenseHiEndMae]:
    """Ours, and the formulas with the same weights, which no branch vanishes under."""
    model = tiny(**{"levels": (0, 1, 2), "depth": 4, "decoder_depth": 2, **overrides})
    theirs = DenseHiEndMae(model.config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs_state = theirs.state_dict()
    keep = ("encoder.positions.table", "decoder.positions.table")
    weights.load(model, theirs_state, model.reference_names(), keep=keep)
    return model, theirs


# Parity.


@pytest.mark.quick
@pytest.mark.parametrize("channels", [1, 2])
def test_pretraining_is_that_of_the_formulas_in_raster_order(channels):
    """Ours stays shuffled up to the loss; theirs never is."""
    model, theirs = twins(channels=channels)
    x, mask = volumes(model), masked(model)
    shown = ~mask.hidden_grid().view(3, -1)
    assert_parity("loss", model.loss(ImageBatch(x, mask)).total, theirs.loss(x, shown))
    everything = theirs(x, shown).flatten(0, 1)
    assert not torch.equal(mask.hidden, mask.hidden.sort().values)
    assert_parity("voxels", model(x, mask), everything[mask.hidden])
    encoded, levels = model.encode(x, mask)
    outputs = theirs.encode(x, shown)
    order = mask.visible.view(3, -1).argsort(1) + 1
    for name, rows, expected in zip(
        ("the last output", *(f"level {i}" for i in model.config.levels)),
        (encoded, *levels),
        (outputs[-1], *(outputs[i] for i in model.config.levels)),
        strict=True,
    ):
        rows = rows.data.unflatten(0, (3, -1))
        assert_parity(f"class rows of {name}", rows[:, 0], expected[:, 0])
        raster = rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        assert_parity(f"rows of {name}", raster, expected[:, 1:])
    theirs.loss(x, shown).backward()
    model.loss(ImageBatch(x, mask)).total.backward()
    # A bias of keys alone moves all scores of a query alike.
    vanishing = [f"decoder.blocks.{i}.cross.k.bias" for i in range(3)]
    assert_gradient_parity(model, theirs, model.reference_names(), vanishing=vanishing)


@pytest.mark.quick
def test_the_encoder_is_a_stack_of_transformers_layers():
    transformers = pytest.importorskip("transformers")
    model = tiny()
    c = model.config
    theirs = transformers.ViTMAEModel(
        transformers.ViTMAEConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            intermediate_size=c.ffn_dim,
            layer_norm_eps=1e-6,
            attn_implementation="eager",
        )
    )
    entries = weights.both("encoder.norm", "layernorm")
    for i in range(c.depth):
        entries += weights.vit_block(f"encoder.stack.blocks.{i}", f"layers.{i}")
    state = theirs.state_dict()
    own = {name for name, _ in model.named_parameters()} - {e.ours for e in entries}
    keep = (*own, "encoder.positions.table", "decoder.positions.table")
    weights.load(model, state, entries, ignore=set(state), keep=keep)
    x, mask = volumes(model), masked(model)
    encoded, levels = model.encode(x, mask)
    rows = model.encoder.embedded(x, mask).data.unflatten(0, (3, -1))
    outputs = []
    for layer in theirs.layers:
        rows = layer(rows)
        outputs.append(rows)
    assert_parity("rows", encoded.data, theirs.layernorm(rows).flatten(0, 1))
    for level, index in zip(levels, c.levels, strict=True):
        assert_parity(f"level {index}", level.data, outputs[index].flatten(0, 1))


@pytest.mark.quick
def test_patches_and_positions_are_those_of_the_formulas():
    """Voxels in the order [ph, pw, pd, C]; sines and cosines of height, width and depth."""
    model = tiny(channels=2)
    x = torch.arange(2 * 2 * 24 * 24 * 12, dtype=torch.float32).view(2, 2, 24, 24, 12)
    rows = model.encoder.embed.pixels(x, channels_last=True)
    expected = patches(x, (6, 6, 6))
    assert torch.equal(rows, expected.flatten(0, 1))
    assert torch.equal(ops.fold_patches(rows, x.shape, (6, 6, 6), channels_last=True), x)
    for module, dim in ((model.encoder, 48), (model.decoder, 66)):
        positions = module.positions()
        assert not positions[0].any()
        torch.testing.assert_close(positions[1:], table((4, 4, 2), dim), rtol=0, atol=1e-6)
        assert "positions.table" not in dict(module.named_parameters())


@pytest.mark.quick
def test_weights_of_the_published_code():
    """Keys and values are one projection there, names have a prefix, tables are parameters."""
    source, theirs = twins()
    published = {}
    for name, tensor in theirs.state_dict().items():
        if ".cross_attn.v." in name:
            continue
        if ".cross_attn.k." in name:
            both = [theirs.state_dict()[name.replace(".k.", f".{x}.")] for x in "kv"]
            name, tensor = name.replace(".k.", ".kv."), torch.cat(both)
        published[f"module.{name}"] = tensor
    published["module.encoder_pos_embed"] = torch.zeros(1, 32, 48)
    published["module.decoder_pos_embed"] = torch.zeros(1, 32, 66)
    assert any(".kv." in name for name in published)
    model = tiny(levels=(0, 1, 2), depth=4, decoder_depth=2)
    model.load_published(published)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    del published["module.mask_token"]
    with pytest.raises(ValueError, match="missing: mask_token"):
        model.load_published(published)
    with pytest.raises(ValueError, match="'masked-image', not 'segmentation'"):
        segmenting().load_published(published)


# What is hidden stays hidden; what is asked is answered by every level.


@pytest.mark.quick
def test_hidden_voxels_never_reach_the_encoder():
    """NaN in every hidden voxel leaves encoder, levels and predictions bit-equal."""
    model = tiny()
    x, mask = volumes(model), masked(model)
    rows = torch.ones(mask.total, model.config.patch_voxels)
    rows[mask.hidden] = torch.nan
    poisoned = x * ops.fold_patches(rows, x.shape, (6, 6, 6), channels_last=True)
    assert poisoned.isnan().float().mean() == 0.75
    clean, dirty = (model.encode(images, mask) for images in (x, poisoned))
    assert torch.equal(clean[0].data, dirty[0].data)
    for a, b in zip(clean[1], dirty[1], strict=True):
        assert torch.equal(a.data, b.data)
    assert torch.equal(model(poisoned, mask), model(x, mask))
    assert model.loss(ImageBatch(poisoned, mask)).total.isnan(), "targets are the hidden voxels"


@pytest.mark.quick
def test_volumes_do_not_see_each_other():
    model = tiny()
    x, mask = volumes(model), masked(model)
    other = x.clone()
    other[[0, 2]] = volumes(model, 2, seed=5)
    a, b = (model(images, mask).unflatten(0, (3, -1)) for images in (x, other))
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0]) and not torch.equal(a[2], b[2])


@pytest.mark.quick
def test_levels_are_the_outputs_of_blocks_3_6_and_9():
    model = tiny(**DEEP)
    outputs: list[torch.Tensor] = []
    for block in model.encoder.stack.blocks:
        run = block.forward_rows

        def keep(*args, run=run):
            outputs.append(run(*args))
            return outputs[-1]

        block.forward_rows = keep
    encoded, levels = model.encode(volumes(model), masked(model))
    assert len(outputs) == 12 and len(levels) == 3
    for level, index in zip(levels, (3, 6, 9), strict=True):
        assert torch.equal(level.data, outputs[index])
        assert level.lengths().tolist() == [9] * 3, "the class row and 8 of 32 patches"
    assert torch.equal(encoded.data, model.encoder.norm(outputs[11]))


@pytest.mark.quick
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_every_bridge_carries_something(which):
    model = tiny(**DEEP)
    x, mask = volumes(model), masked(model)
    before = model(x, mask)
    with torch.no_grad():
        for p in model.decoder.bridges[which].parameters():
            p.zero_()
    after = model(x, mask)
    change = (after - before).abs().amax(1)
    assert (change > 1e-4).all(), "each hidden patch asks this level"


@pytest.mark.quick
def test_the_shallowest_level_alone_reaches_the_first_blocks():
    """Without gradients of the last output and of levels 9 and 6, blocks 0 to 3 still learn."""
    model = tiny(**DEEP)
    x, mask = volumes(model), masked(model)
    encoded, levels = model.encode(x, mask)
    detached = [level.with_data(level.data.detach()) for level in (encoded, *levels[1:])]
    model.decoder(detached[0], [levels[0], *detached[1:]], mask).square().mean().backward()
    for i, block in enumerate(model.encoder.stack.blocks):
        grads = [p.grad for p in block.parameters()]
        if i <= 3:
            assert all(g is not None and g.any() for g in grads), f"block {i}"
        else:
            assert all(g is None for g in grads), f"block {i}"


@pytest.mark.quick
def test_levels_are_read_deepest_first_without_norm_or_positions():
    """What a cross block takes for context is a bridge of the level, and no more."""
    model = tiny(**DEEP)
    contexts = []
    for block in model.decoder.blocks:
        block.register_forward_pre_hook(lambda module, inputs: contexts.append(inputs[1].data))
    x, mask = volumes(model), masked(model)
    model(x, mask)
    levels = model.encode(x, mask)[1]
    assert len(contexts) == 3
    for context, i in zip(contexts, (2, 1, 0), strict=True):
        assert torch.equal(context, model.decoder.bridges[i](levels[i].data))


@pytest.mark.quick
def test_predictions_do_not_depend_on_the_order_of_patches():
    model, noise = tiny(), torch.rand(2, 32)
    x = volumes(model, 2)
    results = []
    for ordered in (True, False):
        mask = PatchMask.from_noise(noise, 8, ordered=ordered)
        results.append(torch.zeros(64, 216).index_copy(0, mask.hidden, model(x, mask)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_each_volume_has_its_own_patches_and_its_share():
    model = tiny(image_size=(24, 24, 24))
    mask = model.draw_mask(50)
    assert (mask.max_visible, mask.max_hidden) == (16, 48)
    assert len(mask.hidden_grid().view(50, 64).unique(dim=0)) == 50
    for name, count in (("visible", 16), ("hidden", 48)):
        rows = getattr(mask, name).view(50, count)
        assert (rows // 64 == torch.arange(50)[:, None]).all()
        assert (rows.diff(dim=1) < 0).any(1).all(), f"{name} ones are shuffled"
    assert model(volumes(model, 2)).shape == (2 * 48, 216), "a mask is drawn where none is given"


# Objective and attention.


@pytest.mark.quick
def test_the_loss_is_the_error_of_hidden_voxels_normalised_patch_by_patch():
    model = tiny()
    x, mask = 3 * volumes(model) + 1, masked(model)
    rows = patches(x, (6, 6, 6)).flatten(0, 1)[mask.hidden]
    mean, variance = rows.mean(1, keepdim=True), rows.var(1, keepdim=True, unbiased=False)
    expected = F.mse_loss(model(x, mask), (rows - mean) / (variance + 1e-6).sqrt())
    loss = model.loss(ImageBatch(x, mask))
    assert loss.total is loss.voxels
    assert_parity("loss", loss.total, expected)


@pytest.mark.quick
@pytest.mark.parametrize("keys", [513, 129])
def test_head_dim_33_is_that_of_sdpa(keys):
    """The sizes of L/12: 513 rows of 16 heads, asking each other or 129 of the encoder's."""
    assert encfast.registry.get_config("hi_end_mae/large-p12").decoder_block().head_size == 33
    q, k, v = (torch.randn(2 * n, 16, 33, requires_grad=True) for n in (513, keys, keys))
    ends = [torch.arange(3, dtype=torch.int32) * n for n in (513, keys)]
    out = ops.varlen_attn(
        q, k, v, ends[0], cu_seqlens_k=ends[1], max_seqlen_q=513, max_seqlen_k=keys
    )
    dense = (x.unflatten(0, (2, -1)).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1)
    assert_parity("output", out, expected)
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, (q, k, v), grad) for y in (out, expected))
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        assert_parity(f"gradient of {name}", a, b)


@pytest.mark.quick
def test_reconstruction_keeps_what_is_visible():
    model = tiny()
    x, mask = volumes(model, 2), masked(model, 2)
    rows, original = (
        patches(images, (6, 6, 6)).flatten(0, 1) for images in (model.reconstruct(x, mask), x)
    )
    assert torch.equal(rows[mask.visible], original[mask.visible])
    of = original[mask.hidden]
    deviation = (of.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    expected = model(x, mask) * deviation + of.mean(1, keepdim=True)
    torch.testing.assert_close(rows[mask.hidden], expected)
    with pytest.raises(ValueError, match="'segmentation' has no decoder"):
        segmenting().reconstruct(x, mask)


# The rest.


@pytest.mark.quick
@pytest.mark.parametrize(
    ("variant", "encoder", "decoder", "bridges"),
    [
        ("large-p12", 342.6e6, 21.0e6, 3.25e6),
        ("base-p16", 88.2e6, 12.2e6, 1.18e6),
        ("large-p16", 346.3e6, 22.3e6, 3.25e6),
    ],
)
def test_published_sizes(variant, encoder, decoder, bridges):
    model = encfast.create(f"hi_end_mae/{variant}", device="meta")
    counts = [
        sum(p.numel() for p in m.parameters())
        for m in (model.encoder, model.decoder, model.decoder.bridges)
    ]
    counts[1] -= counts[2]
    assert counts == pytest.approx([encoder, decoder, bridges], rel=0.005)
    assert model.num_parameters() == sum(counts)
    visible = {"large-p12": 128, "base-p16": 54, "large-p16": 54}[variant]
    assert encfast.data.keep_count(model.config.num_patches, 0.75) == visible


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "masked-lm"}, "task 'masked-lm' is unknown"),
        ({"image_size": (24, 24, 10)}, r"image_size is \(24, 24, 10\), expected three multiples"),
        ({"image_size": (24, 24)}, r"image_size is \(24, 24\), expected three multiples"),
        ({"levels": (1, 0)}, r"levels is \(1, 0\), expected ascending blocks in 0\.\.2"),
        ({"levels": (0, 3)}, r"levels is \(0, 3\)"),
        ({"levels": ()}, r"levels is \(\)"),
        ({"dim": 40}, "dim is 40, expected a multiple of 6"),
        ({"decoder_dim": 64}, "decoder_dim is 64, expected a multiple of 6"),
        ({"mask_ratio": 0.98}, "leaves none of 32 patches visible"),
        ({"decoder_depth": 0}, "decoder_depth must be >= 1"),
        (
            {"task": "segmentation", "levels": (0, 1, 2)},
            r"patch_size is \(6, 6, 6\), expected 8 or more: the grid of patches is doubled",
        ),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


@pytest.mark.quick
def test_errors():
    model = tiny()
    with pytest.raises(ValueError, match=r"images has size \(12, 24, 24\), expected \(24, 24, 12"):
        model(torch.randn(2, 1, 12, 24, 24))
    with pytest.raises(ValueError, match="mask has 32 patches, expected 32 for each of 2 images"):
        model(volumes(model, 2), random_mask(1, (4, 4, 2), 8))
    with pytest.raises(ValueError, match=r"images has shape \(2, 3, 24, 24, 12\).*C=1"):
        model(torch.randn(2, 3, 24, 24, 12))
