"""Attention weights of encfast's attention, where a call asks for them, against eager's."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import inputs_of, mask_of, model_of, states, text, transformers
from torch import Tensor, nn

from encfast.integrations import _transformers_attention as attention
from encfast.integrations import transformers as hook

pytestmark = pytest.mark.filterwarnings("ignore:output_attentions")

TOLERANCE = 1e-5
ROUTED = (
    "bert", "roberta", "distilbert", "electra", "albert", "esm", "modernbert", "vit", "vit_mae",
    "dinov2", "beit", "clip", "siglip", "wav2vec2", "whisper", "t5",
)  # fmt: skip
ACCELERATED = ("bert", "distilbert", "albert", "mpnet", "modernbert", "clip", "siglip", "vit")
MODULE = SimpleNamespace(is_causal=False)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    hook.register()


def attentions(output: Any) -> dict[str, tuple[Tensor, ...]]:
    """All that an output holds, those of towers included."""
    found = {name: x for name, x in output.items() if name.endswith("attentions")}
    for tower in ("text_model_output", "vision_model_output"):
        inner = attentions(output[tower]) if output.get(tower) is not None else {}
        found |= {f"{tower}.{name}": x for name, x in inner.items()}
    return found


def masks_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [m.bool() for name, m in inputs.items() if name.endswith("attention_mask")]


def close(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert expected.std() > 1e-3  # not constant
    torch.testing.assert_close(
        found, expected, rtol=0, atol=TOLERANCE, msg=lambda m: f"{name}: {m}"
    )


def assert_same_weights(found: Any, expected: Any, inputs: dict[str, Tensor]) -> int:
    """Of the queries that are no padding; how many matrices there were."""
    found, expected = attentions(found), attentions(expected)
    assert found.keys() == expected.keys() and expected
    for name, matrices in expected.items():
        assert len(found[name]) == len(matrices), name
        for a, b in zip(found[name], matrices, strict=True):
            queries = [m for m in masks_of(inputs) if m.shape == (b.shape[0], b.shape[2])]
            a, b = a.transpose(1, 2), b.transpose(1, 2)  # [B, Sq, H, Sk]
            close(*((a[queries[0]], b[queries[0]]) if queries else (a, b)), name)
    return sum(map(len, expected.values()))


@pytest.mark.parametrize("system", ROUTED)
def test_weights_and_outputs_equal_eager(system, tmp_path):
    model_of(system).save_pretrained(tmp_path)
    inputs, outputs = inputs_of(system), []
    for name in ("encfast", "eager"):
        model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=name).eval()
        with torch.no_grad():
            outputs.append(model(**inputs, output_attentions=True))
    assert assert_same_weights(*outputs, inputs) >= 2
    found, expected = (states(output, inputs) for output in outputs)
    assert found.keys() == expected.keys() and found
    for name, wanted in expected.items():
        close(found[name], wanted)


@pytest.mark.parametrize("system", ACCELERATED)
def test_accelerated_models_keep_the_grid_for_them(system):
    """And are packed again in the call behind."""
    model, inputs = model_of(system), inputs_of(system)
    if system == "mpnet":
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
        hook.accelerate(model)
        before = states(model(**inputs), inputs)
        found = model(**inputs, output_attentions=True)
        after = states(model(**inputs), inputs)
    assert assert_same_weights(found, expected, inputs) >= 2
    for name, wanted in states(expected, inputs).items():
        close(states(found, inputs)[name], wanted)
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("system", ["bert", "modernbert", "t5"])
def test_gradients_through_weights(system):
    """A loss may be of the weights themselves, as in distillation."""
    model, inputs, runs = model_of(system), text(), []
    model = model.encoder if system == "t5" else model
    valid = mask_of().bool()
    for name in ("eager", "encfast"):
        model.set_attn_implementation(name)
        model.zero_grad()
        output = model(**inputs, output_attentions=True)
        weights = torch.stack([x.transpose(1, 2)[valid] for x in output.attentions])
        (weights.square().sum() + output.last_hidden_state[valid].square().mean()).backward()
        runs.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert runs[0].keys() == runs[1].keys()
    for name, wanted in runs[0].items():
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(runs[1][name], wanted, rtol=0, atol=2e-5 * scale, msg=name)


# ---- without a model ----


def qkv(heads: int = 4, kv_heads: int = 4, queries: int = 9, keys: int = 9) -> list[Tensor]:
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(3, s, h, 8).transpose(1, 2) for h, s in shapes]


def both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **told) -> tuple[Tensor, Tensor]:
    """The weights, after the outputs were found equal to those of the call without them."""
    out, weights = hook.attention_forward(MODULE, q, k, v, mask, output_attentions=True, **told)
    plain, none = hook.attention_forward(MODULE, q, k, v, mask, **told)
    assert none is None
    assert weights.shape == (*q.shape[:3], k.shape[2])
    return (out, plain), weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("left", [False, True])
def test_rules_about_positions(causal, window, left):
    mask = mask_of((9, 4, 1), 9, left=left).bool()
    told = {"is_causal": causal, "sliding_window": window, "scaling": 0.4, "softcap": 2.0}
    (out, plain), weights = both(*qkv(), mask, **told)
    ordered = causal or window
    close(*((out, plain) if ordered else (out[mask], plain[mask])))
    by_query = weights.transpose(1, 2)[mask]
    torch.testing.assert_close(by_query.sum(-1), torch.ones(by_query.shape[:2]))
    assert not weights.masked_select(~mask[:, None, None]).any()
    if causal:
        assert not weights.triu(1).any()
    if window:
        assert not weights.triu(window).any() and not weights.tril(-window).any()


@pytest.mark.parametrize("kind", ["none", "2-D", "bool", "additive", "bias", "bias and mask"])
def test_masks_and_biases(kind):
    q, k, v = qkv(heads=6, kv_heads=2)
    keys, pairs = mask_of((9, 4, 1), 9).bool(), torch.rand(3, 1, 9, 9) < 0.7
    bias = torch.randn(1, 6, 9, 9)
    mask = {
        "2-D": keys,
        "bool": pairs,
        "additive": bias.masked_fill(~pairs, torch.finfo(torch.float32).min),
        "bias and mask": keys,
    }.get(kind)
    told = {"position_bias": bias} if kind.startswith("bias") else {}
    (out, plain), _ = both(q, k, v, mask, **told)
    close(out, plain)


def test_packed_texts():
    """One after another in one row: a matrix of blocks, each that of its text alone."""
    lengths = (7, 1, 11, 4)
    q, k, v = (torch.randn(1, 23, 4, 8).transpose(1, 2) for _ in range(3))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    for told in (
        {"cu_seq_lens_q": cu},
        {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
    ):
        for rule in ({}, {"is_causal": True}, {"sliding_window": 3}):
            (out, plain), weights = both(q, k, v, None, **told, **rule)
            close(out, plain)
            blocks = zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
            alone = [
                hook.attention_forward(
                    MODULE, *(x[:, :, a:b] for x in (q, k, v)), None, output_attentions=True, **rule
                )[1][0]
                for a, b in blocks
            ]
            expected = torch.stack([torch.block_diag(*head) for head in zip(*alone, strict=True)])
            close(weights[0], expected)


def test_hidden_keys_may_hold_anything():
    mask = mask_of((9, 4, 1), 9).bool()
    q, k, v = qkv()
    bad = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
    for told in (mask, mask[:, None, None]):
        expected, found = (
            hook.attention_forward(MODULE, q, *kv, told, output_attentions=True)
            for kv in ((k, v), bad)
        )
        assert all(map(torch.equal, found, expected))


def test_a_query_that_sees_no_key():
    """Zeros, and gradients of zero instead of NaN."""
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    mask[1, :, 4] = False
    out, weights = hook.attention_forward(MODULE, q, k, v, mask, output_attentions=True)
    assert not weights[1, :, 4].any() and not out[1, 4].any()
    grads = torch.autograd.grad(out.square().sum() + weights.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[0][1, :, 4].any()


def test_dropout_is_that_of_the_weights():
    q, k, v = qkv()
    out, weights = hook.attention_forward(
        MODULE, q, k, v, None, dropout=0.5, output_attentions=True
    )
    zeros = (weights == 0).float().mean().item()
    assert 0.4 < zeros < 0.6
    close(out, torch.einsum("bhij,bhjd->bihd", weights, v))


def test_it_warns_once():
    attention._warn_of_weights.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            hook.attention_forward(MODULE, *qkv(), None, output_attentions=True)
    assert [str(w.message)[:17] for w in caught] == ["output_attentions"]
    assert "plain maths" in str(caught[0].message)


def test_lengths_that_are_not_those_of_the_row():
    told = {"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"cu_seq_lens end at 9, .* got \[3, 9"):
        hook.attention_forward(MODULE, *qkv(), None, output_attentions=True, **told)


def test_heads_cannot_be_switched_off_either():
    model = model_of("bert")
    model.set_attn_implementation("encfast")
    assert isinstance(model, nn.Module)
    with pytest.raises(ValueError, match="head_mask reached"):
        hook.attention_forward(
            MODULE, *qkv(), None, output_attentions=True, head_mask=torch.ones(4)
        )
