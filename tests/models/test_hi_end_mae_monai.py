"""Hi-End-MAE's segmentation beside MONAI's UNETR, the public network that it fine-tunes in."""

import copy

import pytest
import torch

import encfast
from encfast import weights
from encfast.data import ImageBatch
from encfast.layers.patch import flat_kernel
from encfast.models.hi_end_mae import HiEndMae
from encfast.weights import Tied, both, tied_table

from .common import assert_gradient_parity, assert_parity

# What MONAI fixes: 12 blocks, levels 3, 6 and 9, patches of 16^3, norms with an eps of 1e-5.
UNETR = {"depth": 12, "levels": (3, 6, 9), "patch_size": (16, 16, 16), "norm_eps": 1e-5}
# Sides differ, so that a swap of two axes shows.
SIZES = {"image_size": (32, 16, 48), "channels": 2, "num_labels": 3}


def res_block(ours: str, theirs: str, *, shortcut: bool) -> list[Tied]:
    convs = {"conv1": "conv1", "conv2": "conv2"} | ({"shortcut": "conv3"} if shortcut else {})
    return [Tied(f"{ours}.{o}.weight", (f"{theirs}.{t}.conv.weight",)) for o, t in convs.items()]


def vit_names(model: HiEndMae) -> list[Tied]:
    c, embed = model.config, "vit.patch_embedding"
    kernel = f"{embed}.patch_embeddings"
    entries = [
        Tied(
            "encoder.embed.proj.weight",
            (f"{kernel}.weight",),
            **flat_kernel(c.dim, c.channels, c.patch_size),
        ),
        Tied("encoder.embed.proj.bias", (f"{kernel}.bias",)),
        tied_table("encoder.positions.table", f"{embed}.position_embeddings", c.num_patches, c.dim),
        *both("encoder.norm", "vit.norm"),
    ]
    parts = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "attn.qkv"}
    parts |= {"attn.out": "attn.out_proj", "mlp.up": "mlp.linear1", "mlp.down": "mlp.linear2"}
    for i in range(c.depth):
        for ours, theirs in parts.items():
            entries += both(f"encoder.stack.blocks.{i}.{ours}", f"vit.blocks.{i}.{theirs}")
    return entries


def unetr_names(model: HiEndMae) -> list[Tied]:
    """Our stem, skips, ups and head are encoder1, encoder2..4, decoder5..2 and out."""
    entries = res_block("segmenter.stem", "encoder1.layer", shortcut=True)
    for i in range(3):
        ours, theirs = f"segmenter.skips.{i}", f"encoder{i + 2}"
        entries.append(Tied(f"{ours}.first.weight", (f"{theirs}.transp_conv_init.conv.weight",)))
        for j in range(2 - i):
            up, block = f"{ours}.further.{2 * j}", f"{ours}.further.{2 * j + 1}"
            entries.append(Tied(f"{up}.weight", (f"{theirs}.blocks.{j}.0.conv.weight",)))
            entries += res_block(block, f"{theirs}.blocks.{j}.1", shortcut=False)
    for i, ours in enumerate(["ups.0", "ups.1", "ups.2", "last"]):
        ours, theirs = f"segmenter.{ours}", f"decoder{5 - i}"
        entries.append(Tied(f"{ours}.up.weight", (f"{theirs}.transp_conv.conv.weight",)))
        entries += res_block(f"{ours}.block", f"{theirs}.conv_block", shortcut=True)
    return entries + both("segmenter.head", "out.conv.conv")


def twins():
    """Ours, MONAI's with the same weights, and the name map."""
    nets = pytest.importorskip("monai.networks.nets")
    model = encfast.create("hi_end_mae/tiny", task="segmentation", **UNETR, **SIZES)
    c = model.config
    theirs = nets.UNETR(
        in_channels=c.channels,
        out_channels=c.num_labels,
        img_size=c.image_size,
        feature_size=c.feature_size,
        hidden_size=c.dim,
        mlp_dim=c.ffn_dim,
        num_heads=c.num_heads,
        norm_name="instance",
        qkv_bias=True,
    )
    with torch.no_grad():
        for p in theirs.vit.parameters():  # biases and norms start from constants
            p.add_(0.05 * torch.randn_like(p))
    entries = vit_names(model) + unetr_names(model)
    state = theirs.state_dict()
    unused = {name for name in state if "norm_cross_attn" in name}  # of a block without it
    weights.load(model, state, entries, ignore=unused)
    return model, theirs, entries


def labelled(model: HiEndMae) -> ImageBatch:
    c, draw = model.config, torch.Generator().manual_seed(0)
    images = torch.randn(2, c.channels, *c.image_size, generator=draw)
    labels = torch.randint(c.num_labels, (2, *c.image_size), generator=draw)
    return ImageBatch(images, labels=labels)


def test_segmentation_is_monais_unetr():
    """Levels and scores; the loss of fine-tuning and every gradient, of MONAI's in float64.

    MONAI's own gradients in float32 are up to 1e-2 off those: rounding moves one of its many
    activations across the kink of a leaky ReLU.
    """
    model, theirs, entries = twins()
    batch = labelled(model)
    encoded, levels = model.encode(batch.images)
    last, outputs = theirs.vit(batch.images)
    assert_parity("last output", encoded.data, last.flatten(0, 1))
    for i, level in zip(UNETR["levels"], levels, strict=True):
        assert_parity(f"level {i}", level.data, outputs[i].flatten(0, 1))
    assert_parity("scores", model(batch.images), theirs(batch.images))
    exact = copy.deepcopy(theirs).double()
    expected = fine_tuning_loss(exact(batch.images.double()), batch.labels)
    loss = model.loss(batch).total
    assert_parity("loss", loss, expected)
    expected.backward()
    loss.backward()
    assert_gradient_parity(model, exact, entries)


def fine_tuning_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """MONAI's, over the background too, with squares in the denominator as in V-Net."""
    losses = pytest.importorskip("monai.losses")
    options = {"softmax": True, "squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6}
    return losses.DiceCELoss(to_onehot_y=True, **options)(scores, labels.unsqueeze(1))
