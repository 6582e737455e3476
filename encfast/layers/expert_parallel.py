"""Mixtures whose experts live on several processes: rows travel to them and back.

Each process holds E / world consecutive experts and routes its own tokens among all E, so capacity
is counted per process, as in DeepSpeed-MoE (arXiv 2201.05596). The mixture itself knows nothing of
it: :class:`ExpertParallel` takes the place of its ``experts``.

A training step::

    parallelise_experts(model, group)
    loss(own_tokens).backward()
    average_gradients(model, group)
    optimizer.step()

is the step of one process on the mean of the processes' losses. Every process must call every layer
in the same order, with or without gradients alike; one without tokens calls it on none. Under
``DistributedDataParallel`` name :func:`expert_parameters` as those to be ignored.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from encfast import ops
from encfast.layers.moe import MoE
from encfast.routing import Routing


class ExpertParallel(nn.Module):
    """This process's slice of a stack of experts, and the way to the other slices.

    Has the call of :class:`~encfast.layers.Experts`. Per call two all-to-alls of rows, one of E
    counts and one host read, of the counts: what is sent must be known to the host.

    ``state_dict`` holds the slice, as ``local.*``. ``load_state_dict`` takes that, or the stacks of
    a checkpoint of one process under their own names (``up``, not ``local.up``), of which it loads
    its slice of the first dimension; such a checkpoint is the slices one after another again.

    Args:
        experts: all E of them, the same on every process: a module whose parameters are stacks with
            the expert first. It is copied in part and not kept.
        group: gloo on CPUs, NCCL on GPUs; None is the default group.

    Raises:
        ValueError: if the size of ``group`` does not divide E.
    """

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.world = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.num_experts = _num_experts(experts)
        _check_divides(self.world, self.num_experts)
        self.local = _part(experts, self._slice())
        self.register_load_state_dict_pre_hook(_take_slices)

    def forward(self, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Each row through the expert whose group it stands in, wherever that is.

        Args:
            rows: ``[M, C]`` of this process, the same dtype on all.
            cu_seqlens: int32 ``[E + 1]``, where the experts' groups begin; at most M.

        Returns:
            ``[M, C]``; rows beyond the last group are 0. Differentiable in ``rows``, and on the
            processes of the experts in their parameters.
        """
        counts = cu_seqlens.diff()  # [E]
        arriving = torch.empty_like(counts)  # [world * E / world], by sender
        dist.all_to_all_single(arriving, counts, group=self.group)
        by_process = torch.stack([counts, arriving]).view(2, self.world, -1).sum(2)
        sent, received = by_process.tolist()

        arrived = _Exchange.apply(rows[: sum(sent)], sent, received, self.group)
        routing = self._by_expert(arriving, sum(received))
        found = self.local(ops.permute_rows(arrived, routing), routing.cu_seqlens)
        found = ops.permute_rows(found, _inverse(routing))
        back = _Exchange.apply(found, received, sent, self.group)
        return nn.functional.pad(back, (0, 0, 0, rows.shape[0] - back.shape[0]))

    def _by_expert(self, arriving: Tensor, n: int) -> Routing:
        """Of n rows that stand by sender, then by expert."""
        local = self.num_experts // self.world
        ids = torch.arange(local, dtype=torch.int32, device=arriving.device).repeat(self.world)
        ids = ids.repeat_interleave(arriving, output_size=n)[:, None]
        return ops.sort_choices(ids, torch.ones_like(ids, dtype=torch.float32), local)

    def _slice(self) -> slice:
        local = self.num_experts // self.world
        return slice(self.rank * local, (self.rank + 1) * local)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        of = self._slice()
        return f"experts {of.start}..{of.stop - 1} of {self.num_experts}, process {self.rank}"


def parallelise_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replaces the experts of every :class:`~encfast.layers.MoE` in ``model``, in place.

    Before the optimizer is made, on every process, with the same weights everywhere.

    Raises:
        ValueError: if the size of ``group`` does not divide a layer's number of experts, if a layer
            is parallel already, or if there is none. The model is left as it was.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoE)}
    if not layers:
        raise ValueError("model has no MoE layer, expected one at least")
    for name, moe in layers.items():
        if isinstance(moe.experts, ExpertParallel):
            raise ValueError(f"the experts of layer {name!r} are parallel already")
        _check_divides(dist.get_world_size(group), moe.num_experts, f" of layer {name!r}")
    for moe in layers.values():
        moe.experts = ExpertParallel(moe.experts, group)


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name the parameters of ``model`` that differ between processes; others are replicated."""
    return {
        name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertParallel)
        for name, parameter in module.named_parameters(prefix)
    }


def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Makes ``grad`` that of the mean of the processes' losses, in place, after ``backward``.

    Gradients of replicated parameters are averaged. Those of experts hold the sum over all
    processes already and are divided by their number. A replicated parameter that has a gradient on
    some processes counts as 0 on the others; one without any keeps None. One host read.

    Args:
        model: after :func:`parallelise_experts` with the same group.
        group: of all processes that train ``model``.
    """
    world = dist.get_world_size(group)
    experts = {id(p) for p in expert_parameters(model).values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if id(p) in experts and p.grad is not None:
            p.grad.div_(world)
    dense = [p for p in trained if id(p) not in experts]
    if not dense:
        return
    used = torch.tensor([p.grad is not None for p in dense], dtype=torch.int32).to(dense[0].device)
    dist.all_reduce(used, group=group)
    works = []
    for p, count in zip(dense, used.tolist(), strict=True):
        if count == 0:
            continue
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(world)
        works.append(dist.all_reduce(p.grad, group=group, async_op=True))
    for work in works:
        work.wait()


class _Exchange(torch.autograd.Function):
    """Rows to the processes: the first ``sent[0]`` to process 0, and so on. Its own adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.way_back = received, sent, group
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grads[0], *ctx.way_back), None, None, None


def _inverse(routing: Routing) -> Routing:
    """The permutation of rows that undoes one of single choices, none dropped."""
    rows, slots = routing.slots.flatten(), routing.rows[:, None]
    return Routing(routing.gates, routing.expert_ids, rows, slots, routing.cu_seqlens)


def _num_experts(experts: nn.Module) -> int:
    counts = {name: p.shape[0] for name, p in experts.named_parameters()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"experts has parameters of first dimensions {counts}, expected stacks of one number "
            "of experts"
        )
    return next(iter(counts.values()))


def _check_divides(world: int, num_experts: int, layer: str = "") -> None:
    if num_experts % world:
        raise ValueError(
            f"group has {world} processes, expected a divisor of the {num_experts} experts{layer}"
        )


def _part(experts: nn.Module, of: slice) -> nn.Module:
    """A copy of the module with these experts alone; the others are never copied."""
    parts: dict[int, Any] = {
        id(p): nn.Parameter(p.detach()[of].clone(), p.requires_grad) for p in experts.parameters()
    }
    return copy.deepcopy(experts, parts)


def _take_slices(
    module: ExpertParallel,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Turns the stacks of a whole checkpoint into this process's slices."""
    for name, _ in module.local.named_parameters():
        whole = state_dict.pop(prefix + name, None)
        if whole is None:
            continue
        if whole.shape[0] != module.num_experts:
            errors.append(
                f"{prefix}{name} has {whole.shape[0]} experts, expected {module.num_experts}"
            )
            continue
        state_dict[f"{prefix}local.{name}"] = whole[module._slice()]
