"""Which patches of each image, clip or volume of a batch are visible, and which are hidden.

A mask is made where a batch is collated or at the start of a step, and everything that follows is
index arithmetic on it: visible rows through the encoder, all rows through a decoder, the targets of
hidden ones (He et al., arXiv 2111.06377, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from encfast import ops
from encfast.ops import PatchSelection
from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class RowPlan:
    """How the rows of a sequence model are put together; see :meth:`build`."""

    index: Tensor  # int64 [M]: row of the source, -1 for the filling
    add_index: Tensor  # int64 [M]: row of the position table
    cu_seqlens: Tensor  # int32 [B + 1]: of the result
    max_seqlen: int

    def build(
        self, rows: Tensor, fill: Tensor | None = None, positions: Tensor | None = None
    ) -> PackedBatch:
        """``rows[index]``, or ``fill`` where that is -1, plus ``positions[add_index]``.

        Args:
            rows: ``[n, C]``.
            fill: ``[C]``: the class token or the mask token; None: zeros.
            positions: ``[A, C]`` or None.

        Returns:
            Rows ``[n', C]`` in the plan's geometry.

        Raises:
            TypeError, ValueError: as :func:`encfast.ops.restore_rows`.
        """
        add_index = None if positions is None else self.add_index
        x = ops.restore_rows(rows, self.index, fill, add=positions, add_index=add_index)
        return PackedBatch(x, self.cu_seqlens, self.max_seqlen)


@dataclass(frozen=True, eq=False)
class PatchMask:
    """B sequences of patches, some visible and the others hidden.

    Patch p of sequence b has the id ``cu_seqlens[b] + p``, its row among the packed patches of the
    batch. Constructors but :meth:`from_noise` with an int read numbers on the host and live outside
    compiled graphs; everything else traces.

    Attributes:
        visible: int64 ``[K]``: visible ids, sequence by sequence.
        hidden: int64 ``[N - K]``: the others.
        restore: int64 ``[N]``: place of each patch in ``visible``, -1 where it is hidden.
        cu_seqlens: int32 ``[B + 1]`` of all patches.
        cu_visible: int32 ``[B + 1]`` of the visible ones.
        max_patches, max_visible, max_hidden: upper bounds of the lengths.
    """

    visible: Tensor
    hidden: Tensor
    restore: Tensor
    cu_seqlens: Tensor
    cu_visible: Tensor
    max_patches: int
    max_visible: int
    max_hidden: int

    @classmethod
    def from_noise(
        cls,
        noise: Tensor,
        keep: int | Sequence[int],
        *,
        cu_seqlens: Tensor | None = None,
        ordered: bool = True,
    ) -> PatchMask:
        """The ``keep`` patches with the least noise are visible.

        Args:
            noise: fp32 ``[B, P]``; or ``[N]`` with ``cu_seqlens``, where sequences differ.
            keep: visible patches of each sequence, in 0..P; with ``cu_seqlens`` one number each.
            cu_seqlens: int32 ``[B + 1]``.
            ordered: list ids in ascending order, otherwise in that of their noise.

        Raises:
            TypeError, ValueError: as :func:`encfast.ops.select_patches`.
        """
        chosen = ops.select_patches(noise, keep, cu_seqlens=cu_seqlens, ordered=ordered)
        if cu_seqlens is None:
            assert not isinstance(keep, Sequence)
            batch, patches = noise.shape
            ends = torch.arange(batch + 1, dtype=torch.int32, device=noise.device) * patches
            return cls._of(chosen, ends, patches, keep, patches - keep)
        lengths, counts = cu_seqlens.diff(), chosen.cu_keep.diff()
        bounds = [max(n.tolist(), default=0) for n in (lengths, counts, lengths - counts)]
        return cls._of(chosen, cu_seqlens, *bounds)

    @classmethod
    def from_hidden(cls, hidden: Tensor, keep: int | None = None) -> PatchMask:
        """From a grid of booleans, as mask generators make it.

        Args:
            hidden: bool ``[B, P]``: True hides a patch.
            keep: visible patches of every sequence; None: counted, they may differ.

        Raises:
            TypeError: unless ``hidden`` is boolean.
            ValueError: for another shape, or (on the CPU) if a sequence has not ``keep`` visible.
        """
        if hidden.dtype != torch.bool:
            raise TypeError(f"hidden is {hidden.dtype}, expected bool, True where hidden")
        if hidden.dim() != 2:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected [B, P]")
        noise = hidden.float()  # the visible have the least
        batch, patches = hidden.shape
        if keep is not None:
            _check_keep(hidden, keep)
            return cls.from_noise(noise, keep)
        counts = (~hidden).sum(1).tolist()
        if counts and min(counts) == max(counts):
            return cls.from_noise(noise, counts[0])
        ends = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * patches
        return cls.from_noise(noise.flatten(), counts, cu_seqlens=ends)

    @classmethod
    def all_visible(
        cls, batch: int, patches: int, *, device: torch.device | str | None = None
    ) -> PatchMask:
        """Nothing is hidden: ``batch`` sequences of ``patches`` patches, on ``device``; traces."""
        rows = torch.arange(batch * patches, device=device)
        ends = torch.arange(batch + 1, dtype=torch.int32, device=device) * patches
        return cls(rows, rows[:0], rows, ends, ends, patches, patches, 0)

    @classmethod
    def _of(
        cls, chosen: PatchSelection, cu_seqlens: Tensor, patches: int, visible: int, hidden: int
    ) -> PatchMask:
        ids = chosen.visible, chosen.hidden, chosen.restore
        return cls(*ids, cu_seqlens, chosen.cu_keep, patches, visible, hidden)

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        """N, the number of patches."""
        return self.restore.shape[0]

    @property
    def cu_hidden(self) -> Tensor:
        """int32 ``[B + 1]`` of the hidden patches."""
        return self.cu_seqlens - self.cu_visible

    def complement(self) -> PatchMask:
        """Hidden patches become visible and the other way round."""
        place = torch.full_like(self.restore, -1)
        place = place.scatter(0, self.hidden, torch.arange(self.hidden.shape[0]).to(place))
        return PatchMask(
            self.hidden,
            self.visible,
            place,
            self.cu_seqlens,
            self.cu_hidden,
            self.max_patches,
            self.max_hidden,
            self.max_visible,
        )

    def hidden_grid(self) -> Tensor:
        """bool ``[N]``: whether each patch is hidden."""
        return self.restore < 0

    def patches_of(self, ids: Tensor) -> Tensor:
        """int64 ``[M]``: which patch of its own sequence each id is, from 0."""
        return ids - self.cu_seqlens[self._owners(ids, self.cu_seqlens)]

    def visible_batch(self, rows: Tensor) -> PackedBatch:
        """``rows`` ``[K, ...]``, one per visible patch, as a batch."""
        return PackedBatch(rows, self.cu_visible, self.max_visible)

    def hidden_batch(self, rows: Tensor) -> PackedBatch:
        """``rows`` ``[N - K, ...]``, one per hidden patch, as a batch."""
        return PackedBatch(rows, self.cu_hidden, self.max_hidden)

    def visible_rows(self) -> Tensor:
        """int64 ``[K]``: rows of the visible patches behind the class tokens of an encoder."""
        source = torch.arange(self.visible.shape[0], device=self.visible.device)
        return source + self._owners(source, self.cu_visible) + 1

    def full_rows(self, ids: Tensor) -> Tensor:
        """int64 ``[M]``: rows of the patches ``ids`` behind the class rows of a decoder."""
        return ids + self._owners(ids, self.cu_seqlens) + 1

    def suffix_rows(self) -> Tensor:
        """int64 ``[N - K]``: rows of the hidden patches where :meth:`suffix_plan` puts them."""
        source = torch.arange(self.hidden.shape[0], device=self.hidden.device)
        owner = self._owners(source, self.cu_hidden)
        return source + self.cu_visible[owner + 1] + owner + 1

    def visible_plan(self, *, class_token: bool = True, own_positions: bool = False) -> RowPlan:
        """An encoder's rows: a class token, then the visible patches.

        Builds from rows ``[K, C]`` of the visible patches, filled with the class token.

        Args:
            class_token: whether there is one; row 0 of the position table is its.
            own_positions: each sequence has a position table of its own, one after another (images
                of different sizes); otherwise they share one.

        Returns:
            B sequences of (1 +) visible patches.
        """
        k = self.visible.shape[0]
        source = torch.arange(k, device=self.visible.device)
        owner = self._owners(source, self.cu_visible)
        rows = self.visible if own_positions else self.visible - self.cu_seqlens[owner]
        if not class_token:
            return RowPlan(source, rows, self.cu_visible, self.max_visible)
        return self._behind_class_rows(
            source, rows, owner, self.cu_visible, self.max_visible, own_positions
        )

    def full_plan(self, *, class_token: bool = True, own_positions: bool = False) -> RowPlan:
        """A decoder's rows: the class row, then all patches in their order.

        Builds from the encoder's rows as :meth:`visible_plan` has arranged them, filled with the
        mask token.

        Args:
            class_token, own_positions: as in :meth:`visible_plan`.

        Returns:
            B sequences of (1 +) all patches.
        """
        ids = torch.arange(self.total, device=self.restore.device)
        owner = self._owners(ids, self.cu_seqlens)
        rows = ids if own_positions else ids - self.cu_seqlens[owner]
        if not class_token:
            return RowPlan(self.restore, rows, self.cu_seqlens, self.max_patches)
        # Each sequence up to and including its own has one class row in front.
        source = torch.where(self.restore < 0, -1, self.restore + owner + 1)
        plan = self._behind_class_rows(
            source, rows, owner, self.cu_seqlens, self.max_patches, own_positions
        )
        class_rows = self.cu_visible.long() + torch.arange(self.batch_size + 1).to(ids)
        places = plan.cu_seqlens[:-1].long()
        return replace(plan, index=plan.index.scatter(0, places, class_rows[:-1]))

    def suffix_plan(self) -> RowPlan:
        """A decoder's rows: the class row, the visible patches, then the hidden ones.

        Each kind stands in the order in which the mask lists it; positions follow. Builds from the
        encoder's rows as :meth:`visible_plan` has arranged them, filled with the mask token.
        """
        batch, total = self.batch_size, self.total
        steps = torch.arange(batch + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        ends, encoder_ends = self.cu_seqlens + steps, self.cu_visible + steps
        # Row 0 of each sequence is its class row, in the encoder's batch as here.
        first, encoder_first = ends[:-1].long(), encoder_ends[:-1].long()
        source = self.visible_rows()
        owner = self._owners(source, encoder_ends)
        place = source - encoder_first[owner] + first[owner]
        index = source.new_full((total + batch,), -1)
        index = index.scatter(0, first, encoder_first).scatter(0, place, source)
        added = source.new_zeros(total + batch)
        added = added.scatter(0, place, self.patches_of(self.visible) + 1)
        added = added.scatter(0, self.suffix_rows(), self.patches_of(self.hidden) + 1)
        return RowPlan(index, added, ends, self.max_patches + 1)

    def _behind_class_rows(
        self,
        source: Tensor,
        rows: Tensor,
        owner: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        own_positions: bool,
    ) -> RowPlan:
        """One more row in front of each sequence: -1 of the source, 0 of the positions."""
        n, batch = source.shape[0], self.batch_size
        steps = torch.arange(batch + 1, dtype=torch.int32, device=cu_seqlens.device)
        place = torch.arange(n, device=source.device) + owner + 1
        index = source.new_full((n + batch,), -1).scatter(0, place, source)
        added = source.new_zeros(n + batch)
        if own_positions:
            rows = rows + owner
            tables = (self.cu_seqlens + steps)[:-1].long()
            added = added.scatter(0, (cu_seqlens + steps)[:-1].long(), tables)
        added = added.scatter(0, place, rows + 1)
        return RowPlan(index, added, cu_seqlens + steps, longest + 1)

    @staticmethod
    def _owners(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.searchsorted(cu_seqlens[1:], rows.int(), right=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PatchMask:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: v.to(device, non_blocking=non_blocking) if isinstance(v, Tensor) else v
            for name, v in values.items()
        }
        return PatchMask(**moved)

    def pin_memory(self) -> PatchMask:
        """The mask in page-locked memory (called by DataLoader(pin_memory=True))."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned: dict[str, Any] = {
            name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in values.items()
        }
        return PatchMask(**pinned)


def _check_keep(hidden: Tensor, keep: int) -> None:
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counts = (~hidden).sum(1)
    for b in (counts != keep).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"hidden leaves {counts[b]} patches of sequence {b} visible, keep={keep}")


torch.export.register_dataclass(PatchMask, serialized_type_name="encfast.patch_mask.PatchMask")
