"""MiniLM learns which summary belongs to which description, in sentence-transformers' trainer.

Pairs are the first paragraphs of docstrings and what follows them:

    python examples/train_sentence_transformers.py
"""

import tempfile

from datasets import Dataset
from masked_docstrings import FOLDER, NO_DROPOUT, arguments
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from train_hf_trainer import Print
from train_mosaicbert import docstrings

from encfast.integrations import sentence_transformers as hook


def pairs(count: int) -> Dataset:
    """Docstrings cut behind their first paragraph."""
    cut = [text.split("\n\n", 1) for text in docstrings() if "\n\n" in text][:count]
    return Dataset.from_dict({"anchor": [a for a, _ in cut], "positive": [b for _, b in cut]})


def main() -> None:
    args = arguments()
    model = SentenceTransformer(FOLDER, device="cpu", config_kwargs=NO_DROPOUT)
    model.max_seq_length = 64
    if args.plain:
        loss = losses.MultipleNegativesRankingLoss(model)
    else:
        hook.enable(model)  # texts without padding
        loss = hook.MultipleNegativesRankingLoss(model)  # and no matrix of scores
    settings = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = pairs(8 * args.steps)
    SentenceTransformerTrainer(
        model, settings, train_dataset=data, loss=loss, callbacks=[Print()]
    ).train()


if __name__ == "__main__":
    main()
