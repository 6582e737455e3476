"""Serves the ops of CPU tensors on a GPU, so that the tests of tests/ops are the GPU's too.

    pytest tests/ops --on-gpu

Arguments move with the strides and the offset they have in their storage, results come back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from cpu_kernels import replaced
from torch import Tensor
from torch.utils._pytree import tree_map_only

from encfast.ops import _backends


def moved(x: Tensor, device: str) -> Tensor:
    """x on another device, in a copy of all of its storage: a view of the same kind there."""
    flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return flat.to(device).as_strided(x.size(), x.stride(), x.storage_offset())


def relay(op: Callable, device: str) -> Callable:
    """`op` on copies of its arguments on a device; the results come back contiguous."""

    def serve(*args):
        outputs = op(*tree_map_only(Tensor, lambda x: moved(x, device), args))
        return tree_map_only(Tensor, lambda x: x.cpu(), outputs)

    return serve


def gpu_serves() -> AbstractContextManager[None]:
    """Every op that has kernels for GPUs runs there, behind its own checks and autograd."""
    ops = {op: getattr(torch.ops.encfast, op).default for op in _backends._gpu_kernels}
    return replaced({name: relay(op, "cuda") for name, op in ops.items()})
