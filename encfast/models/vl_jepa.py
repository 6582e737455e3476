"""VL-JEPA: Joint Embedding Predictive Architecture for Vision-language (Chen et al., 2025, arXiv
2512.10942): predicts the embedding of the answer's text instead of its tokens.

A frozen video encoder X gives rows to a predictor, which reads the query's tokens behind them, both
ways, and averages to one embedding. It is trained against the text encoder Y's embedding of the
answer, by InfoNCE over the batch. Choosing among candidates and retrieval compare embeddings; a
small decoder turns one into text, and on a stream it runs only when the embeddings change
(:meth:`VlJepa.narrate`).

Everything is packed: clips of any length, queries without padding.

No code is published; read from the paper: the predictor is layers 8 to 15 of Llama 3.2 1B with its
final norm, its token table frozen (4.9e8 trained parameters are published, which leaves no room for
it); InfoNCE is the mean of both directions; the temperature starts at 0.07, is learned as its
logarithm and kept above 0.01, as CLIP's. The projections have biases. The decoder's form is not
published: four causal Llama layers over the same token table, which lead to the published total of
1.6e9; it learns to say an answer from the embedding predicted for it, without moving that, and so
may be trained beside the rest or after it. L1 and L2 sum over channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.layers.base import Model, init_normal
from encfast.models._vl_jepa_config import (
    LlamaConfig,
    Objective,
    TextConfig,
    VisionConfig,
    VlJepaConfig,
)
from encfast.models._vl_jepa_data import VlJepaBatch, VlJepaLoss, example_batch, still_clips
from encfast.models._vl_jepa_names import gemma_names, llama_names, vision_names
from encfast.models._vl_jepa_stream import (
    Narration,
    OnlineSegmenter,
    pooled_segments,
    smooth,
    ward_segments,
    windows,
)
from encfast.models._vl_jepa_text import Llama, Predictor, TextDecoder, TextEncoder
from encfast.models._vl_jepa_training import param_groups
from encfast.models._vl_jepa_vision import VisionEncoder
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register

__all__ = [
    "VARIANTS",
    "Llama",
    "LlamaConfig",
    "Narration",
    "Objective",
    "OnlineSegmenter",
    "Predictor",
    "TextConfig",
    "TextDecoder",
    "TextEncoder",
    "VisionConfig",
    "VisionEncoder",
    "VlJepa",
    "VlJepaBatch",
    "VlJepaConfig",
    "VlJepaLoss",
    "gemma_names",
    "llama_names",
    "param_groups",
    "pooled_segments",
    "smooth",
    "still_clips",
    "vision_names",
    "ward_segments",
    "windows",
]

_INIT_STD = 0.02
_MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound


class VlJepa(Model):
    """X, predictor, Y and decoder."""

    config: VlJepaConfig
    log_scale: nn.Parameter | None

    def __init__(
        self,
        config: VlJepaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        llama = config.predictor
        self.vision = VisionEncoder(config.vision, **factory)
        self.tokens = nn.Embedding(llama.vocab_size, llama.dim, **factory)
        # Unused, but a float attribute costs torch.compile a second pass.
        self.tokens.norm_type = 2  # type: ignore[assignment]
        self.predictor = Predictor(
            llama, config.vision.dim, config.embed_dim, causal=config.causal, **factory
        )
        self.text = TextEncoder(config.text, config.embed_dim, **factory)
        self.decoder = None
        if config.decoder_depth:
            self.decoder = TextDecoder(
                llama, config.decoder_depth, config.prefix, config.embed_dim, **factory
            )
        scale = nn.Parameter(torch.empty((), **factory)) if config.objective == "infonce" else None
        self.register_parameter("log_scale", scale)
        self.reset_parameters()
        for frozen in (self.vision, self.tokens):
            frozen.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draws all parameters anew; the published model starts from pre-trained towers."""
        init_normal(self, _INIT_STD)
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, -math.log(self.config.temperature))

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table of queries, shared with the decoder; frozen."""
        return self.tokens

    @torch.no_grad()
    def see(self, clips: PackedBatch) -> PackedBatch:
        """X: ``clips``, frames ``[N, C, H, W]`` -> rows ``[T * P, C]``, for any queries.

        Raises:
            ValueError: for frames of another size, or (on the CPU) a clip whose length is no
                multiple of a tubelet's.
        """
        return self.vision(clips)

    def predict(self, seen: PackedBatch, query: PackedBatch | None = None) -> Tensor:
        """``seen``, of :meth:`see`, and ``query``, ids ``[N]`` -> ``[B, E]``, unit length."""
        if query is not None:
            query = query.with_data(self.tokens(query.data))
        return self.predictor(seen, query)

    def forward(self, clips: PackedBatch, query: PackedBatch | None = None) -> Tensor:
        """The predicted embedding of each answer, ``[B, E]``, unit length.

        Args:
            clips: frames ``[N, C, H, W]``, floating or uint8.
            query: ids ``[N]`` of B texts; None: captioning.

        Returns:
            ``[B, E]``.

        Raises:
            ValueError: as :meth:`see`; for another number of queries.
        """
        return self.predict(self.see(clips), query)

    def embed_text(self, tokens: PackedBatch) -> Tensor:
        """Y: ``tokens``, ids ``[N]`` of B texts -> ``[B, E]``, unit length."""
        return self.text(tokens)

    # Training.

    def loss(self, batch: VlJepaBatch) -> VlJepaLoss:
        """The objective over the batch, and the decoder's loss if there are answers.

        A clip without rows and query, or with an empty target, has no loss.
        """
        query = batch.query
        predicted, target = self(batch.clips, query), self.embed_text(batch.target)  # [B, E]
        rows = batch.clips.lengths() + (0 if query is None else query.lengths())
        embedding = self._objective(predicted, target, (rows > 0) & (batch.target.lengths() > 0))
        text = None
        if self.decoder is not None and batch.answer is not None:
            text = self.decoder.loss(predicted.detach(), batch.answer, self.tokens.weight)
        return VlJepaLoss(embedding if text is None else embedding + text, embedding, text)

    def _objective(self, predicted: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """``[B, E]`` each; of the rows that ``counts`` marks, bool ``[B]``."""
        if self.log_scale is not None:
            if not predicted.shape[0]:
                return (predicted.sum() + target.sum()).float() + 0 * self.log_scale
            own = torch.arange(predicted.shape[0], device=predicted.device)
            scale = self.log_scale.float().clamp(max=_MAX_LOG_SCALE).exp()
            positives = own.where(counts, -1)
            return ops.info_nce(predicted, target, logit_scale=scale, positives=positives)
        a, b = predicted.float(), target.float()
        if self.config.objective == "cosine":
            each = 1 - (a * b).sum(1)
        elif self.config.objective == "l1":
            each = (a - b).abs().sum(1)
        else:
            each = (a - b).square().sum(1)
        return each.where(counts, 0).sum() / counts.sum().clamp(min=1)

    # One interface: choose, retrieve, generate.

    @torch.no_grad()
    def classify(
        self, clips: PackedBatch, candidates: PackedBatch, query: PackedBatch | None = None
    ) -> Tensor:
        """Cosines ``[B, K]`` of B clips' predicted answers and K candidate answers.

        Classification, and multiple-choice questions with a query: the largest is the answer.

        Args:
            clips, query: as in a call.
            candidates: ids ``[N]`` of K texts for Y.

        Returns:
            ``[B, K]``, in -1..1.
        """
        return self(clips, query) @ self.embed_text(candidates).t()

    @torch.no_grad()
    def retrieve(
        self, texts: PackedBatch, clips: PackedBatch, prompt: PackedBatch | None = None
    ) -> Tensor:
        """Cosines ``[Q, B]`` of Q texts and the predicted captions of B clips.

        Args:
            texts: ids ``[N]`` for Y.
            clips: as in a call.
            prompt: what asks for a caption, as the query of a call; None: stage 1's, none.

        Returns:
            ``[Q, B]``, in -1..1.
        """
        return self.embed_text(texts) @ self(clips, prompt).t()

    @torch.no_grad()
    def generate(self, embeddings: Tensor, *, max_new_tokens: int = 64) -> list[Tensor]:
        """Texts of embeddings ``[B, E]``: B tensors of ids, each with its eos if it came.

        ``decoder.calls`` counts the embeddings; a text is cut behind ``max_new_tokens``.

        Raises:
            ValueError: if the model was built without a decoder.
        """
        if self.decoder is None:
            raise ValueError("this model has no decoder; build it with decoder_depth >= 1")
        config = self.config
        return self.decoder.generate(
            embeddings, self.tokens.weight, config.bos_id, config.eos_id, max_new_tokens
        )

    @torch.no_grad()
    def watch(self, frames: Tensor, window: int, stride: int, *, chunk: int = 64) -> Tensor:
        """``[S, E]``: embeddings of a stream's windows, captioning.

        Args:
            frames: ``[T, C, H, W]``.
            window, stride: frames; see :func:`windows`.
            chunk: windows in one pass.

        Returns:
            ``[S, E]``, of length 1.
        """
        clips = windows(frames, window, stride)
        parts = clips.data.split(chunk * window)
        return torch.cat(
            [self(PackedBatch.from_lengths(p, [window] * (len(p) // window))) for p in parts]
        )

    def narrate(
        self, embeddings: Tensor, segments: int, *, width: int = 3, max_new_tokens: int = 64
    ) -> Narration:
        """Selective decoding: one text for each of ``segments`` pieces of a stream.

        The embeddings are smoothed, cut by :func:`ward_segments`, and each segment's mean decoded.

        Args:
            embeddings: ``[S, E]``, of :meth:`watch`.
            segments: 1..S; S * seconds per stride * the rate one wants to decode at.
            width: of the smoothing, odd.
            max_new_tokens: of a text.

        Returns:
            The texts, and the segment of each embedding.

        Raises:
            ValueError: for another number of segments or width; without a decoder.
        """
        labels = ward_segments(smooth(embeddings, width), segments)
        pooled = pooled_segments(embeddings, labels)  # [K, E]
        return Narration(labels, self.generate(pooled, max_new_tokens=max_new_tokens))

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> VlJepaBatch:
        """Random clips, queries, targets and answers, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: time indices of each clip; three clips, one of them empty, if None.

        Returns:
            What ``loss`` takes.
        """
        return example_batch(self.config, generator, lengths)


VARIANTS = {
    "base": VlJepaConfig(),
    "tiny": VlJepaConfig(
        vision=VisionConfig(
            image_size=(16, 16), patch_size=(2, 8, 8), dim=32, depth=1, num_heads=2, ffn_dim=64
        ),
        predictor=LlamaConfig(
            depth=1, dim=48, num_heads=4, num_kv_heads=2, ffn_dim=96, vocab_size=128
        ),
        text=TextConfig(
            vocab_size=96,
            dim=32,
            depth=2,
            num_heads=2,
            head_dim=16,
            ffn_dim=48,
            half_window=4,
            full_every=2,
        ),
        embed_dim=32,
        decoder_depth=1,
        prefix=2,
        bos_id=1,
        eos_id=2,
    ),
}

register(
    "vl_jepa",
    VlJepa,
    VARIANTS,
    ModelInfo(
        title="VL-JEPA: Joint Embedding Predictive Architecture for Vision-language",
        year=2025,
        paper="arXiv 2512.10942",
        tasks=("video-text-embedding", "vqa", "captioning"),
        inputs="clips: PackedBatch of frames [N, C, H, W]; query: PackedBatch of ids [N], or None",
        ops=("varlen_attn", "rotary", "rank_loss", "linear_cross_entropy", "patch_gather"),
        fidelity=(
            "fp32 outputs and every gradient of the towers within 1e-5 of transformers' "
            "VJEPA2Model, LlamaModel's layers without a mask and bidirectional Gemma3TextModel; "
            "published parameter counts"
        ),
        deviations=(
            "no code is published: the temperature's start, the decoder and its training are "
            "readings, see the module's docstring",
        ),
    ),
)
