"""encfast's grouped products in the mixtures of experts of transformers.

transformers routes; this sorts the choices by expert, runs the experts and sums. Choices with an id
of E or more are of no expert here, as its expert parallelism has it, and cost nothing.

Source: transformers.integrations.moe of transformers 5.24, whose `grouped_mm` has these meanings.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.integrations._transformers_support import LIBRARY, NAME
from encfast.layers.mlp import activate, activation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_LAYOUTS: tuple[dict[str, bool], ...] = (
    {},
    {"is_transposed": True, "has_bias": True},
    {"has_gate": False},
)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What takes the place of the ``forward`` of a module under ``use_experts_implementation``.

    Args:
        self: with E experts: ``gate_up_proj`` ``[E, 2F, C]`` (or ``up_proj`` ``[E, F, C]`` without
            a gate) and ``down_proj`` ``[E, C, F]``, the last two dimensions swapped with
            ``is_transposed``; biases under the same names and ``_bias``; float32, bfloat16 or
            float16, in which the products are computed.
        hidden_states: ``[T, C]``.
        top_k_index: integers ``[T, K]``; E and more stand for no expert.
        top_k_weights: ``[T, K]``.

    Returns:
        ``[T, C]`` in the dtype of ``hidden_states``. Differentiable in both float arguments and in
        the parameters.

    Raises:
        TypeError, ValueError: for experts or arguments of another form; the message names it.
    """
    _check(self)
    experts: int = self.num_experts
    ids = torch.where(top_k_index >= experts, -1, top_k_index).to(torch.int32)
    routing = ops.sort_choices(ids, top_k_weights.float().masked_fill(ids < 0, 0), experts)
    rows = ops.permute_rows(hidden_states, routing)  # [T * K, C], expert by expert
    rows = _linear(self, _up_name(self), rows, routing.cu_seqlens)
    rows = _linear(self, "down_proj", _activated(self, rows), routing.cu_seqlens)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    return ops.unpermute_rows(rows, routing).to(hidden_states.dtype)


def _up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _check(experts: Any) -> None:
    kind = type(experts).__name__
    for flag in _FLAGS:
        if not hasattr(experts, flag):
            raise TypeError(
                f"{kind} has no {flag}, expected experts under transformers' "
                f"use_experts_implementation, as {LIBRARY.newest} has it"
            )
    for name in (_up_name(experts), "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{kind}.{name} is {shape}, expected a tensor [E, out, in]")
        if weight.dtype not in _DTYPES:
            raise TypeError(
                f"{kind}.{name} has dtype {weight.dtype}, expected float32, bfloat16 or float16; "
                "another experts_implementation may take it"
            )


def _linear(experts: Any, name: str, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    layout = weight.mT if experts.is_transposed else weight  # [E, out, in]
    return ops.grouped_mm(rows.to(weight.dtype), layout, cu_seqlens, bias=bias)


def _activated(experts: Any, rows: Tensor) -> Tensor:
    """By the op where the gate is transformers' own; interleaved ones are of the class."""
    if not experts.has_gate:
        return activate(rows, _function(experts.act_fn), gated=False)
    own = type(experts)._apply_gate.__module__ == "transformers.integrations.moe"
    if own and experts.is_concatenated:
        return activate(rows, _function(experts.act_fn), gated=True)
    return experts._apply_gate(rows)


def _function(act: Any) -> Any:
    """The function that a module of transformers wraps, which the op is known by."""
    return activation("silu") if type(act).__name__ in ("SiLUActivation", "SiLU") else act


# ---- is this the transformers that encfast knows? ----


def interface() -> Any:
    """The module ``transformers.integrations.moe``.

    Raises:
        ImportError: if transformers is missing, or of a version without an ``ExpertsInterface``.
    """
    transformers = LIBRARY.load()
    try:
        from transformers.integrations import moe

        _ = moe.ExpertsInterface, moe.use_experts_implementation
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers {transformers.__version__} has no ExpertsInterface, which encfast's "
            f"experts need; they were checked with {LIBRARY.checked_with}"
        ) from error
    return moe


def self_test() -> None:
    """Small experts of each layout, forward and every gradient, against a loop over experts.

    Raises:
        ImportError: if transformers is missing, or too old to have an ``ExpertsInterface``.
        RuntimeError: if a result differs or a call fails; it names the layout and both versions.
    """
    moe = interface()
    for layout in _LAYOUTS:
        try:
            found, expected = (_sample_run(moe, layout, name) for name in (NAME, "eager"))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        except Exception as error:
            import transformers

            raise RuntimeError(
                f"transformers {transformers.__version__} passes experts in a way that encfast "
                f"does not know, seen with {layout or 'the plain layout'}; it was checked with "
                f"{LIBRARY.checked_with}: {error}"
            ) from error


def _sample_run(moe: Any, layout: dict[str, bool], name: str) -> list[Tensor]:
    """Result and gradients of a small mixture by the implementation of this name."""
    interface = moe.ExpertsInterface()
    interface[NAME] = experts_forward  # of this object alone, not of transformers
    kind = moe.use_experts_implementation(experts_interface=interface, **layout)(_sample())
    draw = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        experts = kind(SimpleNamespace(_experts_implementation=name), draw=draw, **layout)
        x, gates = _drawn(draw, 5, 8), _drawn(draw, 5, 2)
        ids = torch.tensor([[0, 2], [2, 3], [3, 3], [2, 0], [0, 3]])  # 1 idle, 3 is none
        out = experts(x, ids, gates)
        return [out, *torch.autograd.grad(out.square().sum(), [x, gates, *experts.parameters()])]


def _drawn(draw: torch.Generator, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    return x.requires_grad_()


def _sample() -> type[nn.Module]:
    """A new class each time, as ``use_experts_implementation`` changes the one it is given."""

    class Sample(nn.Module):
        _apply_gate: Any  # transformers gives it

        def __init__(
            self,
            config: Any,
            *,
            draw: torch.Generator,
            is_transposed: bool = False,
            has_bias: bool = False,
            has_gate: bool = True,
        ) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 3, nn.SiLU()
            sizes = {"gate_up_proj" if has_gate else "up_proj": (12 if has_gate else 6, 8)}
            for name, (out, into) in (sizes | {"down_proj": (8, 6)}).items():
                shape = (3, into, out) if is_transposed else (3, out, into)
                self.register_parameter(name, nn.Parameter(_drawn(draw, *shape).detach()))
                if has_bias:
                    bias = nn.Parameter(_drawn(draw, 3, out).detach())
                    self.register_parameter(f"{name}_bias", bias)

        def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(self.num_experts):
                token, choice = torch.where(ids == e)
                hidden = self.linear("gate_up_proj" if self.has_gate else "up_proj", e, x[token])
                hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
                y = self.linear("down_proj", e, hidden) * gates[token, choice, None]
                out = out.index_add(0, token, y)
            return out

        def linear(self, name: str, e: int, x: Tensor) -> Tensor:
            weight = getattr(self, name)[e]
            y = x @ (weight if self.is_transposed else weight.mT)
            return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    return Sample
