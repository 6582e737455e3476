"""Batches by tokens instead of by sequences, for one process or many, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from encfast.data.packing import Lengths, bucket_by_length, check_lengths, check_positive


class _BatchSampler:
    """Deals the batches that `_cut` makes of an epoch's order to the processes.

    Every process gets as many: where the last round has fewer batches than there are processes, it
    is filled with batches from the epoch's start, as torch's `DistributedSampler` does.
    """

    def __init__(
        self,
        lengths: Lengths,
        max_tokens: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.max_tokens = check_positive("max_tokens", max_tokens)
        self.lengths = check_lengths(lengths, max_tokens, "max_tokens")
        self.world_size = check_positive("world_size", world_size)
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise TypeError(f"rank={rank!r} is {type(rank).__name__}, expected an integer")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank}: expected between 0 and world_size - 1 = {world_size - 1}"
            )
        self.rank = int(rank)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._given = 0  # batches of this epoch that were handed out
        self._start = 0  # of the next iteration
        self._batches: list[list[int]] | None = None  # of this epoch and process

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; call it before each epoch, on every process.

        The epoch in which a loaded state stands goes on where it stood.
        """
        if epoch != self.epoch:
            self.epoch, self._given, self._start, self._batches = epoch, 0, 0, None

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: the seed, the epoch, the batches handed out of it.

        A `DataLoader` with workers takes batches ahead of the training loop: set ``given`` to the
        number of steps done in the epoch before you save it.
        """
        return {"seed": self.seed, "epoch": self.epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on where `state` was taken, on any process of as many.

        Raises:
            KeyError: if `state` lacks an entry.
            ValueError: if it counts more batches than the epoch has.
        """
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._batches = None
        if not 0 <= state["given"] <= len(self):
            raise ValueError(
                f"given={state['given']} in the state, expected at most {len(self)}, those "
                "of an epoch; was it taken with other lengths, max_tokens or world_size?"
            )
        self._given = self._start = state["given"]

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._plan()
        self._given, self._start = self._start, 0
        while self._given < len(batches):
            self._given += 1
            yield batches[self._given - 1]

    def __len__(self) -> int:
        return len(self._plan())

    def _plan(self) -> list[list[int]]:
        if self._batches is None:
            batches = self._cut(np.random.default_rng((self.seed, self.epoch)))
            short = -len(batches) % self.world_size
            batches += (batches * self.world_size)[:short]
            self._batches = batches[self.rank :: self.world_size]
        return self._batches

    def _order(self, random: np.random.Generator) -> Any:
        order = np.arange(len(self.lengths))
        return random.permutation(order) if self.shuffle else order

    def _cut(self, random: np.random.Generator) -> list[list[int]]:
        raise NotImplementedError


class TokenBudgetSampler(_BatchSampler):
    """Batches of at most `max_tokens` tokens, for `DataLoader(batch_sampler=...)`.

    Packed batches cost what their tokens cost, so equal token counts mean equal steps. Sequences
    are taken in order (shuffled anew each epoch) until the next one does not fit. Every sequence
    comes exactly once per epoch (on several processes a few may come twice, so that all do as many
    steps); the order depends on `seed` and the epoch alone.

    Args:
        lengths: `[n]` tokens of each sequence, integers in `0..max_tokens`.
        max_tokens: most tokens in a batch.
        shuffle: whether each epoch has an order of its own.
        seed: what that order is drawn from, with the epoch; >= 0.
        rank: of this process, in `0..world_size - 1`. Leave it out where the trainer deals batches
            to processes itself, as Accelerate and transformers' Trainer do.
        world_size: number of processes.

    Raises:
        TypeError: if `lengths`, `max_tokens`, `rank` or `world_size` are not integers.
        ValueError: if `lengths` is not one-dimensional, or a value is out of its range.

    Examples:
        >>> from encfast.data import TokenBudgetSampler
        >>> sampler = TokenBudgetSampler([5, 20, 6, 19, 4], max_tokens=30, shuffle=False)
        >>> list(sampler)
        [[0, 1], [2, 3, 4]]
        >>> batches = iter(sampler)
        >>> next(batches)
        [0, 1]
        >>> sampler.state_dict()
        {'seed': 0, 'epoch': 0, 'given': 1}
    """

    def __init__(
        self,
        lengths: Lengths,
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(lengths, max_tokens, shuffle, seed, rank, world_size)

    def _cut(self, random: np.random.Generator) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for i in self._order(random).tolist():
            length = int(self.lengths[i])
            if not batches or length > room:
                batches.append([])
                room = self.max_tokens
            batches[-1].append(i)
            room -= length
        return batches


class LengthBucketSampler(_BatchSampler):
    """Batches of similar lengths, for trainers that pad them.

    The batches of :func:`encfast.data.bucket_by_length`, in an order of their own each epoch;
    sequences of one length are shuffled among themselves.

    Args:
        lengths: `[n]` tokens of each sequence, integers in `0..max_tokens`.
        max_tokens: cells of a batch's padded grid.
        max_padding: share of the grid that may be padding, `0..1`.
        max_sequences: sequences in a batch; unlimited by default.
        shuffle: whether each epoch has an order of its own; False: shortest first.
        seed: what that order is drawn from, with the epoch; >= 0.
        rank: see :class:`TokenBudgetSampler`.
        world_size: number of processes.

    Raises:
        TypeError, ValueError: as :class:`TokenBudgetSampler` and `bucket_by_length` do.

    Examples:
        >>> from encfast.data import LengthBucketSampler
        >>> list(LengthBucketSampler([5, 20, 6, 19, 4], max_tokens=40, shuffle=False))
        [[4, 0, 2], [3, 1]]
    """

    def __init__(
        self,
        lengths: Lengths,
        max_tokens: int,
        *,
        max_padding: float = 1.0,
        max_sequences: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.max_padding, self.max_sequences = max_padding, max_sequences
        super().__init__(lengths, max_tokens, shuffle, seed, rank, world_size)
        self._plan()  # says now what is wrong with its arguments

    def _cut(self, random: np.random.Generator) -> list[list[int]]:
        order = self._order(random)
        batches = bucket_by_length(
            self.lengths[order],
            self.max_tokens,
            max_padding=self.max_padding,
            max_sequences=self.max_sequences,
        )
        if self.shuffle:
            batches = [batches[i] for i in random.permutation(len(batches))]
        return [order[batch].tolist() for batch in batches]
