"""Which patches to hide, drawn on NumPy arrays: for data-loader workers, without PyTorch.

A mask is a function of its seed alone, on every machine: numbers come from SplitMix64 (Steele et
al., OOPSLA 2014), the n-th of which is a hash of seed + n * gamma. The compiled `encfast._host`
draws the masks; without it NumPy draws the same ones, slower. True hides a patch, as
`PatchMask.from_hidden` reads it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from encfast.data.packing import check_positive, import_host

BoolArray = npt.NDArray[np.bool_]
Seeds = int | Sequence[int] | npt.NDArray[np.integer]

_host = import_host()

_TRIES = 10  # of BEiT's published code
_WORD = 2**64 - 1


class SplitMix64:
    """The numbers of csrc/host/masks.cpp in Python, from a 64-bit `seed`."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        """64 random bits."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _WORD
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """In [0, n), n <= 2^32."""
        return ((self.next() >> 32) * n) >> 32

    def unit(self) -> float:
        """In [0, 1)."""
        return (self.next() >> 11) * 2.0**-53


def random_hidden(patches: int, keep: int, *, seeds: Seeds) -> BoolArray:
    """Hides all but `keep` patches, each choice alike (MAE, arXiv 2111.06377).

    Args:
        patches: P; the cells of a clip or a volume are patches like others.
        keep: visible patches, `1..P`.
        seeds: an int, or n of them, in `0..2**64 - 1`: one mask each.

    Returns:
        bool `[P]`, or `[n, P]`.

    Raises:
        TypeError: if a count or a seed is not an integer.
        ValueError: if one is out of its range.
    """
    keep = check_keep(keep, check_positive("patches", patches))
    if _host is not None:
        return _per_seed(seeds, lambda words: _host.random_masks(words, patches, keep))
    return _per_seed(seeds, lambda words: _rows(words, patches, _random_numpy, keep))


def tube_hidden(grid: Sequence[int], keep: int, *, seeds: Seeds) -> BoolArray:
    """Hides the same places in every frame (VideoMAE, arXiv 2203.12602).

    Args:
        grid: (T, H, W) patches; time is the slowest axis.
        keep: visible patches of each frame, `1..H * W`.
        seeds: as in `random_hidden`.

    Returns:
        bool `[T * H * W]`, or `[n, T * H * W]`.

    Raises:
        TypeError, ValueError: as `random_hidden`; for a grid of other than three axes.
    """
    frames, height, width = check_grid(grid, 3)
    places = random_hidden(height * width, keep, seeds=seeds)
    return np.tile(places, frames)


def group_hidden(groups: npt.ArrayLike, hide: int, *, seeds: Seeds) -> BoolArray:
    """Hides whole groups of patches, such as parts of a body; counts may differ between masks.

    Args:
        groups: integers `[P]` in `0..G - 1`: the group of each patch. G is one more than the
            largest of them, and no group is empty.
        hide: groups to hide, `1..G`.
        seeds: as in `random_hidden`.

    Returns:
        bool `[P]`, or `[n, P]`.

    Raises:
        TypeError, ValueError: as `random_hidden`; for groups that are not as described.
    """
    of_patch, count = check_groups(groups)
    hide = check_hide(hide, count)
    chosen = random_hidden(count, count - hide, seeds=seeds) if hide < count else None
    if chosen is None:
        chosen = _per_seed(seeds, lambda words: np.ones((len(words), count), dtype=bool))
    return chosen[..., of_patch]


def block_hidden(
    grid: Sequence[int],
    keep: int,
    *,
    seeds: Seeds,
    min_patches: int = 16,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
) -> BoolArray:
    """Hides rectangles until exactly `keep` patches are visible (BEiT, arXiv 2106.08254).

    A rectangle has an area of `min_patches` to `max_patches`, at most what is left to hide, any
    whole number alike, and an aspect ratio whose logarithm is uniform. It is drawn again where it
    does not fit into the grid, hides nothing new or too much. After ten such tries one patch at the
    border of what is hidden is hidden instead, so that the count is exact, as in CAE
    (arXiv 2202.03026).

    Args:
        grid: (H, W) patches.
        keep: visible patches, `1..H * W`.
        seeds: as in `random_hidden`.
        min_patches, max_patches: area of a rectangle; by default no upper bound.
        min_aspect: least ratio of height and width, in (0, 1]; its inverse is the greatest.

    Returns:
        bool `[H * W]`, or `[n, H * W]`.

    Raises:
        TypeError, ValueError: as `random_hidden`; for a grid of other than two axes, or an option
            out of its range.
    """
    height, width = check_grid(grid, 2)
    patches = height * width
    keep = check_keep(keep, patches)
    least = check_positive("min_patches", min_patches)
    most = patches if max_patches is None else check_positive("max_patches", max_patches)
    if most < least and max_patches is not None:
        raise ValueError(f"max_patches={max_patches}: expected min_patches={min_patches} or more")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"min_aspect={min_aspect!r}: expected a ratio in (0, 1]")
    rule = (height, width, keep, least, most, float(min_aspect))
    if _host is not None:
        return _per_seed(seeds, lambda words: _host.block_masks(words, *rule))
    return _per_seed(seeds, lambda words: _rows(words, patches, _block_numpy, rule))


def keep_count(patches: int, mask_ratio: float) -> int:
    """Visible patches of `patches` where `mask_ratio` of them are hidden, rounded down as in MAE.

    Raises:
        ValueError: if the ratio is not between 0 and 1, or so large that nothing stays visible.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio!r}: expected a ratio between 0 and 1")
    keep = int(patches * (1 - mask_ratio))
    if keep < 1:
        raise ValueError(f"mask_ratio={mask_ratio}: leaves none of {patches} patches visible")
    return keep


def check_keep(keep: int, patches: int) -> int:
    """`keep` as an int; TypeError or ValueError unless it is in `1..patches`."""
    if check_positive("keep", keep) > patches:
        raise ValueError(f"keep={keep}: expected between 1 and {patches}, the patches")
    return int(keep)


def check_hide(hide: int, groups: int) -> int:
    """`hide` as an int; TypeError or ValueError unless it is in `1..groups`."""
    if check_positive("hide", hide) > groups:
        raise ValueError(f"hide={hide}: expected between 1 and {groups}, the groups")
    return int(hide)


def check_grid(grid: Sequence[int], axes: int) -> tuple[int, ...]:
    """`grid` as so many positive ints as `axes` says; TypeError or ValueError otherwise."""
    if len(grid) != axes:
        raise ValueError(f"grid={tuple(grid)}: expected {axes} axes")
    return tuple(check_positive("grid", n) for n in grid)


def check_groups(groups: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], int]:
    """`groups` as int64 `[P]` and their number; TypeError or ValueError for empty or other ones."""
    array = np.asarray(groups)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"groups has shape {array.shape}, expected [P], the group of each patch")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"groups has dtype {array.dtype}, expected integers")
    if array.min() < 0:
        raise ValueError(f"groups holds {array.min()}, expected 0 or more")
    sizes = np.bincount(array)
    for empty in np.flatnonzero(sizes == 0)[:1]:
        raise ValueError(f"groups: group {empty} of 0..{len(sizes) - 1} has no patch")
    return array.astype(np.int64), len(sizes)


def _per_seed(seeds: Seeds, draw: Callable[[npt.NDArray[np.uint64]], BoolArray]) -> BoolArray:
    """`draw` of uint64 `[n]`; its only row for a single seed."""
    # As objects: beside a small int, one beyond 2**63 would become a float.
    given = np.asarray(seeds, dtype=object)
    if given.ndim > 1:
        raise ValueError(f"seeds has shape {given.shape}, expected an integer or [n]")
    for seed in given.flat:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise TypeError(f"seeds holds {seed!r}, expected integers in 0..2**64 - 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seeds holds {seed}, expected integers in 0..2**64 - 1")
    masks = draw(given.reshape(-1).astype(np.uint64))
    return masks[0] if given.ndim == 0 else masks


def _rows(
    seeds: npt.NDArray[np.uint64],
    patches: int,
    fill: Callable[[SplitMix64, BoolArray, Any], None],
    rule: Any,
) -> BoolArray:
    masks = np.zeros((len(seeds), patches), dtype=bool)
    for seed, mask in zip(seeds.tolist(), masks, strict=True):
        fill(SplitMix64(seed), mask, rule)
    return masks


def _random_numpy(random: SplitMix64, mask: BoolArray, keep: int) -> None:
    order = list(range(len(mask)))
    for i in range(len(mask) - keep):
        j = i + random.below(len(mask) - i)
        order[i], order[j] = order[j], order[i]
        mask[order[i]] = True


def _block_numpy(random: SplitMix64, mask: BoolArray, rule: tuple[Any, ...]) -> None:
    height, width, keep, least, most, min_aspect = rule
    cells = mask.reshape(height, width)
    left = height * width - keep
    while left > 0:
        bounds = (least, min(left, most), min_aspect)
        gained = _hide_rectangle(random, cells, bounds) or _grow(random, cells)
        left -= gained


def _hide_rectangle(random: SplitMix64, cells: BoolArray, bounds: tuple[int, int, float]) -> int:
    """The number of patches that a rectangle has hidden, 0 after so many unlucky tries."""
    least, most, min_aspect = bounds
    for _ in range(_TRIES):
        smallest = min(least, most)
        area = float(smallest + random.below(most - smallest + 1))
        aspect = min_aspect * math.pow(1.0 / (min_aspect * min_aspect), random.unit())
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < 1 or w < 1 or h > cells.shape[0] or w > cells.shape[1]:
            continue
        top, left = random.below(cells.shape[0] - h + 1), random.below(cells.shape[1] - w + 1)
        block = cells[top : top + h, left : left + w]
        gained = h * w - int(block.sum())
        if 1 <= gained <= most:
            block[:] = True
            return gained
    return 0


def _grow(random: SplitMix64, cells: BoolArray) -> int:
    """Hides one patch at the border of a rectangle, the first from a random place on."""
    start = random.below(cells.size)
    near = np.zeros_like(cells)
    near[1:] |= cells[:-1]
    near[:-1] |= cells[1:]
    near[:, 1:] |= cells[:, :-1]
    near[:, :-1] |= cells[:, 1:]
    open_cells = ~cells
    border = near & open_cells
    wanted = (border if border.any() else open_cells).flatten()  # nothing may be hidden yet
    cells.flat[(start + int(np.roll(wanted, -start).argmax())) % cells.size] = True
    return 1
