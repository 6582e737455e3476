"""Heads on packed rows: masked language modelling, classification, answer spans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast.config import NormPrecision
from encfast.layers.dropout import Dropout
from encfast.layers.linear import Linear
from encfast.layers.mlp import activation
from encfast.layers.norm import Norm


class MaskedLMHead(nn.Module):
    """``decoder(norm(act(dense(x))))``: rows to vocabulary logits.

    Args:
        dim: C of the rows.
        vocab_size: V.
        embedding_dim: channels of the decoder's weight, where they differ from C (ALBERT).
        dense_bias, norm_bias, decoder_bias: which parts have a bias.
        act: name of the activation.
        norm_eps, norm_precision: of the norm.
        tied: the word embedding's weight ``[V, E]`` to share, or None for one of its own.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        embedding_dim: int | None = None,
        dense_bias: bool = True,
        norm_bias: bool = True,
        decoder_bias: bool = True,
        act: str = "gelu",
        norm_eps: float = 1e-5,
        norm_precision: NormPrecision = "default",
        tied: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = embedding_dim or dim
        self.dense = Linear(dim, inner, bias=dense_bias, **factory)
        self.act = activation(act)
        self.norm = Norm(inner, eps=norm_eps, bias=norm_bias, precision=norm_precision, **factory)
        self.decoder = Linear(inner, vocab_size, bias=decoder_bias, **factory)
        if tied is not None:
            self.decoder.weight = tied

    def forward(self, x: Tensor) -> Tensor:
        """``[M, C]`` -> logits ``[M, V]``."""
        return self.decoder(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """``[M, C]`` -> ``[M, E]``, what the decoder reads: for losses without the logits."""
        return self.norm(self.act(self.dense(x)))


class ClassificationHead(nn.Module):
    """BERT's pooler and classifier, ``out(dropout(tanh(dense(x))))``; no pooler: ``out`` only.

    Args:
        dim: C.
        num_labels: K, logits of a row.
        pooler: whether there is one.
        bias: of ``out``.
        dropout: probability, in front of ``out``.
    """

    def __init__(
        self,
        dim: int,
        num_labels: int,
        *,
        pooler: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = nn.Linear(dim, dim, **factory) if pooler else None
        self.drop = Dropout(dropout)
        self.out = nn.Linear(dim, num_labels, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C]`` (or ``[N, C]`` for token labels) -> ``[B, num_labels]``."""
        if self.dense is not None:
            x = torch.tanh(self.dense(x))
        return self.out(self.drop(x))


class SpanHead(nn.Module):
    """Start and end scores of an answer span: two dot products per row (BERT, section 4.2).

    Args:
        dim: C.
    """

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out = nn.Linear(dim, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[N, C]`` -> start and end scores, ``[N]`` each."""
        start, end = self.out(x).unbind(-1)
        return start, end
