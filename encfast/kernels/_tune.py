"""Tiles of matrix products: from a table, or measured where ENCFAST_AUTOTUNE=1 asks for it.

With it, the first call of its kind (of attention: of a dtype, head size and kind of rule) times, on
its own tensors, every tile that a table holds for any GPU of the vendor; the process keeps the
fastest for calls of any length. That costs tens of compilations once. Tiles differ in the order of
their sums, so the last bits of a result may differ between processes. While a CUDA graph is
captured nothing is timed: the table serves.
"""

import functools
import os
from collections.abc import Callable

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

from . import _config
from ._attn_tile import Rule, weight

Tile = tuple[int, ...]  # blocks, warps, stages
_fastest: dict[tuple, Tile] = {}


def launch(
    kernel: JITFunction,
    grid: Callable[[dict], tuple[int, ...]],
    args: tuple,
    table: dict,
    dtype: torch.dtype,
    head_size: int,
    rule: Rule,
) -> None:
    """Launches a kernel of attention on `args` with a tile of the table.

    `grid` gets a dictionary with BLOCK_M and BLOCK_N, as Triton hands it out.
    """
    block_d, tile = _config.for_head(table, dtype, head_size, weight(rule))

    def run(tile: Tile) -> None:
        block_m, block_n, warps, stages = tile
        kernel[grid](
            *args,
            D=head_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=warps,
            num_stages=stages,
        )

    terms = tuple(term is None for term in rule)
    key = kernel.__name__, dtype, head_size, terms
    run(fastest(key, tile, lambda: _candidates(table, dtype, block_d), run))


def fastest(
    key: tuple, default: Tile, tiles: Callable[[], list[Tile]], run: Callable[[Tile], None]
) -> Tile:
    """The tile of calls that share `key`: `default`, or the fastest of `tiles` where asked for."""
    if not _is_on():
        return default
    key = *key, _config.target()
    if key not in _fastest:
        _fastest[key] = _measured(default, tiles(), run)
    return _fastest[key]


def _is_on() -> bool:
    return (
        os.environ.get("ENCFAST_AUTOTUNE") == "1"
        and _config.target() != _config.INTERPRETER
        and not torch.cuda.is_current_stream_capturing()
    )


def _candidates(table: dict, dtype: torch.dtype, block_d: int) -> list[Tile]:
    """What the tables of this vendor hold for the dtype, at this width or a wider one."""
    vendor = _config.target()[:3]
    tiles = (
        tile
        for arch, rules in table.items()
        if arch.startswith(vendor)
        for (itemsize, _), widths in rules.items()
        if itemsize == dtype.itemsize
        for width, tile in widths.items()
        if width >= block_d
    )
    return list(dict.fromkeys(tiles))


def _measured(default: Tile, tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
    """The fastest tile; the default where none of the tiles fits this GPU."""
    seconds = {}
    for tile in tiles:
        try:
            seconds[tile] = _seconds(functools.partial(run, tile))
        except (OutOfResources, PTXASError):
            continue  # of another GPU's table
    return min(seconds, key=seconds.__getitem__, default=default)


def _seconds(run: Callable[[], None]) -> float:
    """Median time of a launch with a cold L2 cache."""
    return triton.testing.do_bench(run, return_mode="median") / 1e3
