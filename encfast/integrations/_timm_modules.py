"""timm's attention and patch dropout as subclasses: their constructors, parameters and names."""

from __future__ import annotations

import torch
from timm import layers
from torch import Tensor

from encfast import ops
from encfast.integrations._grids import attend

# What the forward below reads; an attention with other children is of another version.
PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class Attention(layers.Attention):
    """timm's class of this name on :func:`encfast.ops.varlen_attn`.

    Constructor, parameters and their names are those of ``timm.layers.Attention``: published
    weights load. For ``create_model(..., attn_layer=Attention)``.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Multi-head self-attention.

        Args:
            x: ``[B, N, C]``; float32, bfloat16 or float16.
            attn_mask: anything that is broadcast to ``[B, H, N, N]``: bool, True where a query sees
                a key, or floating, to be added. ``[B, 1, 1, N]`` bool skips hidden keys: what
                stands in them, NaN included, reaches nothing.
            is_causal: a query sees no later key; not together with ``attn_mask``.

        Returns:
            ``[B, N, C]``. A query that sees no key gets zeros before the projection.

        Raises:
            ValueError: for a mask of another shape or dtype, and for one besides ``is_causal``.
        """
        # [B, N, H, D] each
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out = attend(
            self.q_norm(q),
            self.k_norm(k),
            v,
            _mask_of(attn_mask, is_causal, x, self.num_heads),
            causal=is_causal,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training and self.attn_drop.p else None,
        )
        out = self.norm(out.flatten(2))
        if getattr(self, "gate", None) is not None:  # not in older versions
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def _mask_of(mask: Tensor | None, is_causal: bool, x: Tensor, heads: int) -> Tensor | None:
    """As ``attend`` takes it: bool ``[B, N]`` of the keys, or 4-D."""
    if mask is None:
        return None
    if is_causal:
        raise ValueError(
            f"attn_mask {tuple(mask.shape)} came together with is_causal=True; pass one of them, "
            "a causal rule can be part of the mask"
        )
    batch, size = x.shape[:2]
    full = (batch, heads, size, size)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}, expected one that is broadcast to "
            f"[B, H, N, N] = {full}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask is {mask.dtype}, expected torch.bool or a floating dtype")
    mask = mask.view(shape).expand(*shape[:3], size)
    if mask.dtype == torch.bool and shape[1] == shape[2] == 1:
        return mask[:, 0, 0].expand(batch, size)
    return mask


class PatchDropout(layers.PatchDropout):
    """timm's class of this name: the same patches for the same seed, in one gather.

    Args:
        prob: part of the patches to drop, in [0, 1); ``max(1, int(L * (1 - prob)))`` stay.
        num_prefix_tokens: class and register tokens in front, which always stay.
        ordered: whether patches keep their order; otherwise it is random.
        return_indices: whether the places of the patches that stay are returned too.

    Raises:
        ValueError: for a ``prob`` outside of [0, 1).
    """

    return_indices = False

    def __init__(
        self,
        prob: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
    ) -> None:
        if not 0 <= prob < 1:
            raise ValueError(f"prob is {prob}, expected a number in [0, 1)")
        super().__init__(prob, num_prefix_tokens, ordered)
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Drops patches in training.

        Args:
            x: ``[B, P + L, ...]``, P prefix tokens in front of L patches.

        Returns:
            ``[B, P + keep, ...]``; with ``return_indices`` also int64 ``[B, keep]``, places among
            the patches, or None where nothing was dropped.
        """
        kept = _drop(self, x)
        return kept if self.return_indices else kept[0]


class PatchDropoutWithIndices(layers.PatchDropoutWithIndices):
    """timm's class of this name: :class:`PatchDropout` with ``return_indices``."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`PatchDropout.forward`."""
        return _drop(self, x)


def _drop(
    module: layers.PatchDropout | layers.PatchDropoutWithIndices, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows of the grid, those of the prefix included, by one index."""
    if not module.training or module.prob == 0:
        return x, None
    batch, size = x.shape[:2]
    prefix = module.num_prefix_tokens
    patches = size - prefix
    keep = min(patches, max(1, int(patches * (1 - module.prob))))
    noise = torch.randn(batch, patches, device=x.device)  # timm's draw
    visible = ops.select_patches(noise, keep, ordered=module.ordered).visible.view(batch, keep)
    image = torch.arange(batch, device=x.device)[:, None]
    kept = visible - image * patches
    in_front = torch.arange(prefix, device=x.device).expand(batch, prefix)
    index = torch.cat((in_front, kept + prefix), 1) + image * size
    return ops.gather_rows(x.flatten(0, 1), index.flatten()).unflatten(0, index.shape), kept
