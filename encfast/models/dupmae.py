"""RetroMAE-2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models
(Xiao et al., ACL 2023, arXiv 2305.02564), DupMAE, and RetroMAE (2022, arXiv 2205.12035) before it.

BERT reads a text with 30 % of its words masked. Two cheap decoders make its rows worth retrieving
by: a one-layer decoder rebuilds the text from [CLS] alone, with a query stream of [CLS] at every
position and a stream of keys and values of the unmasked words, of which each row sees a random
half and never its own; and the ordinary tokens' vocabulary scores, pooled by their largest value,
predict the text's bag of words. Decoders, encoder and masked LM share the embeddings and one head.
The loss is masked LM + decoder + bow_weight * bag of words.

Faithful to the published code (staoxiao/RetroMAE) where it and the paper differ: queries pass the
embedding module as inputs do (``query_norm``; RetroMAE adds positions alone), and bow_weight is
0.1 (in the paper a plain sum). The scores are pooled as they are, without an activation; [SEP] is
among the rows that are pooled; 1 / L counts the tokens of words. To retrieve, c = W_cls h of [CLS]
and the pooled scores mu are compared by c_q c_d + sum over the k largest entries v of mu_d of
mu_q[v] mu_d[v]. The published code does not tune this representation: here by InfoNCE over
in-batch and hard negatives at temperature 1, and with a teacher's scores by KL(teacher || student)
over a query's own passages + 1e-4 of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from encfast import losses, ops
from encfast.config import BlockConfig, nearest
from encfast.layers import Embeddings, MaskedLMHead, Norm, Stack, pool
from encfast.layers.base import Model, init_normal
from encfast.layers.cross import CrossAttention
from encfast.layers.dropout import Dropout, StaticFloat
from encfast.layers.mlp import MLP
from encfast.models._dupmae_data import (
    Losses,
    PretrainBatch,
    PretrainCollator,
    Representation,
    RetrievalBatch,
    SparseRepresentation,
    example_batch,
    ordinary_rows,
    similarity,
)
from encfast.models._dupmae_names import bert_names
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register
from encfast.weights import Tied

__all__ = ["DupMae", "DupMaeConfig", "Losses", "PretrainBatch", "PretrainCollator"]
__all__ += ["Representation", "RetrievalBatch", "SparseRepresentation", "similarity"]

Task = Literal["pretrain", "retrieval"]


@dataclass(frozen=True)
class DupMaeConfig:
    """BERT-base uncased, DupMAE as its code trains it."""

    vocab_size: int = 30_522  # V
    dim: int = 768  # C
    depth: int = 12  # blocks of the encoder
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    max_positions: int = 512  # longest text
    num_segments: int = 2  # token types, of which the first is used
    norm_eps: float = 1e-12
    dropout: float = 0.1  # on embeddings and on both branches of a block
    attn_dropout: float = 0.1  # on the attention weights
    init_std: float = 0.02

    task: Task = "pretrain"
    mask_prob: float = 0.3  # share of the tokens that the encoder does not see
    decoder_mask_prob: float = 0.5  # share of the words that a row of the decoder does not see
    num_masks: int = 256  # most masks of a text in the decoder, of which each row takes one
    query_norm: bool = True  # queries pass type, norm and dropout; False: RetroMAE's h + position
    decoder: bool = True  # the [CLS] decoder; False: ablated
    bow_weight: float = 0.1  # of the bag of words, >= 0; 0: ablated

    cls_dim: int = 384  # K: channels of c
    top_k: int = 384  # entries of mu that an index keeps
    lexical: bool = True  # retrieve by mu too; False: by c alone
    temperature: float = 1.0  # of the contrastive loss, > 0
    distilled_contrastive: float = 1e-4  # weight of the contrastive loss beside a teacher

    pad_id: int | None = 0  # its embedding stays 0; None: no such token
    cls_id: int = 101
    sep_id: int = 102
    mask_id: int = 103

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task {self.task!r} is unknown; {nearest(self.task, get_args(Task))}")
        for name in ("vocab_size", "depth", "max_positions", "num_masks", "cls_dim", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.bow_weight >= 0:
            raise ValueError(f"bow_weight must be >= 0, got {self.bow_weight}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        self.block()

    def block(self) -> BlockConfig:
        """Of every block, the decoder's too."""
        return BlockConfig(
            dim=self.dim,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            norm_position="post",
            norm_eps=self.norm_eps,
            attn_dropout=self.attn_dropout,
            attn_out_dropout=self.dropout,
            mlp_dropout=self.dropout,
        )


class EnhancedDecoder(nn.Module):
    """A post-norm block whose queries, and residual, are not its keys and values."""

    def __init__(self, config: BlockConfig, **factory: Any) -> None:
        super().__init__()
        self.attn = CrossAttention(config, **factory)
        self.mlp = MLP(config, **factory)
        self.norm1, self.norm2 = (
            Norm(config.dim, eps=config.norm_eps, **factory) for _ in range(2)
        )
        self.attn_drop = Dropout(config.attn_out_dropout)
        self.mlp_drop = Dropout(config.mlp_dropout)

    def forward(self, queries: PackedBatch, context: PackedBatch, visible: Tensor) -> Tensor:
        """Rows ``[N, C]`` each, and bool ``[T]`` -> ``[N, C]``."""
        branch = self.attn(queries, context, bias=visible)
        x = self.norm1(self.attn_drop(branch), queries.data)
        return self.norm2(self.mlp_drop(self.mlp(x)), x)


class DupMae(Model):
    """The encoder with one head, and what the task puts beside it."""

    bow_weight = StaticFloat()
    logit_scale = StaticFloat()
    distilled_contrastive = StaticFloat()

    def __init__(
        self,
        config: DupMaeConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c, factory = config, {"device": device, "dtype": dtype}
        self.config, self.task = c, c.task
        self.bow_weight, self.logit_scale = c.bow_weight, 1 / c.temperature
        self.distilled_contrastive = c.distilled_contrastive
        self.embed = Embeddings(
            c.vocab_size,
            c.dim,
            max_positions=c.max_positions,
            num_segments=c.num_segments,
            norm_eps=c.norm_eps,
            dropout=c.dropout,
            padding_idx=c.pad_id,
            **factory,
        )
        self.stack = Stack([c.block()] * c.depth, **factory)
        # Neither a decoder to train nor mu to pool: no head.
        self.lm_head: MaskedLMHead | None = None
        if c.task == "pretrain" or c.lexical:
            self.lm_head = MaskedLMHead(c.dim, c.vocab_size, norm_eps=c.norm_eps, **factory)
        self.decoder: EnhancedDecoder | None = None
        self.project: nn.Linear | None = None
        if c.task == "retrieval":
            self.project = nn.Linear(c.dim, c.cls_dim, bias=False, **factory)
        elif c.decoder:
            self.decoder = EnhancedDecoder(c.block(), **factory)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """The output embedding is the input embedding."""
        if self.lm_head is not None:
            self.lm_head.decoder.weight = self.embed.word.weight

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_normal(self, self.config.init_std)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table ``[V, C]``."""
        return self.embed.word

    def load_pretrained(self, pretrained: Mapping[str, Tensor]) -> None:
        """Takes over encoder and head of a pre-trained model; its decoder is left out.

        Args:
            pretrained: its ``state_dict()``.

        Raises:
            RuntimeError: if these parts are missing, or of another shape.
        """
        for name in ("embed", "stack", "lm_head"):
            module, prefix = getattr(self, name), f"{name}."
            if module is not None:
                own = {n: t for n, t in pretrained.items() if n.startswith(prefix)}
                module.load_state_dict({n.removeprefix(prefix): t for n, t in own.items()})

    def bert_names(self) -> list[Tied]:
        """How transformers' ``BertForMaskedLM`` calls the tensors of encoder and head."""
        return bert_names(self.config.depth)

    def forward(self, tokens: PackedBatch) -> PackedBatch:
        """``tokens``, ids ``[N]`` in [0, V) -> last hidden rows ``[N, C]``."""
        return self.stack(self.embed(tokens))

    def loss(self, batch: PretrainBatch | RetrievalBatch) -> Losses:
        """The task's loss.

        Raises:
            TypeError: for a batch of the other task.
        """
        if self.task == "pretrain":
            if not isinstance(batch, PretrainBatch):
                raise TypeError(f"task 'pretrain' needs a PretrainBatch, got {type(batch)}")
            return self._pretrain_loss(batch)
        if not isinstance(batch, RetrievalBatch):
            raise TypeError(f"task 'retrieval' needs a RetrievalBatch, got {type(batch)}")
        return self._retrieval_loss(batch)

    def _pretrain_loss(self, batch: PretrainBatch) -> Losses:
        hidden = self(batch.tokens)  # [N, C]
        masked = self._head_loss(hidden.select(batch.rows), batch.targets)
        total, decoded, bag = masked, None, None
        if self.decoder is not None:
            rows, words = self.decode(hidden, batch), batch.words.data  # [N, C], [M]
            decoded = self._head_loss(ops.gather_rows(rows, words), batch.originals[words])
            total = total + decoded
        if self.bow_weight:
            ids = batch.words.with_data(batch.originals[batch.words.data])
            bag = losses.bag_of_words_loss(self.lexical(hidden, batch.ordinary), ids)
            total = total + self.bow_weight * bag
        return Losses(total, masked, decoded, bag)

    def decode(self, hidden: PackedBatch, batch: PretrainBatch) -> Tensor:
        """``[N, C]``: every row rebuilt from its text's [CLS] row.

        Args:
            hidden: ``[N, C]`` of the masked texts.
            batch: the texts, and which words each row may see.

        Returns:
            ``[N, C]``.
        """
        assert self.decoder is not None
        h = pool(hidden, "first")[hidden.segment_ids()]  # [N, C]
        if self.config.query_norm:
            queries = self.embed.around(hidden.with_data(h))
        else:
            queries = hidden.with_data(h + self.embed.position.weight[hidden.positions()])
        words = self.embed(batch.tokens.with_data(batch.originals)).data  # [N, C]
        first = (hidden.positions() == 0)[:, None]
        context = hidden.with_data(torch.where(first, h, words))
        return self.decoder(queries, context, batch.visible)

    def lexical(self, hidden: PackedBatch, ordinary: PackedBatch) -> Tensor:
        """mu, float32 ``[B, V]``: the largest vocabulary score of each text's ordinary rows.

        Args:
            hidden: last hidden rows ``[N, C]``.
            ordinary: int64 ``[M]``, rows of each text that are not its first.

        Returns:
            float32 ``[B, V]``.
        """
        rows = self.lm_head.features(hidden.select(ordinary.data))  # [M, C]
        decoder = self.lm_head.decoder
        return ops.linear_seg_max(rows, decoder.weight, ordinary.cu_seqlens, decoder.bias)

    def _head_loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        decoder = self.lm_head.decoder
        features = self.lm_head.features(rows)
        return ops.linear_cross_entropy(features, decoder.weight, targets, decoder.bias)

    def represent(self, tokens: PackedBatch) -> Representation:
        """c and mu of each text, of queries as of passages; for the border.

        Args:
            tokens: ids ``[N]`` of ``[CLS] words [SEP]``.

        Returns:
            One row of c and one of mu per text.

        Raises:
            ValueError: for a model of another task.
        """
        if self.project is None:
            raise ValueError("task 'pretrain' has no W_cls; build the model with task='retrieval'")
        hidden = self(tokens)  # [N, C]
        cls = self.project(pool(hidden, "first"))  # [B, K]
        if not self.config.lexical:
            return Representation(cls, cls.new_empty((len(cls), 0), dtype=torch.float32))
        return Representation(cls, self.lexical(hidden, ordinary_rows(tokens)))

    def index(self, tokens: PackedBatch) -> SparseRepresentation:
        """What an index keeps of passages: c, and the ``top_k`` largest entries of mu.

        Raises:
            ValueError: as :meth:`represent`.
        """
        cls, lexical = self.represent(tokens)
        values, ids = lexical.topk(min(self.config.top_k, lexical.shape[1]), dim=1)
        return SparseRepresentation(cls, values, ids)

    def _retrieval_loss(self, batch: RetrievalBatch) -> Losses:
        texts = self.represent(batch.tokens)
        lexical = texts.lexical
        if self.config.lexical:
            # Of passages what an index keeps.
            largest = lexical.topk(min(self.config.top_k, lexical.shape[1]), dim=1)
            kept = torch.zeros_like(lexical).scatter(1, largest.indices, largest.values)
            query = torch.arange(len(lexical), device=lexical.device) < batch.queries
            lexical = torch.where(query[:, None], lexical, kept)
        # One product for both parts.
        both_parts = torch.cat((texts.cls.float(), lexical), 1)
        queries, passages = both_parts.tensor_split((batch.queries,))
        group = len(passages) // max(batch.queries, 1)
        right = torch.arange(batch.queries, device=queries.device) * group
        if batch.queries == 0:
            contrastive = both_parts.sum() * 0
        else:
            contrastive = ops.info_nce(
                queries, passages, logit_scale=self.logit_scale, positives=right, directions="rows"
            )
        if batch.teacher is None:
            return Losses(contrastive, contrastive=contrastive)
        own = passages[: batch.queries * group].unflatten(0, (batch.queries, group))  # [Q, G, D]
        student = torch.einsum("qd,qgd->qg", queries, own) * self.logit_scale
        teacher = batch.teacher.float().log_softmax(1)
        terms = (teacher.exp() * (teacher - student.log_softmax(1))).sum(1)
        distillation = terms.sum() / max(batch.queries, 1)
        total = distillation + self.distilled_contrastive * contrastive
        return Losses(total, contrastive=contrastive, distillation=distillation)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> PretrainBatch | RetrievalBatch:
        """Random texts, masked to pre-train; or of queries and as many passages. On the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the texts; some, one of them 0, if None.

        Returns:
            What ``loss`` takes.
        """
        return example_batch(self.config, generator, lengths)


_BASE = DupMaeConfig()
_TINY = DupMaeConfig(
    vocab_size=512,
    dim=64,
    depth=2,
    num_heads=2,
    ffn_dim=128,
    max_positions=128,
    cls_dim=32,
    top_k=32,
    cls_id=1,
    sep_id=2,
    mask_id=3,
)
VARIANTS = {
    "tiny": _TINY,
    "base": _BASE,
    "base-retrieval": replace(_BASE, task="retrieval"),
    "retromae-base": replace(_BASE, query_norm=False, bow_weight=0.0),
}

register(
    "dupmae",
    DupMae,
    VARIANTS,
    ModelInfo(
        title="RetroMAE-2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language "
        "Models",
        year=2023,
        paper="arXiv 2305.02564",
        tasks=get_args(Task),
        inputs="token ids [N] packed; to pre-train masked rows [M], visible pairs bool [sum L^2]",
        ops=("varlen_attn", "pad", "linear_cross_entropy", "linear_seg_max", "rank_loss"),
        fidelity="encoder and masked LM equal transformers' BertForMaskedLM, the decoder a layer "
        "assembled of its BertLayer's parts, with copied weights (fp32)",
        deviations=("mining of hard negatives with an index is left to the caller",),
    ),
)
