"""Experts over packed weights: what a mixture runs when it is not trained."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.inference._modules import ACTIVATIONS, FORMATS
from encfast.layers import Experts, MoE


class PackedExperts(nn.Module):
    """Takes the place of :class:`~encfast.layers.Experts` for inference on the CPU.

    Holds packed copies of the weights and no parameters: training goes on with what it was made
    from. Bias, activation and gate run in the epilogue of each product. Reads the groups' lengths
    on the host.

    Args:
        experts: packed as they are now.
        dtype: of the packed weights: float32, bfloat16 or int8.

    Raises:
        NotImplementedError: for experts on another device than the CPU, or with an activation that
            :func:`encfast.ops.packed_linear` does not have.
        ValueError: for another dtype.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype not in FORMATS:
            raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, FORMATS))}")
        if experts.up.device.type != "cpu":
            raise NotImplementedError(
                f"PackedExperts: experts are on {experts.up.device}, packed weights serve the CPU; "
                "move the model there first"
            )
        if experts.act not in ACTIVATIONS:
            raise NotImplementedError(
                f"PackedExperts: experts.act is {experts.act!r}, served are "
                f"{', '.join(ACTIVATIONS.values())}"
            )
        self.dtype = dtype
        act: dict[str, Any] = {"activation": ACTIVATIONS[experts.act], "gated": experts.glu}
        with torch.no_grad():
            self._up = _packed(experts.up, experts.up_bias, FORMATS[dtype], **act)
            self._down = _packed(experts.down, experts.down_bias, FORMATS[dtype])

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self._up)

    @property
    def nbytes(self) -> int:
        """Of the packed weights."""
        return sum(linear["packed"].nbytes for linear in (*self._up, *self._down))

    @torch.no_grad()
    def forward(self, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Rows ``[M, C]`` -> ``[M, C]``, 0 beyond the last group.

        Args:
            rows: in the order of their experts.
            cu_seqlens: int32 ``[E + 1]``: expert e owns rows ``cu_seqlens[e] : cu_seqlens[e + 1]``.

        Returns:
            ``[M, C]`` in the dtype of ``rows``.
        """
        out = torch.zeros_like(rows)
        for (begin, end), up, down in zip(
            pairwise(cu_seqlens.tolist()), self._up, self._down, strict=True
        ):
            if end > begin:
                hidden = ops.packed_linear(rows[begin:end], **up)
                out[begin:end] = ops.packed_linear(hidden, **down)
        return out

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.num_experts} experts, {self.dtype}"


def pack_experts(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Puts packed weights into every mixture of a model, for inference on the CPU.

    Args:
        model: changed in place and switched to evaluation; its experts' parameters leave it.
        dtype: of the packed weights: float32, bfloat16, or int8 (a scale per output channel, rows
            quantised as they come).

    Returns:
        The model.

    Raises:
        NotImplementedError, ValueError: as :class:`PackedExperts`, and for a model without plain
            experts; nothing is changed then.
    """
    found = [m for m in model.modules() if isinstance(m, MoE) and type(m.experts) is Experts]
    if not found:
        raise ValueError(
            f"pack_experts: {type(model).__name__} has no MoE layer with plain Experts"
        )
    packed = [PackedExperts(moe.experts, dtype) for moe in found]  # type: ignore[arg-type]
    for moe, experts in zip(found, packed, strict=True):
        moe.experts = experts
    return model.eval()


def _packed(weights: Tensor, biases: Tensor | None, format: str, **rest: Any) -> list[dict]:
    """For each expert the arguments of packed_linear."""
    return [
        {
            "packed": ops.pack_linear(weight, format=format),
            "out_features": weight.shape[0],
            "format": format,
            "bias": None if biases is None else biases[e].float().clone(),
            **rest,
        }
        for e, weight in enumerate(weights)
    ]
