"""open_clip's contrastive losses on ops that hold no matrix of logits.

    from encfast.integrations.open_clip import ClipLoss, SigLipLoss

Constructors and calls are those of open_clip 3.3 (``open_clip.loss``), which need not be installed.

Gradients of features across processes, before ``DistributedDataParallel`` averages those of the
parameters: with ``gather_with_grad`` a step is that of one process on the whole batch. Without it
and without ``local_loss`` (open_clip's defaults) a process's features get only the gradient of
their own place in the batch, and averaged parameters get a step ``world_size`` times too small;
with ``local_loss`` and no ``gather_with_grad`` features get none as candidates of others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from encfast import ops
from encfast.distributed import gather_features, ring_info_nce, ring_siglip

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """CLIP's loss of image and text features, over all processes.

    Args:
        local_loss: own rows against those of all, instead of all against all. With
            ``gather_with_grad`` this is :func:`encfast.distributed.ring_info_nce`, where a process
            holds its own features and one other's.
        gather_with_grad: other processes' features get gradients too.
        cache_labels: taken for compatibility; there are no labels.
        rank: of this process.
        world_size: processes; 1 needs no process group.
        use_horovod: not served.

    Raises:
        NotImplementedError: with ``use_horovod``.

    Examples:
        >>> from encfast.integrations.open_clip import ClipLoss
        >>> images = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
        >>> ClipLoss()(images, images, torch.tensor(100.0)) < 0.1
        tensor(True)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError(
                "use_horovod=True is not served; torch.distributed is, with use_horovod=False"
            )
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Mean of both directions.

        Args:
            image_features: ``[B, D]``, normalised.
            text_features: ``[B, D]``, normalised.
            logit_scale: 0-dim, not its logarithm.
            logit_bias: 0-dim; a softmax does not see it.
            output_dict: as ``{"contrastive_loss": loss}``.

        Returns:
            0-dim, float32, or the dictionary.

        Raises:
            ValueError: where ``rank`` and ``world_size`` are not the process group's.
        """
        if self.world_size == 1:
            loss = ops.info_nce(image_features, text_features, logit_scale=logit_scale)
        else:
            loss = self._over_processes(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_processes(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        _check_place(self.rank, self.world_size)
        if self.local_loss and self.gather_with_grad:
            return ring_info_nce(image, text, logit_scale=scale)
        images, texts = (self._gathered(x) for x in (image, text))
        if not self.local_loss:
            return ops.info_nce(images, texts, logit_scale=scale)
        offset = self.rank * image.shape[0]
        directions = (
            ops.info_nce(own, others, logit_scale=scale, offset=offset, directions="rows")
            for own, others in ((image, texts), (text, images))
        )
        return sum(directions, torch.zeros((), device=image.device)) / 2

    def _gathered(self, x: Tensor) -> Tensor:
        every = gather_features(x, gradient=self.gather_with_grad)
        if self.gather_with_grad or self.local_loss:
            return every
        rows = list(every.chunk(self.world_size))
        rows[self.rank] = x  # the gradient of its own place
        return torch.cat(rows)


class SigLipLoss(nn.Module):
    """SigLIP's loss, over all processes.

    Args:
        cache_labels: taken for compatibility; there are no labels.
        rank: of this process.
        world_size: processes; 1 needs no process group.
        dist_impl: "gather" holds the text features of all processes. "bidir", "shift" and "reduce"
            are one ring here: :func:`encfast.distributed.ring_siglip` holds those of two.

    Raises:
        ValueError: for another ``dist_impl``.

    Examples:
        >>> from encfast.integrations.open_clip import SigLipLoss
        >>> images = torch.eye(4)
        >>> SigLipLoss()(images, images, torch.tensor(20.0), torch.tensor(-10.0)) < 0.01
        tensor(True)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in DIST_IMPLS:
            raise ValueError(f"dist_impl is {dist_impl!r}, expected one of {', '.join(DIST_IMPLS)}")
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Sum over all pairs of own images, divided by their number.

        Args:
            image_features: ``[B, D]``, normalised.
            text_features: ``[B, D]``, normalised.
            logit_scale: 0-dim, not its logarithm.
            logit_bias: 0-dim.
            output_dict: as ``{"contrastive_loss": loss}``.

        Returns:
            0-dim, float32, or the dictionary.

        Raises:
            ValueError: where ``rank`` and ``world_size`` are not the process group's.
        """
        if self.world_size > 1:
            _check_place(self.rank, self.world_size)
        a, b, ring = image_features, text_features, self.dist_impl != "gather"
        if self.world_size > 1 and ring:
            loss = ring_siglip(a, b, logit_scale=logit_scale, logit_bias=logit_bias)
        else:
            offset = 0
            if self.world_size > 1:
                b, offset = gather_features(b), self.rank * a.shape[0]
            loss = ops.siglip(a, b, logit_scale=logit_scale, logit_bias=logit_bias, offset=offset)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_place(rank: int, world_size: int) -> None:
    found = dist.get_rank(), dist.get_world_size()
    if (rank, world_size) != found:
        raise ValueError(
            f"rank is {rank} and world_size {world_size}, expected {found[0]} and {found[1]} as "
            "the process group has them"
        )
