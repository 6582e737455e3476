"""Contrastive losses over the rows of all processes, around ops that know nothing of processes.

Gradient scale. Every process has its own loss; gradients arrive summed over the processes, as the
adjoint of an exchange is an exchange. `DistributedDataParallel` averages those of parameters: with
each process's loss a mean over its own rows, a step is that of one process on the whole batch.

Ring. In step k every process sends its own rows k places on, works on those that came from k places
before, and sends back what they are owed (sums, gradients): beside its own it holds the rows of one
other process, whatever the number of processes, and sums are taken where their rows are at home.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from encfast import ops
from encfast.ops._checks import can_assert_values, can_read_values
from encfast.ops._rank_loss_checks import DIRECTIONS, check_choice, check_features, check_scalar

_LONGEST = 128  # bytes of a dtype and a shape as text


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

    Raises:
        ValueError: for x of another shape or dtype on another process. On GPUs only under
            ``ENCFAST_CHECK=1``, as the host has to wait for it; else the exchange fails or hangs.
    """
    _check_alike("gather_features", "x", x, group)
    if gradient:
        return _Gather.apply(x, group)
    return _gathered(x.detach(), group)


def ring_info_nce(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor,
    directions: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP's loss of this process's pairs, each against the rows of all processes.

    The mean over the processes is :func:`encfast.ops.info_nce` of the whole batch, and so are its
    gradients. Nothing of size ``world * B`` is held: the rows of ``b`` visit every process, for the
    gradients again. Every process must call it, and its backward.

    Source: Radford et al. 2021, arXiv 2103.00020, section 2.3.

    Args:
        a: ``[B, D]`` float32, bfloat16 or float16, normalised; as many on every process.
        b: ``[B, D]`` of a's dtype, the partners of a's rows. Has to require a gradient on all
            processes or on none.
        logit_scale: 0-dim, one over the temperature, the same positive number on every process.
        directions: "mean" (CLIP) or "sum" of the losses along rows and columns, or "rows" alone,
            where each row of a looks for its b.
        group: of all processes that train.

    Returns:
        float32, 0-dim: the mean over this process's pairs. ``a`` and ``b`` get the gradients of all
        processes' losses, ``logit_scale`` that of the products with this process's ``a``.

    Raises:
        TypeError, ValueError: as :func:`encfast.ops.info_nce`, for unequal numbers of rows, and as
            :func:`gather_features`.

    Numerics: as :func:`encfast.ops.info_nce`; sums over processes are taken in float32.
    """
    check_choice("ring_info_nce", "directions", directions, DIRECTIONS)
    _check_pairs("ring_info_nce", a, b, group)
    loss = _RingInfoNce.apply(a, b, logit_scale, directions != "rows", group)
    return loss / 2 if directions == "mean" else loss


def ring_siglip(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's loss of this process's ``a`` with the ``b`` of all processes.

    The rows of ``b`` visit every process, for the gradients again: a process holds its own and one
    other's. Every process must call it, and its backward.

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
        TypeError, ValueError: as :func:`encfast.ops.siglip`, for unequal numbers of rows, and as
            :func:`gather_features`.
    """
    _check_pairs("ring_siglip", a, b, group)
    return _RingSigLip.apply(a, b, logit_scale, logit_bias, group)


def _check_pairs(op: str, a: Tensor, b: Tensor, group: dist.ProcessGroup | None) -> None:
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{op}: a has {a.shape[0]} rows, b {b.shape[0]}, expected as many")
    _check_alike(op, "b", b, group)


def _check_alike(op: str, name: str, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """x has one shape and dtype on all processes, all of which raise where it has not."""
    if not (can_read_values(x) or can_assert_values(x)):
        return
    own = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    # Of one length everywhere: one exchange, where all_gather_object needs two and pickles.
    text = torch.tensor([*own.encode().ljust(_LONGEST)], dtype=torch.uint8, device=x.device)
    every = [bytes(row).decode().rstrip() for row in _gathered(text[None], group).tolist()]
    for rank, found in enumerate(every):
        if found != every[0]:
            raise ValueError(
                f"{op}: {name} is {found} on process {rank}, {every[0]} on process 0; expected the "
                "same on all: drop the last batch where they differ"
            )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    @once_differentiable
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


class _RingInfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, both: bool, group: dist.ProcessGroup | None
    ) -> Tensor:
        positive, rows, columns = _log_sums(a, b, scale, both)
        for step in range(1, dist.get_world_size(group)):
            _, of_rows, of_columns = _log_sums(a, _moved(b, step, group), scale, both)
            rows = _merged(rows, of_rows)
            columns = _merged(columns, _moved(of_columns, -step, group))
        ctx.save_for_backward(a, b, scale, rows, columns)
        ctx.both, ctx.group = both, group
        loss = (rows[0] - positive) + rows[1]
        return (loss + (columns[0] - positive) + columns[1] if both else loss).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        a, b, scale, rows, columns = ctx.saved_tensors
        group, (need_a, need_b) = ctx.group, ctx.needs_input_grad[:2]
        weight = (grads[0] / len(a)).repeat(len(a))
        # What a visit of b's rows needs to know of their columns: both sums, and their weight.
        known = torch.cat([columns, weight.expand(1, len(a))[:, : columns.shape[1]]])
        da, db, dscale = (_wide_zeros(x) for x in (a, b, scale))
        for step in range(dist.get_world_size(group)):
            grads_of_step = _info_nce_grads(
                weight,
                a,
                _moved(b, step, group),
                scale,
                rows,
                _moved(known, step, group),
                own=step == 0,
                want=(need_a, need_b),
            )
            if need_a:
                da += grads_of_step[0]
            if need_b:
                db += _moved(grads_of_step[1], -step, group)
            dscale += grads_of_step[2]
            del grads_of_step  # before the next step's come beside them
        return (
            da.to(a.dtype) if need_a else None,
            db.to(b.dtype) if need_b else None,
            dscale.to(scale.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _log_sums(a: Tensor, b: Tensor, scale: Tensor, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a's rows with those of b in the same places, and the sums along rows and columns.

    Sums are ``[2, B]``: the largest logit and the log of the sum of exponentials relative to it;
    ``[2, 0]`` along columns without ``both``.
    """
    check_features("ring_info_nce", a, "b", b)
    check_scalar("ring_info_nce", "logit_scale", scale, a, positive=True)
    same = torch.arange(len(a), device=a.device)
    _, _, positive, rows, columns = torch.ops.encfast.info_nce(a, b, scale, same, None, both)
    return positive, rows, columns


def _merged(one: Tensor, other: Tensor) -> Tensor:
    """The sums of two sets of candidates as those of both."""
    largest = torch.maximum(one[0], other[0])
    return torch.stack([largest, torch.logaddexp(*(x[0] - largest + x[1] for x in (one, other)))])


def _info_nce_grads(
    drow: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    rows: Tensor,
    known: Tensor,
    *,
    own: bool,
    want: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and scale in one block of the whole batch's logits, of known sums."""
    columns, dcol, both = known[:2], known[2], known.shape[1] > 0
    # Without a pair of its own a block has no positive: the gradients of its logit cancel.
    dpositive = torch.zeros_like(drow) if own else drow + dcol if both else drow
    same = torch.arange(len(a), device=a.device)
    return torch.ops.encfast.info_nce_bwd(
        drow, dcol, dpositive, a, b, scale, same, None, rows, columns, both, *want
    )


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
        total = _siglip(a, b, scale, bias, own=True)
        for step in range(1, dist.get_world_size(group)):
            total = total + _siglip(a, _moved(b, step, group), scale, bias, own=False)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        a, b, scale, bias = ctx.saved_tensors
        da, db, dscale, dbias = (_wide_zeros(x) for x in (a, b, scale, bias))
        for step in range(dist.get_world_size(ctx.group)):
            leaves = [
                x.detach().requires_grad_() for x in (a, _moved(b, step, ctx.group), scale, bias)
            ]
            with torch.enable_grad():
                loss = _siglip(leaves[0], leaves[1], leaves[2], leaves[3], own=step == 0)
            grads_of_step = torch.autograd.grad(loss, leaves, grads[0])
            da += grads_of_step[0]
            db += _moved(grads_of_step[1], -step, ctx.group)
            dscale += grads_of_step[2]
            dbias += grads_of_step[3]
            del leaves, loss, grads_of_step  # before the next step's come beside them
        sums = zip((da, db, dscale, dbias), (a, b, scale, bias), strict=True)
        return *(x.to(like.dtype) for x, like in sums), None


def _siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, own: bool) -> Tensor:
    return ops.siglip(a, b, logit_scale=scale, logit_bias=bias, negative_only=not own)


def _wide_zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _moved(x: Tensor, places: int, group: dist.ProcessGroup | None) -> Tensor:
    """x of the process so many places before this one on the ring; this one's goes as far on."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if places % world == 0 or not x.numel():
        return x
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    to, source = (rank + places) % world, (rank - places) % world
    moves = [
        dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to),
        dist.P2POp(dist.irecv, found, group=group, group_peer=source),
    ]
    for work in dist.batch_isend_irecv(moves):
        work.wait()
    return found
