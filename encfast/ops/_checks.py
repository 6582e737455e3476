"""Argument checks shared by the ops: sentences that name the argument, the rule and what came.

Shapes, dtypes and devices are checked always; values only where that costs no device sync and
breaks no graph (`can_read_values`). The native kernels check the values again.
"""

import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, x: object, dim: int | None = None, shape: str = "") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a torch.Tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {x.layout}, expected a dense (strided) tensor")
    if dim is not None and x.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {dim}-D {shape}")


def check_dtype(op: str, name: str, x: Tensor, *expected: torch.dtype, hint: str = "") -> None:
    if x.dtype not in expected:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in expected)
        came = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is {came}, expected {wanted}{hint}")


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {x.device}, {like_name} is on {like.device}; move one of them"
        )


def can_read_values(x: Tensor) -> bool:
    """True where the values of `x` may decide about an error: eager, and free or asked for."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return x.device.type == "cpu" or (
        x.device.type != "meta" and os.environ.get("ENCFAST_CHECK") == "1"
    )


def check_cu_seqlens_values(
    op: str, name: str, cu_seqlens: Tensor, total: int, max_name: str, max_seqlen: int | None
) -> None:
    """cu_seqlens = [0, ..., total], never decreasing, no step longer than max_seqlen."""
    ends = cu_seqlens.detach().cpu().numpy()
    if ends[0] != 0:
        raise ValueError(f"{op}: {name} starts at {ends[0]}, expected 0")
    lengths = ends[1:].astype("int64") - ends[:-1]
    if lengths.size and lengths.min() < 0:
        b = int(lengths.argmin())
        raise ValueError(
            f"{op}: {name} decreases from {ends[b]} to {ends[b + 1]} at sequence {b}, expected "
            "the running sum of the lengths"
        )
    if ends[-1] != total:
        raise ValueError(f"{op}: {name} ends at {ends[-1]}, expected the number of rows, {total}")
    if max_seqlen is not None and lengths.size and lengths.max() > max_seqlen:
        raise ValueError(
            f"{op}: {max_name} is {max_seqlen}, but sequence {int(lengths.argmax())} of {name} has "
            f"{lengths.max()} rows"
        )
