"""MiniLM learns to guess hidden words in plain PyTorch, data parallel over two processes.

Both processes see batches of their own; losses are printed of both:

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py
"""

import torch
import torch.distributed as dist
from masked_docstrings import arguments, hidden_words, minilm, padded
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from encfast.integrations import transformers as hook


def main() -> None:
    args = arguments()
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    model = minilm()
    if not args.plain:
        hook.accelerate(model)  # the one line that differs
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    rows = hidden_words(4 * world * args.steps)
    sampler = DistributedSampler(rows, seed=0)
    loader = DataLoader(rows, batch_size=4, sampler=sampler, collate_fn=padded)
    for step, batch in enumerate(loader, 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step:2}: loss {mean.item():.6f}")
    del model  # its reducer holds the group too: as the last to go, it waited for gloo's threads
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
