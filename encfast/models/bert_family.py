"""BERT and GPT under one roof, after Yang et al. 2024, "Can bidirectional encoder become the
ultimate winner for downstream applications of foundation models?" (arXiv 2411.18021).

The article compares one-way (GPT) and two-way (BERT) foundation models on SQuAD and GLUE and
proposes no architecture. Here one class is both: every difference is a switch of
:class:`BertFamilyConfig`, so that the models of a comparison differ in nothing else. Faithful to,
and checked against: BERT (Devlin et al. 2019, arXiv 1810.04805), RoBERTa (1907.11692), ALBERT
(1909.11942), GPT-1 (Radford et al. 2018) and GPT-2 (2019), with their pre-training and fine-tuning
heads. Answers are read off the span scores by :mod:`encfast.layers.span`.

Left open by the article and read so: of the improvements of BERT it reviews, the switches here are
RoBERTa's and ALBERT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import losses
from encfast.config import BlockConfig, nearest
from encfast.data.text import TextBatch
from encfast.layers import Embeddings, MaskedLMHead, Norm, SpanHead, Stack, pool
from encfast.layers.base import init_normal
from encfast.layers.dropout import Dropout
from encfast.models._bert_family_data import Losses, Scores, example_batch
from encfast.models._bert_family_weights import TransformersModel
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register

Task = Literal[
    "encode",  # no head
    "pretrain",  # masked LM and next-sentence (ALBERT: sentence-order) prediction
    "masked-lm",
    "causal-lm",
    "classification",  # of sequences; regression with floating labels
    "token-classification",
    "span",  # extractive question answering
]


@dataclass(frozen=True)
class BertFamilyConfig:
    """BERT-base; every other model is a change of these fields."""

    vocab_size: int = 30_522  # V
    dim: int = 768  # C
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    max_positions: int = 512  # longest sequence
    num_segments: int = 2  # token types; 0: none (GPT)
    activation: str = "gelu"
    norm_eps: float = 1e-12

    task: Task = "pretrain"
    num_labels: int = 2  # K; 1 for regression
    auxiliary_lm: float = 0.0  # weight of the LM loss while classifying (GPT-1: 0.5); causal only

    causal: bool = False  # GPT
    norm_position: Literal["pre", "post"] = "post"
    embedding_norm: bool = True
    final_norm: bool = False  # a norm after the last block (GPT-2)
    pooler: bool = True  # tanh(dense([CLS])) where a task needs one row per sequence
    share_layers: bool = False  # ALBERT: one set of weights for all blocks
    embedding_dim: int | None = None  # E: channels of the embedding tables; None: C, no projection
    position_offset: int = 0  # RoBERTa: 2 unused rows at the start of the position table

    dropout: float = 0.1  # on embeddings and on both branches of a block
    attn_dropout: float = 0.1  # on the attention weights
    head_dropout: float = 0.1  # before the classifier
    init_std: float = 0.02
    scale_residual_init: bool = False  # GPT-2: residual projections / sqrt(2 * depth)

    pad_id: int | None = 0  # its embedding stays 0; None: no such token
    cls_id: int = 101
    sep_id: int = 102
    mask_id: int = 103

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task {self.task!r} is unknown; {nearest(self.task, get_args(Task))}")
        if self.causal and self.task in ("masked-lm", "pretrain"):
            raise ValueError(f"task {self.task!r} needs both sides of a token: set causal=False")
        if not self.causal and (self.task == "causal-lm" or self.auxiliary_lm):
            raise ValueError("a next-token loss needs causal=True: a two-way model sees the answer")
        for name in ("vocab_size", "depth", "max_positions", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        self.block()

    @property
    def has_pooler(self) -> bool:
        """Whether this task's model owns the pooler."""
        return self.pooler and self.task in ("encode", "pretrain", "classification")

    def block(self) -> BlockConfig:
        """Of every block."""
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            norm_position=self.norm_position,
            norm_eps=self.norm_eps,
            causal=self.causal,
            activation=self.activation,
            attn_dropout=self.attn_dropout,
            attn_out_dropout=self.dropout,
            mlp_dropout=self.dropout,
        )


class BertFamily(TransformersModel):
    """Embeddings, a stack of blocks, and the head of one task."""

    config_class = BertFamilyConfig
    head: Any  # of the task, or None

    def __init__(
        self,
        config: BertFamilyConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.task = config, config.task
        width = config.embedding_dim or config.dim
        self.embed = Embeddings(
            config.vocab_size,
            width,
            max_positions=config.max_positions,
            position_offset=config.position_offset,
            num_segments=config.num_segments,
            norm=config.embedding_norm,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            padding_idx=config.pad_id,
            **factory,
        )
        factored = config.embedding_dim is not None
        self.project = nn.Linear(width, config.dim, **factory) if factored else nn.Identity()
        self.stack = Stack([config.block()] * config.depth, share=config.share_layers, **factory)
        norm = Norm(config.dim, eps=config.norm_eps, **factory) if config.final_norm else None
        self.final_norm = norm or nn.Identity()
        self.pooler = nn.Linear(config.dim, config.dim, **factory) if config.has_pooler else None
        self.lm_head = self._make_lm_head(config, width, **factory)
        self.head = self._make_head(config, **factory)
        self.drop = Dropout(config.head_dropout)
        self.auxiliary_lm = config.auxiliary_lm
        self.tie_weights()
        self.reset_parameters()

    @staticmethod
    def _make_lm_head(config: BertFamilyConfig, width: int, **factory: Any) -> nn.Module | None:
        if config.task in ("masked-lm", "pretrain"):
            return MaskedLMHead(
                config.dim,
                config.vocab_size,
                embedding_dim=width,
                act=config.activation,
                norm_eps=config.norm_eps,
                **factory,
            )
        if config.task == "causal-lm" or config.auxiliary_lm:
            return nn.Linear(width, config.vocab_size, bias=False, **factory)
        return None

    @staticmethod
    def _make_head(config: BertFamilyConfig, **factory: Any) -> nn.Module | None:
        if config.task == "span":
            return SpanHead(config.dim, **factory)
        if config.task == "pretrain":
            return nn.Linear(config.dim, 2, **factory)
        if config.task == "token-classification":
            return nn.Linear(config.dim, config.num_labels, **factory)
        if config.task == "classification":
            # GPT's classifier has no bias in any implementation we compare with.
            return nn.Linear(config.dim, config.num_labels, bias=not config.causal, **factory)
        return None

    def tie_weights(self) -> None:
        """The output embedding is the input embedding."""
        if self.lm_head is not None:
            decoder = getattr(self.lm_head, "decoder", self.lm_head)
            decoder.weight = self.embed.word.weight

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_normal(self, self.config.init_std)
        if self.config.scale_residual_init:
            std = self.config.init_std / (2 * self.config.depth) ** 0.5
            for block in self.stack.blocks:
                nn.init.normal_(block.attn.out.weight, std=std)
                nn.init.normal_(block.mlp.down.weight, std=std)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table ``[V, E]``."""
        return self.embed.word

    def hidden(self, tokens: PackedBatch, segments: Tensor | None = None) -> PackedBatch:
        """Ids ``[N]`` -> last hidden rows ``[N, C]``; ``tokens`` and ``segments`` as in a call."""
        x = self.embed(tokens, segments)  # [N, E]
        x = x.with_data(self.project(x.data))  # [N, C]
        x = self.stack(x)  # [N, C]
        return x.with_data(self.final_norm(x.data))  # [N, C]

    def forward(
        self,
        tokens: PackedBatch,
        segments: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Scores:
        """Scores of the task.

        Args:
            tokens: ids ``[N]`` in [0, V).
            segments: int64 ``[N]``, token types; all 0 if None.
            rows: int64 ``[M]``: the only rows whose vocabulary scores are wanted; None: all.

        Returns:
            Last hidden rows, and what the task's head makes of them; None in the place of other
            heads.
        """
        hidden = self.hidden(tokens, segments)  # [N, C]
        pooled = start = end = vocab = labels = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pool(hidden, "first")))  # [B, C]
        elif self.task == "classification":
            # Of a one-way model only the last row has seen everything.
            pooled = pool(hidden, "last" if self.config.causal else "first")  # [B, C]
        if self.lm_head is not None:
            vocab = self.lm_head(hidden.data if rows is None else hidden.select(rows))  # [M, V]
        if self.task == "span":
            start, end = self.head(hidden.data)  # [N], [N]
        elif self.task == "token-classification":
            labels = self.head(self.drop(hidden.data))  # [N, K]
        elif self.task == "pretrain":
            labels = self.head(pooled)  # [B, 2]
        elif self.task == "classification":
            labels = self.head(self.drop(pooled))  # [B, K]
        return Scores(hidden, pooled, vocab, labels, start, end)

    def loss(self, batch: TextBatch) -> Losses:
        """The task's loss, a mean over what there is to predict.

        Raises:
            ValueError: if the batch lacks what the task needs, or the task has no loss.
        """
        self._check_batch(batch)
        tokens = batch.tokens
        scores = self(tokens, batch.segments, batch.rows)
        full = tokens.lengths() > 0
        if self.task in ("masked-lm", "pretrain"):
            masked = losses.masked_lm_loss(scores.vocab, batch.targets)
            if self.task == "masked-lm":
                return Losses(masked, masked_lm=masked)
            pair = losses.classification_loss(scores.labels, batch.labels, full)
            return Losses(masked + pair, masked_lm=masked, sentence_pair=pair)
        if self.task == "causal-lm":
            ahead = losses.next_token_loss(scores.vocab, tokens, batch.labels)
            return Losses(ahead, next_token=ahead)
        if self.task == "span":
            span = losses.span_loss(scores.start, scores.end, tokens, batch.starts, batch.ends)
            return Losses(span, span=span)
        kept = None if self.task == "token-classification" else full
        label = losses.classification_loss(scores.labels, batch.labels, kept)
        if not self.auxiliary_lm:
            return Losses(label, classification=label)
        ahead = losses.next_token_loss(scores.vocab, tokens)
        return Losses(label + self.auxiliary_lm * ahead, classification=label, next_token=ahead)

    def _check_batch(self, batch: TextBatch) -> None:
        if self.task == "encode":
            raise ValueError("task 'encode' has no loss; build the model with another task")
        for name in _NEEDED[self.task]:
            if getattr(batch, name) is None:
                raise ValueError(f"the loss of task {self.task!r} needs batch.{name}, it is None")

    def encode(
        self,
        tokens: PackedBatch,
        segments: Tensor | None = None,
        *,
        how: Literal["mean", "first", "last"] = "mean",
        normalize: bool = True,
    ) -> Tensor:
        """One embedding per sequence.

        Args:
            tokens, segments: as in a call.
            how: mean of the rows, or the first or last row.
            normalize: whether embeddings get length 1.

        Returns:
            ``[B, C]``; an empty sequence yields zeros.
        """
        pooled = pool(self.hidden(tokens, segments), how)  # [B, C]
        return F.normalize(pooled, dim=-1) if normalize else pooled

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> TextBatch:
        """Random text in the form the task expects, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the sequences; some, one of them 0, if None.

        Returns:
            What ``loss`` takes.
        """
        return example_batch(self.config, generator, lengths)


_NEEDED: dict[str, tuple[str, ...]] = {
    "pretrain": ("rows", "targets", "labels"),
    "masked-lm": ("rows", "targets"),
    "causal-lm": (),
    "classification": ("labels",),
    "token-classification": ("labels",),
    "span": ("starts", "ends"),
}

_TINY = BertFamilyConfig(
    vocab_size=512,
    dim=128,
    depth=2,
    num_heads=4,
    ffn_dim=512,
    cls_id=1,
    sep_id=2,
    mask_id=3,
)
_ROBERTA: dict[str, Any] = {
    "vocab_size": 50_265,
    "num_segments": 1,
    "position_offset": 2,
    "norm_eps": 1e-5,
    "task": "masked-lm",
    "pad_id": 1,
    "cls_id": 0,
    "sep_id": 2,
    "mask_id": 50_264,
}
_ALBERT: dict[str, Any] = {
    "vocab_size": 30_000,
    "embedding_dim": 128,
    "share_layers": True,
    "activation": "gelu_tanh",
    "dropout": 0.0,
    "attn_dropout": 0.0,
    "cls_id": 2,
    "sep_id": 3,
    "mask_id": 4,
}
_GPT: dict[str, Any] = {
    "task": "causal-lm",
    "causal": True,
    "num_segments": 0,
    "embedding_norm": False,
    "pooler": False,
    "activation": "gelu_tanh",
    "norm_eps": 1e-5,
    "pad_id": None,
}
_GPT2: dict[str, Any] = {
    **_GPT,
    "vocab_size": 50_257,
    "max_positions": 1024,
    "norm_position": "pre",
    "final_norm": True,
    "scale_residual_init": True,
}


def _size(depth: int, dim: int, num_heads: int, **other: Any) -> BertFamilyConfig:
    fields = {"depth": depth, "dim": dim, "num_heads": num_heads, "ffn_dim": 4 * dim}
    return BertFamilyConfig(**fields | other)


VARIANTS = {
    "tiny": _TINY,
    "tiny-gpt": replace(_TINY, **_GPT2 | {"vocab_size": 512, "max_positions": 512}),
    "tiny-albert": replace(_TINY, embedding_dim=32, share_layers=True, activation="gelu_tanh"),
    "bert-base": BertFamilyConfig(),
    "bert-large": _size(24, 1024, 16),
    "roberta-base": BertFamilyConfig(**_ROBERTA),
    "roberta-large": _size(24, 1024, 16, **_ROBERTA),
    "albert-base": BertFamilyConfig(**_ALBERT),
    "albert-large": _size(24, 1024, 16, **_ALBERT),
    "albert-xlarge": _size(24, 2048, 16, **_ALBERT),
    "albert-xxlarge": _size(12, 4096, 64, **_ALBERT),
    "minilm-l6": _size(6, 384, 12, task="encode"),
    "minilm-l12": _size(12, 384, 12, task="encode"),
    "gpt1": BertFamilyConfig(**_GPT, vocab_size=40_478),
    "gpt2-small": BertFamilyConfig(**_GPT2),
    "gpt2-medium": _size(24, 1024, 16, **_GPT2),
    "gpt2-large": _size(36, 1280, 20, **_GPT2),
    "gpt2-xl": _size(48, 1600, 25, **_GPT2),
}

register(
    "bert_family",
    BertFamily,
    VARIANTS,
    ModelInfo(
        title="Can bidirectional encoder become the ultimate winner for downstream applications of "
        "foundation models?",
        year=2024,
        paper="arXiv 2411.18021",
        tasks=get_args(Task),
        inputs="token ids [N] packed, token types [N] (BERT), masked rows [M]",
        ops=("varlen_attn", "pad"),
        fidelity="outputs, losses and all gradients equal transformers' BERT, RoBERTa, ALBERT, "
        "GPT-2 and OpenAI GPT with copied weights (fp32, one document at a time)",
        deviations=(
            "token types of GPT-2 (transformers adds word embeddings for them) are not served",
            "ALBERT's inner groups and more than one group are not served",
            "span masking, replaced-token detection and disentangled attention (SpanBERT, ELECTRA, "
            "DeBERTa) are not built",
        ),
    ),
)
