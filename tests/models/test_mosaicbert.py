"""MosaicBERT: the acceptance checks of its paper and parity with a dense eager implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import PackedBatch, ops, weights
from encfast.data.text import TextBatch
from encfast.layers import alibi_slopes
from encfast.models.mosaicbert import MosaicBert

from .common import (
    SIX_SHAPES,
    assert_compiles,
    assert_gradient_parity,
    assert_no_leak,
    assert_parity,
    ragged_lengths,
    random_tokens,
)
from .dense_mosaicbert import DenseMosaicBert, published_slopes

VOCAB = 512  # rows of tiny's table
SIX_HEADS = {"dim": 96, "num_heads": 6, "depth": 3, "ffn_dim": 160}  # not a power of two
NO_DROPOUT = {"dropout": 0.0, "head_dropout": 0.0}


def tiny(**overrides) -> MosaicBert:
    return encfast.create("mosaicbert/tiny", **{**NO_DROPOUT, **overrides})


def masked_batch(model: MosaicBert, lengths, seed: int = 0) -> TextBatch:
    return model.example_batch(torch.Generator().manual_seed(seed), lengths=lengths)


def twins(**overrides) -> tuple[MosaicBert, DenseMosaicBert]:
    """A model and an oracle with its weights."""
    model = tiny(**SIX_HEADS, **overrides)
    oracle = DenseMosaicBert(model.config)
    tied = ("cls.predictions.decoder.weight",)
    weights.load(model, oracle.state_dict(), model.reference_names(), ignore=tied)
    return model, oracle


# 1. ALiBi.


@pytest.mark.quick
@pytest.mark.parametrize("heads", [1, 2, 8, 12, 16, 20])
def test_slopes_follow_the_formula(heads):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(published_slopes(heads)))
    if heads == 12:
        expected = [2.0**-k for k in range(1, 9)] + [0.7071, 0.3536, 0.1768, 0.0884]
        torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected), atol=5e-5, rtol=0)
    if heads == 16:
        expected = [0.5**0.5 * 2 ** (-k / 2) for k in range(16)]
        torch.testing.assert_close(alibi_slopes(16), torch.tensor(expected))


@pytest.mark.quick
@pytest.mark.parametrize("heads", [1, 12, 20])
def test_attention_with_alibi_is_that_of_a_dense_bias(heads):
    lengths, slopes = [1, 63, 0, 130], torch.tensor(published_slopes(heads))
    batch = PackedBatch.from_lengths(torch.randn(sum(lengths), 3, heads, 64), lengths)
    qkv = batch.data.requires_grad_()
    weight = torch.randn(sum(lengths), heads, 64)

    def dense(document):  # [L, 3, H, D]
        q, k, v = document.unbind(1)
        place = torch.arange(len(document))
        bias = -slopes[:, None, None] * (place[:, None] - place).abs()
        probs = (torch.einsum("ihd,jhd->hij", q, k) / 8 + bias).softmax(-1)
        return torch.einsum("hij,jhd->ihd", probs, v)

    expected = torch.cat([dense(document) for document in qkv.split(lengths)])
    q, k, v = qkv.unbind(1)
    actual = ops.varlen_attn(q, k, v, batch.cu_seqlens, alibi_slopes=slopes)
    assert_parity("output", actual, expected)
    grads = [torch.autograd.grad((x * weight).sum(), qkv)[0] for x in (actual, expected)]
    assert_parity("gradient", *grads)


# Parity with the published maths.


@pytest.mark.quick
def test_masked_lm_is_that_of_the_dense_model():
    model, oracle = twins()
    batch = masked_batch(model, ragged_lengths(6))
    expected = oracle(batch.tokens, batch.segments)
    assert_parity("logits", model(batch.tokens, batch.segments), expected)
    reference = F.cross_entropy(expected[batch.rows], batch.targets)
    loss = model.loss(batch)
    assert loss.total is loss.masked_lm
    assert_parity("loss", loss.total, reference)
    reference.backward()
    loss.total.backward()
    assert_gradient_parity(model, oracle, model.reference_names())


@pytest.mark.quick
@pytest.mark.parametrize("labels", [3, 1])
def test_classification_is_that_of_the_dense_model(labels):
    """One label is regression with the mean squared error, as GLUE's STS-B asks for."""
    model, oracle = twins(task="classification", num_labels=labels)
    batch = masked_batch(model, [1, 40, 73, 2])
    expected = oracle(batch.tokens, batch.segments)
    assert_parity("scores", model(batch.tokens, batch.segments), expected)
    if labels == 1:
        reference = F.mse_loss(expected[:, 0], batch.labels)
    else:
        reference = F.cross_entropy(expected, batch.labels)
    loss = model.loss(batch)
    assert_parity("loss", loss.total, reference)
    reference.backward()
    loss.total.backward()
    assert_gradient_parity(model, oracle, model.reference_names())


@pytest.mark.quick
def test_weights_go_out_as_they_came_in():
    model, oracle = twins()
    theirs = weights.export(model, model.reference_names())
    reference = oracle.state_dict()
    assert theirs.keys() == reference.keys() - {"cls.predictions.decoder.weight"}
    assert all(torch.equal(theirs[name], reference[name]) for name in theirs)


def test_shared_parts_are_those_of_bert():
    """Without positions and slopes: embeddings, attention with its post-norm, and the heads."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertForPreTraining(config)
    with torch.no_grad():
        for p in bert.parameters():
            p.add_(0.1 * torch.randn_like(p))
        bert.bert.embeddings.position_embeddings.weight.zero_()
    theirs = dict(bert.named_parameters()) | {"zero.bias": torch.zeros(3 * 64)}
    model, classifier = tiny(depth=1), tiny(depth=1, task="classification")
    layer = "bert.encoder.layer.0.attention"
    qkv = [f"{layer}.self.{name}" for name in ("query", "key", "value")]
    same = [
        weights.Tied("embed.word.weight", ("bert.embeddings.word_embeddings.weight",)),
        weights.Tied("embed.segment.weight", ("bert.embeddings.token_type_embeddings.weight",)),
        weights.Tied("head.decoder.bias", ("cls.predictions.bias",)),
    ]
    for kind in ("weight", "bias"):
        pairs = [
            ("embed.norm", ("bert.embeddings.LayerNorm",)),
            ("stack.blocks.0.attn.qkv", tuple(qkv)),
            ("stack.blocks.0.attn.out", (f"{layer}.output.dense",)),
            ("stack.blocks.0.norm1", (f"{layer}.output.LayerNorm",)),
            ("head.dense", ("cls.predictions.transform.dense",)),
            ("head.norm", ("cls.predictions.transform.LayerNorm",)),
        ]
        same += [weights.Tied(f"{a}.{kind}", tuple(f"{n}.{kind}" for n in b)) for a, b in pairs]
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for tied in same:
            ours[tied.ours].copy_(tied.join(theirs))
        model.stack.blocks[0].attn.slopes.zero_()
        classifier.head.dense.load_state_dict(bert.bert.pooler.dense.state_dict())

    ids, segments = torch.randint(VOCAB, (1, 40)), torch.randint(2, (1, 40))
    tokens, block = PackedBatch.from_lengths(ids[0], [40]), model.stack.blocks[0]
    x = bert.bert.embeddings(ids, segments)
    embedded = model.embed(tokens, segments[0])
    assert_parity("embeddings", embedded.data, x[0])
    y = bert.bert.encoder.layer[0].attention(x)[0]
    y = y[0] if y.dim() == 3 else y
    assert_parity("attention", block.norm1(embedded.data + block.attn(embedded)), y)
    assert_parity("masked-LM head", model.head(y), bert.cls.predictions(y))
    pooled = torch.tanh(classifier.head.dense(y[:1]))
    assert_parity("pooler", pooled, bert.bert.pooler(y[None]))


# 2. Padding and neighbours.


@pytest.mark.quick
@pytest.mark.parametrize("extra", [0, 7])
def test_padding_changes_nothing(extra):
    """The grid's rows at the mask are those of the packed batch; pad columns, garbage in them and
    padding on the left are never read."""
    model, lengths = tiny(), [5, 0, 12, 1]
    tokens = random_tokens(lengths, VOCAB)
    expected = model(tokens)
    mask = torch.arange(12 + extra) < torch.tensor(lengths)[:, None]
    for grid_mask in (mask, mask.flip(1)):
        ids = torch.randint(VOCAB, grid_mask.shape).masked_scatter(grid_mask, tokens.data)
        batch = TextBatch.from_padded(ids, grid_mask.long())
        actual = batch.tokens.with_data(model(batch.tokens)).to_padded()
        assert actual.shape == (4, 12 + extra, VOCAB)
        assert torch.equal(actual[grid_mask], expected)
        assert not actual[~grid_mask].any()


@pytest.mark.quick
def test_unpadded_is_padded_with_a_mask():
    """The published way: dense scores over the grid, -10000 on padded keys."""
    model, oracle = twins()
    lengths = [9, 31, 1, 20]
    tokens = random_tokens(lengths, VOCAB)
    grid, mask = tokens.to_padded(), torch.arange(31) < torch.tensor(lengths)[:, None]
    place = torch.arange(31)
    bias = -torch.tensor(oracle.slopes)[:, None, None] * (place[:, None] - place).abs()
    e = oracle.bert.embeddings
    rows = []
    for ids, keep in zip(grid, mask, strict=True):
        x = e.LayerNorm(e.word_embeddings(ids) + e.token_type_embeddings.weight[0])
        for layer in oracle.bert.encoder.layer:
            x = layer(x, bias - 10_000.0 * ~keep)
        rows.append(x[keep])
    assert_parity("hidden rows", model.hidden(tokens).data, torch.cat(rows))


@pytest.mark.quick
@pytest.mark.parametrize("task", ["masked-lm", "classification"])
def test_sequences_do_not_see_each_other(task):
    model = tiny(task=task).eval()
    assert_no_leak(model, lambda tokens: model.hidden(tokens).data, vocab_size=VOCAB)


@pytest.mark.quick
def test_labels_of_a_grid_count_where_they_are_positive():
    """0 is [PAD] and -100 is 'nothing here'; a label under padding is dropped with its column."""
    ids = torch.tensor([[101, 7, 8, 102], [101, 9, 102, 0]])
    labels = torch.tensor([[-100, 70, 0, -100], [-100, 90, -100, 55]])
    batch = TextBatch.from_padded(ids, ids != 0, torch.ones_like(ids), labels)
    assert batch.rows.tolist() == [1, 5] and batch.targets.tolist() == [70, 90]
    assert batch.segments.tolist() == [1] * 7
    assert batch.to("cpu").tokens.data.tolist() == [101, 7, 8, 102, 101, 9, 102]


# 3. The last layer, finished only where it is read.


def count_rows(module: nn.Module, counts: list[int]) -> None:
    module.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[0]))


@pytest.mark.quick
def test_subset_last_layer_is_the_full_computation():
    subset, full = tiny(depth=3), tiny(depth=3, subset_last_layer=False)
    full.load_state_dict(subset.state_dict())
    batch = masked_batch(subset, [40, 1, 63, 17, 0])
    counts: dict[str, list[int]] = {"first": [], "subset": [], "full": [], "head": []}
    count_rows(subset.stack.blocks[0].mlp, counts["first"])
    count_rows(subset.stack.blocks[-1].mlp, counts["subset"])
    count_rows(full.stack.blocks[-1].mlp, counts["full"])
    count_rows(subset.head, counts["head"])
    losses = subset.loss(batch).total, full.loss(batch).total
    assert_parity("loss", *losses, tolerance=1e-6)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(subset.named_parameters(), full.parameters(), strict=True):
        assert_parity(f"gradient of {name}", p.grad, q.grad)
    masked = len(batch.rows)
    assert counts == {"first": [121], "subset": [masked + 5], "full": [121], "head": [masked]}


@pytest.mark.quick
def test_classifier_finishes_the_first_rows_alone():
    subset = tiny(task="classification")
    full = tiny(task="classification", subset_last_layer=False)
    full.load_state_dict(subset.state_dict())
    batch, counts = masked_batch(subset, [40, 1, 63]), []
    count_rows(subset.stack.blocks[-1].mlp, counts)
    assert_parity(
        "scores", subset(batch.tokens, batch.segments), full(batch.tokens, batch.segments)
    )
    assert counts == [3]


@pytest.mark.quick
def test_without_rows_everything_is_computed():
    model = tiny()
    tokens = random_tokens([4, 0, 9], VOCAB)
    everything = model(tokens)
    assert everything.shape == (13, VOCAB)
    rows = torch.tensor([12, 0, 5, 5])
    assert_parity("scores at rows", model(tokens, rows=rows), everything[rows])
    masked, first = model.subset(tokens, None, rows)
    assert masked.shape == (4, 64) and first.shape == (3, 64)


# 4. Positions.


@pytest.mark.quick
def test_positions_come_from_alibi_alone():
    model = tiny().eval()
    assert model.embed.position is None
    assert not [name for name in model.state_dict() if "position" in name]
    tokens = random_tokens([24], VOCAB)
    order = torch.randperm(24)
    shuffled = tokens.with_data(tokens.data[order])
    change = model.hidden(shuffled).data - model.hidden(tokens).data[order]
    assert change.abs().max() > 1e-3, (
        "a permutation of the tokens should change more than the order"
    )
    mirrored = tokens.with_data(tokens.data.flip(0))
    assert_parity("mirror", model.hidden(mirrored).data, model.hidden(tokens).data.flip(0))
    for block in model.stack.blocks:
        block.attn.slopes.zero_()
    assert_parity("no slopes", model.hidden(shuffled).data, model.hidden(tokens).data[order])


# Everything else.


@pytest.mark.quick
def test_low_precision_norms_stay_in_the_dtype_of_autocast():
    dtypes = {}
    for precision in ("low", "fp32", "default"):
        torch.manual_seed(0)
        model = tiny(norm_precision=precision)
        batch = masked_batch(model, [40, 20])
        exact = model.loss(batch).total
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(batch.tokens, batch.segments).data
            loss = model.loss(batch).total
        loss.backward()
        dtypes[precision] = hidden.dtype
        assert_parity(f"loss with precision {precision}", loss, exact, tolerance=1e-2)
    assert dtypes["low"] == torch.bfloat16 and dtypes["default"] == torch.float32


@pytest.mark.quick
def test_dropout_stands_where_the_published_code_has_it():
    model = encfast.create("mosaicbert/tiny")
    block = model.stack.blocks[0]
    assert (model.embed.drop.p, block.attn_drop.p, block.mlp.drop.p) == (0.1, 0.1, 0.1)
    assert block.mlp_drop.p == 0.0
    assert encfast.create("mosaicbert/tiny", task="classification").head.drop.p == 0.1


@pytest.mark.quick
def test_classifier_starts_from_a_pretrained_encoder():
    pretrained, classifier = tiny(), tiny(task="classification", num_labels=3)
    shared = {n: t for n, t in pretrained.state_dict().items() if not n.startswith("head.")}
    missing, surplus = classifier.load_state_dict(shared, strict=False)
    assert not surplus and all(name.startswith("head.") for name in missing)


@pytest.mark.quick
def test_a_model_built_on_meta_works_after_to_empty():
    model = encfast.create("mosaicbert/tiny", device="meta").to_empty(device="cpu")
    model.reset_parameters()
    assert torch.equal(model.stack.blocks[0].attn.slopes, alibi_slopes(4))
    assert model.head.decoder.weight is model.embed.word.weight
    model.loss(model.example_batch()).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.quick
def test_empty_batches():
    model, classifier = tiny(), tiny(task="classification")
    for lengths in ([], [0, 0], [1]):
        tokens = random_tokens(lengths, VOCAB)
        assert model(tokens).shape == (sum(lengths), VOCAB)
        assert classifier(tokens).shape == (len(lengths), 2)
        nothing = torch.empty(0, dtype=torch.int64)
        loss = model.loss(TextBatch(tokens, rows=nothing, targets=nothing)).total
        loss.backward()
        assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.quick
def test_errors_name_what_is_wrong():
    with pytest.raises(
        ValueError, match="task 'clasification' is unknown; did you mean 'classific"
    ):
        tiny(task="clasification")
    with pytest.raises(TypeError, match="no field 'num_head'; did you mean 'num_heads'"):
        tiny(num_head=3)
    with pytest.raises(ValueError, match="num_labels must be >= 1, got 0"):
        tiny(num_labels=0)
    tokens = random_tokens([3], VOCAB)
    with pytest.raises(ValueError, match=r"loss of task 'masked-lm' needs batch.rows"):
        tiny().loss(TextBatch(tokens))
    with pytest.raises(ValueError, match=r"loss of task 'classification' needs batch.labels"):
        tiny(task="classification").loss(TextBatch(tokens))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", ["masked-lm", "classification"])
def test_compiles_without_a_break(task, checkpointing):
    model = tiny(task=task, num_labels=3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert_compiles(model, [masked_batch(model, lengths) for lengths in SIX_SHAPES])
