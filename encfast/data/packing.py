"""Which sequences travel together: plans over lengths, for collators and samplers.

Everything here is NumPy in, NumPy out, so that data-loader workers can use it. The compiled
`encfast._host` makes the plans in O(n log n); without it NumPy makes the same ones, slower.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Lengths = Sequence[int] | npt.NDArray[np.integer]

_MOST = 2**31 - 1  # cu_seqlens are int32


def import_host() -> ModuleType | None:
    """The compiled helpers, or None where they were not built."""
    try:
        return importlib.import_module("encfast._host")
    except ImportError:
        return None


_host = import_host()


def pack_ffd(lengths: Lengths, capacity: int) -> list[IntArray]:
    """Packs sequences into bins of `capacity` tokens by first-fit decreasing.

    From the longest to the shortest, each sequence goes into the first bin that has room for it: at
    most 11/9 of the least possible number of bins, plus one (Dosa, 2007). Equal lengths go in their
    order, so the plan is deterministic. O(n log n) where encfast is compiled.

    Args:
        lengths: `[n]` integers in `0..capacity`.
        capacity: tokens a bin holds, at least 1.

    Returns:
        One int64 array of sequence numbers per bin, ascending; each sequence is in exactly one bin.

    Raises:
        TypeError: if `lengths` or `capacity` are not integers.
        ValueError: if `lengths` is not one-dimensional, or a length is negative or over `capacity`.

    Examples:
        >>> from encfast.data import pack_ffd
        >>> [numbers.tolist() for numbers in pack_ffd([50, 80, 20, 30, 10], capacity=100)]
        [[1, 2], [0, 3, 4]]
    """
    capacity = check_positive("capacity", capacity)
    checked = check_lengths(lengths, capacity, "capacity")
    order = np.argsort(-checked, kind="stable")
    plan = _first_fit_numpy if _host is None else _host.first_fit
    bins = np.empty_like(order)
    bins[order] = plan(checked[order], capacity)
    by_bin = np.argsort(bins, kind="stable")
    return _split(by_bin, np.flatnonzero(np.diff(bins[by_bin], prepend=-1)))


def bucket_by_length(
    lengths: Lengths,
    max_tokens: int,
    *,
    max_padding: float = 1.0,
    max_sequences: int | None = None,
) -> list[IntArray]:
    """Groups sequences of similar length into batches whose padded grid is bounded.

    From the shortest to the longest, a batch takes sequences until the next one would make its grid
    (sequences x longest) exceed `max_tokens`, or more than `max_padding` of that grid padding.

    Args:
        lengths: `[n]` integers in `0..max_tokens`.
        max_tokens: cells of a batch's padded grid, at least 1.
        max_padding: share of the grid that may be padding, `0..1`; 0 batches equal lengths only.
        max_sequences: sequences in a batch, at least 1; unlimited by default.

    Returns:
        One int64 array of sequence numbers per batch, shortest first.

    Raises:
        TypeError: if an argument that counts is not an integer.
        ValueError: if `lengths` is not one-dimensional, or a value is out of its range.

    Examples:
        >>> from encfast.data import bucket_by_length
        >>> [batch.tolist() for batch in bucket_by_length([5, 20, 6, 19, 4], max_tokens=40)]
        [[4, 0, 2], [3, 1]]
    """
    max_tokens = check_positive("max_tokens", max_tokens)
    if not 0 <= max_padding <= 1:
        raise ValueError(f"max_padding={max_padding!r}: expected a share between 0 and 1")
    checked = check_lengths(lengths, max_tokens, "max_tokens")
    limit = (
        len(checked) if max_sequences is None else check_positive("max_sequences", max_sequences)
    )
    order = np.argsort(checked, kind="stable")
    plan = _batch_starts_numpy if _host is None else _host.batch_starts
    return _split(order, plan(checked[order], max_tokens, max_padding, limit))


def check_lengths(lengths: Lengths, most: int, most_name: str) -> IntArray:
    """`lengths` as int64 `[n]`; TypeError or ValueError unless they are integers in `0..most`.

    The error calls that bound `most_name`.
    """
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths has shape {array.shape}, expected one dimension")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"lengths has dtype {array.dtype}, expected integers")
    for bad in np.flatnonzero((array < 0) | (array > most))[:1]:
        raise ValueError(
            f"lengths[{bad}] is {array[bad]}, expected a length between 0 and {most_name}={most}"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def check_positive(name: str, value: int) -> int:
    """`value` as an int; TypeError or ValueError, naming `name`, unless it is in `1..2**31 - 1`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}, expected an integer")
    if not 1 <= value <= _MOST:
        raise ValueError(f"{name}={value}: expected between 1 and {_MOST}")
    return int(value)


def _split(order: IntArray, starts: IntArray) -> list[IntArray]:
    """`order` cut before each of `starts`, the first of which is 0."""
    return np.split(order, starts[1:]) if len(starts) else []


def _first_fit_numpy(lengths: IntArray, capacity: int) -> IntArray:
    room = np.full(len(lengths), capacity)  # one bin for each sequence is always enough
    bins = np.empty_like(lengths)
    for i, length in enumerate(lengths):
        bins[i] = np.argmax(room >= length)
        room[bins[i]] -= length
    return bins


def _batch_starts_numpy(
    lengths: IntArray, max_tokens: int, max_padding: float, max_sequences: int
) -> IntArray:
    starts: list[int] = []
    tokens = 0  # of the batch being filled
    for i, length in enumerate(lengths.tolist()):
        count = i - starts[-1] + 1 if starts else 1
        grid = count * length  # ascending: this one is the longest
        padding = grid - (tokens + length)
        full = count > max_sequences or grid > max_tokens or padding > max_padding * grid
        if full or not starts:
            starts.append(i)
            tokens = 0
        tokens += length
    return np.array(starts, dtype=np.int64)
