"""The clip tower of Frozen in Time: divided space-time attention around one class row per clip.

A clip of F frames with P patches each is one sequence of 1 + F P rows: class row, the patches of
frame 0, of frame 1, ... Either attention cuts the patches into groups: in time F rows of one place,
P rows apart; in space the P rows of one frame. A patch sees its group and the class row, whose key
and value all groups share; the class row sees every row of its clip.

Both attentions are one call of :func:`encfast.ops.varlen_attn`, in which the class row's query and
all keys of its clip are one more sequence beside the groups. Rows are moved for it as seldom as
possible: frames stand one after another, so that only the attention in time permutes its queries
and what they have read; keys and values go to their groups, the shared class row in front, in one
gather each, read in place from the fused projection. The gradient of a shared row is the sum over
its groups in their order (:func:`encfast.ops.scatter_rows`), hence repeatable. A second call for
the class rows would spare the copy of their keys, but its gradients of them, added to the groups',
move more bytes than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encfast import ops
from encfast.config import BlockConfig
from encfast.layers import MLP, LearnedPositions, Linear, Norm, PatchEmbed
from encfast.packed import PackedBatch
from encfast.patch_mask import RowPlan

_TOKEN_STD = 0.02  # of the class token


@dataclass(frozen=True, eq=False)
class Groups:
    """The sequences of one attention: per clip its class row's, then its groups.

    The class row is a sequence of one query that has all rows of the clip as keys, a group one of
    its members as queries, with the class row in front of them as keys.
    """

    keys: Tensor  # int64 [M]: rows of keys and values
    cu_queries: Tensor  # int32 [G + 1]
    cu_keys: Tensor  # int32 [G + 1]
    max_queries: int
    max_keys: int
    order: Tensor | None = None  # int64 [N]: rows of the queries; None: as they stand
    back: Tensor | None = None  # int64 [N]: places of the rows in that order


@dataclass(frozen=True, eq=False)
class SpaceTime:
    """Where the rows of B clips with N rows in all stand, and how they attend."""

    clips: Tensor  # int32 [B + 1]: rows of each clip
    max_rows: int
    build: RowPlan  # from patch rows to the rows of the clips
    time: Groups
    space: Groups

    @classmethod
    def of(cls, frames: PackedBatch, patches: int) -> SpaceTime:
        """The geometry of clips of ``frames`` ``[T, ...]`` that have P ``patches`` each."""
        batch, total, longest = frames.batch_size, frames.total, frames.max_seqlen
        steps = torch.arange(batch + 1, dtype=torch.int32, device=frames.device)
        ends = frames.cu_seqlens * patches + steps
        max_rows = 1 + longest * patches
        rows = torch.arange(batch + total * patches, device=frames.device)
        owner = _owners(rows, ends)
        place = rows - ends[owner]
        source = torch.where(place == 0, -1, rows - owner - 1)
        build = RowPlan(source, place, ends, max_rows)
        lengths = frames.lengths().long()  # [B]
        every = torch.full_like(lengths, patches)
        # In time the members of a group stand P rows apart, the first ones of groups side by side.
        time = _groups(ends, every, lengths, batch * patches, total * patches, 1, patches)
        space = _groups(ends, lengths, every, total, total * patches, patches, 1)
        first = place.clamp(max=1) + ends[owner]  # the class row itself, or the row behind it
        moved, size = (place - 1).clamp(min=0), lengths[owner].clamp(min=1)
        order = first + (moved % size) * patches + moved // size
        back = first + (moved % patches) * size + moved // patches
        max_keys = max(max_rows, 1 + patches)
        return cls(
            ends,
            max_rows,
            build,
            Groups(*time, max(longest, 1), max_keys, order, back),
            Groups(*space, patches, max_keys),
        )


def _owners(rows: Tensor, ends: Tensor) -> Tensor:
    return torch.searchsorted(ends[1:], rows.to(ends.dtype), right=True)


def _groups(
    ends: Tensor, counts: Tensor, sizes: Tensor, groups: int, members: int, stride: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and both cu_seqlens of :class:`Groups`.

    Args:
        ends: int32 ``[B + 1]``, rows of each clip.
        counts, sizes: int64 ``[B]``: clip b has counts[b] groups of sizes[b] rows.
        groups, members: in all clips.
        stride, step: member m of group g is row 1 + g * stride + m * step of its clip.
    """
    batch, rows = counts.shape[0], ends.diff().long()  # [B]
    starts = F.pad((counts + 1).cumsum(0), (1, 0))  # of the clips' sequences
    sequence = torch.arange(groups + batch, device=ends.device)
    owner = _owners(sequence, starts)
    whole = sequence == starts[owner]  # the class row's
    queries = torch.where(whole, 1, sizes[owner])
    keys = torch.where(whole, rows[owner], sizes[owner] + 1)
    cu_queries, cu_keys = (F.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys))

    starts = F.pad((rows + counts * (sizes + 1)).cumsum(0), (1, 0))  # of the clips' keys
    key = torch.arange(batch + 2 * members + groups, device=ends.device)
    owner = _owners(key, starts)
    place = key - starts[owner]
    behind, size = (place - rows[owner]).clamp(min=0), sizes[owner] + 1
    group, member = behind // size, behind % size
    shared = torch.where(member == 0, 0, 1 + group * stride + (member - 1) * step)
    row = torch.where(place < rows[owner], place, shared)
    return row + ends[owner], cu_queries, cu_keys


class GroupAttention(nn.Module):
    """Attention of patches within groups and the class row, and of the class row to everything.

    Args:
        config: uses dim, num_heads, head_dim and the biases.
    """

    def __init__(self, config: BlockConfig, **factory: Any) -> None:
        super().__init__()
        self.head_dim = config.head_size
        inner = config.num_heads * config.head_size
        self.qkv = Linear(config.dim, 3 * inner, bias=bool(config.qkv_bias), **factory)
        self.out = Linear(inner, config.dim, bias=config.out_bias, **factory)

    def zero(self) -> None:
        """Makes it yield 0, as published: no queries, keys and values, ones behind them."""
        for zeros in (self.qkv.weight, self.qkv.bias, self.out.bias):
            if zeros is not None:
                nn.init.zeros_(zeros)
        nn.init.ones_(self.out.weight)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Rows ``[N, C]`` of the clips -> ``[N, C]``."""
        q, k, v = self.qkv(x).chunk(3, dim=1)  # [N, H * D] each
        if groups.order is not None:
            q = ops.gather_rows(q, groups.order)
        k, v = (ops.gather_rows(each, groups.keys) for each in (k, v))  # [M, H * D]
        out = ops.varlen_attn(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            groups.cu_queries,
            cu_seqlens_k=groups.cu_keys,
            max_seqlen_q=groups.max_queries,
            max_seqlen_k=groups.max_keys,
        ).flatten(1)  # [N, H * D]
        return self.out(out if groups.back is None else ops.gather_rows(out, groups.back))

    def class_rows(self, x: Tensor, ends: Tensor, max_rows: int) -> Tensor:
        """Rows ``[N, C]`` of B clips that end at ``ends`` -> ``[B, C]``, their class rows alone."""
        q, k, v = self.qkv(x).chunk(3, dim=1)  # [N, H * D] each
        batch = ends.shape[0] - 1
        out = ops.varlen_attn(
            self._heads(ops.gather_rows(q, ends[:-1].long())),
            self._heads(k),
            self._heads(v),
            torch.arange(batch + 1, dtype=torch.int32, device=x.device),
            cu_seqlens_k=ends,
            max_seqlen_q=1,
            max_seqlen_k=max_rows,
        )  # [B, H, D]
        return self.out(out.flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class SpaceTimeBlock(nn.Module):
    """Attention in time, in space, MLP; the residual of both attentions is the block's input.

    ``a = x + time(norm3(x)); y = x + space(norm1(a)); out = y + mlp(norm2(y))``. TimeSformer's
    block has ``a`` in the place of the second ``x``.
    """

    def __init__(self, config: BlockConfig, **factory: Any) -> None:
        super().__init__()
        self.time, self.space = (GroupAttention(config, **factory) for _ in range(2))
        self.mlp = MLP(config, **factory)
        self.norm1, self.norm2, self.norm3 = (
            Norm(config.dim, eps=config.norm_eps, **factory) for _ in range(3)
        )

    def forward(self, x: Tensor, geometry: SpaceTime, class_only: bool = False) -> Tensor:
        """Rows ``[N, C]`` -> ``[N, C]``, or with ``class_only`` the class rows ``[B, C]``.

        The attention in time and the keys of that in space need all rows even so.
        """
        time = self.time(self.norm3(x), geometry.time)  # [N, C]
        normed = self.norm1(time, x)  # of their sum
        if class_only:
            branch = self.space.class_rows(normed, geometry.clips, geometry.max_rows)  # [B, C]
            x = ops.gather_rows(x, geometry.clips[:-1].long())
        else:
            branch = self.space(normed, geometry.space)  # [N, C]
        normed, y = self.norm2(branch, x, return_sum=True)
        return y + self.mlp(normed)


class ClipTower(nn.Module):
    """Patches, class token, positions in space and in time, blocks, final norm.

    Args:
        image_size, patch_size: pixels, height and width.
        frames: rows of the table of times, the longest clip.
        blocks: one config per block.
        channels, mean, std: as in :class:`encfast.layers.PatchEmbed`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        frames: int,
        blocks: list[BlockConfig],
        *,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        **factory: Any,
    ) -> None:
        super().__init__()
        dim = blocks[0].dim
        self.image_size = image_size
        self.embed = PatchEmbed(patch_size, dim, channels=channels, mean=mean, std=std, **factory)
        grid = self.embed.grid(image_size)
        self.patches = grid[0] * grid[1]
        self.class_token = nn.Parameter(torch.empty(dim, **factory))
        self.positions = LearnedPositions(grid, dim, class_token=True, **factory)
        self.times = nn.Parameter(torch.empty(frames, dim, **factory))
        self.blocks = nn.ModuleList(SpaceTimeBlock(block, **factory) for block in blocks)
        self.norm = Norm(dim, eps=blocks[0].norm_eps, **factory)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the class token anew, times 0 (linear layers and modules reset themselves)."""
        nn.init.normal_(self.class_token, std=_TOKEN_STD)
        nn.init.zeros_(self.times)

    def forward(self, clips: PackedBatch) -> Tensor:
        """Frames ``[T, C, H, W]`` of B clips -> their class rows behind the norm, ``[B, C]``.

        Raises:
            ValueError: for frames of another size, or a clip longer than the table of times.
        """
        size = tuple(clips.data.shape[2:])
        if size != self.image_size:
            raise ValueError(f"clips has frames of {size}, expected {self.image_size}")
        if clips.max_seqlen > self.times.shape[0]:
            raise ValueError(
                f"clips have up to {clips.max_seqlen} frames, the table of times has "
                f"{self.times.shape[0]}; grow it with with_frames(...)"
            )
        geometry = SpaceTime.of(clips, self.patches)
        patches = self.embed(clips.data)  # [T * P, C]
        table = self._positions(clips.max_seqlen)  # [1 + F * P, C]
        x = geometry.build.build(patches, self.class_token, table).data  # [N, C]
        for block in self.blocks[:-1]:
            x = self._run(block, x, geometry, False)  # [N, C]
        return self.norm(self._run(self.blocks[-1], x, geometry, True))  # [B, C]

    def _positions(self, frames: int) -> Tensor:
        """``[1 + F * P, C]``: of the class row, then place plus time, frame by frame."""
        first, places = self.positions().split((1, self.patches))
        return torch.cat((first, (self.times[:frames, None] + places).flatten(0, 1)))

    def _run(self, block: nn.Module, x: Tensor, geometry: SpaceTime, class_only: bool) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, x, geometry, class_only, use_reentrant=False)
        return block(x, geometry, class_only)
