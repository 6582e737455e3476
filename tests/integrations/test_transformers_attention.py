"""encfast as the attention of transformers' own encoders, against its eager one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from encoders import FIRST_BLOCK, inputs_of, mask_of, model_of, states, text
from torch import Tensor, nn

from encfast.integrations import _transformers_self_test
from encfast.integrations import transformers as hook

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
ROUTED = (
    "bert", "roberta", "distilbert", "electra", "albert", "esm", "modernbert", "vit", "vit_mae",
    "dinov2", "beit", "clip", "siglip", "wav2vec2", "whisper", "t5",
)  # fmt: skip
TEXT = [s for s in ROUTED if s in FIRST_BLOCK]
# Self-attention with everything an attention function is told, without a model around it.
MODULE = SimpleNamespace(is_causal=False)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    hook.register()


def run(model: nn.Module, name: str, **inputs) -> Tensor:
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("system", ROUTED)
def test_a_loaded_model_equals_eager(system, tmp_path):
    model_of(system).save_pretrained(tmp_path)
    inputs = inputs_of(system)
    found = []
    for name in ("encfast", "eager"):
        model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert model.config._attn_implementation == name
        with torch.no_grad(), counted() as calls:
            found.append(states(model(**inputs), inputs))
        assert bool(calls) == (name == "encfast")
    assert found[0].keys() == found[1].keys() and found[0]
    for name, expected in found[1].items():
        close(found[0][name], expected)


def counted():
    """The calls of the op, behind the attention function."""
    from encfast.integrations import _grids as attention

    class Calls(list):
        def __enter__(self):
            forward = attention.ops.varlen_attn
            self.patch = mock.patch.object(
                attention.ops, "varlen_attn", lambda *a, **k: self.append(k) or forward(*a, **k)
            )
            self.patch.start()
            return self

        def __exit__(self, *_):
            self.patch.stop()

    return Calls()


# ---- padding ----


def poisoned(model: nn.Module, system: str, mask: Tensor):
    """NaN in the padding in front of the first block."""

    def fill(module, args):
        hidden = args[0]
        pad = mask_of((800, 500, 90), 800) if hidden.shape[1] != mask.shape[1] else mask
        assert pad.shape == hidden.shape[:2]
        return (hidden.masked_fill(pad[..., None] == 0, torch.nan), *args[1:])

    return model.get_submodule(FIRST_BLOCK[system]).register_forward_pre_hook(fill)


@pytest.mark.parametrize("system", [s for s in TEXT if s != "wav2vec2"])
def test_padding_may_hold_anything(system):
    model, inputs = model_of(system), inputs_of(system)
    model.set_attn_implementation("encfast")
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    if any(c._attn_implementation != "encfast" for c in configs):
        pytest.skip(f"transformers {transformers.__version__} sets {system}'s attention at loading")
    with torch.no_grad():
        expected = states(model(**inputs), inputs)
        with poisoned(model, system, inputs["attention_mask"]):
            found = states(model(**inputs), inputs)
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted)


@pytest.mark.parametrize("system", ["bert", "modernbert", "t5"])
@pytest.mark.parametrize("kind", ["left", "gaps"])
def test_padding_anywhere(system, kind):
    mask = mask_of(left=True)
    if kind == "gaps":
        mask = mask_of()
        mask[0, 4], mask[1, 2:5] = 0, 0
    model = model_of(system)
    model = model.encoder if system == "t5" else model
    found, expected = (run(model, name, **text(mask)) for name in ("encfast", "eager"))
    close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("system", ["bert", "modernbert"])
def test_a_text_that_is_all_padding(system):
    mask = mask_of((17, 0, 5, 3))
    found, expected = (run(model_of(system), name, **text(mask)) for name in ("encfast", "eager"))
    close(found[mask.bool()], expected[mask.bool()])
    assert found.isfinite().all()


# ---- packed inputs ----


def packed(lengths: tuple[int, ...], *, start: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """As ``DataCollatorWithFlattening`` makes them, and the texts one by one."""
    ids = text(mask_of(lengths, max(lengths)))["input_ids"]
    texts = [row[None, :n] for row, n in zip(ids, lengths, strict=True)]
    positions = [torch.arange(start, start + n) for n in lengths]
    return {"input_ids": torch.cat(texts, 1), "position_ids": torch.cat(positions)[None]}, texts


def lengths_of(lengths: tuple[int, ...]) -> dict:
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    longest = max(lengths)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (cu, cu, longest, longest), strict=True))


@pytest.mark.parametrize("system", ["bert", "modernbert", "roberta"])
def test_packed_texts_equal_texts_one_by_one(system):
    lengths = (7, 1, 11, 4)
    model, start = model_of(system), 2 if system == "roberta" else 0
    inputs, texts = packed(lengths, start=start)
    found = run(model, "encfast", **inputs, **lengths_of(lengths))
    close(found[0], torch.cat([run(model, "eager", input_ids=x)[0] for x in texts]), 1e-6)


def test_positions_that_restart_are_packed_texts():
    lengths = (7, 1, 11, 4)
    model = model_of("bert")
    inputs, _ = packed(lengths)
    found = run(model, "encfast", **inputs)
    assert torch.equal(found, run(model, "encfast", **inputs, **lengths_of(lengths)))
    for positions in (torch.arange(23), torch.zeros(23, dtype=torch.int64), torch.arange(23) // 2):
        plain = inputs | {"position_ids": positions[None]}
        close(run(model, "encfast", **plain), run(model, "eager", **plain))


@pytest.mark.parametrize("system", ["bert", "modernbert"])
def test_packed_texts_do_not_leak(system):
    lengths = (7, 1, 11, 4)
    model = model_of(system)
    inputs, _ = packed(lengths)
    before = run(model, "encfast", **inputs, **lengths_of(lengths))[0]
    changed = inputs["input_ids"].clone()
    changed[0, 8:19] = 7
    after = run(model, "encfast", **inputs | {"input_ids": changed}, **lengths_of(lengths))[0]
    same = (before == after).all(1)
    assert same[:8].all() and same[19:].all() and not same[8:19].any()


# ---- masks of pairs, biases, heads ----


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("system", ["bert", "modernbert"])
def test_masks_of_pairs(system):
    """Bool and additive, for all heads and for each: what the user says, and nothing besides."""
    model, ids = model_of(system), text()["input_ids"]
    near = (torch.arange(17)[:, None] - torch.arange(17)).abs() < 5
    visible = (mask_of()[:, None, None].bool() & near) | torch.eye(17, dtype=torch.bool)
    slopes = 2.0 ** -torch.arange(1, 5)[None, :, None, None]
    alibi = additive(visible) - slopes * (torch.arange(17)[:, None] - torch.arange(17)).abs()
    for given, plain in ((visible, additive(visible)), (additive(visible),) * 2, (alibi, alibi)):
        found = run(model, "encfast", input_ids=ids, attention_mask=given)
        close(found, run(model, "eager", input_ids=ids, attention_mask=plain))


def test_hidden_keys_may_hold_anything():
    """In a bool mask of pairs too, where nobody sees them."""
    mask = mask_of((9, 4, 1), 9).bool()
    q, k, v = qkv()
    bias = torch.randn(1, 4, 9, 9)
    for given in ({}, {"position_bias": bias}):
        for told in (mask, mask[:, None, None], mask[:, None, None].expand(3, 4, 9, 9)):
            expected, _ = hook.attention_forward(MODULE, q, k, v, told, **given)
            bad = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
            assert torch.equal(hook.attention_forward(MODULE, q, *bad, told, **given)[0], expected)


def qkv(heads: int = 4, kv_heads: int = 4, queries: int = 9, keys: int = 9) -> list[Tensor]:
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(3, s, h, 8).transpose(1, 2) for h, s in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, **kwargs) -> Tensor:
    """``[B, Sq, H, D]`` by PyTorch."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True, **kwargs)
    return out.transpose(1, 2)


def test_shared_key_heads_and_scale():
    q, k, v = qkv(heads=6, kv_heads=2)
    out, weights = hook.attention_forward(MODULE, q, k, v, None, scaling=0.3)
    assert weights is None
    close(out, plain(q, k, v, scale=0.3))
    mask = mask_of((9, 4, 1), 9).bool()
    out, _ = hook.attention_forward(MODULE, q, k, v, mask)
    close(out, plain(q, k, v, mask[:, None, None]))


def test_keys_of_another_length():
    """Queries of cross-attention stay, whichever keys are hidden."""
    for queries in (5, 9):
        q, k, v = qkv(queries=queries)
        mask = mask_of((9, 4, 1), 9).bool()
        out, _ = hook.attention_forward(MODULE, q, k, v, mask)
        close(out, plain(q, k, v, mask[:, None, None]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("left", [False, True])
def test_rules_about_positions(causal, window, left):
    q, k, v = qkv()
    mask = mask_of((9, 4, 1), 9, left=left).bool()
    offset = torch.arange(9)[:, None] - torch.arange(9)
    visible = mask[:, None, None] & (offset.abs() < (window or 99))
    visible = visible & (offset >= 0) if causal else visible
    out, _ = hook.attention_forward(MODULE, q, k, v, mask, is_causal=causal, sliding_window=window)
    close(out[mask], plain(q, k, v, visible)[mask])


def test_generation_with_a_cache():
    model = model_of("t5")
    model = transformers.T5ForConditionalGeneration(model.config).eval()
    found = []
    for name in ("encfast", "eager"):
        model.set_attn_implementation(name)
        found.append(model.generate(**text(), max_new_tokens=6, do_sample=False))
    assert torch.equal(*found) and found[0].shape[1] == 7


def test_patterns_of_other_models_arrive_whole():
    """A pattern that the attention is not told of besides comes as a mask of pairs."""
    from transformers.masking_utils import create_bidirectional_mask

    embeds, mask = torch.zeros(4, 17, 8), mask_of()
    config = SimpleNamespace(_attn_implementation="encfast")
    same = mask_of((17,) * 4)
    assert create_bidirectional_mask(config, embeds, same) is None
    assert torch.equal(create_bidirectional_mask(config, embeds, mask), mask.bool())
    found = create_bidirectional_mask(
        config, embeds, mask, and_mask_function=lambda b, h, i, j: (i - j) % 2 == 0
    )
    even = (torch.arange(17)[:, None] - torch.arange(17)) % 2 == 0
    assert torch.equal(found, (mask[:, None, None].bool() & even))


# ---- training ----


def gradients(model: nn.Module, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.set_attn_implementation(name)
    model.zero_grad()
    draw = torch.Generator().manual_seed(5)
    for x in states(model(**inputs), inputs).values():
        (x * torch.randn(x.shape, generator=draw)).sum().backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("system", ["bert", "modernbert", "clip", "t5", "beit"])
def test_gradients(system):
    """Of all parameters, those of T5's and BEiT's position biases included."""
    model, inputs = model_of(system), inputs_of(system)
    expected = gradients(model, "eager", inputs)
    found = gradients(model, "encfast", inputs)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-5 * scale, msg=name)


def test_gradient_checkpointing():
    model, inputs = model_of("bert").train(), inputs_of("bert")
    for p in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        p.p = 0.0
    expected = gradients(model, "encfast", inputs)
    model.gradient_checkpointing_enable()
    with counted() as calls:
        found = gradients(model, "encfast", inputs)
    assert len(calls) == 4
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted)


def test_dropout_of_the_weights():
    config = {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0.0}
    model, inputs = model_of("bert", **config).train(), inputs_of("bert")
    model.set_attn_implementation("encfast")
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with counted() as calls:
            runs.append(model(**inputs).last_hidden_state)
        assert [c["dropout_p"] for c in calls] == [0.4, 0.4]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=1e-2)
    with counted() as calls:
        model.eval()(**inputs)
    assert [c["dropout_p"] for c in calls] == [None, None]


def test_a_graph_stays_whole():
    """With padding, and with positions that restart, without one graph per batch."""

    def call(q, k, v, mask, positions):
        out, _ = hook.attention_forward(MODULE, q, k, v, mask, position_ids=positions)
        return out

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for keys in (9, 12):
        given = qkv(queries=keys, keys=keys)
        mask = mask_of((keys, 4, 1), keys).bool()
        close(compiled(*given, mask, None), call(*given, mask, None))
        one = [x[:1] for x in given]
        positions = torch.cat((torch.arange(4), torch.arange(keys - 4)))[None]
        close(compiled(*one, None, positions), call(*one, None, positions))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head_mask": torch.ones(4)}, "head_mask reached SimpleNamespace"),
        ({"s_aux": torch.ones(4)}, "s_aux reached SimpleNamespace.*eager"),
        (
            {"mask": torch.ones(3, 8).bool()},
            r"attention_mask has shape \(3, 8\), expected \(3, 9\)",
        ),
        (
            {"mask": torch.ones(3, 9)},
            r"attention_mask \[B, Sk\] is torch.float32, expected torch.b",
        ),
        ({"mask": torch.ones(3, 9, 9)}, r"shape \(3, 9, 9\), expected \[B, Sk\], or \[B, H, Sq"),
        ({"mask": torch.ones(3, 2, 9, 9)}, r"shape \(3, 2, 9, 9\), expected .*\(3, 4, 9, 9\)"),
        (
            {"mask": torch.ones(3, 9).bool(), "cu_seq_lens_q": torch.tensor([0, 27])},
            r"attention_mask \(3, 9\) came together with cu_seq_lens_q",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 26])}, "cu_seqlens_q"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kwargs, message):
    mask = kwargs.pop("mask", None)
    with pytest.raises(ValueError, match=message):
        hook.attention_forward(MODULE, *qkv(), mask, **kwargs)


def test_hidden_keys_and_fewer_queries_under_a_causal_rule():
    q, k, v = qkv(queries=5)
    with pytest.raises(ValueError, match="hides keys of 9 while there are 5 queries"):
        hook.attention_forward(MODULE, q, k, v, mask_of((9, 4, 1), 9).bool(), is_causal=True)


@pytest.mark.parametrize("version", ["5.17.2", "4.57.1", "6.0.0"])
def test_other_versions(version):
    with (
        mock.patch.object(sys.modules["transformers"], "__version__", version),
        pytest.raises(ImportError, match=f"transformers {version} is not one .* 5.18 to 5.24"),
    ):
        hook.register()


def test_a_self_test_that_fails_registers_nothing():
    """Attention without its masks attends to padding: neither may stay."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    interfaces = (AttentionInterface, AttentionMaskInterface)
    mappings = [dict(i._global_mapping) for i in interfaces]
    for mapping in mappings:
        del mapping["encfast"]
    with (
        mock.patch.object(AttentionInterface, "_global_mapping", mappings[0]),
        mock.patch.object(AttentionMaskInterface, "_global_mapping", mappings[1]),
        mock.patch.object(_transformers_self_test, "padding_mask", lambda **_: None),
        pytest.raises(RuntimeError, match=f"{transformers.__version__} calls attention in a way"),
    ):
        hook.register()
    assert all("encfast" not in mapping for mapping in mappings)


def test_needs_transformers():
    with (
        mock.patch.dict(sys.modules, {"transformers": None}),
        pytest.raises(ImportError, match="needs transformers, which could not be imported"),
    ):
        hook.register()
