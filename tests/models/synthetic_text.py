"""Two small worlds for the comparison of one-way and two-way models: answer spans, and six tasks
after GLUE in which the evidence stands behind what is to be judged.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from encfast import PackedBatch
from encfast.models.bert_family import TextBatch

CLS, SEP = 1, 2
VOCAB = 128
KINDS = 6
MEANINGS = 4
# Alphabets of one token for each kind (evidence: for each kind and class), and filler words.
ASK, OPEN, CLOSE, EVIDENCE = 10, 20, 30, 40
WORDS = range(60, 124)


def pack(texts: list[list[int]]) -> PackedBatch:
    return PackedBatch.from_list(texts, dtype=torch.int64)


def span_batch(rng: random.Random, size: int, question_first: bool | None = None) -> TextBatch:
    """A passage with four spans of different kinds, each from its opening to its closing token.

    The question names a kind; its span is the answer.

    Args:
        rng: of everything.
        size: B.
        question_first: where the question stands; either if None.
    """
    texts, starts, ends = [], [], []
    for _ in range(size):
        passage, spans = [], {}
        for kind in rng.sample(range(KINDS), 4):
            passage += rng.choices(WORDS, k=rng.randint(0, 4))
            begin = len(passage)
            passage += [OPEN + kind, *rng.choices(WORDS, k=rng.randint(0, 4)), CLOSE + kind]
            spans[kind] = begin, len(passage) - 1
        kind = rng.choice(sorted(spans))
        first = rng.random() < 0.5 if question_first is None else question_first
        head = [CLS, ASK + kind, SEP] if first else [CLS]
        tail = [SEP] if first else [SEP, ASK + kind, SEP]
        texts.append([*head, *passage, *tail])
        starts.append(len(head) + spans[kind][0])
        ends.append(len(head) + spans[kind][1])
    return TextBatch(pack(texts), starts=torch.tensor(starts), ends=torch.tensor(ends))


def _judged(rng: random.Random, classes: int) -> tuple[list[int], list[float]]:
    """Words, then which of the classes each kind of word belongs to: text, and share of each class.

    What a word counts for stands behind it: a one-way model has to judge it in hindsight.
    """
    table = rng.choices(range(classes), k=MEANINGS)
    kinds = rng.choices(range(MEANINGS), k=rng.randint(7, 14))
    evidence = [EVIDENCE + classes * k + table[k] for k in rng.sample(range(MEANINGS), MEANINGS)]
    shares = [sum(table[k] == c for k in kinds) / len(kinds) for c in range(classes)]
    return [*(OPEN + k for k in kinds), SEP, *evidence], shares


def acceptability(rng: random.Random) -> tuple[list[int], float]:
    """Acceptable with fewer words in the wrong form than in the right one."""
    text, (wrong, right) = _judged(rng, 2)
    return text, wrong < right


def sentiment(rng: random.Random) -> tuple[list[int], float]:
    """More words of praise than of blame; the others say nothing."""
    text, (blame, praise, _) = _judged(rng, 3)
    return text, praise > blame


def paraphrase(rng: random.Random) -> tuple[list[int], float]:
    """At least half of the words come back."""
    text, (_, kept) = _judged(rng, 2)
    return text, kept >= 0.5


def similarity(rng: random.Random) -> tuple[list[int], float]:
    """The share of the words that come back."""
    text, (_, kept) = _judged(rng, 2)
    return text, kept


def inference(rng: random.Random) -> tuple[list[int], float]:
    """What most words are: entailed, neutral or contradicted (of equals the first)."""
    text, shares = _judged(rng, 3)
    return text, shares.index(max(shares))


def answerable(rng: random.Random) -> tuple[list[int], float]:
    """A question at the end asks for one kind: does the text open it, or close it?"""
    kinds = rng.sample(range(KINDS), 4)
    opened = [rng.random() < 0.5 for _ in kinds]
    words = [(OPEN if o else CLOSE) + k for k, o in zip(kinds, opened, strict=True)]
    asked = rng.randrange(4)
    return [*words, SEP, ASK + kinds[asked]], opened[asked]


class GlueTask(NamedTuple):
    make: Callable[[random.Random], tuple[list[int], float]]
    metric: str  # of encfast.metrics
    num_labels: int


GLUE = {
    "acceptability": GlueTask(acceptability, "matthews", 2),
    "paraphrase": GlueTask(paraphrase, "f1", 2),
    "inference": GlueTask(inference, "accuracy", 3),
    "similarity": GlueTask(similarity, "spearman", 1),
    "answerable": GlueTask(answerable, "accuracy", 2),
    "sentiment": GlueTask(sentiment, "accuracy", 2),
}


def glue_batch(task: GlueTask, rng: random.Random, size: int) -> TextBatch:
    texts, labels = zip(*(task.make(rng) for _ in range(size)), strict=True)
    dtype = torch.float32 if task.num_labels == 1 else torch.int64
    tokens = pack([[CLS, *text, SEP] for text in texts])
    return TextBatch(tokens, labels=torch.tensor(labels).to(dtype))
