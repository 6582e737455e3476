"""DeepSpeed-MoE: GPT with mixtures, pyramid-residual mixtures and their distilled students.

Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power
Next-Generation AI Scale", ICML 2022, arXiv 2201.05596. In every other layer of a GPT the MLP is a
mixture of experts of which a token takes one. PR-MoE has more experts in its last layers (pyramid)
and a dense MLP beside each mixture, mixed per token (residual); MoS is a shallower PR-MoE that
learns from its teacher until a cut-off, and from the text alone after it.

Faithful, read from Megatron-DeepSpeed and deepspeed.moe: float32 gate without bias, top-1 by the
softmax's own weight, room for ``ceil(T / E)`` tokens and at least 4, whose victims are drawn at
random in training; ``E * sum(mean p * share)`` times 0.01 over the layers; coefficients of the
residual mix; normal initialisation, smaller where a branch joins the stream, gates and coefficients
as ``nn.Linear`` draws them; students of 21 layers, distilled by T^2 KL per token.

The inference system is the same layer: a table of where each token stands among its expert's rows,
rows gathered expert by expert, one grouped product, rows gathered back times their gate; keys and
values in caches. No token is dropped in evaluation by default; the published scripts evaluate with
``eval_capacity_factor=1.0``.

Left open by the paper and read so: each expert is drawn on its own (DeepSpeed starts those of a
layer as copies of one); a student starts from random weights, at its teacher's learning rate; its
distance from the teacher counts where there is a next token to predict. Victims are drawn among all
tokens of the batch, where DeepSpeed draws among those of one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from encfast.data.text import TextBatch
from encfast.layers import (
    MLP,
    Attention,
    Embeddings,
    Experts,
    KVCache,
    MoE,
    MoEStack,
    Norm,
    ResidualMoE,
    RouterLosses,
    pyramid,
)
from encfast.layers.base import Model, init_normal
from encfast.layers.decode import generate
from encfast.layers.dropout import StaticFloat
from encfast.losses import IGNORE, cross_entropy, next_tokens
from encfast.models._deepspeed_moe_config import DeepSpeedMoEConfig
from encfast.models._deepspeed_moe_training import (
    RECIPES,
    Recipe,
    StagedDistillation,
    distillation_loss,
    param_groups,
)
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register

__all__ = [
    "RECIPES",
    "VARIANTS",
    "DeepSpeedMoE",
    "DeepSpeedMoEConfig",
    "MoELosses",
    "Recipe",
    "StagedDistillation",
    "distillation_loss",
    "param_groups",
]


@dataclass(frozen=True, eq=False)
class MoELosses:
    """The total and its terms, scalars; None where there is no such term."""

    total: Tensor  # lm + balance_weight * balance + kd_weight * kd
    lm: Tensor  # cross entropy of the next token
    balance: Tensor | None = None  # summed over the MoE layers, each 1 at perfect balance
    kd: Tensor | None = None  # T^2 KL of the teacher and the student
    dropped: Tensor | None = None  # share of tokens that found no room; takes no gradient


torch.export.register_dataclass(
    MoELosses, serialized_type_name="encfast.models.deepspeed_moe.MoELosses"
)


class DeepSpeedMoE(Model):
    """GPT over packed token ids, dense or with mixtures."""

    config: DeepSpeedMoEConfig
    balance_weight = StaticFloat()
    kd_weight = StaticFloat()
    kd_temperature = StaticFloat()

    def __init__(
        self,
        config: DeepSpeedMoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.balance_weight = config.balance_weight
        self.kd_weight, self.kd_temperature = config.kd_weight, config.kd_temperature
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed = Embeddings(
            config.vocab_size,
            config.dim,
            max_positions=config.max_positions,
            norm=False,
            dropout=config.dropout,
            **factory,
        )
        self.stack = MoEStack([config.block()] * config.depth, config.moes(), **factory)
        self.norm = Norm(config.dim, eps=config.norm_eps, **factory)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False, **factory)
        self.tie_weights()
        self.reset_parameters()

    @property
    def _no_split_modules(self) -> list[str]:  # type: ignore[override]
        return sorted({type(block).__name__ for block in self.stack.blocks})

    def tie_weights(self) -> None:
        """The output embedding is the input embedding."""
        self.lm_head.weight = self.embed.word.weight

    def reset_parameters(self) -> None:
        """Megatron's initialisation; the mixtures' gates and coefficients as nn.Linear has it."""
        std = self.config.init_std
        joins = std / (2 * self.config.depth) ** 0.5
        init_normal(self, std)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.out.weight, std=joins)
            elif isinstance(module, MLP):
                nn.init.normal_(module.down.weight, std=joins)
            elif isinstance(module, Experts):
                _init_experts(module, std, joins)
            elif isinstance(module, MoE):
                module.router.reset_parameters()
            elif isinstance(module, ResidualMoE):
                module.coefficient.reset_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, shared with the head."""
        return self.embed.word

    def activated_parameters(self) -> int:
        """Parameters that one token passes: all but those of the experts it does not take."""
        idle = 0
        for experts in (m for m in self.modules() if isinstance(m, Experts)):
            stacks = sum(p.numel() for p in experts.parameters())
            idle += stacks // experts.num_experts * (experts.num_experts - self.config.top_k)
        return self.num_parameters() - idle

    def forward(
        self,
        tokens: PackedBatch,
        *,
        rows: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> PackedBatch | Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: ids ``[N]`` in [0, V).
            rows: int64 ``[M]``: return only these rows, as a tensor ``[M, C]``; the last block then
                computes, and routes, no others.
            caches: from ``new_caches()``; then ``tokens`` continue what the caches have seen.

        Returns:
            The batch with rows ``[N, C]``, or ``[M, C]``.

        Raises:
            ValueError: if a text is longer than the position table.
        """
        x = self.embed(tokens, positions=self._positions(tokens, caches))  # [N, C]
        x = self.stack(x, rows=rows, caches=caches)  # [N, C] or [M, C]
        return self.norm(x) if isinstance(x, Tensor) else x.with_data(self.norm(x.data))

    def _positions(self, tokens: PackedBatch, caches: Sequence[KVCache] | None) -> Tensor | None:
        if caches is None:
            return None
        positions = caches[0].positions(tokens)
        longest = int(positions.max()) + 1 if len(positions) else 0
        if longest > self.config.max_positions:
            raise ValueError(
                f"a text has {longest} tokens with what its cache holds, the position table "
                f"{self.config.max_positions}"
            )
        return positions

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores ``[M, V]`` of hidden rows ``[M, C]``."""
        return self.lm_head(hidden)

    def loss(self, batch: TextBatch) -> MoELosses:
        """Next token, and the balance of the experts.

        Args:
            batch: ``tokens`` is read; ``labels`` in their place if given, ids or -100.

        Returns:
            The total and its terms, 0-dim each.
        """
        return self._losses(batch, None)

    def distill(self, batch: TextBatch, teacher: DeepSpeedMoE | Tensor) -> MoELosses:
        """:meth:`loss`, and the distance from a teacher at the rows that predict something.

        Args:
            batch: as for ``loss``.
            teacher: in evaluation mode, run without gradients; or its logits ``[N, V]``.

        Returns:
            The total and its terms, 0-dim each.

        Raises:
            ValueError: for a teacher in training mode, whose answers dropout blurs, or logits of
                another shape.
        """
        if isinstance(teacher, Tensor):
            return self._losses(batch, teacher)
        if teacher.training:
            raise ValueError("teacher is in training mode, expected one after eval()")
        with torch.no_grad():
            answers = teacher.logits(teacher(batch.tokens).data)
        return self._losses(batch, answers)

    def _losses(self, batch: TextBatch, teacher: Tensor | None) -> MoELosses:
        hidden, router = self._hidden(batch.tokens)  # [N, C]
        logits = self.logits(hidden)  # [N, V]
        targets = next_tokens(batch.tokens, batch.labels)  # [N]
        lm = cross_entropy(logits, targets)
        total, kd = lm, None
        if router is not None:
            total = total + self.balance_weight * router.balance
        if teacher is not None:
            kd = distillation_loss(logits, teacher, targets != IGNORE, self.kd_temperature)
            total = total + self.kd_weight * kd
        if router is None:
            return MoELosses(total, lm, kd=kd)
        return MoELosses(total, lm, router.balance, kd, router.dropped)

    def _hidden(self, tokens: PackedBatch) -> tuple[Tensor, RouterLosses | None]:
        """Rows ``[N, C]`` after the final norm, and the routers' losses; None if dense."""
        x, router = self.embed(tokens), None
        if self.config.experts:
            x, router = self.stack.forward_with_losses(x)
        else:
            x = self.stack(x)
        return self.norm(x.data), router

    def new_caches(self) -> list[KVCache]:
        """One empty cache per layer."""
        return self.stack.new_caches()

    def generate(
        self,
        prompts: PackedBatch,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues prompts of different lengths. Call ``eval()`` first.

        With an ``eval_capacity_factor`` tokens compete for room with those of their step, so that
        a text depends on its company; without one it equals that of full recomputation.

        Args:
            prompts: ids ``[N]``, each prompt at least one token.
            max_new_tokens: most tokens to add to each prompt.
            temperature: 0 takes the likeliest token; otherwise samples from logits / temperature.
            eos_id: ends a text; the config's by default, -1 for none.
            generator: of the samples.

        Returns:
            B tensors of ids: prompt and continuation, with its end token if it came.

        Raises:
            ValueError: for an empty prompt, a negative temperature, or a text that grows longer
                than the position table.
        """
        end = self.config.eos_id if eos_id is None else eos_id
        return generate(self, prompts, max_new_tokens, temperature, end, generator)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> TextBatch:
        """Ragged random texts, each with its end token; on the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the texts; some, one of them 0, if None.

        Returns:
            What ``loss`` takes.
        """
        lengths = [37, 5, 0, 60, 12] if lengths is None else lengths
        ids = torch.randint(self.config.vocab_size, (sum(lengths),), generator=generator)
        tokens = PackedBatch.from_lengths(ids, lengths)
        ids[tokens.last_rows()[tokens.lengths() > 0]] = self.config.eos_id
        return TextBatch(tokens)


def _init_experts(experts: Experts, std: float, joins: float) -> None:
    nn.init.normal_(experts.up, std=std)
    nn.init.normal_(experts.down, std=joins)
    for bias in (experts.up_bias, experts.down_bias):
        if bias is not None:
            nn.init.zeros_(bias)


_350M = DeepSpeedMoEConfig(dim=1024, depth=24, num_heads=16)
_1_3B = DeepSpeedMoEConfig(dim=2048, depth=24, num_heads=16)
_TINY = DeepSpeedMoEConfig(
    dim=64,
    depth=4,
    num_heads=2,
    experts=(4, 4),
    vocab_size=512,
    max_positions=256,
    # Two passes over one batch give one result.
    priority="position",
    eos_id=0,
)

VARIANTS: dict[str, DeepSpeedMoEConfig] = {
    "tiny": _TINY,
    "tiny-pr": replace(_TINY, experts=(2, 4), residual=True),
    "125m": DeepSpeedMoEConfig(dim=768, depth=12, num_heads=12),
    "350m": _350M,
    "1.3b": _1_3B,
    "6.7b": DeepSpeedMoEConfig(dim=4096, depth=32, num_heads=32, init_std=0.01),
    "350m-moe-128": replace(_350M, experts=pyramid((12, 128))),
    "1.3b-moe-128": replace(_1_3B, experts=pyramid((12, 128))),
    "350m-pr-moe-32-64": replace(_350M, experts=pyramid((10, 32), (2, 64)), residual=True),
    "1.3b-pr-moe-64-128": replace(_1_3B, experts=pyramid((10, 64), (2, 128)), residual=True),
    # Students of the two above.
    "350m-mos": replace(_350M, depth=21, experts=pyramid((8, 32), (2, 64)), residual=True),
    "1.3b-mos": replace(_1_3B, depth=21, experts=pyramid((8, 64), (2, 128)), residual=True),
}

register(
    "deepspeed_moe",
    DeepSpeedMoE,
    VARIANTS,
    ModelInfo(
        title="DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power "
        "Next-Generation AI Scale",
        year=2022,
        paper="arXiv 2201.05596",
        tasks=("causal-lm",),
        inputs="TextBatch: tokens PackedBatch of ids [N]",
        ops=("varlen_attn", "moe_route", "grouped_mm", "add_norm", "pad"),
        fidelity=(
            "the dense base's outputs and every gradient against transformers' GPT-2 with copied "
            "weights; gates, choices and balance loss against transformers' Switch router; "
            "parameter counts of all sizes against the paper's"
        ),
        deviations=(
            "each expert is drawn on its own, where DeepSpeed starts all of a layer as copies",
            "tokens are drawn at random for an expert's room over the whole batch, not per device",
            "no token is dropped in evaluation unless eval_capacity_factor says so",
        ),
    ),
)
