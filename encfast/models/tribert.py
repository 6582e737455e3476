"""TriBERT: Towards Automatic Boundary Detection for Human-AI Collaborative Hybrid Essay in
Education (Zeng et al., AAAI 2024, arXiv 2307.12267).

A sentence encoder is trained by triplets of one essay so that sentences of human and machine part;
then, without a parameter more, the mean embeddings of the p sentences before and behind every gap
are compared, and the gaps with the largest distances are the boundaries. Every sentence is encoded
alone; all sentences of all essays are one packed batch. Faithful to the published code: masked mean
pooling to length 1, Euclidean triplets with margin 1, windows that end where the essay does, means
that are not normalised again, distances rounded to four decimals.

The code's encoder is MPNet (Song et al. 2020, arXiv 2004.09297) as all-mpnet-base-v2, whose scores
have a learned bias of relative positions, one for all layers: ``encoder="mpnet"``. ``"bert"`` is
what the name says. Where an essay has fewer gaps than are asked for, the code fills up at random;
here the places stay 0. Published recipe: AdamW 1e-5, times 0.8 an epoch, weight decay 0.01, one
triplet a step, 5000 an epoch, up to 10 epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from encfast.config import BlockConfig
from encfast.contrastive import triplet_loss
from encfast.layers import Embeddings, RelativeBias, Stack, pool
from encfast.layers.base import Model, init_normal
from encfast.models._tribert_boundaries import (
    boundary_distances,
    boundary_f1,
    largest_gaps,
    sample_triplets,
)
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register
from encfast.weights import Tied, both

__all__ = [
    "Losses",
    "TriBert",
    "TriBertConfig",
    "TripletBatch",
    "boundary_distances",
    "boundary_f1",
    "largest_gaps",
    "sample_triplets",
]


@dataclass(frozen=True)
class TriBertConfig:
    """all-mpnet-base-v2."""

    encoder: Literal["mpnet", "bert"] = "mpnet"
    vocab_size: int = 30_527  # V
    dim: int = 768  # C
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    max_positions: int = 512  # longest sentence; the published tokeniser cuts at 384
    norm_eps: float = 1e-5
    pad_id: int = 1  # its embedding stays 0
    position_offset: int = 2  # unused rows at the start of the position table
    num_segments: int = 0  # token types
    num_buckets: int = 32  # of relative positions; mpnet
    max_distance: int = 128  # from which on relative positions share a bucket; mpnet

    margin: float = 1.0  # of the triplet loss
    prototype: int = 2  # p, sentences on each side of a gap
    num_boundaries: int = 3  # K, gaps that are named

    dropout: float = 0.1  # on embeddings and on both branches of a block
    attn_dropout: float = 0.1  # on the attention weights
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.encoder not in ("mpnet", "bert"):
            raise ValueError(f"encoder must be 'mpnet' or 'bert', got {self.encoder!r}")
        for name in ("vocab_size", "depth", "max_positions", "prototype", "num_boundaries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.margin > 0:
            raise ValueError(f"margin must be > 0, got {self.margin}")
        self.block()

    def block(self) -> BlockConfig:
        """Of every block."""
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


@dataclass(frozen=True, eq=False)
class TripletBatch:
    """Sentences, and which of them are to be near and far."""

    tokens: PackedBatch  # ids [N] of B sentences
    triplets: Tensor  # int64 [T, 3]: sentences in [0, B): anchor, positive, negative


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, which is the triplet loss."""

    total: Tensor
    triplet: Tensor


for _dataclass in (TripletBatch, Losses):
    torch.export.register_dataclass(
        _dataclass, serialized_type_name=f"{__name__}.{_dataclass.__name__}"
    )


class TriBert(Model):
    """An encoder of sentences, and the rule that finds boundaries between them."""

    def __init__(
        self,
        config: TriBertConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.margin = config, config.margin
        self.embed = Embeddings(
            config.vocab_size,
            config.dim,
            max_positions=config.max_positions,
            position_offset=config.position_offset,
            num_segments=config.num_segments,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            padding_idx=config.pad_id,
            **factory,
        )
        relative = None
        if config.encoder == "mpnet":
            relative = RelativeBias(
                config.num_heads, config.num_buckets, config.max_distance, **factory
            )
        self.stack = Stack([config.block()] * config.depth, relative=relative, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_normal(self, self.config.init_std)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table ``[V, C]``."""
        return self.embed.word

    def hidden(self, tokens: PackedBatch) -> PackedBatch:
        """``tokens``, ids ``[N]`` of sentences -> last hidden rows ``[N, C]``."""
        x: PackedBatch = self.stack(self.embed(tokens))  # [N, C]
        return x

    def forward(self, tokens: PackedBatch) -> Tensor:
        """``tokens``, ids ``[N]`` of B sentences -> ``[B, C]`` of length 1; zeros of empty ones.

        Raises:
            ValueError: if a sentence is longer than the position table.
        """
        return pool(self.hidden(tokens), "mean", normalize=True)  # [B, C]

    def loss(self, batch: TripletBatch) -> Losses:
        """Mean over triplets of ``batch`` of ``max(0, |a - p| - |a - n| + margin)``, or 0.

        Every sentence is encoded once, however many triplets it is in.
        """
        e = self(batch.tokens)  # [B, C]
        anchor, positive, negative = (e.index_select(0, i) for i in batch.triplets.unbind(1))
        loss = triplet_loss(anchor, positive, negative, margin=self.margin)
        return Losses(loss, loss)

    @torch.no_grad()
    def boundaries(
        self,
        tokens: PackedBatch,
        essays: PackedBatch,
        *,
        prototype: int | None = None,
        k: int | None = None,
    ) -> Tensor:
        """int64 ``[essays, K]``: where authors change, the farthest gap first; 0 for none.

        Args:
            tokens: ids ``[N]`` of the S sentences of all essays.
            essays: geometry of the essays, whose rows are the sentences; its data are not read.
            prototype: p; the config's if None.
            k: K; the config's if None.

        Returns:
            int64 ``[essays, K]``.

        Raises:
            ValueError: if the essays have another number of sentences.
        """
        if essays.total != tokens.batch_size:
            raise ValueError(
                f"essays have {essays.total} sentences, tokens has {tokens.batch_size}"
            )
        c = self.config
        distances = boundary_distances(
            essays.with_data(self(tokens)), c.prototype if prototype is None else prototype
        )
        return largest_gaps(distances, essays, c.num_boundaries if k is None else k)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> TripletBatch:
        """Sentences of two authors, who each use one half of the vocabulary, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the sentences; some, one of them 0, if None. The authors take turns; fewer
                than three sentences have no triplet but that of each with itself.

        Returns:
            What ``loss`` takes.
        """
        if lengths is None:
            longest = min(24, self.config.max_positions)
            lengths = [*torch.randint(3, longest + 1, (7,), generator=generator).tolist(), 0]
        b, half = len(lengths), self.config.vocab_size // 2
        author = torch.repeat_interleave(torch.arange(b) % 2, torch.tensor(lengths).long())
        ids = torch.randint(half, (sum(lengths),), generator=generator) + half * author
        tokens = PackedBatch.from_lengths(ids, lengths)
        anchor, apart = torch.arange(b), (0, 2, 1) if b > 2 else (0, 0, 0)
        return TripletBatch(tokens, torch.stack([anchor.roll(n) for n in apart], 1))

    def reference_names(self) -> list[Tied]:
        """What our tensors are called in transformers' MPNetModel or BertModel (no pooler)."""
        mpnet = self.config.encoder == "mpnet"
        theirs = "embeddings"
        entries = [
            Tied("embed.word.weight", (f"{theirs}.word_embeddings.weight",)),
            Tied("embed.position.weight", (f"{theirs}.position_embeddings.weight",)),
            *both("embed.norm", f"{theirs}.LayerNorm"),
        ]
        if self.config.num_segments:
            name = f"{theirs}.token_type_embeddings.weight"
            entries.append(Tied("embed.segment.weight", (name,)))
        if mpnet:
            bias = "encoder.relative_attention_bias.weight"
            entries.append(Tied("stack.relative.weight", (bias,), transpose=True))
        attention, out, norm = (
            ("attention.attn.{}", "attention.attn.o", "attention.LayerNorm")
            if mpnet
            else ("attention.self.{}", "attention.output.dense", "attention.output.LayerNorm")
        )
        parts = "qkv" if mpnet else ("query", "key", "value")
        for i in range(self.config.depth):
            ours, theirs = f"stack.blocks.{i}", f"encoder.layer.{i}"
            entries += [
                *both(f"{ours}.attn.qkv", *(f"{theirs}.{attention.format(x)}" for x in parts)),
                *both(f"{ours}.attn.out", f"{theirs}.{out}"),
                *both(f"{ours}.norm1", f"{theirs}.{norm}"),
                *both(f"{ours}.mlp.up", f"{theirs}.intermediate.dense"),
                *both(f"{ours}.mlp.down", f"{theirs}.output.dense"),
                *both(f"{ours}.norm2", f"{theirs}.output.LayerNorm"),
            ]
        return entries


_BERT: dict[str, Any] = {
    "encoder": "bert",
    "norm_eps": 1e-12,
    "pad_id": 0,
    "position_offset": 0,
    "num_segments": 2,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "dim": 64,
    "depth": 2,
    "num_heads": 4,
    "ffn_dim": 128,
    "max_positions": 128,
}

VARIANTS = {
    "mpnet-base": TriBertConfig(),
    "bert-base": TriBertConfig(vocab_size=30_522, **_BERT),
    "tiny": TriBertConfig(**_TINY),
    "tiny-bert": TriBertConfig(**_TINY, **_BERT),
}

register(
    "tribert",
    TriBert,
    VARIANTS,
    ModelInfo(
        title=(
            "Towards Automatic Boundary Detection for Human-AI Collaborative Hybrid Essay in "
            "Education"
        ),
        year=2024,
        paper="arXiv 2307.12267",
        tasks=("sentence-embedding", "boundary-detection"),
        inputs="tokens: PackedBatch of ids [N], one sequence a sentence",
        ops=("varlen_attn", "add_norm", "seg_pool"),
        fidelity=(
            "fp32 hidden rows and every gradient within 1e-5 of transformers' MPNetModel and "
            "BertModel; boundaries equal to a loop over windows"
        ),
        deviations=("an essay with fewer gaps than K names those it has, not random ones",),
    ),
)
