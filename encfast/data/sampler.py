"""Batches by tokens instead of by sequences."""

from collections.abc import Iterator

import numpy as np

from encfast.data.packing import Lengths, check_lengths, check_positive


class TokenBudgetSampler:
    """Batches of at most `max_tokens` tokens, for `DataLoader(batch_sampler=...)`.

    Packed batches cost what their tokens cost, so equal token counts mean equal steps. Sequences
    are taken in order (shuffled anew each epoch) until the next one does not fit. Every sequence
    comes exactly once per epoch; the order depends on `seed` and the epoch alone.

    Args:
        lengths: `[n]` tokens of each sequence, integers in `0..max_tokens`.
        max_tokens: most tokens in a batch.
        shuffle: whether each epoch has an order of its own.
        seed: what that order is drawn from, with the epoch; >= 0.

    Raises:
        TypeError: if `lengths` or `max_tokens` are not integers.
        ValueError: if `lengths` is not one-dimensional, or a length is out of its range.
    """

    def __init__(
        self, lengths: Lengths, max_tokens: int, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.max_tokens = check_positive("max_tokens", max_tokens)
        self.lengths = check_lengths(lengths, max_tokens, "max_tokens")
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._batches: list[list[int]] | None = None  # of this epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; call it before each epoch, on every rank."""
        self.epoch = epoch
        self._batches = None

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan())

    def __len__(self) -> int:
        return len(self._plan())

    def _plan(self) -> list[list[int]]:
        if self._batches is None:
            order = np.arange(len(self.lengths))
            if self.shuffle:
                order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
            self._batches = self._cut(order.tolist())
        return self._batches

    def _cut(self, order: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for i in order:
            length = int(self.lengths[i])
            if not batches or length > room:
                batches.append([])
                room = self.max_tokens
            batches[-1].append(i)
            room -= length
        return batches
