"""Mixture of experts in the place of an MLP: a router, experts, and what losses are taken from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import losses, ops
from encfast.config import BlockConfig
from encfast.layers.dropout import StaticFloat
from encfast.layers.experts import Experts
from encfast.layers.mlp import MLP
from encfast.packed import PackedBatch
from encfast.routing import Routing


@dataclass(frozen=True)
class MoEConfig:
    """How tokens find their experts; :func:`encfast.ops.route_tokens` has the words' meaning.

    Noise and jitter act in training alone. In evaluation choices queue by position, so that a
    result does not depend on chance.
    """

    num_experts: int  # E
    top_k: int = 1  # K experts of a token, 1..E
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool | Literal["chosen", "kept"] = False  # gates of a token sum to 1
    capacity_factor: float | None = None  # room of an expert in units of T / E; None: dropless
    eval_capacity_factor: float | None = None  # the same in evaluation
    min_capacity: int = 0  # room of an expert at least
    priority: Literal["position", "random"] = "position"  # who finds room, in training
    noise: Literal["gumbel", "gumbel_rest"] | None = None  # on the ranking, in training
    jitter: float = 0.0  # router input times uniform(1 - jitter, 1 + jitter), in training
    residual: bool = False  # beside a dense MLP, mixed per token (DeepSpeed-MoE)

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be >= 1, got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, expected 1..{self.num_experts}, the number of experts"
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not factor > 0:
                raise ValueError(f"{name} is {factor}, expected more than 0, or None for no limit")
        if self.min_capacity < 0:
            raise ValueError(f"min_capacity is {self.min_capacity}, expected >= 0")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}, expected 0 <= jitter < 1")
        for name, known in (
            ("scoring", ("softmax", "sigmoid")),
            ("renormalise", (False, True, "chosen", "kept")),
            ("priority", ("position", "random")),
            ("noise", (None, "gumbel", "gumbel_rest")),
        ):
            if getattr(self, name) not in known:
                options = ", ".join(map(repr, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {options}")


def pyramid(*steps: tuple[int, int]) -> tuple[int, ...]:
    """Experts of each MoE layer: ``pyramid((10, 32), (2, 64))`` is ten layers of 32, two of 64.

    Source: the P of PR-MoE, DeepSpeed-MoE (arXiv 2201.05596), section 4.1.

    Raises:
        ValueError: if a step has no layers or no experts.
    """
    for layers, experts in steps:
        if layers < 1 or experts < 1:
            raise ValueError(f"step ({layers}, {experts}), expected layers and experts >= 1")
    return tuple(experts for layers, experts in steps for _ in range(layers))


class RouterLosses(NamedTuple):
    """Terms that keep a router healthy; :func:`sum_losses` adds those of several layers."""

    balance: Tensor  # fp32 scalar: encfast.losses.load_balance_loss
    z: Tensor  # fp32 scalar: encfast.losses.router_z_loss
    dropped: Tensor  # fp32 scalar without gradient: share of choices that found no room


def sum_losses(terms: list[RouterLosses]) -> RouterLosses:
    """Each of ``terms`` summed over layers; ``dropped`` is their mean.

    Raises:
        ValueError: for no layers.
    """
    if not terms:
        raise ValueError("terms is empty, expected the losses of one MoE layer at least")
    balance, z, dropped = (torch.stack(values) for values in zip(*terms, strict=True))
    return RouterLosses(balance.sum(), z.sum(), dropped.mean())


class MoEOutput(NamedTuple):
    """What :class:`MoE` returns."""

    data: Any  # like the input: [..., C], or a PackedBatch of rows [N, C]
    routing: Routing  # of the N rows; gates and probabilities are differentiable
    logits: Tensor  # fp32 [N, E]: the router's
    mask: Tensor | None  # bool [N]: the rows that are tokens

    def losses(self, choices: Literal["first", "all"] = "first") -> RouterLosses:
        """Load balance (counting ``choices``, see there), z-loss and the share that was dropped."""
        routing = self.routing
        chosen = (routing.expert_ids >= 0).sum().clamp(min=1)
        return RouterLosses(
            losses.load_balance_loss(routing, choices=choices),
            losses.router_z_loss(self.logits, self.mask),
            routing.dropped().sum() / chosen,
        )


class MoE(nn.Module):
    """Each token through ``top_k`` of E experts: ``y = sum_j gate_j * expert_j(x)``.

    A token that found no room at an expert gets nothing from it; the residual stream around the
    layer carries it on. The router computes in float32, whatever the rows are in.

    Source: Shazeer et al. (arXiv 1701.06538), Switch (arXiv 2101.03961), DeepSpeed-MoE (arXiv
    2201.05596), Mixtral (arXiv 2401.04088): :class:`MoEConfig` tells them apart.

    Args:
        config: of the experts, see :class:`~encfast.layers.Experts`.
        moe: of the router.
    """

    jitter = StaticFloat()
    capacity_factor = StaticFloat()
    eval_capacity_factor = StaticFloat()

    def __init__(
        self,
        config: BlockConfig,
        moe: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.moe = moe
        self.jitter = moe.jitter
        self.capacity_factor = moe.capacity_factor
        self.eval_capacity_factor = moe.eval_capacity_factor
        self.router = nn.Linear(config.dim, moe.num_experts, bias=False, **factory)
        # Rows [M, C] that stand expert by expert, int32 [E + 1] -> rows [M, C].
        self.experts: nn.Module = Experts(config, moe.num_experts, **factory)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.out_features

    def forward(self, x: Tensor | PackedBatch, *, mask: Tensor | None = None) -> MoEOutput:
        """Routes, computes and sums.

        Args:
            x: ``[..., C]``, or a PackedBatch of rows ``[N, C]``.
            mask: bool of x's leading shape, False where a row is padding: it takes no room at any
                expert, counts in no loss and gives 0. None: all rows are tokens.

        Returns:
            ``data`` of x's type and shape, the routing, the router's logits, and the mask of rows.

        Raises:
            ValueError: for a mask of another shape, beside a PackedBatch, or other errors of
                :func:`encfast.ops.route_tokens`.
        """
        rows, mask = _flat(x, mask)
        logits = self._logits(rows)
        routing = self._route(logits, mask)
        sent = ops.permute_rows(rows, routing)  # [N * K, C], expert by expert
        found = ops.unpermute_rows(self.experts(sent, routing.cu_seqlens), routing)
        return MoEOutput(_like(x, found), routing, logits, mask)

    def _logits(self, rows: Tensor) -> Tensor:
        if self.training and self.jitter > 0:
            rows = ops.jitter_rows(rows, self.jitter)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.float(), self.router.weight.float())

    def _route(self, logits: Tensor, mask: Tensor | None) -> Routing:
        moe, training = self.moe, self.training
        return ops.route_tokens(
            logits,
            moe.top_k,
            mask=mask,
            scoring=moe.scoring,
            renormalise=moe.renormalise,
            capacity_factor=self.capacity_factor if training else self.eval_capacity_factor,
            min_capacity=moe.min_capacity,
            priority=moe.priority if training else "position",
            noise=moe.noise if training else None,
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return str(self.moe)


class ResidualMoE(nn.Module):
    """A dense MLP and a mixture side by side: ``c_0 * MoE(x) + c_1 * MLP(x)``.

    ``c = softmax(W x + b)`` per token. Source: the R of PR-MoE, DeepSpeed-MoE (arXiv 2201.05596),
    section 4.1; which coefficient is whose from deepspeed.moe.layer.

    Args:
        config: of the MLP and of each expert.
        moe: of the router.
    """

    def __init__(
        self,
        config: BlockConfig,
        moe: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.moe = MoE(config, moe, **factory)
        self.mlp = MLP(config, **factory)
        self.coefficient = nn.Linear(config.dim, 2, **factory)

    def forward(self, x: Tensor | PackedBatch, *, mask: Tensor | None = None) -> MoEOutput:
        """``x`` and ``mask`` as in :meth:`MoE.forward`."""
        rows, mask = _flat(x, mask)
        out = self.moe(rows, mask=mask)
        weights = self.coefficient(rows).softmax(-1, dtype=torch.float32).to(out.data.dtype)
        mixed = weights[:, :1] * out.data + weights[:, 1:] * self.mlp(rows)
        if mask is not None:
            mixed = mixed.masked_fill(~mask[:, None], 0)
        return out._replace(data=_like(x, mixed))


def _flat(x: Tensor | PackedBatch, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows [N, C] and mask [N]. What stands in padding may be NaN: it is cleared."""
    if isinstance(x, PackedBatch):
        if mask is not None:
            raise ValueError("mask is given beside a PackedBatch, whose rows are all tokens")
        return x.data, None
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:-1])}, that of x "
                "without its channels"
            )
        mask = mask.reshape(-1)
        return x.reshape(-1, x.shape[-1]).masked_fill(~mask[:, None], 0), mask
    return x.reshape(-1, x.shape[-1]), None


def _like(x: Tensor | PackedBatch, rows: Tensor) -> Tensor | PackedBatch:
    return x.with_data(rows) if isinstance(x, PackedBatch) else rows.view(x.shape)


def moe_layer(config: BlockConfig, moe: MoEConfig, **factory: Any) -> MoE | ResidualMoE:
    """:class:`ResidualMoE` if ``moe.residual``, else :class:`MoE`."""
    return (ResidualMoE if moe.residual else MoE)(config, moe, **factory)
