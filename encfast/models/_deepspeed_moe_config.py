"""Config of DeepSpeed-MoE: a GPT, and which of its layers are mixtures of how many experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from encfast.config import BlockConfig
from encfast.layers import MoEConfig


@dataclass(frozen=True)
class DeepSpeedMoEConfig:
    """A GPT, and the experts of its layers."""

    dim: int  # C
    depth: int  # blocks
    num_heads: int  # H
    experts: tuple[int, ...] = ()  # E of each MoE layer; empty: dense
    expert_interval: int = 2  # blocks interval, 2 * interval, ... are mixtures, counted from 1
    residual: bool = False  # a dense MLP beside each mixture
    vocab_size: int = 50_257  # V
    max_positions: int = 2048  # longest sequence
    norm_eps: float = 1e-5

    top_k: int = 1  # experts of a token, 1 or 2
    capacity_factor: float | None = 1.0  # room in units of top_k * T / E; None: no limit
    eval_capacity_factor: float | None = None  # the same in evaluation
    min_capacity: int = 4  # room of an expert at least
    priority: Literal["position", "random"] = "random"  # who finds room, in training
    jitter: float = 0.0  # on the gate's input, in training
    rsample: bool = False  # Gumbel noise on the choice, in training; top-2 has it on the second

    balance_weight: float = 0.01  # of the load-balance loss, summed over layers
    kd_weight: float = 1.0  # of the distillation loss
    kd_temperature: float = 1.0

    dropout: float = 0.1  # on embeddings and on both branches of a block
    attn_dropout: float = 0.1  # on the attention weights
    init_std: float = 0.014
    eos_id: int = 50_256  # ends a text

    def __post_init__(self) -> None:
        for name in ("depth", "expert_interval", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(
                f"eos_id = {self.eos_id} is no id of a vocabulary of {self.vocab_size}"
            )
        if self.top_k not in (1, 2):
            raise ValueError(f"top_k must be 1 or 2, got {self.top_k}")
        if self.rsample and self.top_k == 2:
            raise ValueError("rsample is top-1's; the second expert of top-2 is drawn with noise")
        if not self.kd_temperature > 0:
            raise ValueError(f"kd_temperature must be > 0, got {self.kd_temperature}")
        layers = self.depth // self.expert_interval
        if self.experts and len(self.experts) != layers:
            raise ValueError(
                f"experts has {len(self.experts)} entries, expected {layers}, one for each "
                f"{self.expert_interval} of {self.depth} blocks, or none"
            )
        self.block()
        self.moes()

    def block(self) -> BlockConfig:
        """Of every block, of its MLP and of each expert."""
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            ffn_dim=4 * self.dim,
            norm_eps=self.norm_eps,
            causal=True,
            activation="gelu_tanh",
            attn_dropout=self.attn_dropout,
            attn_out_dropout=self.dropout,
            mlp_dropout=self.dropout,
        )

    def moes(self) -> list[MoEConfig | None]:
        """One per block, None where it is dense."""
        moes: list[MoEConfig | None] = [None] * self.depth
        for i, num_experts in enumerate(self.experts, start=1):
            moes[i * self.expert_interval - 1] = self.moe(num_experts)
        return moes

    def moe(self, num_experts: int) -> MoEConfig:
        """The config of one mixture of ``num_experts``.

        With top-2 Gumbel noise chooses the second expert, and the weights of the experts that had
        room sum to 1. DeepSpeed's top-2 has ``priority="position"`` alone.
        """
        top_2 = self.top_k == 2
        noise: Literal["gumbel", "gumbel_rest"] | None = "gumbel" if self.rsample else None
        train, evaluation = self.capacity_factor, self.eval_capacity_factor
        return MoEConfig(
            num_experts,
            top_k=self.top_k,
            renormalise="kept" if top_2 else False,
            capacity_factor=None if train is None else self.top_k * train,
            eval_capacity_factor=None if evaluation is None else self.top_k * evaluation,
            min_capacity=self.min_capacity,
            priority=self.priority,
            noise="gumbel_rest" if top_2 else noise,
            jitter=self.jitter,
            residual=self.residual,
        )
