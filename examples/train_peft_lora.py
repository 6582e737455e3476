"""Adapters of low rank learn to guess hidden words; MiniLM itself stays as it is.

Adapters go in first or last, as one likes:

    python examples/train_peft_lora.py
"""

import torch
from masked_docstrings import arguments, hidden_words, minilm, padded
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from encfast.integrations import transformers as hook


def main() -> None:
    args = arguments()
    config = LoraConfig(r=8, target_modules=["query", "value", "dense"])
    model = get_peft_model(minilm(), config)
    if not args.plain:
        hook.accelerate(model)  # the one line that differs
    model.print_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)

    rows = hidden_words(4 * args.steps)
    for step, batch in enumerate(DataLoader(rows, batch_size=4, collate_fn=padded), 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2}: loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
