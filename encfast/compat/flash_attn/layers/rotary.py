"""flash-attn's rotary functions and module.

Functions whose names end in an underscore, and `inplace=True`, overwrite their input. As in
flash-attn the gradient belongs to the tensor that is returned: go on with that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import require, require_stack
from ..ops.triton.rotary import apply_rotary

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]


def _overwrite(x: Tensor, turn: Callable[[Tensor, bool], Any]) -> Tensor:
    """x, after turn(x, False) has changed it in place."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Overwrite.apply(x, turn)
    turn(x, False)
    return x


class _Overwrite(torch.autograd.Function):
    """turn(x, False) changes x in place; its gradient is turn(dx, True) on a copy."""

    @staticmethod
    def forward(ctx, x: Tensor, turn: Callable[[Tensor, bool], Any]) -> Tensor:
        ctx.turn = turn
        turn(x, False)
        return x

    @staticmethod
    def backward(ctx, dx: Tensor):
        dx = dx.clone(memory_format=torch.contiguous_format)
        ctx.turn(dx, True)
        return dx, None


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first R elements of each head of x.

    Args:
        x: [B, S, H, D], or [N, H, D] with `cu_seqlens`.
        cos, sin: [S, R / 2], float32 or the dtype of x; R <= D.
        interleaved: pairs are neighbours (GPT-J) instead of halves (GPT-NeoX).
        inplace: overwrite x.
        seqlen_offsets: position of the first row, an int or one per sequence [B].
        cu_seqlens: int32 [B + 1] of packed sequences.
        max_seqlen: accepted, not needed.

    Returns:
        Like x.
    """

    def turn(x: Tensor, conjugate: bool, inplace: bool = True) -> Tensor:
        lengths = (seqlen_offsets, cu_seqlens, max_seqlen)
        return apply_rotary(x, cos, sin, *lengths, interleaved, inplace, conjugate)

    return _overwrite(x, turn) if inplace else turn(x, False, False)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k within qkv, in place; v stays.

    Args:
        qkv: [B, S, 3, H, D], or [B, S, H + 2 Hk, D] with `num_heads_q` = H.
        cos, sin: [S, R / 2].
        cos_k, sin_k: tables of k; those of q by default.
        interleaved, seqlen_offsets: see `apply_rotary_emb`.

    Returns:
        qkv.

    Raises:
        ValueError: for one table of k without the other.
    """
    op = "apply_rotary_emb_qkv_"
    heads_q, heads_k = _heads(op, qkv, num_heads_q)
    if (cos_k is None) != (sin_k is None):
        missing = "cos_k" if cos_k is None else "sin_k"
        raise ValueError(f"{op}: {missing} is None; pass both tables of k or none")

    def turn(qkv: Tensor, conjugate: bool) -> None:
        heads = qkv.flatten(2, 3) if qkv.dim() == 5 and qkv.is_contiguous() else qkv
        options: Any = {"interleaved": interleaved, "inplace": True, "conjugate": conjugate}
        if heads.dim() == 4 and cos_k is None:  # q and k lie beside each other
            apply_rotary(heads[:, :, : heads_q + heads_k], cos, sin, seqlen_offsets, **options)
            return
        if heads.dim() == 4:
            q, k = heads[:, :, :heads_q], heads[:, :, heads_q : heads_q + heads_k]
        else:
            q, k = heads[:, :, 0], heads[:, :, 1]
        apply_rotary(q, cos, sin, seqlen_offsets, **options)
        tables = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        apply_rotary(k, *tables, seqlen_offsets, **options)

    return _overwrite(qkv, turn)


def _heads(op: str, qkv: Tensor, num_heads_q: int | None) -> tuple[int, int]:
    """Numbers of query and key heads in qkv."""
    if isinstance(qkv, Tensor) and qkv.dim() == 5:
        require_stack(op, "qkv", qkv, 5, 2, 3, "[B, S, 3, H, D]")
        return qkv.shape[3], qkv.shape[3]
    require(op, "qkv", qkv, 4, "[B, S, 3, H, D] or [B, S, H + 2 Hk, D]")
    if num_heads_q is None:
        raise ValueError(f"{op}: num_heads_q is None; pass the query heads of a 4-D qkv")
    rest = qkv.shape[2] - num_heads_q
    if num_heads_q < 1 or rest < 2 or rest % 2:
        raise ValueError(
            f"{op}: num_heads_q is {num_heads_q} and qkv has {qkv.shape[2]} heads, expected "
            "H + 2 Hk of them"
        )
    return num_heads_q, rest // 2


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates k within kv, in place; v stays.

    Args:
        kv: [B, S, 2, Hk, D].
        cos, sin: [S, R / 2].
        interleaved, seqlen_offsets: see `apply_rotary_emb`.

    Returns:
        kv.
    """
    require_stack("apply_rotary_emb_kv_", "kv", kv, 5, 2, 2, "[B, S, 2, Hk, D]")

    def turn(kv: Tensor, conjugate: bool) -> None:
        options: Any = {"interleaved": interleaved, "inplace": True, "conjugate": conjugate}
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, **options)

    return _overwrite(kv, turn)


class RotaryEmbedding(nn.Module):
    """Rotary positions with their tables, float32 whatever the dtype of the model.

    Args:
        dim: R, the elements of each head that are rotated.
        base: of the frequencies base^(-2j / R).
        interleaved: pairs are neighbours instead of halves.
        scale_base: XPos (Sun et al., arXiv:2212.10554): q is multiplied and k divided by a per-pair
            decay to the power p / scale_base, p the distance behind the middle of the tables.
        device: of the tables.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base = scale_base
        even = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
        self.register_buffer("inv_freq", self.base ** (-even / dim), persistent=False)
        decay = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", decay, persistent=False)
        self._tables: tuple[Tensor, ...] | None = None  # cos, sin and, under XPos, those of k

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:  # model.to(torch.bfloat16) has rounded it
                setattr(self, name, buffer.to(now.device))
        self._tables = None
        return self

    def _tables_of(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """At least `rows` rows. XPos is relative to the middle of the tables, as in flash-attn."""
        old = self._tables
        if old is not None and old[0].device == device and old[0].shape[0] >= rows:
            return old
        steps = torch.arange(rows, dtype=torch.float32, device=device)
        angles = steps[:, None] * self.inv_freq.to(device)
        tables: tuple[Tensor, ...] = (angles.cos(), angles.sin())
        if self.scale is not None and self.scale_base is not None:
            power = (steps - rows // 2)[:, None] / self.scale_base
            scale = self.scale.to(device) ** power
            tables = (*(t * scale for t in tables), *(t / scale for t in tables))
        # A graph has no use for a cache, and what inference mode makes cannot serve training.
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            self._tables = tables
        return tables

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates q and k in place.

        Args:
            qkv: as for `apply_rotary_emb_qkv_`; with `kv` q alone, [B, S, H, D].
            kv: [B, S, 2, Hk, D].
            seqlen_offset: position of the first row, an int or one per sequence [B].
            max_seqlen: rows the tables need; required with a tensor of offsets the tables built
                before do not cover.
            num_heads_q: of a 4-D qkv.

        Returns:
            qkv, or (q, kv).

        Raises:
            ValueError: for a tensor of offsets whose tables are not there, without ``max_seqlen``.
        """
        rows = max_seqlen
        if rows is None and isinstance(seqlen_offset, int):
            rows = qkv.shape[1] + seqlen_offset
        if rows is None:
            if self._tables is None:
                raise ValueError(
                    "RotaryEmbedding: max_seqlen is None; with a tensor as seqlen_offset pass the "
                    "largest position + 1"
                )
            rows = 0
        tables = self._tables_of(rows, qkv.device)
        (cos, sin), (cos_k, sin_k) = tables[:2], tables[-2:]
        options: Any = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            of_k: Any = {} if self.scale is None else {"cos_k": cos_k, "sin_k": sin_k}
            return apply_rotary_emb_qkv_(qkv, cos, sin, num_heads_q=num_heads_q, **of_k, **options)
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **options)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, **options)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"dim={self.dim}, base={self.base:g}, interleaved={self.interleaved}"
