"""Which experts the tokens of a batch go to, and where each choice stands among their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """N tokens, K choices each, of E experts: what :func:`encfast.ops.route_tokens` returns.

    Choice j of token t has the number ``t * K + j``. Kept choices stand expert by expert, within an
    expert by (j, t): first choices in the order of their tokens, then second ones. They are a
    ragged batch of E sequences, ``cu_seqlens``, with at most N rows each; its length is known on
    the device alone, so every tensor has room for all N * K choices.

    Attributes:
        gates: fp32 ``[N, K]``: weight of each choice, 0 where it was dropped. Differentiable.
        expert_ids: int32 ``[N, K]``, -1 in rows that are no tokens.
        rows: int32 ``[N * K]``: the choice that stands at each slot, -1 behind the kept ones.
        slots: int32 ``[N, K]``: the slot of each choice, -1 where it was dropped.
        cu_seqlens: int32 ``[E + 1]``: running sum of the rows that each expert keeps.
        probabilities: fp32 ``[N, E]``: the router's scores, 0 in rows that are no tokens; None
            where expert ids came from elsewhere. Differentiable.
    """

    gates: Tensor
    expert_ids: Tensor
    rows: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    probabilities: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """N, rows that are no tokens included."""
        return self.slots.shape[0]

    @property
    def top_k(self) -> int:
        """K, the choices of a token."""
        return self.slots.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.cu_seqlens.shape[0] - 1

    def loads(self) -> Tensor:
        """int32 ``[E]``: rows that each expert keeps."""
        return self.cu_seqlens.diff()

    def dropped(self) -> Tensor:
        """bool ``[N, K]``: choices of tokens that found no room."""
        return (self.slots < 0) & (self.expert_ids >= 0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Routing:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def detach(self) -> Routing:
        """The same choices, with gates and probabilities cut off from the graph."""
        return self._map(Tensor.detach)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Routing:
        values: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(self)}
        mapped: dict[str, Any] = {n: None if x is None else f(x) for n, x in values.items()}
        return Routing(**mapped)


torch.export.register_dataclass(Routing, serialized_type_name="encfast.routing.Routing")
