"""Calls of every launcher, one per set of kernels that users get."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from encfast.kernels import glu, rotary


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


@call(quick=True)
def glu_gated():
    x, dout, bias = _bf16(100, 1536), _bf16(100, 768), torch.zeros(1536)
    glu.glu(x, bias, "gelu", True, False)
    glu.glu_bwd(dout, x, bias, "gelu", True, False, True)


@call()
def glu_plain():
    x = torch.zeros(100, 768)
    for activation in ("gelu", "gelu_tanh", "silu", "relu"):
        glu.glu(x, None, activation, False, False)
        glu.glu_bwd(x, x, None, activation, False, False, False)


@call()
def glu_gated_second_half_activated():
    x, dout = _bf16(100, 1536), _bf16(100, 768)
    for activation in ("gelu_tanh", "silu", "relu"):
        glu.glu(x, None, activation, True, True)
        glu.glu_bwd(dout, x, None, activation, True, True, False)


@call()
def glu_odd_width():
    """33 columns: nothing is divisible by 16, so no access is vectorised."""
    x, dout, bias = _bf16(5, 66), _bf16(5, 33), torch.zeros(66)
    glu.glu(x, bias, "silu", True, False)
    glu.glu_bwd(dout, x, bias, "silu", True, False, True)


@call(quick=True)
def rotary_both():
    q, angles = _bf16(100, 12, 64), torch.zeros(128, 32)
    rotary.rotary(q, q, angles, angles, torch.zeros(100, dtype=torch.int64), False, False)


@call()
def rotary_interleaved():
    q, angles = torch.zeros(100, 12, 64), torch.zeros(128, 32)
    rotary.rotary(q, None, angles, angles, torch.zeros(100, dtype=torch.int32), True, True)


@call()
def rotary_part_of_a_head():
    """40 of 96 channels turn; no positions: row n stands at n. k has fewer heads."""
    q, k, angles = _bf16(100, 12, 96), _bf16(100, 4, 96), torch.zeros(100, 20)
    for interleaved in (False, True):
        rotary.rotary(q, k, angles, angles, None, interleaved, False)
