"""Contrastive losses over the rows of all processes, around ops that know nothing of processes.

Gradient scale. Every process has its own loss; gradients arrive summed over the processes, as the
adjoint of an exchange is an exchange. `DistributedDataParallel` averages those of parameters: with
each process's loss a mean over its own rows, a step is that of one process on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from encfast import ops


def gather_features(
    x: Tensor, group: dist.ProcessGroup | None = None, *, gradient: bool = True
) -> Tensor:
    """The rows of all processes, in the order of their ranks.

    Args:
        x: ``[B, D]``, as many rows and the same dtype on every process.
        group: gloo on CPUs, NCCL on GPUs; None is the default group.
        gradient: rows of other processes get theirs too: each process's gradient of x is the sum
            over all processes. Without it nothing of the result has a gradient.

    Returns:
        ``[world * B, D]``.
    """
    if gradient:
        return _Gather.apply(x, group)
    return _gathered(x.detach(), group)


def ring_siglip(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's loss of this process's ``a`` with the ``b`` of all processes.

    The rows of ``b`` go around: a process holds its own and one other's, and for the gradients
    they go around again, theirs with them. Every process must call it, and its backward.

    Source: Zhai et al. 2023, arXiv 2303.15343, section 3.3.

    Args:
        a: ``[B, D]``, normalised.
        b: ``[B, D]``, the partners of a's rows; as many rows on every process.
        logit_scale, logit_bias: 0-dim.
        group: of all processes that train.

    Returns:
        float32, 0-dim: the sum over all pairs of a's rows, divided by B. ``b`` gets the gradients
        of all processes' losses, ``a``, scale and bias those of their own.

    Raises:
        TypeError, ValueError: as :func:`encfast.ops.siglip`, and for unequal numbers of rows.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"ring_siglip: a has {a.shape[0]} rows, b {b.shape[0]}, expected as many")
    return _RingSigLip.apply(a, b, logit_scale, logit_bias, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        world, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        rows = total.shape[0] // world
        if dist.get_backend(ctx.group) == "nccl":
            own = total.new_empty(rows, *total.shape[1:])
            dist.reduce_scatter_tensor(own, total, group=ctx.group)
            return own, None
        total = total.clone()  # a gradient is not ours to write to
        dist.all_reduce(total, group=ctx.group)
        return total[rank * rows : (rank + 1) * rows].clone(), None


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


class _RingSigLip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(a, b, scale, bias)
        ctx.group = group
        total = _loss(a, b, scale, bias, own=True)
        for _ in range(dist.get_world_size(group) - 1):
            (b,) = _shifted([b], group)
            total = total + _loss(a, b, scale, bias, own=False)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        a, b, scale, bias = ctx.saved_tensors
        db, sums = torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32)), None
        for step in range(dist.get_world_size(ctx.group)):
            leaves = [x.detach().requires_grad_() for x in (a, b, scale, bias)]
            with torch.enable_grad():
                loss = _loss(leaves[0], leaves[1], leaves[2], leaves[3], own=step == 0)
            da, db_of_step, *rest = torch.autograd.grad(loss, leaves, grads[0])
            found = [da.to(db.dtype), *rest]
            sums = found if sums is None else [s + f for s, f in zip(sums, found, strict=True)]
            # After as many steps as there are processes everything is back at its owner.
            b, db = _shifted([b, db + db_of_step], ctx.group)
        assert sums is not None
        return sums[0].to(a.dtype), db.to(b.dtype), *sums[1:], None


def _loss(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, own: bool) -> Tensor:
    return ops.siglip(a, b, logit_scale=scale, logit_bias=bias, negative_only=not own)


def _shifted(tensors: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """What the process before this one holds; this one's go to the next."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return tensors
    found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    moves = []
    for t, space in zip(tensors, found, strict=True):
        to, source = (rank + 1) % world, (rank - 1) % world
        moves.append(dist.P2POp(dist.isend, t.contiguous(), group=group, group_peer=to))
        moves.append(dist.P2POp(dist.irecv, space, group=group, group_peer=source))
    for work in dist.batch_isend_irecv(moves):
        work.wait()
    return found
