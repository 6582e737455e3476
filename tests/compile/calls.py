"""Calls of every launcher, one per set of kernels that users get."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """`launch` makes CPU tensors and calls a launcher of `encfast.kernels` with them."""

    launch: Callable[[], object]
    tensor_kernels: Sequence[str]  # kernels that must use tensor cores
    quick: bool


CALLS: dict[str, Call] = {}


def call(*, tensor_kernels: Sequence[str] = (), quick: bool = False):
    """Lists the function under its name; `quick` calls compile in every run of the tests."""

    def listed(launch):
        CALLS[launch.__name__] = Call(launch, tensor_kernels, quick)
        return launch

    return listed


def _bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)
