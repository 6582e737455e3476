"""VL-JEPA's towers against transformers: outputs, gradients, names both ways; published sizes."""

import dataclasses

import pytest
import torch

import encfast
from encfast import PackedBatch, weights
from encfast.models.vl_jepa import (
    TextEncoder,
    VisionEncoder,
    gemma_names,
    llama_names,
    vision_names,
)

from .common import assert_gradient_parity, assert_parity

TINY = encfast.registry.get_config("vl_jepa/tiny")


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def compare(ours, theirs, names, out, expected) -> None:
    """Outputs, gradients of one weighted sum of them, and the way back."""
    assert_parity("rows", out, expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (out * weight).sum().backward()
    assert_gradient_parity(ours, theirs, names)
    tensors = theirs.state_dict()
    for name, tensor in weights.export(ours, names).items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.quick
@pytest.mark.parametrize("heads", [2, 4], ids=["D16", "D8"])
def test_vision_is_vjepa2(heads):
    """Published as it is: pairs whose elements turn by different angles, channels that stay."""
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY.vision, image_size=(32, 32), num_heads=heads)
    theirs = transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            patch_size=8,
            crop_size=32,
            frames_per_clip=6,
            hidden_size=config.dim,
            num_attention_heads=heads,
            num_hidden_layers=config.depth,
            mlp_ratio=config.ffn_dim / config.dim,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
            attn_implementation="eager",
        )
    )
    shaken(theirs)
    ours, names = VisionEncoder(config), vision_names(config)
    tensors = theirs.state_dict()
    weights.load(ours, tensors, names, ignore=[n for n in tensors if n.startswith("predictor.")])
    clips = [torch.randn(n, 3, 32, 32) for n in (6, 2, 4)]
    out = ours(PackedBatch.from_list(clips))
    assert out.lengths().tolist() == [48, 16, 32]
    expected = torch.cat([theirs(c[None], skip_predictor=True)[0][0] for c in clips])
    compare(ours, theirs, names, out.data, expected)


@pytest.mark.quick
@pytest.mark.parametrize("first", [0, 2])
def test_predictor_is_the_last_layers_of_llama_without_a_mask(first):
    """Acceptance 1: to 1e-5, wavelengths scaled as Llama 3.2's where texts are long enough."""
    transformers = pytest.importorskip("transformers")
    llama = dataclasses.replace(
        TINY.predictor,
        rope_scaling=encfast.config.RopeScaling(factor=4.0, low=1.0, high=4.0, original=32),
    )
    theirs = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=llama.vocab_size,
            hidden_size=llama.dim,
            intermediate_size=llama.ffn_dim,
            num_hidden_layers=first + llama.depth,
            num_attention_heads=llama.num_heads,
            num_key_value_heads=llama.num_kv_heads,
            rms_norm_eps=llama.norm_eps,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": llama.rope_theta,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            attn_implementation="eager",
        )
    )
    shaken(theirs)
    theirs.layers = theirs.layers[first:]
    predictor = encfast.create("vl_jepa/tiny", predictor=llama).predictor
    ours, names = predictor.layers, llama_names(llama)
    tensors = theirs.state_dict()
    weights.load(ours, tensors, names, ignore=["embed_tokens.weight"])
    rows = [torch.randn(n, llama.dim) for n in (50, 1, 7)]
    out = ours(PackedBatch.from_list(rows)).data
    whole = [torch.zeros(1, 1, len(r), len(r)) for r in rows]  # added to the scores: all seen
    expected = torch.cat(
        [
            theirs(inputs_embeds=r[None], attention_mask=mask).last_hidden_state[0]
            for r, mask in zip(rows, whole, strict=True)
        ]
    )
    compare(ours, theirs, names, out, expected)


@pytest.mark.quick
def test_text_is_gemma_both_ways():
    """Windows on both sides in all but every second layer, which has another rotary base."""
    transformers = pytest.importorskip("transformers")
    c = dataclasses.replace(TINY.text, depth=4)
    theirs = transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            query_pre_attn_scalar=c.head_dim,
            rms_norm_eps=c.norm_eps,
            sliding_window=2 * c.half_window,
            layer_types=["sliding_attention", "full_attention"] * 2,
            use_bidirectional_attention=True,
            attn_implementation="eager",
        )
    )
    shaken(theirs)
    ours, names = TextEncoder(c, 8), gemma_names(c)
    weights.load(ours, theirs.state_dict(), names, keep=["out.weight", "out.bias"])
    texts = [torch.randint(1, c.vocab_size, (n,)) for n in (23, 1, 9)]
    out = ours.rows(PackedBatch.from_list(texts)).data
    expected = torch.cat([theirs(t[None]).last_hidden_state[0] for t in texts])
    compare(ours, theirs, names, out, expected)


@pytest.mark.quick
def test_published_sizes():
    """8 of Llama 3.2 1B's layers with the norm are 486.57M; published are 490M and 1.6B."""
    model = encfast.create("vl_jepa/base", device="meta")

    def count(module, trained: bool = False) -> float:
        kept = (p for p in module.parameters() if p.requires_grad or not trained)
        return sum(p.numel() for p in kept) / 1e6

    assert count(model.predictor.layers) == pytest.approx(486.57, abs=0.005)
    assert count(model.predictor, trained=True) == pytest.approx(490, abs=2)
    assert count(model.vision) == pytest.approx(304, abs=0.2)
    assert count(model.tokens) == pytest.approx(262.7, abs=0.05)
    # EmbeddingGemma's published 308M hold two dense layers, 768 to 3072 and back.
    assert count(model.text) - 1.18 + 4.72 == pytest.approx(307.6, abs=0.1)
    assert count(model) == pytest.approx(1600, abs=20)
    assert not count(model.vision, trained=True) and not count(model.tokens, trained=True)
    for frames, rows in ((2, 256), (8, 1024), (16, 2048), (32, 4096)):
        assert frames // model.vision.depth * model.vision.num_patches == rows
