"""Token-by-token decoding of ragged prompts with caches of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from encfast.layers.cache import KVCache
from encfast.packed import PackedBatch


class Decoder(Protocol):
    """A causal model that decodes: hidden rows of what is new, and their vocabulary scores."""

    def new_caches(self) -> list[KVCache]:
        """One empty cache per layer."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows ``[M, C]`` -> ``[M, V]``."""

    def __call__(self, tokens: PackedBatch, *, rows: Tensor, caches: Sequence[KVCache]) -> Any:
        """Ids ``[N]`` that continue the caches -> the hidden ``rows``, ``[M, C]``."""


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: PackedBatch,
    max_new_tokens: int,
    temperature: float,
    end: int,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Continues prompts of different lengths.

    A finished text goes on as a zero-length sequence: it costs nothing.

    Args:
        model: in evaluation mode.
        prompts: ids ``[N]``, each prompt at least one token.
        max_new_tokens: most tokens to add to each prompt.
        temperature: 0 takes the likeliest token; otherwise samples from logits / temperature.
        end: id that ends a text; -1 for none.
        generator: of the samples.

    Returns:
        B tensors of ids: prompt and continuation, with its end token if it came.

    Raises:
        ValueError: for an empty prompt, a negative temperature or a negative ``max_new_tokens``.
    """
    caches = model.new_caches()
    _check(prompts, max_new_tokens, temperature)
    texts = [[prompt] for prompt in prompts.split()]
    step, alive = prompts, list(range(prompts.batch_size))
    for _ in range(max_new_tokens):
        if not alive:
            break
        last = step.last_rows()[torch.tensor(alive, device=step.device)]
        scores = model.logits(model(step, rows=last, caches=caches))  # [A, V]
        chosen = _choose(scores, temperature, generator).to(prompts.data.dtype)
        for text, token in zip(alive, chosen.split(1), strict=True):
            texts[text].append(token)
        going = chosen != end
        alive = [text for text, on in zip(alive, going.tolist(), strict=True) if on]
        # A finished text stays in the batch with no rows: caches keep their B sequences.
        lengths = torch.zeros(prompts.batch_size, dtype=torch.int64)
        lengths[alive] = 1
        step = PackedBatch.from_lengths(chosen[going], lengths)
    return [torch.cat(parts) for parts in texts]


def _check(prompts: PackedBatch, max_new_tokens: int, temperature: float) -> None:
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    for i, length in enumerate(prompts.lengths().tolist()):
        if length == 0:
            raise ValueError(f"prompt {i} is empty; start it with a token that begins a text")


def _choose(scores: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """int64 ``[A]``: a token per row of scores ``[A, V]``."""
    if temperature == 0:
        return scores.argmax(-1)
    shares = (scores.float() / temperature).softmax(-1)
    return torch.multinomial(shares, 1, generator=generator).squeeze(1)
