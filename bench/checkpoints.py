"""Folders with weights that benches make for themselves; gone when the process is."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Size:
    """Of a BERT; no dropout, so that all variants of a training step compute the same."""

    layers: int
    channels: int
    heads: int
    vocabulary: int = 30522


BERT_BASE = Size(layers=12, channels=768, heads=12)


@functools.lru_cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="encfast-bench-")


def scratch_folder() -> Path:
    """A fresh folder."""
    return Path(tempfile.mkdtemp(dir=_directory().name))


@functools.lru_cache
def random_bert(size: Size) -> Path:
    """A folder as transformers writes it: BERT's architecture, its initialisation, a fixed seed.

    The tokenizer knows the special tokens alone: it is there for converters that ask for one.
    """
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.channels,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.channels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type="absolute",  # no longer a field, and converters ask for it
    )
    folder = scratch_folder()
    BertModel(config).save_pretrained(folder)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    BertTokenizer(vocab={word: i for i, word in enumerate(special)}).save_pretrained(folder)
    return folder
