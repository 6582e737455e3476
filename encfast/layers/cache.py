"""KVCache: keys and values of what has been decoded, ragged like everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from encfast.packed import PackedBatch


class KVCache:
    """Keys and values of one attention layer, ``[Nk, Hk, D]`` packed over B sequences.

    A layer with a left window keeps only the rows that a next token can see. For decoding without
    gradients; lives at the border, not in compiled graphs.

    Args:
        max_rows: most rows to keep per sequence between calls; None keeps all.
    """

    def __init__(self, max_rows: int | None = None) -> None:
        self.max_rows = max_rows
        self.keys: PackedBatch | None = None
        self.values: PackedBatch | None = None
        self.seen: Tensor | None = None  # int64 [B]: tokens decoded so far, dropped ones included

    def positions(self, batch: PackedBatch) -> Tensor:
        """int64 ``[N]``: positions of ``batch``'s rows, from the start of their sequences."""
        positions = batch.positions()
        return positions if self.seen is None else positions + self.seen[batch.segment_ids()]

    def append(self, k: Tensor, v: Tensor, batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
        """Adds the new rows of each sequence behind its old ones.

        Args:
            k, v: ``[N, Hk, D]``: rows of ``batch``.
            batch: geometry of the new rows, the same B at every call.

        Returns:
            All keys and values a query of ``batch`` may need, old and new.

        Raises:
            ValueError: if the batch has another number of sequences than the cache.
        """
        keys, values = batch.with_data(k), batch.with_data(v)
        lengths = batch.lengths().long()
        if self.keys is not None and self.values is not None and self.seen is not None:
            if batch.batch_size != self.keys.batch_size:
                raise ValueError(
                    f"batch has {batch.batch_size} sequences, the cache holds "
                    f"{self.keys.batch_size}; use one cache per set of sequences"
                )
            keys, values = _concat(self.keys, keys), _concat(self.values, values)
            lengths = lengths + self.seen
        self.seen = lengths
        self.keys, self.values = _tail(keys, self.max_rows), _tail(values, self.max_rows)
        return keys, values


def _concat(old: PackedBatch, new: PackedBatch) -> PackedBatch:
    """Sequence by sequence, the old rows followed by the new ones."""
    pairs = zip(old.split(), new.split(), strict=True)
    return PackedBatch.from_list([torch.cat(pair) for pair in pairs])


def _tail(batch: PackedBatch, rows: int | None) -> PackedBatch:
    """The last ``rows`` rows of each sequence."""
    if rows is None or batch.max_seqlen <= rows:
        return batch
    return PackedBatch.from_list([s[max(s.shape[0] - rows, 0) :] for s in batch.split()])
