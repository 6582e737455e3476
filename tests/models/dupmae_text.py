"""Texts to retrieve: synthetic ones about topics, and the glosses of WordNet's nouns."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from encfast import PackedBatch
from encfast.models.dupmae import RetrievalBatch

WORDNET = Path("/usr/share/wordnet/data.noun")  # of Debian's package wordnet-base
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


class Synset(NamedTuple):
    lemmas: list[str]
    gloss: list[str]
    hypernyms: list[str]  # offsets


def read_nouns() -> dict[str, Synset]:
    """By offset. Of a gloss its definition, without examples."""
    found = {}
    for line in WORDNET.read_text().splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        count = int(fields[3], 16)
        lemmas = [fields[4 + 2 * i].lower() for i in range(count)]
        hypernyms = re.findall(r"@ (\d{8}) n", head)
        definition = gloss.partition('; "')[0]
        found[fields[0]] = Synset(
            [w for lemma in lemmas for w in lemma.split("_")],
            re.findall(r"[a-z]+", definition.lower()),
            hypernyms,
        )
    return found


class Glosses(NamedTuple):
    vocab_size: int
    training: list[Pair]
    development: list[Pair]  # to choose by
    test: list[Pair]  # to look at once


def wordnet(words: int, chunks: int, held: int, seed: int = 0) -> Glosses:
    """Pairs (gloss of a synset; words and gloss of its hypernym), one of each hypernym.

    No synset of the ``held`` pairs of development, nor of those of the test, is in training, and
    tokens are chosen by the training pairs: the most frequent words, and three letters of others.
    """
    nouns = read_nouns()
    rng = random.Random(seed)
    by_hypernym: dict[str, list[str]] = {}
    for offset, synset in nouns.items():
        for above in synset.hypernyms:
            if len(synset.gloss) >= 4 and len(nouns[above].gloss) >= 3:
                by_hypernym.setdefault(above, []).append(offset)
    offsets = [(rng.choice(below), above) for above, below in sorted(by_hypernym.items())]
    rng.shuffle(offsets)
    development, test = offsets[:held], offsets[-held:]
    untrained = {offset for pair in development + test for offset in pair}
    trained = [pair for pair in offsets if untrained.isdisjoint(pair)]

    def sides(pair: tuple[str, str]) -> tuple[list[str], list[str]]:
        below, above = (nouns[offset] for offset in pair)
        return below.gloss, above.lemmas + above.gloss

    ids = token_ids(
        Counter(w for pair in trained for side in sides(pair) for w in side), words, chunks
    )

    def tokens(word: str) -> list[int]:
        found = [word] if word in ids else pieces(word)
        return [ids[c] for c in found if c in ids]

    def pairs(chosen: Iterable[tuple[str, str]]) -> list[Pair]:
        return [Pair(*(text(map(tokens, side)) for side in sides(pair))) for pair in chosen]

    return Glosses(FIRST + len(ids), pairs(trained), pairs(development), pairs(test))


def token_ids(counts: Counter[str], words: int, chunks: int) -> dict[str, int]:
    """Of the most frequent words, and of the most frequent pieces of the others."""
    ranked = counts.most_common()
    parts: Counter[str] = Counter()
    for word, n in ranked[words:]:
        parts.update(dict.fromkeys(pieces(word), n))
    known = [w for w, _ in ranked[:words]] + [c for c, _ in parts.most_common(chunks)]
    return {w: FIRST + i for i, w in enumerate(known)}


def pieces(word: str) -> list[str]:
    return ["##" + word[i : i + 3] for i in range(0, len(word), 3)]
