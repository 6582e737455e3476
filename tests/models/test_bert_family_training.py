"""bert_family learns: one-way against two-way models on spans and on six tasks after GLUE.

The two models of a comparison differ in one switch, `causal`; fixed seeds, equal steps.
"""

import random
from collections.abc import Callable

import pytest
import torch

import encfast
from encfast import PackedBatch, metrics
from encfast.data.masking import mask_tokens
from encfast.layers.span import best_spans
from encfast.models.bert_family import BertFamily, TextBatch

from .synthetic_text import GLUE, VOCAB, glue_batch, span_batch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps this small spend more on waking a second thread than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def create(task: str, causal: bool, num_labels: int = 2) -> BertFamily:
    torch.manual_seed(0)
    return encfast.create(
        "bert_family/tiny-gpt",
        task=task,
        causal=causal,
        num_labels=num_labels,
        vocab_size=VOCAB,
        max_positions=64,
        dim=64,
        ffn_dim=128,
        dropout=0.0,
        attn_dropout=0.0,
        head_dropout=0.0,
    )


def train(
    model: BertFamily, make: Callable[[random.Random, int], TextBatch], steps: int, lr: float
) -> None:
    """AdamW, 50 steps of warmup, then down to 0; 64 texts a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)
    )
    rng = random.Random(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(make(rng, 64)).total.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def test_span_extraction_needs_the_question_before_the_passage_or_both_sides():
    """Sheet, check 3: two-way EM >= 0.9; one-way loses >= 30 points with the question behind."""
    scores = {}
    for causal in (False, True):
        model = create("span", causal)
        train(model, span_batch, steps=300, lr=2e-3)
        for question_first in (True, False):
            batch = span_batch(random.Random(1), 500, question_first)
            with torch.no_grad():
                out = model(batch.tokens)
            spans = best_spans(out.start, out.end, batch.tokens)
            scores[causal, question_first] = metrics.exact_match(
                spans.start, spans.end, batch.starts, batch.ends
            )
    assert scores[False, True] >= 0.9, scores
    assert scores[False, False] >= 0.9, scores
    assert scores[True, False] <= scores[True, True] - 0.3, scores
    assert scores[True, False] <= scores[False, False] - 0.3, scores


def test_two_way_models_win_where_the_evidence_comes_last():
    """Sheet, check 4: the mean over six tasks, at equal size and steps."""
    scores: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for name, task in GLUE.items():
        for causal in (False, True):
            model = create("classification", causal, task.num_labels)
            train(model, lambda rng, size, task=task: glue_batch(task, rng, size), 500, 3e-3)
            batch = glue_batch(task, random.Random(1), 1000)
            with torch.no_grad():
                logits = model(batch.tokens).labels
            predicted = logits[:, 0] if task.num_labels == 1 else logits.argmax(1)
            scores[causal][name] = getattr(metrics, task.metric)(predicted, batch.labels)
    both, one = (sum(scores[causal].values()) / len(GLUE) for causal in (False, True))
    assert both >= 0.9, scores
    assert both > one + 0.05, scores


def test_masked_language_modelling_learns_a_pattern():
    """MLM through masking, head and loss: texts that repeat a word are filled in."""
    model = encfast.create("bert_family/tiny", task="masked-lm", dropout=0.0, attn_dropout=0.0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recent = []
    for _ in range(300):
        texts = [[1, *[rng.randint(10, 59)] * rng.randint(6, 20), 2] for _ in range(32)]
        tokens = PackedBatch.from_list(texts, dtype=torch.int64)
        masked = mask_tokens(
            tokens, vocab_size=512, mask_id=3, special_ids=(1, 2), generator=generator
        )
        batch = TextBatch(masked.tokens, rows=masked.rows, targets=masked.targets)
        optimizer.zero_grad()
        loss = model.loss(batch).total
        loss.backward()
        optimizer.step()
        recent = [*recent[-19:], loss.item()]
    assert sum(recent) / 20 < 0.1
