"""TriBERT beside its encoder: distances of prototypes, boundaries, their score, and triplets.

Essays are a :class:`PackedBatch` whose rows are sentences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encfast._precision import wide
from encfast.packed import PackedBatch

_DIGITS = 4  # to which the published code rounds distances; equal ones go by place


def boundary_distances(essays: PackedBatch, prototype: int) -> Tensor:
    """``[S]``: how far the means of ``prototype`` sentences before and behind each gap are apart.

    Windows end where the essay does, and the means are not normalised again. The gap of row i is
    the one behind it; the last sentence of an essay has none, and -inf.

    Args:
        essays: embeddings ``[S, C]`` of sentences.
        prototype: p >= 1.

    Returns:
        ``[S]``, -inf behind the last sentence of an essay.

    Raises:
        ValueError: for another ``prototype``.
    """
    if prototype < 1:
        raise ValueError(f"prototype must be >= 1, got {prototype}")
    x = wide(essays.data)
    rows = torch.arange(essays.total, device=x.device)
    ends = essays.cu_seqlens.long()[essays.segment_ids() + 1]
    before = _mean_from(x, rows, -1, essays.positions() + 1, prototype)
    behind = _mean_from(x, rows + 1, 1, ends - rows - 1, prototype)
    distance = torch.linalg.vector_norm(before - behind, dim=1)
    return distance.masked_fill(rows + 1 == ends, -torch.inf)


def _mean_from(x: Tensor, first: Tensor, step: int, available: Tensor, size: int) -> Tensor:
    """Mean of the rows first, first + step, ...: ``size`` of them or what is available."""
    # Sums of differences of running sums would cost digits; windows are short.
    total = torch.zeros_like(x)
    for k in range(size):
        there = k < available
        total = total + torch.where(there[:, None], x[(first + step * k).where(there, 0)], 0)
    return total / available.clamp(1, size)[:, None]


def largest_gaps(distances: Tensor, essays: PackedBatch, k: int) -> Tensor:
    """int64 ``[B, k]``: the gaps with the largest distances, farthest first.

    A gap is the number, from 1, of the last sentence before it. Distances are equal where their
    first four decimals are, and the earlier gap comes first. An essay with fewer gaps than k names
    all it has, and 0 in the places left.

    Args:
        distances: of :func:`boundary_distances`.
        essays: geometry of the sentences.
        k: >= 1.

    Returns:
        int64 ``[B, k]``.

    Raises:
        ValueError: for another k.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    owner, place = essays.segment_ids(), essays.positions()
    scale = 10.0**_DIGITS
    rounded = (distances.double() * scale).round() / scale
    order = rounded.sort(descending=True, stable=True).indices
    order = order[owner[order].sort(stable=True).indices]
    # By essay again, so that the rank within one is the place of the row.
    chosen = (place < k) & (rounded[order] > -torch.inf)
    flat = torch.where(chosen, owner * k + place, essays.batch_size * k)
    gaps = torch.zeros(essays.batch_size * k + 1, dtype=torch.int64, device=flat.device)
    gaps = gaps.scatter(0, flat.long(), torch.where(chosen, place[order] + 1, 0).long())
    return gaps[:-1].view(essays.batch_size, k)


def boundary_f1(predicted: Tensor, gold: Tensor) -> float:
    """F1 at K, averaged over essays; precision and recall have 1e-4 added, as published.

    Args:
        predicted: int64 ``[B, K]``, gaps from 1; 0 is none.
        gold: int64 ``[B, G]``, at least one gap a row, padded with 0.

    Returns:
        In 0..1, to within what is added.

    Raises:
        ValueError: for different numbers of essays, none of them, or one without a boundary.
    """
    if len(predicted) != len(gold) or not len(gold):
        raise ValueError(f"predicted has {len(predicted)} essays, gold {len(gold)}")
    if not (gold > 0).any(1).all():
        raise ValueError(f"essay {int((gold > 0).any(1).int().argmin())} has no gold boundary")
    hit = (predicted[:, :, None] == gold[:, None]) & (gold > 0)[:, None]
    hits = hit.any(2).sum(1).double()
    precision = 1e-4 + hits / predicted.shape[1]
    recall = 1e-4 + hits / (gold > 0).sum(1)
    return (2 * precision * recall / (precision + recall)).mean().item()


def sample_triplets(
    authors: PackedBatch,
    prompts: Tensor,
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """int64 ``[count, 3]``: rows of anchor, positive and negative sentences.

    A random prompt, one of its essays, and one of the two authors, who has two different sentences
    in it; the negative is a sentence of the other author in the same essay. What has too few
    sentences is drawn again.

    Args:
        authors: ``[S]`` on the CPU, 0 or 1 for each sentence.
        prompts: int64 ``[B]``, the prompt of each essay.
        generator: of all random numbers.
        count: number of triplets.

    Returns:
        int64 ``[count, 3]``.

    Raises:
        ValueError: if no essay has three such sentences.
    """
    b = authors.batch_size
    group = authors.segment_ids() * 2 + authors.data.long()  # essay and author
    order = group.sort(stable=True).indices
    size = torch.zeros(2 * b, dtype=torch.int64).index_add(0, group, torch.ones_like(group))
    start = size.cumsum(0) - size
    counts = size.view(b, 2)
    fits = (counts >= 2) & (counts.flip(1) >= 1)  # [B, author of the anchor]
    if not fits.any():
        raise ValueError("no essay has two sentences of one author and one of the other")
    essay, author = _draw_essays(prompts, fits, count, generator)
    own, other = 2 * essay + author, 2 * essay + 1 - author
    first, second, third = torch.rand(3, count, dtype=torch.float64, generator=generator)
    anchor = (first * size[own]).long()
    positive = (second * (size[own] - 1)).long()
    positive = positive + (positive >= anchor).long()
    negative = (third * size[other]).long()
    places = (start[own] + anchor, start[own] + positive, start[other] + negative)
    return order[torch.stack(places, 1)]


def _draw_essays(
    prompts: Tensor, fits: Tensor, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``count`` essays and authors that fit, each of a prompt drawn before."""
    order = prompts.sort(stable=True).indices
    _, sizes = prompts[order].unique_consecutive(return_counts=True)
    starts = sizes.cumsum(0) - sizes
    kept: list[Tensor] = []
    while sum(len(x) for x in kept) < count:
        u, v, w = torch.rand(3, count, dtype=torch.float64, generator=generator)
        prompt = (u * len(sizes)).long()
        essay = order[starts[prompt] + (v * sizes[prompt]).long()]
        drawn = torch.stack([essay, (w < 0.5).long()], 1)
        kept.append(drawn[fits[drawn[:, 0], drawn[:, 1]]])
    essay, author = torch.cat(kept)[:count].unbind(1)
    return essay, author
