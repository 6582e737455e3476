"""MiniLM learns to guess hidden words in Lightning.

The hooks live in the module that Lightning trains:

    python examples/train_lightning.py
"""

import lightning
import torch
from masked_docstrings import arguments, hidden_words, minilm, padded
from torch.utils.data import DataLoader

from encfast.integrations import transformers as hook


class MaskedWords(lightning.LightningModule):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.bert = minilm()
        if not plain:
            hook.accelerate(self.bert)  # the one line that differs

    def training_step(self, batch, step):
        loss = self.bert(**batch).loss
        print(f"step {step + 1:2}: loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-4)


def main() -> None:
    args = arguments()
    rows = hidden_words(4 * args.steps)
    loader = DataLoader(rows, batch_size=4, collate_fn=padded)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(MaskedWords(args.plain), loader)


if __name__ == "__main__":
    main()
