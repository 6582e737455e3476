"""bert_family: no leaks, compiled whole, the probes of its sheet, and its configs."""

import pytest
import torch

import encfast
from encfast import PackedBatch
from encfast.models.bert_family import VARIANTS, BertFamily, BertFamilyConfig
from encfast.registry import get_config

from .common import (
    SIX_SHAPES,
    assert_compiles,
    assert_no_leak,
    assert_parity,
    random_tokens,
)

quick = pytest.mark.quick
TINY = ["tiny", "tiny-gpt", "tiny-albert"]
VOCAB = 512
# Task -> the tiny variant that has it.
TASKS = {
    "pretrain": "tiny",
    "masked-lm": "tiny-albert",
    "causal-lm": "tiny-gpt",
    "classification": "tiny",
    "token-classification": "tiny",
    "span": "tiny",
}


def create(variant: str, **overrides) -> BertFamily:
    """A model whose attention tells tokens apart, as a trained one does."""
    quiet = {"dropout": 0.0, "attn_dropout": 0.0, "head_dropout": 0.0, "init_std": 0.1}
    return encfast.create(f"bert_family/{variant}", **quiet | overrides)


@quick
@pytest.mark.parametrize("variant", TINY)
def test_documents_do_not_leak(variant):
    model = create(variant, task="encode").eval()
    assert_no_leak(model, lambda tokens: model(tokens).hidden.data, vocab_size=VOCAB)


@quick
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_a_document_does_not_depend_on_its_neighbours(task):
    """The mean over two documents is that of each alone, weighted by what it predicts."""
    model = create(TASKS[task], task=task)
    both = model.example_batch(torch.Generator().manual_seed(0), lengths=[40, 0, 25])
    parts, counts = [], []
    for b, size in ((0, 40), (2, 25)):
        rows = slice(0, 40) if b == 0 else slice(40, 65)
        fields = {"tokens": PackedBatch.from_lengths(both.tokens.data[rows], [size])}
        if both.segments is not None:
            fields["segments"] = both.segments[rows]
        count = 1
        if both.rows is not None:
            mine = (both.rows >= rows.start) & (both.rows < rows.stop)
            fields |= {"rows": both.rows[mine] - rows.start, "targets": both.targets[mine]}
            count = int(mine.sum())
        if both.labels is not None:
            per_row = task == "token-classification"
            fields["labels"] = both.labels[rows] if per_row else both.labels[b : b + 1]
            count = size if per_row else count
        if task == "span":
            fields |= {"starts": both.starts[b : b + 1], "ends": both.ends[b : b + 1]}
        counts.append(size - 1 if task == "causal-lm" else count)
        parts.append(model.loss(type(both)(**fields)))
    total = model.loss(both)
    name = {"causal-lm": "next_token", "span": "span"}.get(task, "classification")
    name = "masked_lm" if task in ("masked-lm", "pretrain") else name
    terms = [getattr(p, name) for p in parts]
    expected = sum(c * t for c, t in zip(counts, terms, strict=True)) / sum(counts)
    assert_parity(name, getattr(total, name), expected)
    if task == "pretrain":
        pair = (parts[0].sentence_pair + parts[1].sentence_pair) / 2
        assert_parity("sentence_pair", total.sentence_pair, pair)
        assert_parity("total", total.total, total.masked_lm + total.sentence_pair)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_compiles_in_two_graphs(task):
    model = create(TASKS[task], task=task).train()
    batches = [
        model.example_batch(torch.Generator().manual_seed(i), lengths=lengths)
        for i, lengths in enumerate(SIX_SHAPES)
    ]
    assert_compiles(model, batches)


@pytest.mark.parametrize("variant", ["tiny", "tiny-gpt"])
def test_compiles_with_inductor(variant):
    model = create(variant).train()
    model.gradient_checkpointing_enable()
    batches = [
        model.example_batch(torch.Generator().manual_seed(i), lengths=lengths)
        for i, lengths in enumerate(SIX_SHAPES)
    ]
    assert_compiles(model, batches, backend="inductor")


@quick
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_gpt_does_not_see_ahead(norm_position):
    """Sheet, check 5: another token at t leaves rows before t bit-equal and moves those from t."""
    model = create("tiny-gpt", norm_position=norm_position).eval()
    tokens = random_tokens([20, 0, 11], VOCAB)
    changed = tokens.data.clone()
    changed[12] = (changed[12] + 1) % VOCAB
    with torch.no_grad():
        before = model(tokens).hidden.data
        after = model(tokens.with_data(changed)).hidden.data
    assert torch.equal(before[:12], after[:12])
    assert (before[12:20] != after[12:20]).any(1).all()
    assert torch.equal(before[20:], after[20:])


@quick
def test_bert_sees_both_sides():
    """Sheet, check 5: every row feels every other; without positions, order means nothing."""
    model = create("tiny", task="encode").eval()
    tokens = random_tokens([16, 0, 9], VOCAB)
    changed = tokens.data.clone()
    changed[8] = (changed[8] + 1) % VOCAB
    with torch.no_grad():
        before = model(tokens).hidden.data
        after = model(tokens.with_data(changed)).hidden.data
        assert (before[:16] != after[:16]).any(1).all()
        model.embed.position.weight.zero_()
        straight = model(tokens).hidden.split()
        mirrored = PackedBatch.from_list([t.flip(0) for t in tokens.split()])
        for a, b in zip(model(mirrored).hidden.split(), straight, strict=True):
            if len(b):
                assert_parity("mirrored sequence", a.flip(0), b)


@quick
def test_gpt_classifies_by_its_last_row():
    """Sheet, check 5: the last row of each packed sequence, not of the grid."""
    model = create("tiny-gpt", task="classification", num_labels=3).eval()
    tokens = random_tokens([5, 0, 1, 9], VOCAB)
    scores = model(tokens)
    last = scores.hidden.data[[4, 5, 14]]
    assert torch.equal(scores.pooled[[0, 2, 3]], last)
    assert not scores.pooled[1].any()
    assert torch.equal(scores.labels[[0, 2, 3]], model.head(last))


@quick
def test_gpt1_fine_tuning_adds_half_of_the_language_model():
    model = create("tiny-gpt", task="classification", auxiliary_lm=0.5)
    batch = model.example_batch(torch.Generator().manual_seed(0))
    losses = model.loss(batch)
    assert_parity("total", losses.total, losses.classification + 0.5 * losses.next_token)
    plain = create("tiny-gpt", task="classification")
    assert plain.num_parameters() == model.num_parameters(), "the output embedding is the input's"


@quick
def test_regression_labels_take_the_squared_error():
    model = create("tiny", task="classification", num_labels=1)
    batch = model.example_batch(torch.Generator().manual_seed(0), lengths=[9, 0, 12])
    predicted = model(batch.tokens, batch.segments).labels[[0, 2], 0]
    expected = (predicted - batch.labels[[0, 2]]).square().mean()
    assert_parity("mean squared error", model.loss(batch).total, expected)


@quick
def test_shared_layers_do_not_grow_with_depth():
    """Sheet, check 6."""
    counts = {create("tiny-albert", depth=depth).num_parameters() for depth in (1, 2, 7)}
    assert len(counts) == 1
    assert create("tiny", depth=2).num_parameters() < create("tiny", depth=3).num_parameters()


@quick
def test_shared_layers_equal_tied_copies():
    """Sheet, check 6: the same numbers, and the gradient of a shared weight is the copies' sum."""
    shared = create("tiny-albert", depth=3)
    unshared = create("tiny-albert", depth=3, share_layers=False)
    state = shared.state_dict()
    for i in range(3):
        own = {n: t for n, t in state.items() if n.startswith("stack.blocks.0.")}
        state |= {n.replace("blocks.0", f"blocks.{i}"): t for n, t in own.items()}
    unshared.load_state_dict(state)
    batch = shared.example_batch(torch.Generator().manual_seed(0))
    a, b = shared(batch.tokens, batch.segments), unshared(batch.tokens, batch.segments)
    assert torch.equal(a.hidden.data, b.hidden.data)
    shared.loss(batch).total.backward()
    unshared.loss(batch).total.backward()
    for name, parameter in shared.stack.blocks[0].named_parameters():
        copies = [dict(block.named_parameters())[name].grad for block in unshared.stack.blocks]
        assert_parity(f"gradient of {name}", parameter.grad, sum(copies))


@quick
def test_embeddings_have_length_one_and_empty_sequences_are_zero():
    model = create("tiny", task="encode").eval()
    tokens = random_tokens([7, 0, 30], VOCAB)
    with torch.no_grad():
        embeddings = model.encode(tokens)
        raw = model.encode(tokens, normalize=False)
        rows = model.hidden(tokens).split()
    assert torch.allclose(embeddings.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.allclose(raw[2], rows[2].mean(0), atol=1e-6)


@quick
def test_roberta_starts_at_the_third_position():
    model = create("tiny", task="encode", position_offset=2).eval()
    with torch.no_grad():
        model.embed.position.weight[:2] = float("nan")
    assert model(random_tokens([512], VOCAB)).hidden.data.isfinite().all()
    with pytest.raises(ValueError, match="513 tokens, the position table 512"):
        model(random_tokens([513], VOCAB))


@quick
def test_residual_projections_start_smaller_in_gpt2():
    model = create("tiny-gpt", depth=8, init_std=0.02)
    wide, scaled = model.stack.blocks[0].mlp.up.weight, model.stack.blocks[0].mlp.down.weight
    assert wide.std().item() == pytest.approx(0.02, rel=0.05)
    assert scaled.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@quick
@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("bert-base", 110.1),  # 109.5 encoder with pooler, as published "110M", and the heads
        ("bert-large", 336.2),
        ("gpt1", 116.5),
        ("gpt2-small", 124.4),
        ("gpt2-xl", 1557.6),
        ("roberta-base", 124.7),
        ("albert-base", 11.8),
        ("minilm-l6", 22.7),
    ],
)
def test_published_sizes(variant, millions):
    assert encfast.describe(f"bert_family/{variant}").parameters / 1e6 == pytest.approx(
        millions, abs=0.05
    )


@quick
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds_without_memory(variant):
    model = encfast.create(f"bert_family/{variant}", device="meta")
    assert model.config == get_config(f"bert_family/{variant}")


@quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "masked_lm"}, "did you mean 'masked-lm'"),
        ({"task": "masked-lm", "causal": True}, "causal=False"),
        ({"task": "causal-lm"}, "causal=True"),
        ({"task": "classification", "auxiliary_lm": 0.5}, "causal=True"),
        ({"dim": 770}, "num_heads=12 must divide dim=770"),
        ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
        ({"dropout": 1.0}, "got 1.0"),
    ],
)
def test_configs_explain_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        BertFamilyConfig(**fields)


@quick
def test_a_batch_that_lacks_something_says_what():
    model = create("tiny", task="span")
    batch = model.example_batch(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"needs batch\.starts"):
        model.loss(type(batch)(batch.tokens))
    with pytest.raises(ValueError, match="'encode' has no loss"):
        create("tiny", task="encode").loss(batch)
