"""Synthetic texts to retrieve, each about a topic."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from encfast import PackedBatch
from encfast.models.dupmae import RetrievalBatch

CLS, SEP, MASK, FIRST = 1, 2, 3, 4  # ids; 0 is [PAD]
Text = tuple[list[int], list[int]]  # ids of [CLS] words [SEP], and the word of each


class Pair(NamedTuple):
    query: Text
    passage: Text


def text(words: Iterable[Sequence[int]], longest: int = 40) -> Text:
    """From the tokens of each word."""
    ids, of_word = [CLS], [-1]
    for i, word in enumerate(words):
        if len(ids) + len(word) < longest:
            ids += word
            of_word += [i] * len(word)
    return [*ids, SEP], [*of_word, -1]


def retrieval_batch(pairs: Sequence[Pair]) -> RetrievalBatch:
    """Every query with its passage; those of the others are its negatives."""
    texts = [p.query[0] for p in pairs] + [p.passage[0] for p in pairs]
    return RetrievalBatch(PackedBatch.from_list(texts, dtype=torch.int64), len(pairs))


def topics(count: int, vocab_size: int, seed: int = 0) -> list[Pair]:
    """A query and a passage of each topic: words of its own among words of all, in any order.

    A word has one token or two.
    """
    rng = random.Random(seed)
    words = [[FIRST + i] for i in range(vocab_size - FIRST)]
    words = [w if rng.random() < 0.7 else [*w, *rng.choice(words)] for w in words]
    common, special = words[:20], words[20:]
    pairs = []
    for _ in range(count):
        own = rng.sample(special, 8)
        mixed = [rng.choices(own, k=n) + rng.choices(common, k=m) for n, m in ((4, 4), (12, 8))]
        for side in mixed:
            rng.shuffle(side)
        pairs.append(Pair(*map(text, mixed)))
    return pairs
