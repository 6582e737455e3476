"""DupMAE: parity with transformers, its bottleneck, its losses and its representation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput

import encfast
from encfast import metrics, weights
from encfast.layers import pool
from encfast.models.dupmae import (
    DupMae,
    DupMaeConfig,
    PretrainCollator,
    RetrievalBatch,
    SparseRepresentation,
    similarity,
)
from encfast.registry import get_config

from .common import assert_gradient_parity, assert_parity

LENGTHS = [9, 2, 0, 1, 14, 30]
QUIET = {"dropout": 0.0, "attn_dropout": 0.0}
BERT = transformers.BertConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=80,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    attn_implementation="eager",
)
LIKE_BERT = {"vocab_size": 97, "dim": 48, "depth": 2, "num_heads": 3, "ffn_dim": 80}


def tiny(**fields) -> DupMae:
    return encfast.create("dupmae/tiny", **QUIET | fields)


def drawn(model: DupMae, lengths=LENGTHS, seed: int = 0):
    return model.example_batch(torch.Generator().manual_seed(seed), lengths=lengths)


def shaken(module: nn.Module) -> nn.Module:
    """Random weights everywhere, also where initialisation leaves 0 and 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module


def squares(batch) -> list[torch.Tensor]:
    """What each row of the decoder sees, text by text."""
    sizes = batch.tokens.lengths().tolist()
    grids = batch.visible.split([n * n for n in sizes])
    return [g.view(n, n) for g, n in zip(grids, sizes, strict=True)]


# Parity.


@pytest.mark.quick
def test_encoder_and_masked_lm_are_those_of_transformers():
    theirs = shaken(transformers.BertForMaskedLM(BERT))
    model = tiny(**LIKE_BERT, max_positions=40, decoder=False, bow_weight=0.0)
    entries = model.bert_names()
    ignore = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    weights.load(model, theirs.state_dict(), entries, ignore=ignore)
    batch = drawn(model)
    loss, count = model.loss(batch).masked_lm, len(batch.rows)
    loss.backward()
    expected, at = 0.0, 0
    labels = torch.full_like(batch.originals, -100).index_put((batch.rows,), batch.targets)
    hidden = model(batch.tokens).split()
    for ids, rows in zip(batch.tokens.split(), hidden, strict=True):
        if len(ids):
            out = theirs(ids[None], output_hidden_states=True)
            assert_parity("hidden", rows, out.hidden_states[-1][0])
            its = labels[at : at + len(ids)]
            expected = expected + F.cross_entropy(out.logits[0], its, reduction="sum") / count
        at += len(ids)
    assert_parity("loss", loss, expected)
    expected.backward()
    assert_gradient_parity(model, theirs, entries, tolerance=2e-5)


class TheirDecoder(nn.Module):
    """One layer of BERT's parts, its queries apart from its keys and values."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        size = config.hidden_size
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.self_output, self.output = BertSelfOutput(config), BertOutput(config)
        self.intermediate = BertIntermediate(config)

    def forward(self, queries, context, visible):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for layer, x in ((self.query, queries), (self.key, context), (self.value, context))
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        x = self.self_output((p @ v).transpose(0, 1).flatten(1), queries)
        return self.output(self.intermediate(x), x)


DECODER_NAMES = [
    *weights.both("attn.q", "query"),
    *weights.both("attn.k", "key"),
    *weights.both("attn.v", "value"),
    *weights.both("attn.out", "self_output.dense"),
    *weights.both("norm1", "self_output.LayerNorm"),
    *weights.both("mlp.up", "intermediate.dense"),
    *weights.both("mlp.down", "output.dense"),
    *weights.both("norm2", "output.LayerNorm"),
]


@pytest.mark.quick
@pytest.mark.parametrize("query_norm", [True, False], ids=["dupmae", "retromae"])
def test_decoder_is_a_layer_of_berts_parts(query_norm):
    """Two streams, the residual of the queries, and the mask of each row; loss and gradients."""
    model = shaken(tiny(**LIKE_BERT, query_norm=query_norm))
    theirs = shaken(TheirDecoder(BERT))
    weights.load(model.decoder, theirs.state_dict(), DECODER_NAMES)
    batch = drawn(model)
    hidden = model(batch.tokens)
    rows = model.decode(hidden, batch)
    embed, expected = model.embed, []
    texts = zip(hidden.split(), batch.originals.split(LENGTHS), squares(batch), strict=True)
    for its, ids, visible in texts:
        if not len(ids):
            continue
        places = torch.arange(len(ids))
        words = embed.word(ids) + embed.segment.weight[0] + embed.position(places)
        queries = its[0] + embed.position(places)
        if query_norm:
            queries = embed.norm(queries + embed.segment.weight[0])
        context = torch.cat((its[:1], embed.norm(words)[1:]))
        expected.append(theirs(queries, context, visible))
    expected = torch.cat(expected)
    assert_parity("rows", rows, expected)
    model.zero_grad()
    factors = torch.randn_like(rows)
    (rows * factors).sum().backward(retain_graph=True)
    (expected * factors).sum().backward()
    vanishing = ["attn.k.bias"]
    options = {"vanishing": vanishing, "tolerance": 2e-5}
    assert_gradient_parity(model.decoder, theirs, DECODER_NAMES, **options)


@pytest.mark.quick
def test_published_sizes():
    """BERT-base with its masked-LM head, and one more layer of 7.09 M to pre-train."""
    both = encfast.create("dupmae/base", device="meta")
    alone = encfast.create("dupmae/base", device="meta", decoder=False)
    assert alone.num_parameters() == 109_514_298  # of BertForMaskedLM
    assert both.num_parameters() - alone.num_parameters() == 7_087_872
    assert get_config("dupmae/base").bow_weight == 0.1
    assert not get_config("dupmae/retromae-base").query_norm


@pytest.mark.quick
def test_collator_cuts_and_masks():
    config = get_config("dupmae/tiny")
    ids, words = list(range(10, 210)), [-1, *range(198), -1]
    batch = PretrainCollator(config, torch.Generator().manual_seed(0))([(ids, words), ([], [])])
    assert batch.tokens.lengths().tolist() == [128, 0]
    assert torch.equal(batch.originals, torch.arange(10, 138))
    assert batch.visible.shape == (128 * 128,) and len(batch.rows) == round(0.3 * 127)
    assert batch.words.data.tolist() == batch.ordinary.data.tolist() == list(range(1, 128))


# What the decoders see and teach.


@pytest.mark.quick
def test_the_decoder_teaches_the_encoder_through_its_class_row_alone():
    """Sheet, check 3."""
    model = tiny(bow_weight=0.0)
    batch = drawn(model)

    def teach(hidden):
        model.zero_grad()
        rows, words = model.decode(hidden, batch), batch.words.data
        model._head_loss(rows[words], batch.originals[words]).backward()

    hidden = model(batch.tokens)
    teach(hidden.with_data(hidden.data.detach()))
    assert all(p.grad is None for p in model.stack.parameters())
    assert model.embed.word.weight.grad.any() and model.lm_head.dense.weight.grad.any()
    rows = hidden.data.detach().requires_grad_()
    teach(hidden.with_data(rows))
    first = torch.zeros(len(rows), dtype=torch.bool)
    first[batch.tokens.cu_seqlens[:-1][batch.tokens.lengths() > 2].long()] = True
    assert (rows.grad.abs().sum(1) > 0).tolist() == first.tolist()


@pytest.mark.quick
def test_bag_of_words_is_that_of_dense_logits():
    """Sheet, check 4; a longer neighbour, which padding would follow, changes nothing."""
    model = shaken(tiny())
    batch = drawn(model)
    found = model.loss(batch).bag_of_words
    hidden, terms = model(batch.tokens).split(), []
    ids = batch.words.with_data(batch.originals[batch.words.data]).split()
    for rows, words in zip(hidden, ids, strict=True):
        if len(words):
            w = torch.zeros(512).index_fill(0, words, 1 / len(words))
            mu = model.lm_head(rows[1:]).amax(0)
            terms.append(-(w * mu.log_softmax(0)).sum())
    expected = torch.stack(terms).mean()
    assert_parity("bag of words", found, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (found, expected))
    for name, ours, theirs in zip(names, *grads, strict=True):
        assert (ours is None) == (theirs is None), name
        if theirs is not None and theirs.abs().max() > 1e-6:
            assert_parity(f"gradient of {name}", ours, theirs, 3e-5)


@pytest.mark.quick
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_loss_is_the_sum_of_its_terms(weight):
    """Sheet, check 5."""
    torch.manual_seed(0)
    loss = (model := tiny(bow_weight=weight)).loss(drawn(model))
    expected = loss.masked_lm + loss.decoder
    if weight:
        expected = expected + weight * loss.bag_of_words
    assert torch.equal(loss.total, expected) and (loss.bag_of_words is None) == (weight == 0)
    torch.manual_seed(0)
    alone = (model := tiny(bow_weight=0.0, decoder=False)).loss(drawn(model))
    assert alone.decoder is None and torch.equal(alone.total, alone.masked_lm)


# Retrieval.


def retrieval(**fields) -> DupMae:
    return shaken(tiny(task="retrieval", **fields))


@pytest.mark.quick
def test_similarity_with_every_entry_is_a_dense_product():
    """Sheet, check 7; with k of them, a product with all others at 0."""
    tokens = drawn(retrieval()).tokens
    for k in (512, 30):
        model = retrieval(top_k=k)
        cls, mu = model.represent(tokens)
        passages = model.index(tokens)
        least = mu.topk(k, dim=1).values[:, -1:]
        dense = cls @ cls.mT + mu @ mu.where(mu >= least, 0).mT
        assert_parity("similarity", similarity((q := model.represent(tokens)), passages), dense)
        assert passages.values.shape == (6, k) and q.cls.shape == (6, 32)


@pytest.mark.quick
def test_fine_tuning_losses_are_their_formulas():
    """Two queries with three passages each; and with a teacher."""
    model = retrieval(temperature=2.0, distilled_contrastive=0.3)
    lengths = [5, 9, 4, 12, 6, 7, 8, 3]
    tokens = drawn(model, lengths).tokens
    teacher = torch.randn(2, 3)
    with torch.no_grad():
        texts = model.represent(tokens)
        queries = texts._replace(cls=texts.cls[:2], lexical=texts.lexical[:2])
        passages = SparseRepresentation(*(t[2:] for t in model.index(tokens)))
        scores = similarity(queries, passages) / 2
    contrastive = F.cross_entropy(scores, torch.tensor([0, 3]))
    assert_parity("contrastive", model.loss(RetrievalBatch(tokens, 2)).total, contrastive)
    own = torch.stack((scores[0, :3], scores[1, 3:]))
    kl = F.kl_div(own.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    loss = model.loss(RetrievalBatch(tokens, 2, teacher))
    assert_parity("distillation", loss.distillation, kl)
    assert_parity("total", loss.total, kl + 0.3 * contrastive)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.quick
def test_without_words_only_the_class_row_is_compared():
    model = retrieval(lexical=False)
    assert model.lm_head is None
    tokens = drawn(model).tokens
    c = model.represent(tokens)
    assert_parity("c", c.cls, model.project(pool(model(tokens), "first")))
    assert_parity("similarity", similarity(c, model.index(tokens)), c.cls @ c.cls.mT)
    model.loss(drawn(model)).total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.quick
def test_no_queries_teach_nothing():
    for teacher in (None, torch.empty(0, 3)):
        model = retrieval()
        loss = model.loss(RetrievalBatch(drawn(model, [4]).tokens, 0, teacher)).total
        loss.backward()
        assert loss == 0


@pytest.mark.quick
def test_pretraining_goes_on_in_retrieval():
    before, after = tiny(), tiny(task="retrieval")
    after.load_pretrained(before.state_dict())
    tokens = drawn(before).tokens
    assert torch.equal(before(tokens).data, after(tokens).data)
    assert torch.equal(before.lm_head.dense.weight, after.lm_head.dense.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        after.load_pretrained({})


def test_mean_reciprocal_rank_counts_ties_against_the_right_one():
    scores = torch.tensor([[3.0, 1, 2], [0, 5, 5], [1, 1, 1]])
    found = metrics.mean_reciprocal_rank(scores, torch.tensor([2, 1, 0]))
    assert found == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.quick
def test_errors_name_what_is_wrong():
    for fields, message in (
        ({"task": "retrieve"}, "task 'retrieve' is unknown; .*retrieval"),
        ({"bow_weight": -1.0}, "bow_weight must be >= 0, got -1.0"),
        ({"bow_weight": math.nan}, "bow_weight must be >= 0, got nan"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"num_heads": 5}, "num_heads=5 must divide dim"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(DupMaeConfig(), **fields)
    model, tuned = tiny(), retrieval()
    with pytest.raises(TypeError, match=r"'pretrain' needs a PretrainBatch, got .*RetrievalBatch"):
        model.loss(drawn(tuned))
    with pytest.raises(TypeError, match=r"'retrieval' needs a RetrievalBatch, got .*PretrainBatch"):
        tuned.loss(drawn(model))
    with pytest.raises(ValueError, match="task 'pretrain' has no W_cls"):
        model.represent(drawn(model).tokens)
