"""MAE: parity with transformers' ViTMAE, hidden pixels that never leak, and the paper's numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import ops, weights
from encfast.data import ImageBatch, random_mask
from encfast.losses import pixel_loss
from encfast.models.mae import Mae, MaeConfig
from encfast.patch_mask import PatchMask

from .common import assert_compiles, assert_gradient_parity, assert_parity

SQUARE = {"image_size": (24, 24)}  # transformers takes no others


def tiny(**overrides) -> Mae:
    return encfast.create("mae/tiny", **overrides)


def deep(**overrides) -> Mae:
    """More than one block in the decoder too."""
    return tiny(**{"decoder_depth": 2, **overrides})


def images(model: Mae, count: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.config.channels, *model.config.image_size, generator=generator)


def twins(**overrides) -> tuple[Mae, nn.Module]:
    """transformers' model with weights that no branch vanishes under, and ours with the same."""
    transformers = pytest.importorskip("transformers")
    model = deep(**SQUARE, **overrides)
    c = model.config
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=c.image_size[0],
            patch_size=c.patch_size[0],
            num_channels=c.channels,
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            intermediate_size=c.ffn_dim,
            layer_norm_eps=c.norm_eps,
            decoder_hidden_size=c.decoder_dim,
            decoder_num_hidden_layers=c.decoder_depth,
            decoder_num_attention_heads=c.decoder_heads,
            decoder_intermediate_size=c.decoder_ffn_dim,
            mask_ratio=c.mask_ratio,
            norm_pix_loss=c.norm_pix_loss,
            attn_implementation="eager",
        )
    )
    # Built without a checkpoint, transformers' tables stay zero: their initialisation is skipped.
    theirs.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(c.num_patches)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    weights.load(model, theirs.state_dict(), model.reference_names())
    return model, theirs


# Parity.


@pytest.mark.quick
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pretraining_is_that_of_transformers(norm_pix_loss):
    model, theirs = twins(norm_pix_loss=norm_pix_loss)
    pixels, noise = images(model), torch.rand(3, 36)
    expected = theirs(pixels, noise=noise)
    mask = PatchMask.from_noise(noise, 9)
    assert torch.equal(mask.hidden_grid().view(3, 36), expected.mask.bool())
    everything = model.predict(pixels, mask).view_as(expected.logits)
    assert_parity("pixels of all patches", everything, expected.logits)
    hidden = expected.logits[expected.mask > 0]
    assert_parity("pixels of hidden patches", model(pixels, mask), hidden)
    loss = model.loss(ImageBatch(pixels, mask))
    assert loss.total is loss.pixels
    assert_parity("loss", loss.total, expected.loss)
    expected.loss.backward()
    loss.total.backward()
    learned = {name for name, _ in model.named_parameters()}
    entries = [tied for tied in model.reference_names() if tied.ours in learned]
    assert_gradient_parity(model, theirs, entries)


@pytest.mark.quick
def test_the_encoder_is_that_of_transformers():
    model, theirs = twins()
    pixels, noise = images(model), torch.rand(3, 36)
    expected = theirs.vit(pixels, noise=noise)
    # In the order of the noise, as theirs; ours may list patches in any order.
    encoded = model.encode(pixels, PatchMask.from_noise(noise, 9, ordered=False))
    assert encoded.lengths().tolist() == [10] * 3
    assert_parity("rows", encoded.data.view(3, 10, -1), expected.last_hidden_state)


@pytest.mark.quick
def test_position_tables_are_those_of_transformers():
    model, theirs = tiny(**SQUARE), twins()[1]
    for ours, name in ((model.encoder, "embeddings.position_embeddings"), (model.decoder, None)):
        table = theirs.vit.get_parameter(name) if name else theirs.decoder.decoder_pos_embed
        torch.testing.assert_close(ours.positions(), table[0].detach(), atol=1e-6, rtol=0)


@pytest.mark.quick
def test_weights_go_out_as_they_came_in():
    model, theirs = twins()
    exported = weights.export(model, model.reference_names())
    reference = theirs.state_dict()
    assert exported.keys() == reference.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, reference[name]), name
    # A classifier starts from the encoder alone.
    classifier = tiny(**SQUARE, task="classification")
    names = classifier.reference_names()
    decoder = [name for name in reference if name.startswith("decoder.")]
    weights.load(classifier, reference, names, ignore=decoder, keep=("head.weight", "head.bias"))
    pixels = images(model)
    assert torch.equal(classifier.encode(pixels).data, model.encode(pixels).data)
    with pytest.raises(ValueError, match=r"shape of vit.embeddings.cls_token: \(1, 1, 7\)"):
        wrong = reference | {"vit.embeddings.cls_token": torch.zeros(1, 1, 7)}
        weights.load(model, wrong, model.reference_names())


# What is hidden stays hidden.


@pytest.mark.quick
def test_hidden_pixels_never_reach_the_encoder():
    """NaN in every hidden pixel leaves the encoder's rows and the predictions bit-equal."""
    model = tiny()
    pixels, mask = images(model), model.draw_mask(3, generator=torch.Generator().manual_seed(1))
    rows = torch.ones(mask.total, model.config.patch_pixels)
    rows[mask.hidden] = torch.nan
    poison = ops.fold_patches(rows, pixels.shape, model.encoder.embed.patch, channels_last=True)
    poisoned = pixels * poison
    assert poisoned.isnan().float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(model.encode(poisoned, mask).data, model.encode(pixels, mask).data)
    assert torch.equal(model(poisoned, mask), model(pixels, mask))
    assert model.loss(ImageBatch(poisoned, mask)).total.isnan(), "targets are the hidden pixels"


@pytest.mark.quick
def test_the_loss_reads_hidden_patches_alone():
    model = tiny()
    pixels, mask = images(model).requires_grad_(), random_mask(3, (6, 4), 6)
    predicted = model(pixels.detach(), mask).detach()
    targets = model.encoder.embed.pixels(pixels, mask.hidden, channels_last=True)
    pixel_loss(predicted, targets, normalise=True).backward()
    reached = ops.gather_patches(pixels.grad, None, model.encoder.embed.patch).any(1)
    assert torch.equal(reached, mask.hidden_grid())


@pytest.mark.quick
def test_predictions_do_not_depend_on_the_order_of_visible_patches():
    model, noise = tiny(), torch.rand(2, 24)
    pixels = images(model, 2)
    ordered, shuffled = (PatchMask.from_noise(noise, 6, ordered=o) for o in (True, False))
    assert not torch.equal(ordered.visible, shuffled.visible)
    everything = [model.predict(pixels, mask) for mask in (ordered, shuffled)]
    torch.testing.assert_close(*everything, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_each_image_has_its_own_patches_and_its_share():
    model = tiny(image_size=(32, 32))
    mask = model.draw_mask(50)
    assert (mask.max_visible, mask.max_hidden) == (16, 48)
    grid = mask.hidden_grid().view(50, 64)
    assert (grid.sum(1) == 48).all() and len(grid.unique(dim=0)) == 50
    assert model(images(model, 2)).shape == (2 * 48, 48), "a mask is drawn where none is given"


@pytest.mark.quick
def test_targets_are_normalised_patch_by_patch():
    pixels, predicted = torch.randn(5, 12) * 3 + 1, torch.randn(5, 12)
    expected = (pixels - pixels.mean(1, keepdim=True)) / (pixels.var(1, keepdim=True) + 1e-6).sqrt()
    loss = pixel_loss(predicted, pixels, normalise=True)
    torch.testing.assert_close(loss, F.mse_loss(predicted, expected))
    torch.testing.assert_close(
        pixel_loss(predicted, pixels, normalise=True, unbiased=False),
        F.mse_loss(predicted, F.layer_norm(pixels, (12,), eps=1e-6)),
    )
    torch.testing.assert_close(pixel_loss(predicted, pixels), F.mse_loss(predicted, pixels))
    assert pixel_loss(predicted[:0], pixels[:0]).item() == 0


@pytest.mark.quick
def test_uint8_images_are_those_normalised_by_hand():
    model = tiny()
    raw = torch.randint(256, (2, 3, 24, 16), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (model.config.pixel_mean, model.config.pixel_std)
    )
    mask = model.draw_mask(2)
    expected = model.loss(ImageBatch((raw / 255 - mean) / std, mask)).total
    assert_parity("loss", model.loss(ImageBatch(raw, mask)).total, expected)


@pytest.mark.quick
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_keeps_what_is_visible(norm_pix_loss):
    model = tiny(norm_pix_loss=norm_pix_loss)
    pixels, mask = images(model, 2), model.draw_mask(2)
    rows, original = (
        ops.gather_patches(x, None, model.encoder.embed.patch, channels_last=True)
        for x in (model.reconstruct(pixels, mask), pixels)
    )
    assert torch.equal(rows[mask.visible], original[mask.visible])
    hidden, predicted = rows[mask.hidden], model(pixels, mask)
    if norm_pix_loss:  # what is put back has the mean and the deviation it was predicted for
        of = original[mask.hidden]
        predicted = predicted * (of.var(1, keepdim=True) + 1e-6).sqrt() + of.mean(1, keepdim=True)
    torch.testing.assert_close(hidden, predicted)


# Classification.


@pytest.mark.quick
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_classification_by_hand(pooling):
    model = tiny(task="classification", pooling=pooling)
    nn.init.normal_(model.head.weight)
    pixels, labels = images(model), torch.tensor([3, 1, -100])
    encoder = model.encoder
    x = encoder.embed(pixels).view(3, 24, -1) + encoder.positions()[1:]
    x = torch.cat(((encoder.class_token + encoder.positions()[0]).expand(3, 1, -1), x), 1)
    rows = encoder.stack(encfast.PackedBatch.from_lengths(x.flatten(0, 1), [25] * 3)).data
    rows = rows.view(3, 25, -1)
    pooled = rows[:, 1:].mean(1) if pooling == "mean" else rows[:, 0]
    expected = model.head(encoder.norm(pooled))
    scores = model(pixels)
    assert_parity("scores", scores, expected)
    loss = model.loss(ImageBatch(pixels, labels=labels))
    assert loss.total is loss.classification
    assert_parity("loss", loss.total, F.cross_entropy(expected[:2], labels[:2]))
    assert model(pixels, model.draw_mask(3)).shape == (3, 10), "also of visible patches alone"


@pytest.mark.quick
def test_drop_path_of_fine_tuning():
    model = tiny(task="classification", drop_path=0.5, depth=3)
    rates = [block.drop_path1.p for block in model.encoder.stack.blocks]
    assert rates == pytest.approx([0, 0.25, 0.5])
    nn.init.normal_(model.head.weight)
    pixels = images(model, 1).expand(8, -1, -1, -1)
    assert len(model.train()(pixels).unique(dim=0)) > 1
    scores = model.eval()(pixels)
    torch.testing.assert_close(scores, scores[:1].expand(8, -1))


# The rest.


def test_classification_compiles_with_drop_path():
    model = tiny(task="classification", drop_path=0.3).train()
    nn.init.normal_(model.head.weight)
    batches = [
        model.example_batch(torch.Generator().manual_seed(b), batch_size=b) for b in (3, 5, 2, 4)
    ]
    assert_compiles(model, batches)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("variant", "encoder", "total"),
    [("base", 85.8e6, 111.7e6), ("large", 303.3e6, 329.2e6), ("huge", 630.8e6, 656.7e6)],
)
def test_published_sizes(variant, encoder, total):
    model = encfast.create(f"mae/{variant}", device="meta")
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert model.num_parameters() == pytest.approx(total, rel=0.005)
    assert model.num_parameters() - decoder == pytest.approx(encoder, rel=0.005)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "masked-lm"}, "task 'masked-lm' is unknown"),
        ({"pooling": "max"}, "pooling must be"),
        ({"image_size": (24, 18)}, r"image_size is \(24, 18\), expected multiples of \(4, 4\)"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1\.0"),
        ({"mask_ratio": 0.97}, "leaves none of 24 patches visible"),
        ({"decoder_depth": 0}, "decoder_depth must be >= 1"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


@pytest.mark.quick
def test_errors():
    model, classifier = tiny(), tiny(task="classification")
    with pytest.raises(ValueError, match=r"images has size \(16, 24\), expected \(24, 16\)"):
        model(torch.randn(2, 3, 16, 24))
    with pytest.raises(ValueError, match="mask has 24 patches, expected 24 for each of 2 images"):
        model(images(model, 2), model.draw_mask(1))
    with pytest.raises(ValueError, match=r"images has shape \(2, 1, 24, 16\).*C=3"):
        model(torch.randn(2, 1, 24, 16))
    with pytest.raises(ValueError, match=r"needs batch\.labels"):
        classifier.loss(ImageBatch(images(model)))
    with pytest.raises(ValueError, match="'classification' has no decoder"):
        classifier.predict(images(model), classifier.draw_mask(3))
    assert MaeConfig().grid == (14, 14)
