"""cross_entropy_loss under flash-attn's other path."""

from ...losses.cross_entropy import cross_entropy_loss

__all__ = ["cross_entropy_loss"]
