"""Small losses on packed rows, shared by the models.

Every loss is a mean over what there is to predict and 0, still attached to the graph, where there
is nothing. Logits are read in fp32 (fp64 stays fp64). Zero-length sequences predict nothing.
All functions trace under ``torch.compile(fullgraph=True)`` except :func:`masked_lm_rows`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import ops
from encfast._precision import wide
from encfast._reconstruction_losses import (
    mean_squared_error,
    normalised_patches,
    patch_moments,
    pixel_loss,
    scaled_cosine_error,
)
from encfast._router_losses import load_balance_loss, router_z_loss
from encfast.packed import PackedBatch

__all__ = [
    "IGNORE",
    "bag_of_words_loss",
    "classification_loss",
    "cross_entropy",
    "dice_loss",
    "load_balance_loss",
    "masked_lm_loss",
    "masked_lm_rows",
    "mean_squared_error",
    "next_token_loss",
    "next_tokens",
    "normalised_patches",
    "patch_moments",
    "pixel_loss",
    "position_loss",
    "router_z_loss",
    "scaled_cosine_error",
    "segment_logsumexp",
    "span_loss",
]

IGNORE = -100  # torch's and transformers' label for "predict nothing here"


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float | None = None
) -> Tensor:
    """Mean cross entropy over the rows whose target is not -100; 0 if there is none.

    Args:
        logits: ``[M, V]``; or ``[B, V, *size]`` of a grid.
        targets: int64 ``[M]`` or ``[B, *size]`` in [0, V), or -100.
        label_smoothing: share of the target, in [0, 1], that is spread evenly over all V; none by
            default.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import cross_entropy
        >>> cross_entropy(torch.zeros(3, 4), torch.tensor([1, -100, 2])).exp().round()
        tensor(4.)
    """
    total = F.cross_entropy(
        wide(logits),
        targets,
        ignore_index=IGNORE,
        reduction="sum",
        # A default of 0.0 would be a symbol to the compiler, which traces a second time for it.
        label_smoothing=0.0 if label_smoothing is None else label_smoothing,
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images and classes of 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)); 0 if there are none.

    p is the softmax over the classes and t one-hot; sums run over an image. Images without a label
    are left out. Source: Milletari et al. 2016, arXiv 1606.04797, section 3.

    Args:
        logits: ``[B, V, *size]``.
        targets: int64 ``[B, *size]`` in [0, V); where -100 stands, nothing counts.

    Returns:
        0-dim, fp32 or wider.

    Raises:
        ValueError: for targets of another shape.

    Examples:
        >>> from encfast.losses import dice_loss
        >>> targets = torch.tensor([[[0, 1], [1, -100]]])
        >>> right = torch.nn.functional.one_hot(targets.clamp(min=0), 2).movedim(-1, 1)
        >>> dice_loss(50.0 * right, targets).abs() < 1e-5
        tensor(True)
    """
    if targets.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected [B, *size] of the logits "
            f"{tuple(logits.shape)}"
        )
    kept = (targets != IGNORE).unsqueeze(1)
    p = (wide(logits).softmax(1) * kept).flatten(2)  # [B, V, n]
    t = F.one_hot(targets.clamp(min=0), logits.shape[1]).movedim(-1, 1) * kept
    t = t.flatten(2).to(p.dtype)
    overlap, area = (p * t).sum(-1), (p.square() + t).sum(-1)  # [B, V]; t is its own square
    counted = kept.flatten(1).any(1, keepdim=True)  # [B, 1]
    terms = (1 - 2 * overlap / (area + 1e-6)) * counted
    return terms.sum() / (counted.sum() * overlap.shape[1]).clamp(min=1)


def masked_lm_rows(labels: Tensor) -> Tensor:
    """int64 ``[M]``: the rows of ``labels`` ``[N]`` other than -100. For the border: M is data.

    Examples:
        >>> from encfast.losses import masked_lm_rows
        >>> masked_lm_rows(torch.tensor([-100, 7, -100, 9]))
        tensor([1, 3])
    """
    return (labels != IGNORE).nonzero().flatten()


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the masked rows alone.

    Args:
        logits: ``[M, V]`` of the masked rows.
        targets: int64 ``[M]``: what stood there.

    Returns:
        0-dim, fp32 or wider; 0 where nothing is masked.

    Examples:
        >>> from encfast.losses import masked_lm_loss
        >>> masked_lm_loss(torch.zeros(2, 8), torch.tensor([3, 5])).exp().round()
        tensor(8.)
    """
    return cross_entropy(logits, targets)


def bag_of_words_loss(pooled: Tensor, words: PackedBatch) -> Tensor:
    """Mean over sequences of ``-sum_v w_v log softmax(pooled)_v``: which words a text consists of.

    w_v is 1 / L for the entries v among a sequence's L words. An entry that occurs again counts
    once, so that w sums to less than 1 then. A sequence without words counts for nothing.

    Source: Xiao et al., RetroMAE v2 (arXiv 2305.02564), weights as its published code has them.

    Args:
        pooled: ``[B, V]``, as :func:`encfast.ops.linear_seg_max` returns it.
        words: ids ``[M]`` in [0, V), B sequences.

    Returns:
        0-dim, fp32 or wider.

    Raises:
        ValueError: if the numbers of sequences differ.

    Examples:
        >>> from encfast.losses import bag_of_words_loss
        >>> words = PackedBatch.from_list([torch.tensor([1, 3])])
        >>> bag_of_words_loss(torch.zeros(1, 4), words).exp().round()
        tensor(4.)
    """
    if words.batch_size != pooled.shape[0]:
        raise ValueError(
            f"words has {words.batch_size} sequences, expected {pooled.shape[0]} like pooled"
        )
    pooled, owners = wide(pooled), words.segment_ids()
    length = words.lengths()
    share = length.to(pooled.dtype).reciprocal()[owners]
    w = torch.zeros_like(pooled).index_put((owners, words.data.long()), share)
    losses = w.sum(1) * pooled.logsumexp(1) - (w * pooled).sum(1)
    return losses.sum() / (length > 0).sum().clamp(min=1)


def next_tokens(tokens: PackedBatch, labels: Tensor | None = None) -> Tensor:
    """int64 ``[N]``: the token after each row, -100 at the last row of a sequence.

    Args:
        tokens: ids ``[N]``.
        labels: ``[N]``, ids or -100, to be predicted instead of the ids themselves.

    Returns:
        int64 ``[N]``.

    Examples:
        >>> from encfast.losses import next_tokens
        >>> next_tokens(PackedBatch.from_list([torch.tensor([5, 6, 7]), torch.tensor([8, 9])]))
        tensor([   6,    7, -100,    9, -100])
    """
    ahead = F.pad(tokens.data if labels is None else labels, (0, 1))[1:].long()
    ends = tokens.cu_seqlens[1:].long()[tokens.segment_ids()]  # [N]
    last = torch.arange(1, tokens.total + 1, device=tokens.device) == ends
    return ahead.masked_fill(last, IGNORE)


def next_token_loss(logits: Tensor, tokens: PackedBatch, labels: Tensor | None = None) -> Tensor:
    """Mean cross entropy of each token given those before it in its own sequence.

    Args:
        logits: ``[N, V]``; the last row of a sequence predicts nothing.
        tokens: ids ``[N]``.
        labels: ``[N]``, ids or -100 (not predicted), in place of the ids.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import next_token_loss
        >>> tokens = PackedBatch.from_list([torch.tensor([1, 2, 3]), torch.tensor([0, 1])])
        >>> next_token_loss(torch.zeros(5, 4), tokens).exp().round()
        tensor(4.)
    """
    return cross_entropy(logits, next_tokens(tokens, labels))


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    kept: Tensor | None = None,
    *,
    label_smoothing: float | None = None,
) -> Tensor:
    """Cross entropy for integer labels, mean squared error for floating ones (regression).

    Args:
        logits: ``[M, K]``; for regression K = 1 or the shape of ``labels``.
        labels: int64 ``[M]`` in [0, K) or -100; or floating ``[M]`` or ``[M, K]``.
        kept: bool ``[M]``: leave out rows where it is False (e.g. of empty sequences).
        label_smoothing: of integer labels, see :func:`cross_entropy`.

    Returns:
        0-dim, fp32 or wider; 0 where no row counts.

    Raises:
        ValueError: if floating labels do not have the shape of the predictions.

    Examples:
        >>> from encfast.losses import classification_loss
        >>> regression = torch.tensor([1.0, 4.0])
        >>> classification_loss(torch.tensor([[1.0], [2.0]]), regression)
        tensor(2.)
    """
    if kept is None:
        kept = torch.ones(labels.shape[:1], dtype=torch.bool, device=labels.device)
    if not labels.is_floating_point():
        labels = labels.masked_fill(~kept, IGNORE)
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)
    predicted = logits.squeeze(-1) if labels.dim() == 1 and logits.shape[-1] == 1 else logits
    if predicted.shape != labels.shape:
        raise ValueError(
            f"regression labels have shape {tuple(labels.shape)}, expected "
            f"{tuple(predicted.shape)} like the predictions"
        )
    predicted = wide(predicted)
    error = (predicted - labels.to(predicted.dtype)).square()
    error = error if error.dim() == 1 else error.flatten(1).mean(1)  # [M]
    return error.masked_fill(~kept, 0).sum() / kept.sum().clamp(min=1)


def segment_logsumexp(scores: Tensor, batch: PackedBatch) -> Tensor:
    """``[B]``: log of the sum of exp over the rows of each sequence, -inf for an empty one.

    Args:
        scores: ``[N]``.
        batch: geometry of the rows.

    Returns:
        ``[B]`` in the dtype of the scores.

    Examples:
        >>> from encfast.losses import segment_logsumexp
        >>> batch = PackedBatch.from_list([torch.zeros(4), torch.zeros(0)])
        >>> segment_logsumexp(batch.data, batch).exp().round()
        tensor([4., 0.])
    """
    segments = batch.segment_ids()
    lowest = torch.full((batch.batch_size,), -torch.inf, dtype=scores.dtype, device=scores.device)
    top = lowest.scatter_reduce(0, segments, scores.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0)
    total = torch.zeros_like(top).index_add(0, segments, (scores - top[segments]).exp())
    empty = total == 0
    return (total.masked_fill(empty, 1).log() + top).masked_fill(empty, -torch.inf)


def position_loss(scores: Tensor, batch: PackedBatch, positions: Tensor) -> Tensor:
    """Mean cross entropy of choosing one row of each sequence, by a softmax over its own rows.

    Args:
        scores: ``[N]``.
        batch: geometry of the rows.
        positions: int64 ``[B]``, counted from the start of the sequence; a sequence whose position
            is not in [0, length) is left out.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import position_loss
        >>> batch = PackedBatch.from_list([torch.zeros(4), torch.zeros(4)])
        >>> position_loss(batch.data, batch, torch.tensor([0, 3])).exp().round()
        tensor(4.)
    """
    scores = wide(scores)
    kept = (positions >= 0) & (positions < batch.lengths())
    rows = torch.where(kept, batch.cu_seqlens[:-1] + positions, -1)
    chosen = ops.gather_rows(scores, rows)  # [B], 0 where left out
    log_total = segment_logsumexp(scores, batch).masked_fill(~kept, 0)
    return (log_total - chosen).sum() / kept.sum().clamp(min=1)


def span_loss(
    start: Tensor, end: Tensor, batch: PackedBatch, starts: Tensor, ends: Tensor
) -> Tensor:
    """Mean of the start's and the end's cross entropy (Devlin et al. 2019, section 4.2).

    Args:
        start, end: scores ``[N]``.
        batch: geometry of the rows.
        starts, ends: int64 ``[B]``, the answer's first and last position in its sequence; positions
            outside of the sequence (an answer that this window does not hold) are left out.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import span_loss
        >>> batch = PackedBatch.from_list([torch.zeros(4)])
        >>> starts, ends = torch.tensor([1]), torch.tensor([2])
        >>> span_loss(batch.data, batch.data, batch, starts, ends).exp().round()
        tensor(4.)
    """
    return (position_loss(start, batch, starts) + position_loss(end, batch, ends)) / 2
