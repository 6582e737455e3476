"""BlockConfig: one frozen description of a transformer block; layers build themselves from it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

NormPrecision = Literal["default", "fp32", "low"]
Position = Literal["none", "alibi", "rope"]

ConfigT = TypeVar("ConfigT")

_DROPOUTS = ("attn_dropout", "attn_out_dropout", "mlp_dropout", "mlp_hidden_dropout")


@dataclass(frozen=True)
class RopeScaling:
    """Longer rotary wavelengths for longer texts, as Llama 3.1 has them (arXiv 2407.21783).

    Wavelengths below ``original / high`` tokens stay, those above ``original / low`` grow by
    ``factor``, and what lies between is interpolated.
    """

    factor: float = 32.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low < self.high or self.original < 1:
            raise ValueError(
                "a RopeScaling needs factor >= 1, 0 < low < high and original >= 1, got "
                f"{self.factor}, {self.low}, {self.high} and {self.original}"
            )


@dataclass(frozen=True)
class BlockConfig:
    """What distinguishes one transformer block from another.

    Modules copy the floats they need in ``__init__``: a float read from a config shared by two
    checkpointed blocks cannot be lifted by ``torch.compile(dynamic=True)``.
    """

    dim: int  # C: channels of the residual stream
    num_heads: int  # H: query heads
    ffn_dim: int  # hidden channels of the MLP; of each half if glu
    num_kv_heads: int | None = None  # Hk: divides num_heads; None: num_heads
    head_dim: int | None = None  # D in 1..256; None: dim / num_heads

    norm_position: Literal["pre", "post", "sandwich"] = "pre"  # sandwich: see layers.Block
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # layernorm only
    norm_unit_offset: bool = False  # the norms' weights are kept less 1 (Gemma)
    norm_precision: NormPrecision = "default"  # see layers.norm.Norm
    first_norm: bool = (
        True  # False: the pre-norm of attention is the identity (ModernBERT's layer 0)
    )

    causal: bool = False
    window: tuple[int, int] = (-1, -1)  # keys left and right of the query, inclusive; -1: all
    position: Position = "none"  # what attention itself knows of positions
    rope_theta: float = 10_000.0  # base of the rotary frequencies, if position is "rope"
    rope_scaling: RopeScaling | None = None  # of their wavelengths
    qk_norm: bool = False  # a norm over each head of q and of k, before they are rotated
    softcap: float | None = None

    qkv_bias: bool | Literal["qv"] = True  # "qv": on queries and values only (BEiT)
    out_bias: bool = True
    glu: bool = False  # act(a) * b with [a, b] from one matmul, a the first half
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    up_bias: bool = True
    down_bias: bool = True

    attn_dropout: float = 0.0  # probability in [0, 1), on the attention weights
    attn_out_dropout: float = 0.0  # probability in [0, 1), on the attention branch
    mlp_dropout: float = 0.0  # probability in [0, 1), on the MLP branch
    mlp_hidden_dropout: float = 0.0  # probability in [0, 1), inside the MLP, before its last matmul

    layer_scale: float | None = None  # start of a learned factor per channel on both branches
    drop_path: float = 0.0  # probability in [0, 1) that a sequence skips a branch

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_heads, self.kv_heads
        if self.dim < 1 or heads < 1 or self.ffn_dim < 1:
            raise ValueError(
                f"dim, num_heads and ffn_dim must be >= 1, got {self.dim}, {heads}, {self.ffn_dim}"
            )
        if self.head_dim is None and self.dim % heads:
            raise ValueError(f"num_heads={heads} must divide dim={self.dim}, or head_dim be given")
        if not 1 <= self.head_size <= 256:
            raise ValueError(f"head_dim must be in 1..256, got {self.head_size}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} must divide num_heads={heads}")
        if min(self.window) < -1:
            raise ValueError(f"window bounds must be >= -1 (-1: unlimited), got {self.window}")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"position='rope' needs an even head_dim, got {self.head_size}")
        for name in (*_DROPOUTS, "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.qkv_bias not in (True, False, "qv"):
            raise ValueError(f"qkv_bias must be True, False or 'qv', got {self.qkv_bias!r}")

    @property
    def kv_heads(self) -> int:
        """Hk, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """D, resolved."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim


def with_drop_path(config: BlockConfig, rate: float, depth: int) -> list[BlockConfig]:
    """``depth`` times ``config``, its ``drop_path`` linear from 0 to ``rate`` in the last block.

    Source: Huang et al. 2016, arXiv 1603.09382, section 3, as DeiT and BEiT apply it.
    """
    steps = max(depth - 1, 1)
    return [dataclasses.replace(config, drop_path=rate * i / steps) for i in range(depth)]


def replace_fields(config: ConfigT, overrides: dict[str, Any]) -> ConfigT:
    """``dataclasses.replace(config, **overrides)``, whose errors name the nearest field.

    Raises:
        TypeError: for a field the config does not have.
    """
    known = [f.name for f in dataclasses.fields(config) if f.init]  # type: ignore[arg-type]
    for name in overrides:
        if name not in known:
            raise TypeError(
                f"{type(config).__name__} has no field {name!r}; {nearest(name, known)}"
            )
    return dataclasses.replace(config, **overrides)  # type: ignore[type-var]


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for error messages, or the list of what there is.

    Args:
        name: what was asked for.
        known: the names there are.

    Returns:
        A sentence.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
