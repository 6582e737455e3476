"""Modules of :mod:`encfast.layers` as calls of ops, with everything at hand but the rows.

Each call is read from its module once, by copying, and keeps no reference to it. The ops are called
behind their checks: the encoder checks a batch where it comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.layers import MLP, Attention, Block, Embeddings, Linear, Norm, Rotary, activation
from encfast.layers.dropout import Dropout
from encfast.packed import PackedBatch

LINEARS = ("qkv", "out", "up", "down")
_NORMS = ("norm1", "norm2")
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
ACTIVATIONS = {activation(name): name for name in ("gelu", "gelu_tanh", "silu", "relu")}
_packed_linear = torch.ops.encfast.packed_linear.default
_varlen_attn = torch.ops.encfast.varlen_attn.default
_rotary = torch.ops.encfast.rotary.default
_gather_rows = torch.ops.encfast.gather_rows.default

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def expect(name: str, module: Any, *kinds: type[ModuleT]) -> ModuleT:
    """``module``, if it is plainly one of ``kinds``: only then is it known what it computes.

    Raises:
        NotImplementedError: naming the module, for another class (a subclass, an adapter, a
            quantised layer) and for forward hooks, which would not run.
    """
    if type(module) not in kinds:
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise NotImplementedError(
            f"compile_encoder: {name} is a {found}, served is a plain "
            f"{kinds[0].__qualname__}; merge adapters and undo other replacements of layers first"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotImplementedError(
            f"compile_encoder: {name} has forward hooks, which would not run; remove them first"
        )
    return module


def _copied(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    return None if x is None else x.detach().to(dtype, copy=True)


@dataclass(frozen=True)
class NormCall:
    """A norm. Its statistics and arithmetic are in fp32, whatever the module's precision."""

    kind: str
    weight: Tensor  # [C]
    bias: Tensor | None  # [C]
    eps: float

    @classmethod
    def read(cls, name: str, module: nn.Module) -> NormCall:
        norm = expect(name, module, Norm)
        weight = _copied(norm.weight)
        if norm.unit_offset:
            weight = 1 + weight
        return cls(norm.kind, weight, _copied(norm.bias), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def optional_norm(name: str, module: nn.Module) -> NormCall | None:
    """None where the model has an ``nn.Identity`` in a norm's place."""
    return None if type(module) is nn.Identity else NormCall.read(name, module)


@dataclass(frozen=True)
class LinearCall:
    """``packed_linear`` and its epilogue, as tuples in the order of the op's arguments."""

    weight: tuple[Any, ...]  # packed, out_features, format, bias, activation, gated
    norm: tuple[Any, ...]  # norm, norm_weight, norm_bias, norm_eps

    @classmethod
    def read(
        cls,
        name: str,
        module: nn.Module,
        format: str,
        *,
        act: str | None = None,
        gated: bool = False,
        norm: NormCall | None = None,
    ) -> LinearCall:
        linear = expect(name, module, Linear, nn.Linear)
        packed = ops.pack_linear(linear.weight.detach(), format=format)
        tail = (None,) * 4 if norm is None else (norm.kind, norm.weight, norm.bias, norm.eps)
        return cls((packed, linear.out_features, format, _copied(linear.bias), act, gated), tail)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _packed_linear(x, *self.weight, residual, *self.norm)

    @property
    def nbytes(self) -> int:
        """Of the packed weight."""
        return self.weight[0].nbytes


@dataclass(frozen=True)
class EmbedCall:
    """``norm(word[id] + position[pos] + segment[type])``."""

    word: Tensor  # [V, E]
    position: Tensor | None  # [P, E], row 0 is that of position 0
    segment: Tensor | None  # [T, E]
    start: Tensor | None  # [P, E] or [E]: position + segment[0], the sum of most batches
    norm: NormCall | None

    @classmethod
    def read(cls, name: str, module: nn.Module, dtype: torch.dtype) -> EmbedCall:
        embed = expect(name, module, Embeddings)
        expect(f"{name}.drop", embed.drop, Dropout)
        word = expect(f"{name}.word", embed.word, nn.Embedding).weight
        position = segment = start = None
        if embed.position is not None:
            table = expect(f"{name}.position", embed.position, nn.Embedding)
            start = position = table.weight[embed.position_offset :]
        if embed.segment is not None:
            segment = expect(f"{name}.segment", embed.segment, nn.Embedding).weight
            start = segment[0] if start is None else start + segment[0]
        return cls(
            _copied(word, dtype),
            _copied(position, dtype),
            _copied(segment, dtype),
            _copied(start, dtype),
            optional_norm(f"{name}.norm", embed.norm),
        )

    def __call__(self, tokens: PackedBatch, segments: Tensor | None) -> Tensor:
        """Ids ``[N]`` -> rows ``[N, E]``."""
        x = F.embedding(tokens.data, self.word)
        rest = self.start
        if segments is not None and self.segment is not None:
            x.add_(F.embedding(segments, self.segment))
            rest = self.position
        if rest is not None:
            x.add_(F.embedding(tokens.positions(), rest) if self.position is not None else rest)
        return x if self.norm is None else self.norm(x)


@dataclass(frozen=True)
class RotaryCall:
    """Tables of rotation angles, computed in fp32."""

    inv_freq: Tensor  # [D / 2]

    @classmethod
    def read(cls, name: str, module: nn.Module) -> RotaryCall:
        return cls(_copied(expect(name, module, Rotary).inv_freq))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 ``[N, D / 2]``."""
        angles = positions[:, None] * self.inv_freq
        return angles.cos(), angles.sin()


@dataclass(frozen=True)
class BlockCall:
    """One block: five ops, and two norms besides if it is pre-norm.

    A post-norm block's norms are in the epilogues of ``out`` and ``down``.
    """

    linears: tuple[LinearCall, ...]  # in the order of LINEARS
    norms: tuple[NormCall | None, ...]  # in front of qkv and of up
    heads: tuple[int, int]  # of queries, of keys
    head_dim: int
    rule: tuple[Any, ...]  # varlen_attn's arguments behind max_seqlen_k

    @classmethod
    def read(cls, name: str, module: nn.Module, formats: Mapping[str, str]) -> BlockCall:
        block = expect(name, module, Block)
        attn = expect(f"{name}.attn", block.attn, Attention)
        mlp = expect(f"{name}.mlp", block.mlp, MLP)
        if block.scale1 is not None or block.scale2 is not None:
            raise NotImplementedError(
                f"compile_encoder: {name} has LayerScale, which packed blocks do not apply; call "
                "the model itself"
            )
        if attn.q_norm is not None or type(block.branch_norm1) is not nn.Identity:
            raise NotImplementedError(
                f"compile_encoder: {name} has norms over heads or behind its branches, which "
                "packed blocks do not apply; call the model itself"
            )
        for drop in ("attn_drop", "mlp_drop", "mlp.drop"):
            expect(f"{name}.{drop}", block.get_submodule(drop), Dropout)
        if mlp.act not in ACTIVATIONS:
            raise NotImplementedError(
                f"compile_encoder: {name}.mlp.act is {mlp.act!r}, served are "
                f"{', '.join(ACTIVATIONS.values())}"
            )
        norms = tuple(optional_norm(f"{name}.{n}", getattr(block, n)) for n in _NORMS)
        nothing: tuple[NormCall | None, ...] = (None, None)
        in_front, behind = (nothing, norms) if block.post else (norms, nothing)
        act: dict[str, Any] = {"act": ACTIVATIONS[mlp.act], "gated": mlp.glu}
        linears = (
            LinearCall.read(f"{name}.attn.qkv", attn.qkv, formats["qkv"]),
            LinearCall.read(f"{name}.attn.out", attn.out, formats["out"], norm=behind[0]),
            LinearCall.read(f"{name}.mlp.up", mlp.up, formats["up"], **act),
            LinearCall.read(f"{name}.mlp.down", mlp.down, formats["down"], norm=behind[1]),
        )
        biases = (_copied(attn.slopes), None, None, None)
        rule = (None, attn.causal, list(attn.window), *biases, attn.softcap, None, None)
        return cls(linears, in_front, (attn.num_heads, attn.kv_heads), attn.head_dim, rule)

    def __call__(
        self,
        x: Tensor,
        tokens: PackedBatch,
        rope: tuple[Tensor, Tensor] | None,
        rows: Tensor | None,
    ) -> Tensor:
        """Rows ``[N, C]`` -> ``[N, C]``, or ``[M, C]`` of int64 ``rows`` ``[M]``; -1: zeros."""
        qkv, out, up, down = self.linears
        norm1, norm2 = self.norms
        seen = x if norm1 is None else norm1(x)
        heads = self._attend(qkv(seen), tokens, rope)  # [N, H * D]
        if rows is not None:
            x, heads = _gather_rows(x, rows), _gather_rows(heads, rows)
        x = out(heads, x)
        return down(up(x if norm2 is None else norm2(x)), x)

    def _attend(
        self, qkv: Tensor, tokens: PackedBatch, rope: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        queries, keys = self.heads
        rows = qkv.view(qkv.shape[0], queries + 2 * keys, self.head_dim)
        q, k, v = rows.split((queries, keys, keys), 1)
        if rope is not None:
            q, k = _rotary(q, k, *rope, None, False, False)
        cu_seqlens, max_seqlen = tokens.cu_seqlens, tokens.max_seqlen
        heads, _ = _varlen_attn(q, k, v, cu_seqlens, None, max_seqlen, None, *self.rule)
        return heads.flatten(1)
