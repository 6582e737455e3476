"""Ettin against transformers with copied weights, its windows, its two modes and its decoding."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from encfast import PackedBatch, create, describe
from encfast.data.masking import mask_tokens
from encfast.data.text import TextBatch
from encfast.models import _ettin_hf as hf
from encfast.models.ettin import VARIANTS, Ettin, EttinConfig
from encfast.registry import get_config
from encfast.weights import export

from .common import (
    assert_gradient_parity,
    assert_no_leak,
    assert_parity,
    ragged_lengths,
    random_tokens,
)

SIZES = ("17m", "32m", "68m", "150m", "400m", "1b")
# Four layers of a published shape: head size 64, the real window, both kinds of layer.
SMALL = EttinConfig(
    dim=128,
    num_layers=4,
    num_heads=2,
    ffn_dim=96,
    vocab_size=300,
    bos_id=1,
    eos_id=2,
    pad_id=0,
    mask_id=3,
)
MODES = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])


def small(causal: bool, **fields) -> Ettin:
    return Ettin(dataclasses.replace(SMALL, causal=causal, **fields)).eval()


def their_class(causal: bool, task: bool = True):
    import transformers

    kind, head = ("ModernBertDecoder", "ForCausalLM") if causal else ("ModernBert", "ForMaskedLM")
    return getattr(transformers, kind + (head if task else "Model"))


def their_model(config: EttinConfig, attention: str = "eager", task: bool = True):
    """transformers' model of the same shape, every weight random, norms included."""
    cls = their_class(config.causal, task)
    fields = {k: v for k, v in hf.config_from(config).items() if k != "model_type"}
    model = cls(cls.config_class(**fields, attn_implementation=attention)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if p.dim() == 1 else 0.05 * torch.randn_like(p))
        if task:
            model.decoder.bias.normal_()
    return model


def batch_of(tokens: PackedBatch, config: EttinConfig) -> TextBatch:
    if config.causal:
        return TextBatch(tokens)
    masked = mask_tokens(
        tokens,
        vocab_size=config.vocab_size,
        mask_id=config.mask_id,
        prob=config.mask_rate,
        special_ids=(config.pad_id,),
        generator=torch.Generator().manual_seed(0),
    )
    return TextBatch.from_masked(masked)


def their_loss(theirs, batch: TextBatch, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logits [N, V] of transformers, one document at a time."""
    logits = torch.cat([theirs(doc[None]).logits[0] for doc in batch.tokens.split() if len(doc)])
    if not causal:
        return F.cross_entropy(logits[batch.rows], batch.targets), logits
    keep = torch.cat([torch.arange(len(doc)) < len(doc) - 1 for doc in batch.tokens.split()])
    return F.cross_entropy(logits[keep], batch.tokens.data.roll(-1)[keep]), logits


@MODES
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_parity(causal, attention, tmp_path):
    """Outputs, loss and every gradient with copied weights, ragged over the window's edge."""
    config = dataclasses.replace(SMALL, causal=causal, window_mode="hf", rope_theta_local=10_000.0)
    theirs = their_model(config, attention)
    theirs.save_pretrained(tmp_path)
    model = Ettin.from_transformers(tmp_path)
    batch = batch_of(random_tokens(ragged_lengths(8), config.vocab_size), config)
    reference, logits = their_loss(theirs, batch, causal)
    loss = model.loss(batch).total
    assert_parity("logits", model.logits(model(batch.tokens).data), logits)
    assert_parity("loss", loss, reference)
    reference.backward()
    loss.backward()
    assert_gradient_parity(model, theirs, hf.entries(model.config))
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


@MODES
def test_bare_transformers_model(causal, tmp_path):
    """ModernBertModel and ModernBertDecoderModel have no head, nor has what is read from them."""
    theirs = their_model(dataclasses.replace(SMALL, causal=causal, lm_head=False), task=False)
    theirs.save_pretrained(tmp_path)
    model = Ettin.from_transformers(tmp_path)
    assert model.head is None
    tokens = random_tokens([70, 3, 150], SMALL.vocab_size)
    reference = torch.cat([theirs(doc[None]).last_hidden_state[0] for doc in tokens.split()])
    assert_parity("hidden", model(tokens).data, reference)
    with pytest.raises(ValueError, match="no head"):
        model.loss(batch_of(tokens, dataclasses.replace(SMALL, causal=causal)))


@MODES
def test_round_trip_through_transformers(causal, tmp_path):
    model = small(causal, window_mode="hf", rope_theta_global=50_000.0)
    model.to_transformers(tmp_path)
    theirs = their_class(causal).from_pretrained(tmp_path).eval()
    tokens = random_tokens([80, 5], SMALL.vocab_size)
    reference = torch.cat([theirs(doc[None]).logits[0] for doc in tokens.split()])
    assert_parity("logits", model.logits(model(tokens).data), reference)
    again = Ettin.from_transformers(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    same = {"attn_out_dropout": model.config.attn_out_dropout, "mask_id": model.config.mask_id}
    assert dataclasses.replace(again.config, **same) == model.config


@pytest.mark.quick
def test_folder_with_wrong_tensors_is_refused(tmp_path):
    small(False).to_transformers(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.9.mlp.Wi.weight"] = tensors.pop("model.layers.2.attn.Wqkv.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        Ettin.from_transformers(tmp_path)
    assert "missing: model.layers.2.attn.Wqkv.weight" in str(error.value)
    assert "surplus: model.layers.9.mlp.Wi.weight" in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "bert"},
        {"attention_bias": True},
        {"tie_word_embeddings": False},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_of_another_architecture_is_refused(change, tmp_path):
    small(False).to_transformers(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*Ettin|model_type is 'bert'"):
        Ettin.from_transformers(tmp_path)


@pytest.mark.quick
def test_config_written_before_transformers_5():
    old = {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM"],
        "hidden_size": 256,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "global_rope_theta": 160000.0,
        "local_rope_theta": None,
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
        "max_position_embeddings": 7999,
    }
    fields = hf.fields_from(old) | {"window_mode": "training", "attn_out_dropout": 0.1}
    assert EttinConfig(**fields) == get_config("ettin/encoder-17m")


def keys_seen(model: Ettin, layer: int, length: int, query: int) -> list[int]:
    """Rows whose gradient from what the heads of `layer` read for `query` is not zero."""
    x = torch.randn(length, model.config.dim, requires_grad=True)
    batch = PackedBatch.from_lengths(x, [length])
    tables = model.stack._rope_tables(batch, None)
    rope = tables[model.stack.rotary_of[layer]]
    model.stack.blocks[layer].attn.heads(batch, rope)[query].sum().backward()
    return x.grad.abs().sum(1).nonzero().flatten().tolist()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("causal", "mode", "window"),
    [(False, "training", (64, 64)), (True, "training", (64, 0)), (True, "hf", (63, 0))],
    ids=["encoder", "decoder-training", "decoder-hf"],
)
def test_window_by_gradient(causal, mode, window):
    """The keys that reach a query are exactly the window's; layers 0, 3, 6 see everything."""
    model = small(causal, num_layers=7, window_mode=mode)
    length = 150
    for layer in range(7):
        for query in (0, 1, 63, 64, 65, 80, length - 1):
            left, right = (length, 0 if causal else length) if layer % 3 == 0 else window
            expected = range(max(query - left, 0), min(query + right, length - 1) + 1)
            assert keys_seen(model, layer, length, query) == list(expected), (layer, query)


@pytest.mark.quick
def test_two_rotary_bases():
    model = small(False, rope_theta_global=123.0, rope_theta_local=7.0)
    bases = [model.stack.rotaries[i].theta for i in model.stack.rotary_of]
    assert bases == [123.0, 7.0, 7.0, 123.0]


@MODES
@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size, causal):
    """Equal to transformers' class of the same shape and to the published size, in both modes."""
    millions = dict(zip(SIZES, (16.91, 32.08, 68.46, 149.66, 395.88, 1031.31), strict=True))
    name = f"ettin/{'decoder' if causal else 'encoder'}-{size}"
    count = describe(name).parameters
    with torch.device("meta"):
        cls = their_class(causal)
        theirs = cls(cls.config_class(**hf.config_from(get_config(name))))
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6, 2) == millions[size]


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
def test_both_modes_have_one_state_dict(size):
    encoder, decoder = (
        create(f"ettin/{mode}-{size}", device="meta").state_dict()
        for mode in ("encoder", "decoder")
    )
    assert {k: v.shape for k, v in encoder.items()} == {k: v.shape for k, v in decoder.items()}


@pytest.mark.quick
def test_encoder_weights_in_decoder_mode_are_causal(tmp_path):
    encoder, decoder = small(False), small(True)
    decoder.load_state_dict(encoder.state_dict())
    tokens = random_tokens([100], SMALL.vocab_size)
    changed = tokens.with_data(tokens.data.clone())
    changed.data[60:] = 5
    assert torch.equal(decoder(tokens).data[:60], decoder(changed).data[:60])
    assert not torch.allclose(encoder(tokens).data[:60], encoder(changed).data[:60])
    encoder.to_transformers(tmp_path)
    flipped = Ettin.from_transformers(tmp_path, causal=True, window_mode="training")
    assert torch.equal(flipped(tokens).data, decoder(tokens).data)


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["training", "hf"])
def test_cached_decoding_equals_full_forward(mode):
    """Ragged prefill and steps give the rows of one forward; local caches stay in the window."""
    model = small(True, window_mode=mode)
    parts = ([70, 1, 0, 130], [1, 1, 5, 1], [1, 0, 66, 3], [64, 1, 1, 1])
    lengths = [sum(column) for column in zip(*parts, strict=True)]
    tokens = random_tokens(lengths, SMALL.vocab_size)
    texts, done, caches, out = tokens.split(), [0] * 4, model.new_caches(), [[], [], [], []]
    with torch.no_grad():
        full = model(tokens)
        for part in parts:
            step = [t[d : d + n] for t, d, n in zip(texts, done, part, strict=True)]
            hidden = model(PackedBatch.from_list(step), caches=caches)
            for rows, piece in zip(out, hidden.split(), strict=True):
                rows.append(piece)
            done = [d + n for d, n in zip(done, part, strict=True)]
    assert_parity("cached rows", torch.cat([torch.cat(rows) for rows in out]), full.data)
    left = 64 if mode == "training" else 63
    for layer, cache in enumerate(caches):
        kept = cache.keys.lengths().tolist()
        assert kept == [n if layer % 3 == 0 else min(n, left) for n in lengths]
        assert cache.values.lengths().tolist() == kept


@pytest.mark.quick
def test_greedy_generation_equals_recomputing():
    model = small(True)
    prompts = random_tokens([66, 1, 7], SMALL.vocab_size)
    for prompt, text in zip(prompts.split(), model.generate(prompts, 6, eos_id=-1), strict=True):
        assert len(text) == len(prompt) + 6
        with torch.no_grad():
            scores = model.logits(model(PackedBatch.from_list([text])).data)
        assert torch.equal(scores.argmax(-1)[len(prompt) - 1 : -1], text[len(prompt) :])


@pytest.mark.quick
def test_generation_stops_samples_and_refuses():
    model = small(True)
    prompts = random_tokens([4, 9], SMALL.vocab_size)
    first = model.generate(prompts, 1, eos_id=-1)
    stop = int(first[0][-1])
    stopped = model.generate(prompts, 5, eos_id=stop)
    assert torch.equal(stopped[0], first[0])
    assert int(stopped[1][-1]) == stop or len(stopped[1]) == 9 + 5
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    a, b, c = (model.generate(prompts, 8, temperature=2.0, eos_id=-1, generator=g) for g in seeds)
    assert torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate(random_tokens([3, 0], SMALL.vocab_size), 1)
    with pytest.raises(ValueError, match="encoder"):
        small(False).generate(prompts, 1)


@pytest.mark.quick
@MODES
def test_neighbours_do_not_leak(causal):
    model = small(causal)
    assert_no_leak(model, lambda t: model.logits(model(t).data), vocab_size=SMALL.vocab_size)


@pytest.mark.quick
@MODES
def test_encode_pools_by_mode(causal):
    """The mean for an encoder, the last token for a decoder; an empty text is zeros."""
    model = small(causal)
    tokens = random_tokens([9, 0, 4], SMALL.vocab_size)
    texts = model(tokens).split()
    for text, row in zip(texts, model.encode(tokens), strict=True):
        if len(text):
            assert_parity(
                "embedding", row, F.normalize(text[-1] if causal else text.mean(0), dim=0)
            )
        else:
            assert not row.any()


@pytest.mark.quick
def test_masked_loss_is_that_of_all_rows():
    """Restricting the last block and the head to masked rows changes no number; none gives zero."""
    model = small(False)
    batch = batch_of(random_tokens([40, 0, 90], SMALL.vocab_size), SMALL)
    scores = model.logits(model(batch.tokens).data)[batch.rows]
    assert_parity("loss", model.loss(batch).total, F.cross_entropy(scores, batch.targets))
    none = torch.zeros(0, dtype=torch.int64)
    loss = model.loss(TextBatch(batch.tokens, rows=none, targets=none)).total
    loss.backward()
    assert loss == 0 and model.embed.word.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="needs rows and targets"):
        model.loss(TextBatch(batch.tokens))


@pytest.mark.quick
def test_initialisation_is_truncated_and_scaled_by_depth():
    model = small(False)
    joins = 0.02 / (2 * SMALL.num_layers) ** 0.5
    for block in model.stack.blocks:
        for weight, std in (
            (block.attn.qkv.weight, 0.02),
            (block.mlp.up.weight, 0.02),
            (block.attn.out.weight, joins),
            (block.mlp.down.weight, joins),
        ):
            assert weight.abs().max() <= 2 * std
            # A normal cut at two deviations keeps 0.8796 of its deviation.
            assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.03)


@pytest.mark.quick
def test_variants_and_configs():
    assert {f"{m}-{s}" for m in ("encoder", "decoder") for s in SIZES} < set(VARIANTS)
    assert all(VARIANTS[n].dim == 64 * VARIANTS[n].num_heads for n in VARIANTS if "tiny" not in n)
    assert export(small(True), hf.entries(dataclasses.replace(SMALL, causal=True))).keys() == (
        their_model(dataclasses.replace(SMALL, causal=True)).state_dict().keys() - {hf.TIED_COPY}
    )
    wrong = {"half_window": 0, "window_mode": "flash", "pad_id": 512, "global_every": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            get_config("ettin/tiny", **{name: value})
