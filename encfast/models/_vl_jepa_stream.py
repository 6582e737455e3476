"""When to decode: a stream's embeddings cut into segments, offline by clustering or as it runs."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast.layers import pool
from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class Narration:
    """What was decoded of a stream of S embeddings."""

    labels: Tensor  # int64 [S], the segment of each, 0..K-1 in order
    texts: list[Tensor]  # K texts of ids: as many as there were decodings


def windows(frames: Tensor, size: int, stride: int) -> PackedBatch:
    """Overlapping clips of a stream.

    Args:
        frames: ``[T, ...]``.
        size: frames of a clip.
        stride: frames between the starts of two.

    Returns:
        S = 1 + (T - size) // stride clips, frames ``[S * size, ...]``; none if T < size.

    Raises:
        ValueError: for a size or stride below 1.
    """
    if size < 1 or stride < 1:
        raise ValueError(f"size and stride must be >= 1, got {size} and {stride}")
    count = max(0, 1 + (frames.shape[0] - size) // stride)
    starts = torch.arange(count, device=frames.device) * stride
    rows = starts[:, None] + torch.arange(size, device=frames.device)
    return PackedBatch.from_lengths(frames[rows.flatten()], [size] * count)


def smooth(embeddings: Tensor, width: int) -> Tensor:
    """Means of ``width`` embeddings around each, of fewer at both ends; ``[S, E]``.

    Raises:
        ValueError: for a width that is not odd and positive.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width must be odd and >= 1, got {width}")
    if width == 1 or not embeddings.shape[0]:
        return embeddings
    rows = embeddings.t()[None]  # [1, E, S]
    return F.avg_pool1d(rows, width, 1, width // 2, count_include_pad=False)[0].t()


def ward_segments(embeddings: Tensor, count: int) -> Tensor:
    """Agglomerative clustering after Ward whose clusters may only join their neighbours in time.

    Joins the two touching clusters whose union adds least to the sum of squared distances to the
    means, n m / (n + m) ||mean_a - mean_b||^2, until ``count`` are left. That is the update of
    Lance and Williams for Ward in its form by means: on a chain distances of clusters that do not
    touch are never needed. O(S log S) steps, O(S) memory besides the sums; float64 on the CPU.

    Args:
        embeddings: ``[S, E]``.
        count: clusters, 1..S.

    Returns:
        int64 ``[S]``: cluster of each, 0..count-1 in order of time.

    Raises:
        ValueError: for another count.
    """
    total = embeddings.shape[0]
    if not 1 <= count <= total:
        raise ValueError(f"count must be in 1..{total}, one embedding a cluster at most: {count}")
    chain = _Chain(embeddings.detach().double().cpu().numpy())
    for _ in range(total - count):
        chain.join_nearest()
    starts = torch.tensor(chain.starts())
    labels = torch.zeros(total, dtype=torch.int64)
    labels[starts[1:]] = 1
    return labels.cumsum(0).to(embeddings.device)


class _Chain:
    """Clusters of neighbours, each named by its first point, and a heap of what joining costs.

    An entry of the heap is (cost, a, b, end of b). It is stale unless a still begins a cluster that
    ends where b begins, and b one that ends where it did.
    """

    def __init__(self, points: Any) -> None:
        total = len(points)
        self.sums = points.copy()  # [S, E]
        self.end = list(range(1, total + 1))  # 0: joined to the cluster before it
        self.start_of_end = list(range(-1, total))  # first point of the cluster that ends there
        self.heap = [self._entry(a, a + 1) for a in range(total - 1)]
        heapq.heapify(self.heap)

    def _entry(self, a: int, b: int) -> tuple[float, int, int, int]:
        n, m = b - a, self.end[b] - b
        gap = self.sums[a] / n - self.sums[b] / m
        return float(gap @ gap) * n * m / (n + m), a, b, self.end[b]

    def join_nearest(self) -> None:
        while True:
            _, a, b, end = heapq.heappop(self.heap)
            if self.end[a] == b and self.end[b] == end:
                break
        self.sums[a] += self.sums[b]
        self.end[a], self.end[b] = end, 0
        self.start_of_end[end] = a
        if a > 0:
            heapq.heappush(self.heap, self._entry(self.start_of_end[a], a))
        if end < len(self.end):
            heapq.heappush(self.heap, self._entry(a, end))

    def starts(self) -> list[int]:
        return [a for a, end in enumerate(self.end) if end]


def pooled_segments(embeddings: Tensor, labels: Tensor) -> Tensor:
    """``[K, E]``, unit length: the mean of the ``embeddings`` ``[S, E]`` of each segment.

    ``labels``, int64 ``[S]``, are those of :func:`ward_segments`.
    """
    lengths = torch.bincount(labels)
    return pool(PackedBatch.from_lengths(embeddings, lengths), "mean", normalize=True)


class OnlineSegmenter:
    """Says when to decode as embeddings come in: whenever a new segment has settled.

    Keeps the last ``width`` embeddings. While their variance, the mean squared distance to their
    mean, is above ``threshold`` the stream is changing; once it falls to it again, their mean
    stands for a new segment. A stream that changes too slowly for that is told by its distance
    from the segment that was decoded last: a squared distance above ``4 * threshold``, which is
    the variance of a window that is half the one and half the other.

    Args:
        width: embeddings in the window, 2 at least.
        threshold: of the variance, positive; embeddings have unit length, so 1 at most.

    Raises:
        ValueError: for another width or threshold.
    """

    def __init__(self, width: int, threshold: float) -> None:
        if width < 2 or not threshold > 0:
            raise ValueError(
                f"width must be >= 2 and threshold positive, got {width} and {threshold}"
            )
        self.width, self.threshold = width, threshold
        self._window: deque[Tensor] = deque(maxlen=width)
        self._decoded: Tensor | None = None

    def push(self, embedding: Tensor) -> Tensor | None:
        """Takes the next ``embedding`` ``[E]``; returns what to decode now, ``[E]``, or None.

        What it returns has length 1.
        """
        self._window.append(embedding)
        if len(self._window) < self.width:
            return None
        recent = torch.stack(tuple(self._window))  # [width, E]
        mean = recent.mean(0)
        if (recent - mean).square().sum(1).mean() > self.threshold:
            return None
        last = self._decoded
        if last is not None and (mean - last).square().sum() <= 4 * self.threshold:
            return None
        self._decoded = mean
        return F.normalize(mean, dim=0)
