"""MosaicBERT as published, without its padding tricks: the oracle of its tests.

One document at a time, a materialised ALiBi bias, and the module names of mosaicml/examples
(examples/benchmarks/bert/src/bert_layers.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def published_slopes(n: int) -> list[float]:
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    c = 2 ** math.floor(math.log2(n))
    return published_slopes(c) + published_slopes(2 * c)[0::2][: n - c]


class DenseLayer(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        self.attention.self.Wqkv = nn.Linear(c.dim, 3 * c.dim)
        self.attention.output = nn.Module()
        self.attention.output.dense = nn.Linear(c.dim, c.dim)
        self.attention.output.LayerNorm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = nn.Module()
        self.mlp.gated_layers = nn.Linear(c.dim, 2 * c.ffn_dim, bias=False)
        self.mlp.wo = nn.Linear(c.ffn_dim, c.dim)
        self.mlp.layernorm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.heads = c.num_heads

    def forward(self, x, bias):  # [L, C], [H, L, L]
        q, k, v = self.attention.self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) + bias
        seen = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        out = self.attention.output
        x = out.LayerNorm(x + out.dense(seen))
        a, b = self.mlp.gated_layers(x).chunk(2, dim=-1)
        return self.mlp.layernorm(x + self.mlp.wo(F.gelu(a) * b))


class DenseMosaicBert(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = e = nn.Module()
        e.word_embeddings = nn.Embedding(c.table_size, c.dim, padding_idx=c.pad_id)
        e.token_type_embeddings = nn.Embedding(c.num_segments, c.dim)
        e.LayerNorm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(DenseLayer(c) for _ in range(c.depth))
        self.slopes, self.task = published_slopes(c.num_heads), c.task
        if c.task == "masked-lm":
            self.cls = nn.Module()
            self.cls.predictions = p = nn.Module()
            p.transform = nn.Module()
            p.transform.dense = nn.Linear(c.dim, c.dim)
            p.transform.LayerNorm = nn.LayerNorm(c.dim, eps=c.norm_eps)
            p.decoder = nn.Linear(c.dim, c.table_size)
            p.decoder.weight = e.word_embeddings.weight
        else:
            self.bert.pooler = nn.Module()
            self.bert.pooler.dense = nn.Linear(c.dim, c.dim)
            self.classifier = nn.Linear(c.dim, c.num_labels)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, mean=1.0, std=0.2)

    def document(self, ids, segments):  # [L] -> [L, C]
        e, place = self.bert.embeddings, torch.arange(len(ids))
        x = e.LayerNorm(e.word_embeddings(ids) + e.token_type_embeddings(segments))
        distance = (place[:, None] - place[None, :]).abs()
        bias = -torch.tensor(self.slopes)[:, None, None] * distance
        for layer in self.bert.encoder.layer:
            x = layer(x, bias)
        return x

    def forward(self, tokens, segments):  # -> [N, V] or [B, K]
        parts = segments.split(tokens.lengths().tolist())
        rows = [self.document(i, s) for i, s in zip(tokens.split(), parts, strict=True)]
        if self.task == "masked-lm":
            p = self.cls.predictions
            x = torch.cat(rows)
            return p.decoder(p.transform.LayerNorm(F.gelu(p.transform.dense(x))))
        first = torch.stack([x[0] for x in rows])
        return self.classifier(torch.tanh(self.bert.pooler.dense(first)))
