"""Frozen in Time against timm, transformers and the published names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
import vision
from encfast import PackedBatch, weights
from encfast.models._frozen_in_time_names import image_names, text_names

from .common import assert_gradient_parity, assert_parity
from .frozen_in_time_nets import QUIET, SQUARE, batch_of, tiny

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


# Published names.


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
