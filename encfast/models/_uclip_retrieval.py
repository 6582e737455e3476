"""What stands in for the pairs uCLIP does without: banks of unpaired features, searched softly.

Retrieval is attention of one head whose keys are its values. Its heads (512 to 768 channels) are
wider than those of :func:`encfast.ops.varlen_attn`, and it needs no gradient: a chunk of the bank
at a time is two matrix products around an online softmax, and a bank may be of a narrower dtype
than the queries, or mapped from a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Cosines that differ by 1 are 100 apart at the published temperature: their exponentials are
# subnormal and slow. 2^-100 vanishes beside the nearest row's 1, be there millions of them.
_VANISHING = -100 * math.log(2)


@torch.no_grad()
def soft_retrieve(
    queries: Tensor, memory: Tensor, *, temperature: float = 0.01, chunk: int = 4096
) -> Tensor:
    """``normalize(softmax(queries @ memory.T / temperature) @ memory)``, without the matrix.

    Args:
        queries: ``[B, D]`` of length 1.
        memory: ``[N, D]`` of length 1, N at least 1, any floating dtype; read once, in order.
        temperature: > 0. Toward 0 the result is the nearest row.
        chunk: rows of memory at a time; B * chunk scores are held.

    Returns:
        ``[B, D]`` of length 1 in the queries' dtype, computed in fp32. Without gradient.

    Raises:
        ValueError: for other shapes, an empty memory, a temperature that is not positive and
            finite, or a chunk below 1.
    """
    _check(queries, memory, temperature, chunk)
    q = queries.float() / temperature
    largest = q.new_full((q.shape[0], 1), -math.inf)
    total = q.new_zeros(q.shape[0], 1)
    out = torch.zeros_like(q)
    for rows in memory.split(chunk):
        values = rows.to(q)  # [n, D]
        scores = q @ values.t()  # [B, n]
        now = torch.maximum(largest, scores.amax(1, keepdim=True))
        scores, kept = scores.sub_(now).clamp_(min=_VANISHING).exp_(), (largest - now).exp()
        total = total * kept + scores.sum(1, keepdim=True)
        out = torch.addmm(out * kept, scores, values)
        largest = now
    return F.normalize(out / total, dim=-1).to(queries.dtype)


def _check(queries: Tensor, memory: Tensor, temperature: float, chunk: int) -> None:
    if queries.dim() != 2 or memory.dim() != 2 or queries.shape[1] != memory.shape[1]:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and memory {tuple(memory.shape)}, expected "
            "[B, D] and [N, D]"
        )
    if memory.shape[0] < 1:
        raise ValueError("memory has no rows, expected at least 1")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a positive finite number")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")


@dataclass(frozen=True, eq=False)
class Anchors:
    """Features of B English sentences, and of what they retrieve; all of length 1.

    They depend on no trained parameter and may be kept for all epochs.
    """

    clip: Tensor  # [B, D]: of CLIP's text encoder (T)
    multilingual: Tensor  # [B, E]: of the multilingual encoder (E)
    images: Tensor  # [B, D]: retrieved for clip from features of images (V)
    sentences: Tensor  # [B, E]: retrieved for multilingual from those of other languages (U)


torch.export.register_dataclass(Anchors, serialized_type_name=f"{__name__}.{Anchors.__name__}")


@dataclass(frozen=True, eq=False)
class MemoryBanks:
    """Features of unpaired images and of unpaired sentences of other languages."""

    images: Tensor  # [N, D], of CLIP's image encoder
    sentences: Tensor  # [M, E], of the multilingual encoder
    temperature: float = 0.01
    chunk: int = 4096  # rows at a time

    def anchors(self, clip: Tensor, multilingual: Tensor) -> Anchors:
        """What a model trains on, from features of English sentences.

        Args:
            clip: ``[B, D]``, of the frozen CLIP's text encoder.
            multilingual: ``[B, E]``, of the frozen multilingual encoder, of the same sentences.

        Returns:
            What ``loss`` takes.
        """
        clip, multilingual = (F.normalize(x.detach(), dim=-1) for x in (clip, multilingual))
        options: dict[str, Any] = {"temperature": self.temperature, "chunk": self.chunk}
        return Anchors(
            clip,
            multilingual,
            soft_retrieve(clip, self.images, **options),
            soft_retrieve(multilingual, self.sentences, **options),
        )

    def encode(
        self,
        clip: Callable[[Any], Tensor],
        multilingual: Callable[[Any], Tensor],
        for_clip: Any,
        for_multilingual: Any,
    ) -> Anchors:
        """The same from the sentences themselves, by frozen encoders.

        Args:
            clip, multilingual: encoders; modules are put into evaluation mode and frozen.
            for_clip, for_multilingual: what each takes of the same sentences, such as token ids.

        Returns:
            What ``loss`` takes.
        """
        for encoder in (clip, multilingual):
            if isinstance(encoder, nn.Module):
                encoder.eval().requires_grad_(False)
        with torch.no_grad():
            return self.anchors(clip(for_clip), multilingual(for_multilingual))
