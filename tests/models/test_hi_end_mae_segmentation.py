"""Hi-End-MAE's segmentation: what it takes over, UNETR around the levels, its loss, its data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import PackedBatch, metrics
from encfast.data import ImageBatch
from encfast.models.hi_end_mae import (
    FINE_TUNING_AUGMENTATION,
    Augmentation,
    HiEndMae,
    phantoms,
    window_ct,
)

from .common import assert_compiles, assert_parity


def tiny(**overrides) -> HiEndMae:
    return encfast.create("hi_end_mae/tiny", **overrides)


def segmenting(**overrides) -> HiEndMae:
    return tiny(task="segmentation", **overrides)


def volumes(model: HiEndMae, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, model.config.channels, *model.config.image_size, generator=generator)


@pytest.mark.quick
def test_segmentation_takes_over_the_encoder_alone():
    source, model = tiny(), segmenting()
    before = {name: t.clone() for name, t in model.segmenter.state_dict().items()}
    model.load_encoder(source.state_dict())
    encoder = source.encoder
    for name, tensor in model.encoder.state_dict().items():
        expected = encoder.state_dict()[name]
        assert torch.equal(tensor, expected[1:] if name == "positions.table" else expected), name
    for name, tensor in model.segmenter.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not [n for n, _ in model.named_parameters() if "class_token" in n or "decoder" in n]
    # All patches, no class row.
    x = volumes(model)
    rows = encoder.embed(x) + encoder.positions()[1:].repeat(3, 1)
    expected = encoder.stack(PackedBatch.from_lengths(rows, [32] * 3)).data
    encoded, levels = model.encode(x)
    assert_parity("rows", encoded.data, encoder.norm(expected))
    assert [level.lengths().tolist() for level in levels] == [[32] * 3] * 2
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_encoder(tiny(dim=60).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_encoder({"head.weight": torch.zeros(1)})


@pytest.mark.quick
def test_segmentation_is_fine_tuned_end_to_end():
    model = segmenting()
    model.loss(model.example_batch(torch.Generator().manual_seed(0))).total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert model.encoder.positions.table.requires_grad, "learned from the sines and cosines on"


@pytest.mark.quick
@pytest.mark.parametrize("which", ["stem", "0", "1", "last output"])
def test_segmentation_reads_every_level_and_the_volume(which):
    model = segmenting()
    x = volumes(model, 2)
    encoded, levels = model.encode(x)
    inputs = {"stem": x, "last output": encoded, "0": levels[0], "1": levels[1]}
    before = model.segmenter(x, encoded, levels)
    given = inputs[which]
    noise = torch.randn_like(x if which == "stem" else given.data)
    inputs[which] = noise if which == "stem" else given.with_data(noise)
    after = model.segmenter(inputs["stem"], inputs["last output"], [inputs["0"], inputs["1"]])
    assert before.shape == (2, 3, 24, 24, 12)
    assert ((after - before).abs() > 1e-4).float().mean() > 0.5


@pytest.mark.quick
def test_rows_are_put_where_their_patches_are():
    """A skip connection's voxels stand over the patch whose row they come from."""
    model = segmenting(image_size=(24, 12, 18))
    rows = torch.zeros(4 * 2 * 3, 48)
    rows[1 * 6 + 0 * 3 + 2] = 1.0  # the patch at (1, 0, 2)
    volume = model.segmenter._volume(rows)
    assert volume.shape == (1, 48, 4, 2, 3)
    assert volume[0, :, 1, 0, 2].all() and volume.sum() == 48
    lifted = model.segmenter.skips[1].first(volume)  # doubled once
    reached = lifted.abs().sum(1)[0].nonzero().unique(dim=0)
    expected = [[2 + a, 0 + b, 4 + c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    assert reached.tolist() == expected


@pytest.mark.quick
@pytest.mark.parametrize(
    ("variant", "sizes", "resized"),
    [("large-p12", [16, 32, 64], True), ("large-p16", [12, 24, 48], False)],
)
def test_unetr_as_published(variant, sizes, resized):
    """Feature size 32; three doublings; patches of 12 voxels end with a trilinear resize."""
    model = encfast.create(f"hi_end_mae/{variant}", task="segmentation", device="meta")
    net = model.segmenter
    shapes = []
    for module in (*net.skips[::-1], *net.ups, net.last):
        module.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape)))
    grid = model.config.num_patches
    ends = torch.arange(2, dtype=torch.int32) * grid
    rows = PackedBatch(torch.empty(grid, 1536, device="meta"), ends, grid)
    scores = net(torch.empty(1, 1, 96, 96, 96, device="meta"), rows, [rows] * 3)
    expected = [(1, c, n, n, n) for c, n in zip((256, 128, 64), sizes, strict=True)]
    assert sorted(shapes[:3]) == sorted(expected) and shapes[3:6] == expected
    assert shapes[6] == (1, 32, 96, 96, 96) and scores.shape == (1, 14, 96, 96, 96)
    assert isinstance(net.last.up, nn.Conv3d if resized else nn.ConvTranspose3d)
    assert net.last.doubles is not resized


@pytest.mark.quick
def test_the_loss_of_segmentation():
    model = segmenting()
    batch = model.example_batch(torch.Generator().manual_seed(0))
    loss = model.loss(batch)
    scores = model(batch.images)
    p, t = scores.softmax(1), F.one_hot(batch.labels, 3).movedim(-1, 1)
    areas = (p.square() + t).sum((2, 3, 4)) + 1e-6
    dice = (1 - 2 * (p * t).sum((2, 3, 4)) / areas).mean()
    assert_parity("dice", loss.dice, dice)
    assert_parity("cross entropy", loss.classification, F.cross_entropy(scores, batch.labels))
    assert_parity("total", loss.total, loss.dice + loss.classification)


@pytest.mark.quick
@pytest.mark.parametrize("task", ["masked-image", "segmentation"])
def test_uint8_volumes_are_those_in_0_to_1(task):
    model = tiny(task=task)
    raw = torch.randint(256, (2, 1, 24, 24, 12), dtype=torch.uint8)
    mask = model.draw_mask(2) if task == "masked-image" else None
    assert_parity("output", model(raw, mask), model(raw / 255, mask))


@pytest.mark.quick
def test_segmentation_keeps_its_gradients_under_checkpointing():
    model = segmenting().train()
    batch = model.example_batch(torch.Generator().manual_seed(0), batch_size=2)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.loss(batch).total.backward()
        return [p.grad for p in model.parameters()]

    kept = gradients()
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(), kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
def test_segmentation_of_nothing_and_in_bfloat16():
    model = segmenting()
    batch = model.example_batch(batch_size=0)
    loss = model.loss(batch).total
    loss.backward()
    assert loss.item() == 0 and model(batch.images).shape == (0, 3, 24, 24, 12)
    half = segmenting(dtype=torch.bfloat16)
    assert half.loss(half.example_batch(batch_size=2)).total.isfinite()


def test_segmentation_compiles():
    model = segmenting().train()
    batches = [
        model.example_batch(torch.Generator().manual_seed(b), batch_size=b) for b in (3, 5, 2)
    ]
    assert_compiles(model, batches)


# Data.


@pytest.mark.quick
def test_the_window_of_ct():
    hounsfield = torch.tensor([-1000, -175, 37.5, 250, 3000])
    assert window_ct(hounsfield).tolist() == [0, 0, 0.5, 1, 1]
    assert window_ct(hounsfield.to(torch.int16), -1000, 3000)[1] == pytest.approx(0.20625)
    with pytest.raises(ValueError, match="low must be < high, got 5 and 5"):
        window_ct(hounsfield, 5, 5)


@pytest.mark.quick
def test_augmentation_moves_labels_with_their_voxels():
    labels = torch.arange(6 * 6 * 4).view(6, 6, 4)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        moved, said = Augmentation(scale=0, shift=0)(
            labels[None].float(), labels, generator=generator
        )
        assert torch.equal(moved[0], said.float())
        assert moved.sort().values.sum() == labels.sum()
        seen.add(tuple(said.flatten().tolist()))
    assert len(seen) == 16, "flips of three axes and quarter turns in a plane"
    same, nothing = Augmentation(0, 0, 0, 0)(labels[None].float())
    assert nothing is None and torch.equal(same[0], labels.float())
    with pytest.raises(ValueError, match=r"volume has shape \(1, 6, 5, 4\)"):
        FINE_TUNING_AUGMENTATION(torch.zeros(1, 6, 5, 4))


@pytest.mark.quick
@pytest.mark.parametrize(("field", "low", "high"), [("scale", 0.9, 1.1), ("shift", 1.9, 2.1)])
def test_augmentation_of_intensities(field, low, high):
    options = {"flip": 0, "turn": 0, "scale": 0, "shift": 0, field: 1}
    base = 1.0 if field == "scale" else 2.0
    augment, generator = Augmentation(**options), torch.Generator().manual_seed(0)
    values = [
        augment(torch.full((1, 2, 2, 2), base), generator=generator)[0].unique().item()
        for _ in range(100)
    ]
    assert low <= min(values) < low + 0.05 and high - 0.05 < max(values) <= high


@pytest.mark.quick
def test_phantoms_have_organs_as_dense_as_their_class():
    images, labels = phantoms(8, (24, 24, 24), 3, generator=torch.Generator().manual_seed(0))
    assert images.shape == (8, 1, 24, 24, 24) and labels.unique().tolist() == [0, 1, 2]
    means = [images[:, 0][labels == k].mean().item() for k in range(3)]
    assert means[0] < means[1] - 0.1 < means[2] - 0.2
    assert phantoms(2, (8, 6, 4), 1)[1].any().item() is False
    scores = (images[:, 0] > 0.5).long()
    assert metrics.f1(scores.flatten(), (labels > 0).long().flatten()) > 0.6


@pytest.mark.quick
def test_segmentation_errors():
    model = segmenting()
    with pytest.raises(ValueError, match=r"needs batch\.labels"):
        model.loss(ImageBatch(volumes(model)))
    with pytest.raises(ValueError, match="mask is given, expected None"):
        model(volumes(model), model.draw_mask(3))
