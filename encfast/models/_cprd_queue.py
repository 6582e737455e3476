"""Momentum keys and their queue, after ALBEF (arXiv 2107.07651), for CPRD's contrastive term."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.packed import PackedBatch


class MomentumQueue(nn.Module):
    """A slow copy of a dual encoder, and the newest of its features.

    Args:
        student: whose weights the copy follows.
        size: Q, features of each kind; they start random and of length 1.
        momentum: m of ``copy = m copy + (1 - m) student``, in [0, 1).
        generator: of the first features, on the CPU.

    Raises:
        ValueError: for a size below 1, or another momentum.
    """

    images: Tensor
    texts: Tensor
    place: Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        size: int = 65_536,
        momentum: float = 0.995,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected within [0, 1)")
        self.size, self.momentum = size, momentum
        self.encoder = copy.deepcopy(student).requires_grad_(False)
        weight = next(student.parameters())
        for name in ("images", "texts"):
            rows = torch.randn(size, student.config.embed_dim, generator=generator)
            self.register_buffer(name, F.normalize(rows, dim=-1).to(weight))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64, device=weight.device))

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """One step of the copy towards the student, after the optimiser's."""
        pairs = zip(self.encoder.parameters(), student.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor, tokens: PackedBatch) -> tuple[Tensor, Tensor]:
        """The copy's features of images and texts.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            tokens: ids ``[N]`` of B texts.

        Returns:
            ``[B, E]`` each.
        """
        return self.encoder.encode_images(images), self.encoder.encode_texts(tokens)

    @torch.no_grad()
    def push(self, images: Tensor, texts: Tensor) -> None:
        """Puts keys of ``images`` and of ``texts``, ``[B, E]`` each, in place of the oldest.

        Raises:
            ValueError: for more keys than the queue holds.
        """
        if len(images) > self.size:
            raise ValueError(f"images has {len(images)} rows, the queue holds {self.size}")
        rows = (self.place + torch.arange(len(images), device=images.device)) % self.size
        self.images[rows], self.texts[rows] = images.to(self.images), texts.to(self.texts)
        self.place.copy_((self.place + len(images)) % self.size)
