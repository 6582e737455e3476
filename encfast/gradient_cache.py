"""Contrastive batches larger than memory: all features at once, one chunk's activations a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Encoder = Callable[[Any], Tensor]


def backward_in_chunks(
    towers: Sequence[tuple[Encoder, Sequence[Any]]], loss: Callable[..., Tensor]
) -> Tensor:
    """The backward of ``loss(*features)`` over a batch that is encoded chunk by chunk, twice.

    First all chunks are encoded without a graph; the loss is taken of all features together and
    gives their gradients; then each chunk is encoded again and its part goes backward. Gradients
    are those of the whole batch, for about a third more work. Random numbers (dropout, masks) are
    the same in both passes.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup", arXiv 2101.06983.

    Args:
        towers: for each argument of the loss an encoder and the chunks of its batch, in order: any
            objects that the encoder turns into features ``[rows, D]``. The same encoder may come
            twice.
        loss: of the features ``[B, D]`` of each tower to a scalar; may have parameters of its own
            (a temperature) and may exchange features between processes.

    Returns:
        The loss, without a graph. Gradients are accumulated in ``grad``, as by ``backward``. Under
        ``DistributedDataParallel`` every chunk is a backward: wrap the call in ``no_sync`` and
        average gradients behind it.

    Raises:
        ValueError: for no towers, a tower without chunks, or features that are no matrix.

    Examples:
        >>> from encfast.gradient_cache import backward_in_chunks
        >>> tower, x = torch.nn.Linear(4, 8), torch.randn(6, 4)
        >>> loss = backward_in_chunks([(tower, x.split(2))], lambda y: y.square().mean())
        >>> torch.allclose(loss, tower(x).square().mean())
        True
        >>> tower.weight.grad.shape
        torch.Size([8, 4])
    """
    if not towers or not all(chunks for _, chunks in towers):
        raise ValueError("towers needs at least one tower, each with at least one chunk")
    encoded = [[_encoded(encoder, chunk) for chunk in chunks] for encoder, chunks in towers]
    leaves = [torch.cat([e.features for e in parts]).requires_grad_() for parts in encoded]
    with torch.enable_grad():
        value = loss(*leaves)
    value.backward()
    after = _RandomState()
    for (encoder, chunks), parts, leaf in zip(towers, encoded, leaves, strict=True):
        if leaf.grad is None:
            continue
        grads = leaf.grad.split([len(e.features) for e in parts])
        for chunk, part, grad in zip(chunks, parts, grads, strict=True):
            part.random.restore()
            with torch.enable_grad():
                features = encoder(chunk)
            if features.requires_grad:
                features.backward(grad)
    after.restore()
    return value.detach()


class _RandomState:
    """Of the CPU's generator, and of all GPUs' where there are any in use."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class _Encoded(NamedTuple):
    """Features of a chunk without their graph, and the random state they began with."""

    features: Tensor
    random: _RandomState


@torch.no_grad()
def _encoded(encoder: Encoder, chunk: Any) -> _Encoded:
    random = _RandomState()
    features = encoder(chunk)
    if features.dim() != 2:
        raise ValueError(f"an encoder gave features {tuple(features.shape)}, expected [rows, D]")
    return _Encoded(features, random)
