"""VL-JEPA's text towers: the predictor's Llama layers, Y (EmbeddingGemma), and the Y-decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.layers import KVCache, Norm, Stack, pool
from encfast.layers.decode import generate
from encfast.losses import next_tokens
from encfast.models._vl_jepa_config import LlamaConfig, TextConfig
from encfast.packed import PackedBatch


class Llama(nn.Module):
    """Llama layers and their final norm over rows that are embedded already.

    Args:
        config: of the layers.
        depth: how many of them.
        causal: a row sees those before it; otherwise all.
    """

    def __init__(self, config: LlamaConfig, depth: int, *, causal: bool, **factory: Any) -> None:
        super().__init__()
        self.stack = Stack([config.block(causal=causal)] * depth, **factory)
        self.norm = Norm(config.dim, kind="rmsnorm", eps=config.norm_eps, **factory)

    def forward(
        self,
        x: PackedBatch,
        *,
        rows: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Any:
        """Rows ``[N, C]`` -> rows ``[N, C]`` behind the final norm.

        Args:
            x: embedded rows, and their geometry.
            rows: int64 ``[M]``: only these are wanted.
            caches: one a layer, of earlier rows; these are appended.

        Returns:
            The batch, or with ``rows`` ``[M, C]``.
        """
        x = self.stack(x, rows=rows, caches=caches)
        return self.norm(x) if isinstance(x, Tensor) else x.with_data(self.norm(x.data))


class Predictor(nn.Module):
    """Visual rows and query tokens, packed, through Llama layers to one embedding.

    Padding never exists: a sequence is its visual rows followed by its real query tokens, and the
    mean is over these.

    Args:
        config: of the layers.
        visual_dim: channels of X's rows.
        embed_dim: E.
        causal: whether a row sees only those before it.
    """

    def __init__(
        self,
        config: LlamaConfig,
        visual_dim: int,
        embed_dim: int,
        *,
        causal: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.visual = nn.Linear(visual_dim, config.dim, **factory)
        self.layers = Llama(config, config.depth, causal=causal, **factory)
        self.out = nn.Linear(config.dim, embed_dim, **factory)

    def rows(self, visual: PackedBatch, query: PackedBatch | None) -> PackedBatch:
        """Rows behind the final norm, each clip's visual ones before its query's.

        Args:
            visual: ``[Nv, visual_dim]`` of B clips.
            query: embedded tokens ``[Nq, C]`` of B texts, or None.

        Returns:
            ``[Nv + Nq, C]``.

        Raises:
            ValueError: for a query of another number of texts.
        """
        x = visual.with_data(self.visual(visual.data))
        return self.layers(x if query is None else x.concat(query))

    def forward(self, visual: PackedBatch, query: PackedBatch | None) -> Tensor:
        """``[B, E]``, unit length; see :meth:`rows`."""
        return F.normalize(self.out(pool(self.rows(visual, query), "mean")), dim=-1)


class TextEncoder(nn.Module):
    """Y: Gemma 3 layers both ways, mean of the rows, projection.

    Args:
        config: of the layers.
        embed_dim: E.
    """

    def __init__(self, config: TextConfig, embed_dim: int, **factory: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.dim, **factory)
        # Unused, but a float attribute costs torch.compile a second pass.
        self.tokens.norm_type = 2  # type: ignore[assignment]
        self.stack = Stack([config.block(i) for i in range(config.depth)], **factory)
        self.norm = Norm(
            config.dim,
            kind="rmsnorm",
            eps=config.norm_eps,
            unit_offset=True,
            precision="fp32",
            **factory,
        )
        self.out = nn.Linear(config.dim, embed_dim, **factory)
        self.scale = repr(math.sqrt(config.dim))  # text: see layers.dropout.StaticFloat

    def rows(self, tokens: PackedBatch) -> PackedBatch:
        """``tokens``, ids ``[N]`` -> rows ``[N, C]`` behind the final norm."""
        x = self.tokens(tokens.data)
        # Gemma rounds the factor to the table's dtype.
        x = x * torch.tensor(float(self.scale), dtype=x.dtype)
        x = self.stack(tokens.with_data(x))
        return x.with_data(self.norm(x.data))

    def forward(self, tokens: PackedBatch) -> Tensor:
        """``tokens``, ids ``[N]`` of B texts -> ``[B, E]``, unit length."""
        return F.normalize(self.out(pool(self.rows(tokens), "mean")), dim=-1)


class TextDecoder(nn.Module):
    """Y-decoder: an embedding becomes the first rows of a text that causal Llama layers go on with.

    Tokens and their scores come from the predictor's token table, which the caller hands over.

    Args:
        config: of the layers.
        depth: how many of them.
        prefix: rows that an embedding becomes.
        embed_dim: E.

    Attributes:
        calls: embeddings decoded so far; set it to 0 to count anew.
    """

    def __init__(
        self, config: LlamaConfig, depth: int, prefix: int, embed_dim: int, **factory: Any
    ) -> None:
        super().__init__()
        self.prefix, self.dim = prefix, config.dim
        self.expand = nn.Linear(embed_dim, prefix * config.dim, **factory)
        self.layers = Llama(config, depth, causal=True, **factory)
        self.calls = 0

    def prefixes(self, embeddings: Tensor) -> PackedBatch:
        """``[B, E]`` -> ``prefix`` rows of each, ``[B * prefix, C]``."""
        count = embeddings.shape[0]
        rows = self.expand(embeddings).view(count * self.prefix, self.dim)
        ends = torch.arange(count + 1, dtype=torch.int32, device=rows.device) * self.prefix
        return PackedBatch(rows, ends, self.prefix)

    def loss(self, embeddings: Tensor, texts: PackedBatch, table: Tensor) -> Tensor:
        """Mean cross entropy of each token given the embedding and the tokens before it.

        Args:
            embeddings: ``[B, E]``.
            texts: ids ``[N]``, each text from bos to eos.
            table: ``[V, C]``.

        Returns:
            0-dim, fp32 or wider.
        """
        x = self.prefixes(embeddings).concat(texts.with_data(F.embedding(texts.data, table)))
        own = torch.arange(texts.total, device=table.device)
        own = own + self.prefix * (texts.segment_ids() + 1)  # behind each text's own prefix
        return ops.linear_cross_entropy(self.layers(x, rows=own), table, next_tokens(texts))

    def generate(
        self, embeddings: Tensor, table: Tensor, bos_id: int, eos_id: int, max_new_tokens: int
    ) -> list[Tensor]:
        """The likeliest text of each embedding.

        Args:
            embeddings: ``[B, E]``.
            table: ``[V, C]``.
            bos_id, eos_id: ids of the tokens around a text.
            max_new_tokens: where a text is cut that has not ended.

        Returns:
            B tensors of ids, without bos, with eos where it came.
        """
        count = embeddings.shape[0]
        self.calls += count
        start = torch.full((count,), bos_id, device=table.device)
        model = _Conditioned(self, self.prefixes(embeddings), table)
        prompts = PackedBatch.from_lengths(start, [1] * count)
        texts = generate(model, prompts, max_new_tokens, 0.0, eos_id, None)
        return [text[1:] for text in texts]


class _Conditioned:
    """A `layers.decode.Decoder` whose caches know the prefixes before the first token."""

    def __init__(self, decoder: TextDecoder, prefixes: PackedBatch, table: Tensor) -> None:
        self.layers, self.prefixes, self.table = decoder.layers, prefixes, table

    def new_caches(self) -> list[KVCache]:
        caches = self.layers.stack.new_caches()
        self.layers.stack(self.prefixes, caches=caches)
        return caches

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.table)

    def __call__(self, tokens: PackedBatch, *, rows: Tensor, caches: Sequence[KVCache]) -> Tensor:
        embedded = tokens.with_data(F.embedding(tokens.data, self.table))
        return self.layers(embedded, rows=rows, caches=caches)
