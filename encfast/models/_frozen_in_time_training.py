"""How Frozen in Time is trained: which frames are seen, how many of them when, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import nearest

TimeGrowth = Literal["zeros", "nearest", "bilinear"]


def sample_frames(
    frames: int,
    length: int,
    *,
    how: Literal["random", "middle"] = "random",
    start: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which frames of a video make up its clip: one of each of equal intervals.

    Args:
        frames: of the clip, at least 1. A shorter video gives all of its frames.
        length: of the video, at least 0.
        how: "random", any frame of an interval, to train; "middle", to test.
        start: offset into each interval in the place of ``how``, cut at its last frame. Embeddings
            of clips of several starts may be averaged to test.
        generator: of the random numbers.

    Returns:
        int64 ``[min(frames, length)]``, rising.

    Raises:
        ValueError: for a number below its least, or another ``how``.
    """
    if frames < 1 or length < 0 or (start is not None and start < 0):
        raise ValueError(
            f"frames is {frames}, length {length} and start {start}, expected at least 1, 0 and 0"
        )
    if how not in ("random", "middle"):
        raise ValueError(f"how is {how!r}, expected 'random' or 'middle'")
    count = min(frames, length)
    edges = torch.arange(count + 1) * length // max(count, 1)
    first, sizes = edges[:-1], edges.diff()
    if start is not None:
        return first + torch.minimum(torch.full_like(sizes, start), sizes - 1)
    if how == "middle":
        return first + (sizes - 1) // 2
    share = torch.rand(count, dtype=torch.float64, generator=generator)
    return first + (share * sizes).long()


def grow_times(table: Tensor, frames: int, how: TimeGrowth = "zeros") -> Tensor:
    """A table of times for clips of another length.

    Args:
        table: ``[F, C]``.
        frames: of the new table. Of a longer one the first rows are kept.
        how: what further frames get: "zeros" behind the rows there are, or all rows stretched,
            "nearest" or "bilinear" (linear in time, corners not aligned).

    Returns:
        ``[frames, C]``, no part of the table.

    Raises:
        ValueError: for ``frames`` below 1, or another ``how``.
    """
    if how not in get_args(TimeGrowth):
        raise ValueError(f"growth {how!r} is unknown; {nearest(how, get_args(TimeGrowth))}")
    if frames < 1:
        raise ValueError(f"frames is {frames}, expected at least 1")
    known, dim = table.shape
    if frames <= known:
        return table[:frames].clone()
    if how == "zeros":
        return torch.cat((table, table.new_zeros(frames - known, dim)))
    stretched = table.float().t()[None]  # [1, C, F]
    mode = "nearest" if how == "nearest" else "linear"
    return F.interpolate(stretched, size=frames, mode=mode)[0].t().to(table.dtype)


@dataclass(frozen=True)
class Curriculum:
    """Stages of training on ever more frames; images are clips of one frame in all of them."""

    frames: tuple[int, ...] = (1, 4)  # of clips, stage by stage
    shares: tuple[float, ...] = (1.0, 0.1)  # steps of each stage per step of the first

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.shares):
            raise ValueError(
                f"frames has {len(self.frames)} stages and shares {len(self.shares)}, expected the "
                "same number, at least 1"
            )
        if min(self.frames) < 1 or min(self.shares) <= 0:
            raise ValueError(
                f"frames is {self.frames} and shares {self.shares}, expected frames >= 1 and "
                "shares > 0"
            )

    def frames_at(self, step: int, first: int) -> int:
        """Frames of a clip at a step, counted from 0; ``first`` is the first stage's steps."""
        end = 0
        for frames, share in zip(self.frames, self.shares, strict=True):
            end += round(share * first)
            if step < end:
                return frames
        return self.frames[-1]

    def cost(self, of_a_clip: Callable[[int], float]) -> float:
        """What this costs beside as many steps on the frames of the last stage.

        Args:
            of_a_clip: cost of a clip by its frames, as :meth:`FrozenInTimeConfig.attention_scores`.

        Returns:
            The ratio of the two costs.
        """
        spent = sum(s * of_a_clip(f) for f, s in zip(self.frames, self.shares, strict=True))
        return spent / (sum(self.shares) * of_a_clip(self.frames[-1]))


@dataclass(frozen=True)
class Recipe:
    """AdamW at a constant rate; batches of each data set in turn, a step each."""

    lr: float = 3e-5

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over all of ``model``, with PyTorch's defaults but the rate, as published."""
        return torch.optim.AdamW(model.parameters(), lr=self.lr)


TRAINING = Recipe()


def max_margin_loss(similarity: Tensor, margin: float, *, kept: Tensor | None = None) -> Tensor:
    """Mean hinge of each pair over the wrong ones of its row and of its column.

    ``mean_{i != j} (relu(m - s_ii + s_ij) + relu(m - s_ii + s_ji)) / 2``, 0 if there is no i != j.

    Args:
        similarity: ``[B, B]``.
        margin: m.
        kept: bool ``[B]``: pairs that count; all by default.
    """
    s, n = similarity.float(), similarity.shape[0]
    right = s.diagonal()[:, None]
    hinges = F.relu(margin - right + s) + F.relu(margin - right + s.t())
    counted = ~torch.eye(n, dtype=torch.bool, device=s.device)
    if kept is not None:
        counted = counted & kept & kept[:, None]
    return (hinges * counted).sum() / (2 * counted.sum()).clamp(min=1)
