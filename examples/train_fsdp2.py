"""MiniLM learns to guess hidden words, its parameters sharded over two processes by FSDP2.

Accelerate spreads the batches. It shards on GPUs alone; here PyTorch's own function does.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py
"""

import torch
from accelerate import Accelerator
from masked_docstrings import arguments, hidden_words, minilm, padded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from encfast.integrations import transformers as hook


def main() -> None:
    args = arguments()
    accelerator = Accelerator(cpu=True)
    model = minilm()
    if not args.plain:
        hook.accelerate(model)  # the one line that differs
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    rows = hidden_words(4 * accelerator.num_processes * args.steps)
    optimizer, loader = accelerator.prepare(
        torch.optim.AdamW(model.parameters(), lr=2e-4),
        DataLoader(rows, batch_size=4, collate_fn=padded),
    )
    for step, batch in enumerate(loader, 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        if accelerator.is_main_process:
            print(f"step {step:2}: loss {mean:.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
