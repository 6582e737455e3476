"""The one ragged type: B sequences of different lengths as one tensor of N rows.

A batch becomes a :class:`PackedBatch` where it is collated and stays one up to the loss; padding
exists only where a caller brings a grid (:meth:`PackedBatch.pack`) or wants one
(:meth:`PackedBatch.to_padded`). Zero-length sequences and B = 0 are legal everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encfast import ops


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences of different lengths, one after another in the rows of ``data``.

    Constructors (``pack``, ``from_list``, ``from_lengths``, ``from_njt``) check their input and
    read lengths on the host once; they live outside compiled graphs. Moves (``with_data``,
    ``select``, ``positions``, ``segment_ids``, ``to_padded``) trace under
    ``torch.compile(fullgraph=True)`` and ``torch.export``; ``split`` and ``to_njt`` leave the
    packed world and live at the border again.

    Attributes:
        data: ``[N, ...]``, any dtype: the rows of all sequences.
        cu_seqlens: int32 ``[B + 1]``, on data's device: sequence b owns rows
            ``cu_seqlens[b] : cu_seqlens[b + 1]``.
        max_seqlen: an upper bound of the sequence lengths, a Python int (a tensor would cost a
            device synchronisation in every op); the constructors set it to the exact maximum.
        indices: int64 ``[N]`` or None: place of each row in the flattened ``[B * S]`` grid it
            came from.
        padded_shape: ``(B, S)`` of that grid, or None.

    Examples:
        >>> batch = PackedBatch.from_list([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
        >>> batch
        PackedBatch(2 sequences, data=(5,) torch.int64 on cpu, max_seqlen=3)
        >>> batch.cu_seqlens
        tensor([0, 3, 5], dtype=torch.int32)
        >>> batch.positions()
        tensor([0, 1, 2, 0, 1])
        >>> batch.to_padded()
        tensor([[5, 6, 7],
                [8, 9, 0]])
    """

    data: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor | None = None
    padded_shape: tuple[int, int] | None = None

    # Constructors: at the border, checked.

    @classmethod
    def pack(cls, padded: Tensor, mask: Tensor) -> PackedBatch:
        """Keeps the rows of a padded grid where ``mask`` is set, and remembers where they stood.

        Args:
            padded: ``[B, S, ...]``.
            mask: bool or integer 0/1 ``[B, S]``; 1 keeps a row. Kept rows need not be a prefix.

        Raises:
            TypeError, ValueError: for a mask of another dtype, shape or value (see
                :func:`encfast.ops.unpad`).
        """
        rows = ops.unpad(padded, mask)
        shape = (padded.shape[0], padded.shape[1])
        return cls(rows.data, rows.cu_seqlens, rows.max_seqlen, rows.indices, shape)

    @classmethod
    def from_list(
        cls,
        sequences: Iterable[Any],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Packs tensors, arrays or lists ``[L_b, ...]`` that agree in everything but their length.

        Args:
            sequences: one item per sequence; an empty iterable gives B = 0 (then ``dtype`` says
                of what).
            dtype: dtype of the rows; by default that of the items.
            device: device of the result; by default that of the items.

        Raises:
            ValueError: if an item is a scalar or its row shape differs from that of the first
                non-empty one.
        """
        items = [torch.as_tensor(s, dtype=dtype, device=device) for s in sequences]
        for i, item in enumerate(items):
            if item.dim() == 0:
                raise ValueError(
                    f"sequences[{i}] is a scalar; expected a sequence of rows [L, ...]"
                )
        # An empty Python list has neither row shape nor dtype: the first item with rows decides.
        first = next((t for t in items if t.shape[0]), items[0] if items else None)
        if first is None:
            first = torch.empty(0, dtype=dtype or torch.float32, device=device)
        for i, item in enumerate(items):
            if item.shape[0] and item.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"sequences[{i}] has rows of shape {tuple(item.shape[1:])}, expected "
                    f"{tuple(first.shape[1:])} as in the first non-empty sequence"
                )
        full = [t for t in items if t.shape[0]]
        data = torch.cat(full) if full else first
        return cls.from_lengths(data, [t.shape[0] for t in items])

    @classmethod
    def from_lengths(cls, data: Tensor, lengths: Sequence[int] | Tensor) -> PackedBatch:
        """Wraps rows that already stand one sequence after another.

        Args:
            data: ``[N, ...]``.
            lengths: B integers >= 0 that add up to N (a list, or an integer tensor ``[B]``).

        Raises:
            TypeError: if ``lengths`` are not integers.
            ValueError: if a length is negative or they do not add up to N.
        """
        host = _host_lengths(lengths)
        if sum(host) != data.shape[0]:
            raise ValueError(
                f"lengths add up to {sum(host)}, expected data.shape[0] = {data.shape[0]} rows"
            )
        cu_seqlens = torch.zeros(len(host) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(host, dtype=torch.int32), 0, out=cu_seqlens[1:])
        return cls(data, cu_seqlens.to(data.device), max(host, default=0))

    @classmethod
    def from_njt(cls, nested: Any) -> PackedBatch:
        """Takes over the rows of a ``torch.jagged`` nested tensor ``[B, j, ...]`` without a copy.

        Raises:
            TypeError: if ``nested`` is not a nested tensor of jagged layout.
            ValueError: if it has holes (built with ``lengths``): call ``nested.contiguous()``
                first.
        """
        if not getattr(nested, "is_nested", False) or nested.layout != torch.jagged:
            raise TypeError(
                "nested must be a nested tensor of layout torch.jagged, got "
                f"{type(nested).__name__}"
            )
        if nested.lengths() is not None:
            raise ValueError(
                "nested has holes between its sequences; call .contiguous() on it first"
            )
        return cls.from_lengths(nested.values(), nested.offsets().diff())

    # Moves: traceable, no device synchronisation.

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        """N, the number of rows."""
        return self.data.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.data.device

    def lengths(self) -> Tensor:
        """int32 ``[B]``: the length of each sequence."""
        return self.cu_seqlens.diff()

    def with_data(self, data: Tensor) -> PackedBatch:
        """The same geometry around other rows ``[N, ...]``.

        Raises:
            ValueError: if ``data`` has another number of rows.
        """
        if data.shape[0] != self.data.shape[0]:
            raise ValueError(
                f"data has {data.shape[0]} rows, expected {self.data.shape[0]} as in this batch"
            )
        return PackedBatch(data, self.cu_seqlens, self.max_seqlen, self.indices, self.padded_shape)

    def concat(self, other: PackedBatch) -> PackedBatch:
        """Sequence by sequence, the rows of this batch followed by those of ``other``.

        Args:
            other: as many sequences, rows of the same shape and dtype.

        Raises:
            ValueError: if ``other`` has another number of sequences.
        """
        if other.batch_size != self.batch_size:
            raise ValueError(
                f"other has {other.batch_size} sequences, expected {self.batch_size} as here"
            )
        n = self.total + other.total
        own, added = (torch.arange(b.total, device=self.device) for b in (self, other))
        place = torch.cat(
            (
                own + other.cu_seqlens[self.segment_ids()],
                added + self.cu_seqlens[other.segment_ids() + 1],
            )
        )  # [N]: where each row of the two goes
        order = torch.empty_like(place).scatter_(0, place, torch.arange(n, device=self.device))
        rows = ops.select_rows(torch.cat((self.data, other.data)), order)
        bound = self.max_seqlen + other.max_seqlen
        return PackedBatch(rows, self.cu_seqlens + other.cu_seqlens, bound)

    def select(self, rows: Tensor) -> Tensor:
        """``data[rows]`` as a row copy; duplicates add up in the gradient.

        Args:
            rows: int64 ``[M]`` in [0, N).

        Returns:
            ``[M, ...]``: plain rows, for a head or a loss that no longer cares about sequences.
        """
        return ops.select_rows(self.data, rows)

    def segment_ids(self) -> Tensor:
        """int64 ``[N]``: the sequence each row belongs to."""
        ids = self.owners(torch.arange(self.total, dtype=torch.int32, device=self.device))
        # Of an exported grid the rows behind the last sequence count with it.
        return ids.clamp(max=self.batch_size - 1) if torch.compiler.is_exporting() else ids

    def owners(self, rows: Tensor) -> Tensor:
        """int64 ``[M]``: the sequences that ``rows``, integers ``[M]`` in [0, N), belong to."""
        return torch.searchsorted(self.cu_seqlens[1:], rows.int(), right=True)

    def positions(self) -> Tensor:
        """int64 ``[N]``: the position of each row in its sequence, from 0."""
        starts = self.cu_seqlens[:-1].long()
        rows = torch.arange(self.total, device=self.device)
        places = rows - starts[self.segment_ids()]
        return places.clamp(max=self.max_seqlen - 1) if torch.compiler.is_exporting() else places

    def first_rows(self) -> Tensor:
        """int64 ``[B]``: the first row of each sequence ([CLS]); sequences must not be empty."""
        return self.cu_seqlens[:-1].long()

    def last_rows(self) -> Tensor:
        """int64 ``[B]``: the last row of each sequence; sequences must not be empty."""
        return self.cu_seqlens[1:].long() - 1

    def to_padded(self, fill: float | None = None) -> Tensor:
        """``[B, S, ...]``: the grid the batch came from, or S = max_seqlen with rows at the left.

        Args:
            fill: value of the rows that are no part of a sequence; 0 by default.

        Returns:
            ``[B, S, ...]`` in the dtype of ``data``.
        """
        if self.indices is None or self.padded_shape is None:
            shape = (self.batch_size, self.max_seqlen)
            indices = self.segment_ids() * self.max_seqlen + self.positions()
        else:
            shape, indices = self.padded_shape, self.indices
        return ops.pad(self.data, indices, *shape, fill=fill)

    def to(self, *args: Any, **kwargs: Any) -> PackedBatch:
        """``data.to(*args, **kwargs)``; the geometry follows to data's new device."""
        data = self.data.to(*args, **kwargs)
        move = {"device": data.device, "non_blocking": kwargs.get("non_blocking", False)}
        indices = None if self.indices is None else self.indices.to(**move)
        return PackedBatch(
            data, self.cu_seqlens.to(**move), self.max_seqlen, indices, self.padded_shape
        )

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory (called by DataLoader(pin_memory=True))."""
        indices = None if self.indices is None else self.indices.pin_memory()
        return PackedBatch(
            self.data.pin_memory(),
            self.cu_seqlens.pin_memory(),
            self.max_seqlen,
            indices,
            self.padded_shape,
        )

    # Exits: at the border again.

    def groups(self, size: int) -> PackedBatch:
        """The same rows cut into groups of consecutive ones: each sequence into its own.

        What :func:`encfast.ops.seg_pool` reduces to one row per group. Sequence b has
        ceil(L_b / size) of them, as even as possible and longer ones first, as in ARC-Encoder
        (kyutai, 2025). Reads the lengths on the host.

        Args:
            size: rows of a group at most, 1 at least.

        Returns:
            The batch of all groups, whose ``data`` is this one's.

        Raises:
            ValueError: for a size below 1.
        """
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        lengths = self.lengths().tolist()
        return PackedBatch.from_lengths(self.data, [g for n in lengths for g in _even(n, size)])

    def split(self) -> list[Tensor]:
        """One view ``[L_b, ...]`` per sequence (reads the lengths on the host)."""
        return list(self.data.split(self.lengths().tolist()))

    def to_njt(self) -> Any:
        """A ``torch.jagged`` nested tensor ``[B, j, ...]`` over the same rows."""
        return torch.nested.nested_tensor_from_jagged(
            self.data, self.cu_seqlens.long(), max_seqlen=self.max_seqlen
        )

    def __repr__(self) -> str:
        return (
            f"PackedBatch({self.batch_size} sequences, data={tuple(self.data.shape)} "
            f"{self.data.dtype} on {self.device}, max_seqlen={self.max_seqlen})"
        )


def _even(n: int, size: int) -> list[int]:
    """n split into ceil(n / size) parts that differ by 1 at most, the longer ones first."""
    count = -(-n // size)
    return [n // count + (i < n % count) for i in range(count)]


def _host_lengths(lengths: Sequence[int] | Tensor) -> list[int]:
    """``lengths`` as Python ints >= 0, or an error that names the offender."""
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(
                f"lengths must be an integer tensor [B], got {lengths.dtype} {tuple(lengths.shape)}"
            )
        lengths = lengths.tolist()
    host = []
    for b, n in enumerate(lengths):
        try:
            value = n.__index__()
        except AttributeError:
            raise TypeError(f"lengths[{b}] must be an int, got {n!r}") from None
        if value < 0:
            raise ValueError(f"lengths[{b}] must be >= 0, got {value}")
        host.append(value)
    return host


torch.export.register_dataclass(PackedBatch, serialized_type_name="encfast.packed.PackedBatch")
