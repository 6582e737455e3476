"""Ettin: paired encoders and decoders from one recipe, 17M to 1B.

Weller et al., "Seq vs Seq: An Open Suite of Paired Encoders and Decoders", ICLR 2026, arXiv
2507.11412. The ModernBERT architecture trained twice per size on the same data: bidirectional with
masked language modelling, and causal with next-token prediction. ``EttinConfig.causal`` is the only
difference; parameters carry the same names and shapes, so that either mode loads the other's
weights (the paper's cross-objective training).

Faithful: pre-norm blocks without biases (one per vocabulary entry excepted), embedding norm, no
norm before the first attention, rotary positions with a base per kind of layer, every third layer
global and the others windowed, exact-GELU GLU, tied head, truncated Megatron initialisation, the
training phases with StableAdamW, retrieval fine-tuning with cached gradients.

Two readings of the decoder's local window exist. Training used flash-attn's window (64, 64) with a
causal mask: a query sees itself and 64 keys before it (``window_mode="training"``). The released
weights run in transformers, where it sees itself and 63 (``"hf"``, set by ``from_transformers``).

Left open by the paper, read from the training configs and code: the truncation at 2 standard
deviations (``init_cutoff``, transformers' value); the local rotary base, which decoders of 17M,
32M, 68M and 400M kept at 10,000 to the end while every other run ended at 160,000; the head's dense
layer, initialised like an input projection (transformers: like an output projection).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import weights
from encfast.config import BlockConfig, replace_fields
from encfast.data.text import TextBatch
from encfast.layers import Embeddings, KVCache, MaskedLMHead, Norm, Stack, pool
from encfast.layers.base import Model
from encfast.layers.decode import generate
from encfast.losses import masked_lm_loss, next_token_loss
from encfast.models import _ettin_hf as hf
from encfast.models._ettin_data import EttinLoss, example_batch
from encfast.models._ettin_training import (
    LONG_THETA,
    SHORT_LOCAL_DECODERS,
    SHORT_THETA,
    StableAdamW,
    cached_ranking_step,
    cross_phase,
    param_groups,
    phases,
    ranking_loss,
)
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register

__all__ = [
    "VARIANTS",
    "Ettin",
    "EttinConfig",
    "EttinLoss",
    "StableAdamW",
    "cached_ranking_step",
    "cross_phase",
    "param_groups",
    "phases",
    "ranking_loss",
]


@dataclass(frozen=True)
class EttinConfig:
    """One network, two modes."""

    dim: int  # C
    num_layers: int
    num_heads: int
    ffn_dim: int  # of each half of the GLU
    causal: bool = False  # False: encoder, masked tokens; True: decoder, next token
    vocab_size: int = 50368
    max_positions: int = 7999  # tokens trained on; rotary positions themselves have no end
    half_window: int = 64  # keys on each side that a local layer sees
    window_mode: Literal["training", "hf"] = "training"  # of decoders: see the module's docstring
    global_every: int = 3  # layer l sees everything if l % global_every == 0
    rope_theta_global: float = LONG_THETA
    rope_theta_local: float = LONG_THETA
    norm_eps: float = 1e-5
    attn_out_dropout: float = 0.1  # probability in [0, 1)
    init_std: float = 0.02
    init_cutoff: float = 2.0  # standard deviations at which the normal is truncated
    lm_head: bool = True  # False: the bare encoder
    bos_id: int = 50281  # [CLS]
    eos_id: int = 50282  # [SEP]
    pad_id: int | None = 50283
    mask_id: int | None = 50284  # None: unknown, transformers' configs do not say
    mask_rate: float = 0.3  # share of tokens example_batch masks

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.global_every < 1:
            raise ValueError(
                "num_layers and global_every must be >= 1, "
                f"got {self.num_layers} and {self.global_every}"
            )
        if self.half_window < 1:
            raise ValueError(f"half_window must be >= 1 token, got {self.half_window}")
        if self.window_mode not in ("training", "hf"):
            raise ValueError(f"window_mode must be 'training' or 'hf', got {self.window_mode!r}")
        for name, token in self.special_ids().items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} = {token} is no id of a vocabulary of {self.vocab_size}")

    def special_ids(self) -> dict[str, int]:
        """Ids that are no text, by the name of their field."""
        ids = {name: getattr(self, name) for name in ("bos_id", "eos_id", "pad_id", "mask_id")}
        return {name: token for name, token in ids.items() if token is not None}

    def window(self, layer: int) -> tuple[int, int]:
        """Keys left and right of a query that ``layer`` sees, inclusive; -1: all."""
        if layer % self.global_every == 0:
            return (-1, -1)
        if not self.causal:
            return (self.half_window, self.half_window)
        return (self.half_window - (self.window_mode == "hf"), 0)

    def block(self, layer: int) -> BlockConfig:
        """The block at depth ``layer``."""
        is_global = layer % self.global_every == 0
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            norm_eps=self.norm_eps,
            norm_bias=False,
            first_norm=layer > 0,
            causal=self.causal,
            window=self.window(layer),
            position="rope",
            rope_theta=self.rope_theta_global if is_global else self.rope_theta_local,
            qkv_bias=False,
            out_bias=False,
            glu=True,
            up_bias=False,
            down_bias=False,
            attn_out_dropout=self.attn_out_dropout,
        )


class Ettin(Model):
    """Encoder or decoder over packed token ids."""

    config: EttinConfig

    def __init__(
        self,
        config: EttinConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: dict[str, Any] = {"norm_eps": config.norm_eps, "norm_bias": False}
        self.embed = Embeddings(
            config.vocab_size, config.dim, padding_idx=config.pad_id, **norm, **factory
        )
        self.stack = Stack([config.block(i) for i in range(config.num_layers)], **factory)
        self.norm = Norm(config.dim, eps=config.norm_eps, bias=False, **factory)
        self.head = None
        if config.lm_head:
            self.head = MaskedLMHead(
                config.dim,
                config.vocab_size,
                dense_bias=False,
                tied=self.embed.word.weight,
                **norm,
                **factory,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Megatron's initialisation: truncated normal, smaller where a branch joins the stream."""
        config, table = self.config, self.embed.word.weight
        if self.head is not None:  # materialising a model built on meta unties it
            self.head.decoder.weight = table
        joins = {m for b in self.stack.blocks for m in (b.attn.out, b.mlp.down)}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                shrink = (2 * config.num_layers) ** 0.5 if module in joins else 1.0
                if module.weight is not table:
                    _truncated_normal(module.weight, config.init_std / shrink, config.init_cutoff)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _truncated_normal(module.weight, config.init_std, config.init_cutoff)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, shared with the head."""
        return self.embed.word

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
                computes no others.
            caches: from ``new_caches()``; then ``tokens`` continue what the caches have seen.

        Returns:
            The batch with rows ``[N, C]``, or ``[M, C]``.
        """
        x = self.stack(self.embed(tokens), rows=rows, caches=caches)  # [N, C] or [M, C]
        return self.norm(x) if isinstance(x, Tensor) else x.with_data(self.norm(x.data))

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores ``[M, V]`` of hidden rows ``[M, C]``.

        Raises:
            ValueError: if the model was built without a head.
        """
        if self.head is None:
            raise ValueError("this model has no head; build it with lm_head=True")
        return self.head(hidden)

    def loss(self, batch: TextBatch) -> EttinLoss:
        """Masked tokens for an encoder, next token for a decoder.

        An encoder's head and all but the attention of its last block run on the masked rows alone.

        Raises:
            ValueError: if an encoder's batch has no ``rows`` and ``targets``.
        """
        if self.config.causal:
            hidden = self(batch.tokens)  # [N, C]
            return EttinLoss(next_token=next_token_loss(self.logits(hidden.data), batch.tokens))
        if batch.rows is None or batch.targets is None:
            raise ValueError(
                "an encoder's batch needs rows and targets; "
                "make one with TextBatch.from_masked(mask_tokens(tokens, ...))"
            )
        hidden = self(batch.tokens, rows=batch.rows)  # [M, C]
        return EttinLoss(masked=masked_lm_loss(self.logits(hidden), batch.targets))

    def encode(self, tokens: PackedBatch) -> Tensor:
        """``[B, C]``, unit length: one embedding per text of ``tokens``, zeros for an empty one.

        As in the paper's retrieval runs: the mean of an encoder, the last token of a decoder.
        """
        return F.normalize(pool(self(tokens), "last" if self.config.causal else "mean"), dim=-1)

    def new_caches(self) -> list[KVCache]:
        """One empty cache per layer; those of local layers keep no more keys than a token can see.

        Raises:
            ValueError: for an encoder, which has to see the whole text at once.
        """
        if not self.config.causal:
            raise ValueError("an encoder cannot decode token by token; set causal=True")
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
        """Continues prompts of different lengths.

        A finished text goes on as a zero-length sequence: it costs nothing. Call ``eval()`` first.

        Args:
            prompts: ids ``[N]``, each prompt at least one token.
            max_new_tokens: most tokens to add to each prompt.
            temperature: 0 takes the likeliest token; otherwise samples from logits / temperature.
            eos_id: ends a text; the config's by default, -1 for none.
            generator: of the samples.

        Returns:
            B tensors of ids: prompt and continuation, with its end token if it came.

        Raises:
            ValueError: for an encoder, an empty prompt or a negative temperature.
        """
        end = self.config.eos_id if eos_id is None else eos_id
        return generate(self, prompts, max_new_tokens, temperature, end, generator)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> TextBatch:
        """Ragged random texts between their bos and eos, masked for an encoder; on the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the texts; some, one of them 0, if None.

        Returns:
            What ``loss`` takes.

        Raises:
            ValueError: for an encoder whose config has no ``mask_id``.
        """
        return example_batch(self.config, generator, lengths)

    @classmethod
    def from_transformers(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> Ettin:
        """A ModernBert or ModernBertDecoder from a local folder (config.json, *.safetensors).

        Args:
            folder: as ``save_pretrained`` of the bare model, ForMaskedLM or ForCausalLM wrote it.
            device, dtype: of the parameters.
            **overrides: config fields; ``causal`` flips the mode (cross-objective training).

        Raises:
            FileNotFoundError: if a file is missing; nothing is downloaded.
            ValueError: if the config is no Ettin's, or listing the tensors that do not fit.
        """
        theirs, tensors = weights.read_folder(folder)
        own = EttinConfig(**hf.fields_from(theirs))
        model = cls(replace_fields(own, overrides), device=device, dtype=dtype)
        weights.load(model, tensors, hf.entries(own), ignore=(hf.TIED_COPY,))
        return model

    def to_transformers(self, folder: str | Path) -> None:
        """Writes a folder that transformers' ``from_pretrained`` reads.

        Its decoder sees one key fewer in local layers than ``window_mode="training"``.
        """
        tensors = weights.export(self, hf.entries(self.config))
        weights.write_folder(folder, hf.config_from(self.config), tensors)


def _truncated_normal(weight: Tensor, std: float, cutoff: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-cutoff * std, b=cutoff * std)


_SIZES = {  # layers, C, F, H
    "17m": (7, 256, 384, 4),
    "32m": (10, 384, 576, 6),
    "68m": (19, 512, 768, 8),
    "150m": (22, 768, 1152, 12),
    "400m": (28, 1024, 2624, 16),
    "1b": (28, 1792, 3840, 28),
}


def _published(size: str, *, causal: bool) -> EttinConfig:
    layers, dim, ffn_dim, heads = _SIZES[size]
    short = causal and size in SHORT_LOCAL_DECODERS
    return EttinConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        ffn_dim=ffn_dim,
        causal=causal,
        rope_theta_local=SHORT_THETA if short else LONG_THETA,
    )


_TINY = EttinConfig(
    dim=64,
    num_layers=4,
    num_heads=2,
    ffn_dim=96,
    vocab_size=512,
    half_window=8,
    bos_id=1,
    eos_id=2,
    pad_id=0,
    mask_id=3,
)

VARIANTS: dict[str, EttinConfig] = {
    **{f"encoder-{size}": _published(size, causal=False) for size in _SIZES},
    **{f"decoder-{size}": _published(size, causal=True) for size in _SIZES},
    "tiny": _TINY,
    "tiny-decoder": dataclasses.replace(_TINY, causal=True),
}

register(
    "ettin",
    Ettin,
    VARIANTS,
    ModelInfo(
        title="Seq vs Seq: An Open Suite of Paired Encoders and Decoders (Ettin)",
        year=2025,
        paper="arXiv 2507.11412",
        tasks=("masked-lm", "causal-lm", "text-embedding"),
        inputs="TextBatch: tokens PackedBatch of ids [N]; encoder: rows, targets int64 [M]",
        ops=("varlen_attn", "pad"),
        fidelity=(
            "outputs and every gradient against transformers' ModernBertForMaskedLM and "
            "ModernBertDecoderForCausalLM with copied weights; parameter counts of all sizes"
        ),
        deviations=(
            "an encoder's last block runs on the masked rows only, where the training code "
            "restricts the head alone: the same numbers",
        ),
    ),
)
