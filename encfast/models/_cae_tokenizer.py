"""A frozen tokenizer of patches, in the place of DALL-E's discrete VAE.

The loss of CAE takes ids, wherever they come from: ``ImageBatch.targets``, one per hidden patch. A
dVAE that gives ``ids`` ``[B, 14, 14]`` is used as ``ids.flatten()[mask.hidden]``, and this codebook
as ``codebook(model.encoder.embed.pixels(images, mask.hidden))``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CHUNK = 4096  # rows whose distances to all codes are held at once


class PatchCodebook(nn.Module):
    """The id of a patch is that of the nearest of K codes; of equally near ones, the first.

    Args:
        codes: ``[K, Q]``, floating. They take no gradient.

    Raises:
        ValueError: for codes of another shape, or none.
    """

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        if codes.dim() != 2 or codes.shape[0] < 1:
            raise ValueError(f"codes has shape {tuple(codes.shape)}, expected [K, Q] with K >= 1")
        self.register_buffer("codes", codes.detach().clone())

    @classmethod
    def random(
        cls, size: int, dim: int, *, generator: torch.Generator | None = None
    ) -> PatchCodebook:
        """``size`` codes of ``dim`` numbers each from N(0, 1), as normalised pixels have.

        Args:
            size: K.
            dim: Q, numbers in a patch.
            generator: of the draw, on the CPU.
        """
        return cls(torch.randn(size, dim, generator=generator))

    @classmethod
    def k_means(
        cls,
        rows: Tensor,
        size: int,
        *,
        steps: int = 20,
        generator: torch.Generator | None = None,
    ) -> PatchCodebook:
        """The means that Lloyd's algorithm finds among patches, from ``size`` of them.

        A code that no patch is nearest to takes the place of the patch that is farthest from its
        own code.

        Args:
            rows: ``[n, Q]``, floating, n >= size.
            size: K.
            steps: of the algorithm.
            generator: of the first choice, on the CPU.

        Raises:
            ValueError: if there are fewer patches than codes.
        """
        if rows.shape[0] < size:
            raise ValueError(
                f"rows has {rows.shape[0]} patches, expected {size} or more, the codes"
            )
        first = torch.randperm(rows.shape[0], generator=generator)[:size].to(rows.device)
        codes = rows[first].float()
        for _ in range(steps):
            codes = _moved(rows.float(), codes)
        return cls(codes)

    @property
    def size(self) -> int:
        """K, the number of ids."""
        return self.codes.shape[0]

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Pixels ``[M, Q]``, floating -> ids int64 ``[M]`` in 0..K - 1.

        Raises:
            ValueError: for rows of another size than the codes.
        """
        if rows.dim() != 2 or rows.shape[1] != self.codes.shape[1]:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}, expected [M, {self.codes.shape[1]}]"
            )
        return _nearest(rows.to(self.codes.dtype), self.codes)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"size={self.size}, dim={self.codes.shape[1]}"


def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """argmin |x - c|^2, of which |x|^2 is the same for every code."""
    half_norms = codes.square().sum(1) / 2  # [K]
    parts = [(half_norms - part @ codes.t()).argmin(1) for part in rows.split(_CHUNK)]
    return torch.cat(parts) if parts else rows.new_empty(0, dtype=torch.int64)


def _moved(rows: Tensor, codes: Tensor) -> Tensor:
    """One step of Lloyd's algorithm."""
    owner = _nearest(rows, codes)  # [n]
    counts = owner.bincount(minlength=codes.shape[0])
    means = torch.zeros_like(codes).index_add(0, owner, rows) / counts.clamp(min=1)[:, None]
    unused = (counts == 0).nonzero().flatten()
    farthest = (rows - codes[owner]).square().sum(1).topk(unused.shape[0]).indices
    return means.index_copy(0, unused, rows[farthest])
