"""MiniLM learns to guess hidden words in transformers' Trainer.

Its default optimizer, schedule and clipping of gradients:

    python examples/train_hf_trainer.py
"""

import tempfile

from masked_docstrings import arguments, hidden_words, minilm, padded
from transformers import Trainer, TrainerCallback, TrainingArguments

from encfast.integrations import transformers as hook


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step:2}: loss {float(logs['loss']):.6f}")


def main() -> None:
    args = arguments()
    model = minilm()
    if not args.plain:
        hook.accelerate(model)  # the one line that differs
    settings = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = hidden_words(4 * args.steps)
    Trainer(model, settings, train_dataset=rows, data_collator=padded, callbacks=[Print()]).train()


if __name__ == "__main__":
    main()
