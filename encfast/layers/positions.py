"""Positions of patches: fixed sines and cosines, learned tables, and tables for other grids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.layers.exact import ExactBuffers

_MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


def sincos_positions(
    grid: Sequence[int],
    dim: int,
    *,
    axes: Sequence[int] | None = None,
    temperature: float = 10_000.0,
    class_token: bool = False,
) -> Tensor:
    """fp32 ``[(1 +) P, dim]``: sines and cosines of the coordinates of each patch.

    Each of the n axes has a part [sin, cos] of ``dim / n`` channels, with frequencies
    temperature^(-i / (dim / 2n)).

    Args:
        grid: patches along each axis; the last axis is the fastest.
        dim: a multiple of 2n.
        axes: the order of the axes' parts, by default that of the grid: (row, column) as in CAE
            (arXiv 2202.03026). MAE's published code (arXiv 2111.06377) has (1, 0).
        temperature: see above.
        class_token: put a row of zeros in front.

    Returns:
        fp32 ``[P, dim]``, or ``[1 + P, dim]`` with ``class_token``.

    Raises:
        ValueError: if 2n does not divide dim, or ``axes`` are not those of the grid.
    """
    n = len(grid)
    order = tuple(range(n)) if axes is None else tuple(axes)
    if sorted(order) != list(range(n)):
        raise ValueError(f"axes is {order}, expected an order of 0..{n - 1}, the axes of the grid")
    if n < 1 or dim % (2 * n):
        raise ValueError(f"dim is {dim}, expected a multiple of {2 * n} for {n} axes")
    size = dim // (2 * n)
    frequency = temperature ** (-torch.arange(size, dtype=torch.float64) / size)
    steps = [torch.arange(length, dtype=torch.float64) for length in grid]
    places = torch.meshgrid(*steps, indexing="ij")
    parts = []
    for axis in order:
        angle = places[axis].flatten()[:, None] * frequency  # [P, size]
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, 1).float()
    return torch.cat((table.new_zeros(1, dim), table)) if class_token else table


def resize_positions(
    table: Tensor,
    grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    class_token: bool = False,
    antialias: bool = False,
) -> Tensor:
    """A table for another grid: linear along time, bicubic over an image, trilinear in a volume.

    Args:
        table: ``[(1 +) P, C]`` of ``grid``.
        grid, new_grid: patches along each of 1 to 3 axes.
        class_token: row 0 is that of a class token, and stays.
        antialias: bicubic only: smooth before making the grid smaller, as timm does.

    Returns:
        ``[(1 +) P', C]`` in the table's dtype, interpolated in fp32; the table itself if the grids
        are equal. Differentiable.

    Raises:
        ValueError: for grids of different axes, or a table of other rows.
    """
    grid, new_grid = tuple(grid), tuple(new_grid)
    first = int(class_token)
    if len(grid) != len(new_grid) or len(grid) not in _MODES:
        raise ValueError(f"grid is {grid} and new_grid {new_grid}, expected 1 to 3 axes, the same")
    if table.shape[0] != first + math.prod(grid):
        raise ValueError(
            f"table has {table.shape[0]} rows, expected {first + math.prod(grid)} for grid {grid}"
        )
    if grid == new_grid:
        return table
    cells = table[first:].float().t().reshape(1, -1, *grid)  # [1, C, *grid]
    smooth = {"antialias": antialias} if len(grid) == 2 else {}
    cells = F.interpolate(
        cells, size=new_grid, mode=_MODES[len(grid)], align_corners=False, **smooth
    )
    rows = cells.flatten(2)[0].t().to(table.dtype)  # [P', C]
    return torch.cat((table[:first], rows))


class FixedPositions(ExactBuffers):
    """The table of :func:`sincos_positions` as a buffer, fp32 whatever dtype the model has.

    It is part of the state dict: other libraries' checkpoints hold theirs.

    Args:
        grid, dim, axes, temperature, class_token: as in :func:`sincos_positions`.
    """

    table: Tensor

    def __init__(
        self,
        grid: Sequence[int],
        dim: int,
        *,
        axes: Sequence[int] | None = None,
        temperature: float = 10_000.0,
        class_token: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.dim, self.class_token = tuple(grid), dim, class_token
        self.axes = None if axes is None else tuple(axes)
        self.temperature = repr(float(temperature))  # text: see layers.dropout.StaticFloat
        rows = math.prod(self.grid) + int(class_token)
        empty = torch.empty(rows, dim, dtype=torch.float32, device=device)
        self.register_buffer("table", empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the table."""
        if not self.table.is_meta:
            with torch.no_grad():
                self.table.copy_(self._compute(self.grid))

    def _compute(self, grid: Sequence[int]) -> Tensor:
        return sincos_positions(
            grid,
            self.dim,
            axes=self.axes,
            temperature=float(self.temperature),
            class_token=self.class_token,
        )

    def forward(self, grid: Sequence[int] | None = None) -> Tensor:
        """fp32 ``[(1 +) P, C]``; for another ``grid`` computed anew, which is exact."""
        if grid is None or tuple(grid) == self.grid:
            return self.table
        return self._compute(grid).to(self.table.device)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"grid={self.grid}, dim={self.dim}, class_token={self.class_token}"


class LearnedPositions(nn.Module):
    """A learned row per patch, and for a class token, interpolated for other grids.

    Args:
        grid: patches along each axis.
        dim: C.
        class_token: whether row 0 is that of a class token.
        std: of the normal distribution the rows start from.
    """

    def __init__(
        self,
        grid: Sequence[int],
        dim: int,
        *,
        class_token: bool = False,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.class_token = tuple(grid), class_token
        self.std = repr(float(std))  # text: see layers.dropout.StaticFloat
        rows = math.prod(self.grid) + int(class_token)
        self.table = nn.Parameter(torch.empty(rows, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table anew."""
        nn.init.normal_(self.table, std=float(self.std))

    def forward(self, grid: Sequence[int] | None = None, *, antialias: bool = False) -> Tensor:
        """``[(1 +) P, C]``, interpolated where ``grid`` is another than the table's.

        Args:
            grid: patches along each axis; None: the table's own.
            antialias: where the grid is smaller, average over the places left out.

        Returns:
            ``[(1 +) P, C]``, the class token's position first where there is one.
        """
        if grid is None:
            return self.table
        return resize_positions(
            self.table, self.grid, grid, class_token=self.class_token, antialias=antialias
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"grid={self.grid}, dim={self.table.shape[1]}, class_token={self.class_token}"
