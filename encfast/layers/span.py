"""Answers read off span scores: best span per sequence, best over windows, and the null answer.

Decoding rules of Devlin et al. 2019, sections 4.2 and 4.3 (SQuAD 1.1 and 2.0). For the border:
nothing here is differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import ops
from encfast.packed import PackedBatch


class Spans(NamedTuple):
    """One answer per sequence (or per example)."""

    start: Tensor  # int64 [B]: first position, -1 if there is no span
    end: Tensor  # int64 [B]: last position, inclusive, -1 if there is no span
    score: Tensor  # [B]: start score + end score, -inf if there is no span


def best_spans(
    start: Tensor,
    end: Tensor,
    batch: PackedBatch,
    *,
    max_length: int = 30,
    allowed: Tensor | None = None,
) -> Spans:
    """The span i <= j < i + max_length of each sequence with the largest start[i] + end[j].

    Of equal spans the one that starts first wins, then the shortest. Memory: ``[N, max_length]``.

    Args:
        start, end: scores ``[N]``, without NaN.
        batch: geometry of the rows.
        max_length: most tokens of an answer.
        allowed: bool ``[N]``: rows an answer may begin and end at (the passage); all if None.

    Returns:
        Positions within each sequence.

    Raises:
        ValueError: if ``max_length`` is less than 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be >= 1, got {max_length}")
    if allowed is not None:
        start = start.masked_fill(~allowed, -torch.inf)
        end = end.masked_fill(~allowed, -torch.inf)
    total, segments = batch.total, batch.segment_ids()
    rows = torch.arange(total, device=start.device)
    # ends[i, d] = end[i + d], -inf behind the end of i's sequence.
    ends = F.pad(end, (0, max_length), value=-torch.inf).unfold(0, max_length, 1)[:total]
    left = batch.cu_seqlens[1:].long()[segments] - rows  # [N] rows from i to the end, i included
    offsets = torch.arange(max_length, device=start.device)
    ends = ends.masked_fill(offsets >= left[:, None], -torch.inf)
    best, offset = (start[:, None] + ends).max(dim=1)
    top = start.new_full((batch.batch_size,), -torch.inf).scatter_reduce(0, segments, best, "amax")
    wins = (best == top[segments]) & (best > -torch.inf)
    first = torch.full_like(batch.cu_seqlens[1:], total, dtype=torch.int64)
    first = first.scatter_reduce(0, segments, torch.where(wins, rows, total), "amin")
    none = first == total
    at = torch.where(none, -1, first)
    starts = at - batch.cu_seqlens[:-1]
    return Spans(
        starts.masked_fill(none, -1),
        (starts + ops.gather_rows(offset, at)).masked_fill(none, -1),
        top,
    )


def null_scores(start: Tensor, end: Tensor, batch: PackedBatch) -> Tensor:
    """``[B]``: start[0] + end[0] of each sequence, the score of "no answer" at [CLS].

    Args:
        start, end: scores ``[N]``.
        batch: geometry of the rows.

    Returns:
        ``[B]``; an empty sequence scores -inf.
    """
    filled = batch.lengths() > 0
    at = torch.where(filled, batch.cu_seqlens[:-1], -1).long()
    return ops.gather_rows(start + end, at).masked_fill(~filled, -torch.inf)


def merge_windows(spans: Spans, examples: Tensor, offsets: Tensor, count: int) -> Spans:
    """The best span of each example over its windows, in the example's own positions.

    Of equal scores the first window's wins.

    Args:
        spans: one per window.
        examples: int64 ``[W]`` in [0, count): whose window it is.
        offsets: int64 ``[W]``: added to a window's positions to give the example's.
        count: number of examples.

    Returns:
        One per example.
    """
    windows = torch.arange(examples.shape[0], device=examples.device)
    top = spans.score.new_full((count,), -torch.inf)
    top = top.scatter_reduce(0, examples, spans.score, "amax")
    wins = (spans.score == top[examples]) & (spans.start >= 0)
    none = examples.shape[0]
    chosen = torch.full((count,), none, dtype=torch.int64, device=examples.device)
    chosen = chosen.scatter_reduce(0, examples, torch.where(wins, windows, none), "amin")
    at = torch.where(chosen == none, -1, chosen)
    placed = (ops.gather_rows(p + offsets, at) for p in (spans.start, spans.end))
    start, end = (p.masked_fill(at < 0, -1) for p in placed)
    return Spans(start, end, top)


def merge_null(scores: Tensor, examples: Tensor, count: int) -> Tensor:
    """``[count]``: an example's null score, the smallest of its windows; inf without a window.

    Args:
        scores: ``[W]``, one per window.
        examples: int64 ``[W]`` in [0, count): whose window it is.
        count: number of examples.

    Returns:
        ``[count]``.
    """
    return scores.new_full((count,), torch.inf).scatter_reduce(0, examples, scores, "amin")


def best_null_threshold(margins: Tensor, answered: Tensor, null: Tensor) -> tuple[float, float]:
    """The tau that maximises the mean metric when a span is answered iff its margin > tau.

    Args:
        margins: ``[Q]``: best span score - null score, finite.
        answered: ``[Q]``: the question's metric (F1 or exact match) if the span is answered.
        null: ``[Q]``: its metric if "no answer" is.

    Returns:
        tau and the mean metric at tau. Of equal taus the largest: -inf answers everything, the
        largest margin nothing.

    Raises:
        ValueError: if there is no question.
    """
    if margins.numel() == 0:
        raise ValueError("margins is empty; expected one per question")
    order = margins.argsort(descending=True)
    margins, gains = margins[order], (answered - null)[order].double()
    # Answering the k largest margins: tau is the margin of the next one, or -inf for all.
    means = (null.double().sum() + F.pad(gains.cumsum(0), (1, 0))) / margins.numel()
    taus = F.pad(margins.double(), (0, 1), value=-torch.inf)
    # Equal margins are answered together or not at all.
    reachable = F.pad(taus[1:] < taus[:-1], (1, 0), value=True)
    best = int(means.masked_fill(~reachable, -torch.inf).argmax())
    return taus[best].item(), means[best].item()
