"""A linear layer over a packed weight: encfast against what PyTorch offers for inference.

fp32 and bf16 against `F.linear` and the separate steps behind it; int8 against PyTorch's
dynamically quantised linear layer (fp32 in and out, a scale per output channel), in percent of the
fp32 roof. Each is compared with the same maths in float64: int8 by the cosine of the whole result,
as a quantised layer is not close by element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant
from torch import Tensor

from encfast import ops

MIN_COSINE = 0.999  # of one int8 layer on normal values
# What follows the product in an encoder: the projection alone, the first layer of an MLP, the
# second layer of a post-norm block.
EPILOGUES = ("bias", "bias+gelu", "bias+add+layernorm")


@dataclass(frozen=True)
class Inputs:
    """One layer and its input; `residual` and the norm have the width of the result."""

    x: Tensor  # [N, C]
    weight: Tensor  # [F, C] float32
    bias: Tensor  # [F] float32
    residual: Tensor  # [N, F]


def _inputs(n: int, c: int, f: int, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return Inputs(
        torch.randn(n, c, generator=g).to(dtype),
        torch.randn(f, c, generator=g) * c**-0.5,
        torch.randn(f, generator=g),
        torch.randn(n, f, generator=g).to(dtype),
    )


def _follow(y: Tensor, i: Inputs, epilogue: str) -> Tensor:
    """The steps behind the linear layer, one by one."""
    if epilogue == "bias+gelu":
        return F.gelu(y)
    if epilogue == "bias+add+layernorm":
        return F.layer_norm(y + i.residual.to(y.dtype), y.shape[1:])
    return y


def _encfast(format: str, epilogue: str):
    def make(i: Inputs) -> Call:
        packed = ops.pack_linear(i.weight, format=format)
        options = {
            "bias": {},
            "bias+gelu": {"activation": "gelu"},
            "bias+add+layernorm": {"residual": i.residual, "norm": "layernorm"},
        }[epilogue]
        width = i.weight.shape[0]
        return Call(
            lambda: ops.packed_linear(i.x, packed, width, format=format, bias=i.bias, **options)
        )

    return make


def _torch_linear(epilogue: str):
    def make(i: Inputs) -> Call:
        weight, bias = i.weight.to(i.x.dtype), i.bias.to(i.x.dtype)
        return Call(lambda: _follow(F.linear(i.x, weight, bias), i, epilogue))

    return make


def _torch_int8(epilogue: str):
    def make(i: Inputs) -> Call:
        scale = i.weight.abs().amax(1) / 127
        quantized = torch.quantize_per_channel(
            i.weight, scale, torch.zeros_like(scale, dtype=torch.int64), 0, torch.qint8
        )
        packed = torch.ops.quantized.linear_prepack(quantized, i.bias)
        # Without VNNI two products of 8 bits are added in 16, which overflows: PyTorch then asks
        # for rows of 7 bits.
        seven = not torch.cpu._is_vnni_supported()
        return Call(
            lambda: _follow(
                torch.ops.quantized.linear_dynamic(i.x, packed, reduce_range=seven), i, epilogue
            )
        )

    return make


def _verify(epilogue: str, format: str):
    def verify(i: Inputs, variant: Variant, out: Tensor) -> Gate:
        y = F.linear(i.x.double(), i.weight.double(), i.bias.double())
        want = _follow(y, i, epilogue)
        if format == "int8":
            cosine = F.cosine_similarity(out.double().flatten(), want.flatten(), 0).item()
            return Gate(cosine >= MIN_COSINE, f"cosine {cosine:.5f}")
        error = ((out - want).abs().max() / want.abs().max()).item()
        limit = 1e-5 if format == "fp32" else 0.02
        return Gate(error <= limit, f"max error {error:.1e} of the largest value")

    return verify


def _spec(format: str, shape: tuple[int, int, int], epilogue: str, setting: Setting) -> BenchSpec:
    n, c, f = shape
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    peer = "quantized.linear_dynamic" if format == "int8" else "F.linear"
    make_peer = _torch_int8 if format == "int8" else _torch_linear
    return BenchSpec(
        name=f"packed_linear/{format}-N{n}-C{c}-F{f}-{epilogue}",
        title=f"packed_linear {format}, N={n}, C={c}, F={f}, {epilogue}",
        inputs=lambda: _inputs(n, c, f, dtype),
        variants=(
            Variant(peer, dtype, make_peer(epilogue), torch_products=format != "int8"),
            Variant("encfast", dtype, _encfast(format, epilogue), ours=True),
        ),
        verify=_verify(epilogue, format),
        flops=lambda i: 2.0 * n * c * f,
        pairs=(("encfast", peer),),
        budget_s=0.1 if setting.suite == "tiny" else 0.5,
    )


# (N, C, F) and what follows: of MiniLM (C=384), BERT-base and BERT-large.
QUICK = (((1024, 384, 1536), "bias+gelu"),)
FULL = tuple(
    ((n, c, f), epilogue)
    for n in (32, 1024)
    for c, f, epilogue in (
        (384, 1152, "bias"),
        (384, 1536, "bias+gelu"),
        (1536, 384, "bias+add+layernorm"),
        (768, 2304, "bias"),
        (768, 768, "bias+add+layernorm"),
        (768, 3072, "bias+gelu"),
        (3072, 768, "bias+add+layernorm"),
        (1024, 4096, "bias+gelu"),
        (4096, 1024, "bias+add+layernorm"),
    )
)


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite; there is no GPU kernel."""
    if setting.device != "cpu":
        return []
    cases = {"tiny": (((5, 24, 16), EPILOGUES[-1]),), "quick": QUICK, "full": FULL}
    return [
        _spec(format, shape, epilogue, setting)
        for shape, epilogue in cases[setting.suite]
        for format in ("fp32", "bf16", "int8")
    ]
