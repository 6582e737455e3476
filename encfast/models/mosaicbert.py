"""MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining (Portes et al., NeurIPS 2023,
arXiv 2312.17482).

A post-norm BERT without position table: attention knows distances alone, through symmetric ALiBi
(score_ij - slope * |i - j|). The feed-forward half is gated, by one bias-free matmul. Padding is
removed once, before the first layer. While pre-training, 30 % of the tokens are masked and the
last layer is finished only where something is predicted, and at [CLS]. LayerNorm runs in the dtype
of autocast.

Where the paper is silent its published code decides (mosaicml/examples, examples/benchmarks/bert):
the dropout of the feed-forward half stands before its last matmul; weight decay applies to every
parameter and does not scale with the peak learning rate. The paper asks for a vocabulary that is a
multiple of 64, the code for one of 8; both give 30528. The large model's pre-training is read as
that of base, at a rate of 2e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from encfast import losses, ops
from encfast.config import BlockConfig, NormPrecision, nearest
from encfast.data.masking import mask_tokens
from encfast.data.text import TextBatch
from encfast.layers import ClassificationHead, Embeddings, MaskedLMHead, Stack
from encfast.layers.base import Model, init_normal
from encfast.models._mosaicbert_training import GLUE, PRETRAINING, Recipe
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register
from encfast.weights import Tied

__all__ = [
    "GLUE",
    "PRETRAINING",
    "Losses",
    "MosaicBert",
    "MosaicBertConfig",
    "Recipe",
]

Task = Literal["masked-lm", "classification"]


@dataclass(frozen=True)
class MosaicBertConfig:
    """MosaicBERT-Base."""

    vocab_size: int = 30_522  # tokens the tokenizer knows
    vocab_multiple: int = 64  # the table is padded to a multiple of this many rows
    dim: int = 768  # C
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072  # channels of each half of the gated projection
    num_segments: int = 2  # token types
    norm_eps: float = 1e-12
    norm_precision: NormPrecision = "low"  # see layers.norm.Norm

    task: Task = "masked-lm"
    num_labels: int = 2  # K of classification; 1: regression
    subset_last_layer: bool = True  # finish the last layer only where it is read

    dropout: float = 0.1  # on embeddings, attention output and the gated product
    head_dropout: float = 0.1  # before the classifier
    init_std: float = 0.02

    mask_prob: float = 0.30  # share of tokens to predict while training
    eval_mask_prob: float = 0.15  # the same while evaluating
    pad_id: int = 0
    unk_id: int = 100
    cls_id: int = 101
    sep_id: int = 102
    mask_id: int = 103

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task {self.task!r} is unknown; {nearest(self.task, get_args(Task))}")
        for name in ("vocab_size", "vocab_multiple", "depth", "num_segments", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        self.block()

    @property
    def table_size(self) -> int:
        """V: rows of the word table, and scores per predicted token."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked."""
        return self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id

    def block(self) -> BlockConfig:
        """Of every block."""
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            norm_position="post",
            norm_eps=self.norm_eps,
            norm_precision=self.norm_precision,
            position="alibi",
            glu=True,
            activation="gelu",
            up_bias=False,
            attn_out_dropout=self.dropout,
            mlp_hidden_dropout=self.dropout,
        )


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and the task's term of it."""

    total: Tensor
    masked_lm: Tensor | None = None
    classification: Tensor | None = None


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class MosaicBert(Model):
    """Embeddings, a stack of blocks, and the head of one task."""

    def __init__(
        self,
        config: MosaicBertConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.task = config, config.task
        norm = {"norm_eps": config.norm_eps, "norm_precision": config.norm_precision}
        self.embed = Embeddings(
            config.table_size,
            config.dim,
            num_segments=config.num_segments,
            dropout=config.dropout,
            padding_idx=config.pad_id,
            **norm,
            **factory,
        )
        self.stack = Stack([config.block()] * config.depth, **factory)
        self.head: nn.Module
        if config.task == "masked-lm":
            self.head = MaskedLMHead(config.dim, config.table_size, **norm, **factory)
        else:
            self.head = ClassificationHead(
                config.dim, config.num_labels, dropout=config.head_dropout, **factory
            )
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """The output embedding is the input embedding."""
        if self.task == "masked-lm":
            self.head.decoder.weight = self.embed.word.weight

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_normal(self, self.config.init_std)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table ``[V, C]``."""
        return self.embed.word

    def hidden(self, tokens: PackedBatch, segments: Tensor | None = None) -> PackedBatch:
        """Ids ``[N]`` -> last hidden rows ``[N, C]``; ``tokens`` and ``segments`` as in a call."""
        return self.stack(self.embed(tokens, segments))

    def subset(
        self, tokens: PackedBatch, segments: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Last hidden rows where they are read: at ``rows`` and at each sequence's first token.

        With ``subset_last_layer`` the last block's output projection, norms and feed-forward half
        run on these M + B rows alone; all N remain its keys.

        Args:
            tokens: ids ``[N]``.
            segments: int64 ``[N]`` or None.
            rows: int64 ``[M]`` in [0, N).

        Returns:
            ``[M, C]``, and ``[B, C]`` (meaningless for an empty sequence).
        """
        first = torch.where(tokens.lengths() > 0, tokens.first_rows(), -1)  # [B]
        read = torch.cat((rows, first))  # [M + B]
        x = self.embed(tokens, segments)  # [N, C]
        if self.config.subset_last_layer:
            x = self.stack(x, rows=read)  # [M + B, C]
        else:
            x = ops.gather_rows(self.stack(x).data, read)  # [M + B, C]
        return x[: rows.shape[0]], x[rows.shape[0] :]

    def forward(
        self, tokens: PackedBatch, segments: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Scores of the task.

        Args:
            tokens: ids ``[N]`` in [0, V).
            segments: int64 ``[N]``, token types; all 0 if None.
            rows: int64 ``[M]``: the only rows whose vocabulary scores are wanted; None: all.

        Returns:
            ``[N, V]`` or ``[M, V]`` to predict tokens, ``[B, K]`` to classify.
        """
        if self.task == "classification":
            nothing = torch.empty(0, dtype=torch.int64, device=tokens.device)
            _, first = self.subset(tokens, segments, nothing)  # [B, C]
            return self.head(first)
        if rows is None:
            return self.head(self.hidden(tokens, segments).data)
        masked, _ = self.subset(tokens, segments, rows)  # [M, C]
        return self.head(masked)

    def loss(self, batch: TextBatch) -> Losses:
        """Mean cross entropy of the masked tokens, or of the labels; squared error for regression.

        Raises:
            ValueError: if the batch lacks what the task predicts.
        """
        needed = ("rows", "targets") if self.task == "masked-lm" else ("labels",)
        for name in needed:
            if getattr(batch, name) is None:
                raise ValueError(
                    f"the loss of task {self.task!r} needs batch.{name}, which is None"
                )
        scores = self(batch.tokens, batch.segments, batch.rows)
        if self.task == "masked-lm":
            loss = losses.masked_lm_loss(scores, batch.targets)
            return Losses(loss, masked_lm=loss)
        labels = batch.labels.float() if self.config.num_labels == 1 else batch.labels
        loss = losses.classification_loss(scores, labels, batch.tokens.lengths() > 0)
        return Losses(loss, classification=loss)

    def mask(
        self,
        tokens: PackedBatch,
        segments: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> TextBatch:
        """Masks tokens: ``mask_prob`` of them in training mode, ``eval_mask_prob`` in evaluation.

        For the border, on the CPU; a data-loader worker calls
        :func:`encfast.data.masking.mask_tokens` itself.

        Args:
            tokens: ids ``[N]``.
            segments: int64 ``[N]``, token types, handed on.
            generator: of the draw.

        Returns:
            What ``loss`` takes.
        """
        c = self.config
        masked = mask_tokens(
            tokens,
            vocab_size=c.vocab_size,
            mask_id=c.mask_id,
            prob=c.mask_prob if self.training else c.eval_mask_prob,
            special_ids=c.special_ids,
            generator=generator,
        )
        return TextBatch.from_masked(masked, segments)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> TextBatch:
        """Random pairs ``[CLS] A [SEP] B [SEP]`` in the form the task expects, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the sequences; some up to 128, one of them 0, if None.

        Returns:
            What ``loss`` takes.
        """
        c, draw = self.config, {"generator": generator}
        if lengths is None:
            lengths = [*torch.randint(8, 129, (4,), **draw).tolist(), 0]
        low = min(c.mask_id + 1, c.vocab_size - 1)  # ordinary words follow the special ids
        ids = torch.randint(low, c.vocab_size, (sum(lengths),), **draw)
        tokens = PackedBatch.from_lengths(ids, lengths)
        place, size = tokens.positions(), tokens.lengths().long()[tokens.segment_ids()]  # [N]
        ids.masked_fill_((place == size // 2) | (place == size - 1), c.sep_id)
        ids.masked_fill_(place == 0, c.cls_id)
        segments = (place > size // 2).long().clamp(max=c.num_segments - 1)
        if self.task == "masked-lm":
            return self.mask(tokens, segments, generator=generator)
        if c.num_labels == 1:
            return TextBatch(tokens, segments, labels=torch.rand(len(lengths), **draw))
        labels = torch.randint(c.num_labels, (len(lengths),), **draw)
        return TextBatch(tokens, segments, labels=labels)

    def reference_names(self) -> list[Tied]:
        """What our tensors are called in mosaicml/examples (BertForMaskedLM, ...Classification).

        Its masked-LM checkpoints hold the tied ``cls.predictions.decoder.weight`` as well, which
        :func:`encfast.weights.load` is to ignore.
        """
        names = {
            "embed.word.weight": "bert.embeddings.word_embeddings.weight",
            "embed.segment.weight": "bert.embeddings.token_type_embeddings.weight",
            **_both("embed.norm", "bert.embeddings.LayerNorm"),
        }
        for i in range(self.config.depth):
            ours, theirs = f"stack.blocks.{i}", f"bert.encoder.layer.{i}"
            names |= _both(f"{ours}.attn.qkv", f"{theirs}.attention.self.Wqkv")
            names |= _both(f"{ours}.attn.out", f"{theirs}.attention.output.dense")
            names |= _both(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
            names[f"{ours}.mlp.up.weight"] = f"{theirs}.mlp.gated_layers.weight"
            names |= _both(f"{ours}.mlp.down", f"{theirs}.mlp.wo")
            names |= _both(f"{ours}.norm2", f"{theirs}.mlp.layernorm")
        if self.task == "masked-lm":
            names |= _both("head.dense", "cls.predictions.transform.dense")
            names |= _both("head.norm", "cls.predictions.transform.LayerNorm")
            names["head.decoder.bias"] = "cls.predictions.decoder.bias"
        else:
            names |= _both("head.dense", "bert.pooler.dense")
            names |= _both("head.out", "classifier")
        return [Tied(ours, (theirs,)) for ours, theirs in names.items()]


def _both(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


VARIANTS = {
    "base": MosaicBertConfig(),
    "large": MosaicBertConfig(dim=1024, depth=24, num_heads=16, ffn_dim=4096),
    "tiny": MosaicBertConfig(vocab_size=500, dim=64, depth=2, num_heads=4, ffn_dim=128),
}

register(
    "mosaicbert",
    MosaicBert,
    VARIANTS,
    ModelInfo(
        title="MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining",
        year=2023,
        paper="arXiv 2312.17482",
        tasks=("masked-lm", "classification"),
        inputs="tokens: PackedBatch of ids [N]; segments: token types [N]",
        ops=("varlen_attn", "pad"),
        fidelity=(
            "fp32 outputs and every gradient within 1e-5 of a dense eager re-implementation of the "
            "published code, and shared parts of transformers' BertModel"
        ),
        deviations=(
            "the classifier finishes the last layer at [CLS] alone, which changes no number",
        ),
    ),
)
