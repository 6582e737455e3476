"""How Ettin is trained: its phases per size, its optimizer, its cached ranking loss.

Numbers come from ``pretraining/configs`` in github.com/JHU-CLSP/ettin-encoder-vs-decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from encfast.packed import PackedBatch
from encfast.schedules import one_minus_sqrt, wsd_schedule

EVAL_MASK_RATE = 0.15  # masked share whenever an encoder is evaluated
GLOBAL_BATCH = 4608  # sequences per step after the batch-size warmup
ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-6

SHORT_THETA, LONG_THETA = 10_000.0, 160_000.0


@dataclass(frozen=True)
class SizeRecipe:
    """What the training configs of one size share."""

    peak_lr: float
    weight_decay: float
    warmup: float  # tokens of learning-rate warmup in phase 1
    batch_warmup: float  # tokens over which phase 1 grows its batch
    extension: float = 250e9  # tokens of phase 2
    decay: float = 50e9  # tokens of phase 3, and of cross-objective training


SIZES = {
    "17m": SizeRecipe(3e-3, 3e-4, 4e9, 125e9),
    "32m": SizeRecipe(3e-3, 3e-4, 4e9, 100e9),
    "68m": SizeRecipe(3e-3, 3e-4, 3e9, 75e9),
    "150m": SizeRecipe(8e-4, 1e-5, 3e9, 50e9),
    "400m": SizeRecipe(5e-4, 1e-5, 2e9, 10e9),
    "1b": SizeRecipe(5e-4, 5e-5, 2e9, 3e9, 83.333e9, 16.666666667e9),
}
# Decoders whose phase 3 kept the short base in local layers; all other runs end with the long one.
SHORT_LOCAL_DECODERS = ("17m", "32m", "68m", "400m")


@dataclass(frozen=True)
class Phase:
    """One training run: data, masking, rotary bases and learning rate."""

    name: Literal["pretrain", "extend", "decay", "cross"]
    tokens: float
    max_length: int  # tokens
    mask_rate: float  # share of tokens to predict; 0: next-token prediction
    rope_theta_global: float
    rope_theta_local: float
    peak_lr: float
    weight_decay: float
    warmup: float = 0.0  # tokens
    cooldown: float = 0.0  # tokens of linear decay at the end ("cross" only)
    batch_warmup: float = 0.0  # tokens
    final_factor: float = 1.0  # of peak_lr, reached at the end

    def lr(self, tokens: float) -> float:
        """Learning rate after ``tokens`` tokens of this phase."""
        if self.name in ("extend", "decay"):
            return self.peak_lr * one_minus_sqrt(tokens, self.tokens, final=self.final_factor)
        return self.peak_lr * wsd_schedule(
            tokens, self.warmup, self.tokens, self.cooldown, final=self.final_factor
        )

    def batch_size(self, tokens: float, start: int) -> int:
        """Sequences per step after ``tokens`` tokens.

        Every size from ``start`` to the full batch serves equally many steps, so the tokens seen
        grow with the square of the batch size.
        """
        if tokens >= self.batch_warmup:
            return GLOBAL_BATCH
        grown = (GLOBAL_BATCH**2 - start**2) * tokens / self.batch_warmup
        return int(math.sqrt(start**2 + grown))


def phases(size: str, *, causal: bool) -> tuple[Phase, Phase, Phase]:
    """Pretraining, context extension and decay of one published model.

    Args:
        size: 17m, 32m, 68m, 150m, 400m or 1b.
        causal: the decoder's, not the encoder's.

    Returns:
        The three, in their order.

    Raises:
        KeyError: for another size.
    """
    s = SIZES[size]
    mask, last_mask = (0.0, 0.0) if causal else (0.3, 0.15)
    extend_local = SHORT_THETA if size == "17m" else LONG_THETA
    short = causal and size in SHORT_LOCAL_DECODERS
    common = {"peak_lr": s.peak_lr, "weight_decay": s.weight_decay}
    pretrain = Phase(
        "pretrain",
        1.7e12,
        1024,
        mask,
        SHORT_THETA,
        SHORT_THETA,
        warmup=s.warmup,
        batch_warmup=s.batch_warmup,
        **common,
    )
    extend = Phase(
        "extend", s.extension, 7999, mask, LONG_THETA, extend_local, final_factor=0.5, **common
    )
    # Phase 3 starts where phase 2 ended, at half the peak, and ends at 0.02 of the peak.
    decay = Phase(
        "decay",
        s.decay,
        7999,
        last_mask,
        LONG_THETA,
        SHORT_THETA if short else LONG_THETA,
        0.5 * s.peak_lr,
        s.weight_decay,
        final_factor=0.04,
    )
    return pretrain, extend, decay


def cross_phase(size: str, *, causal: bool) -> Phase:
    """Continued training of the other mode's final weights; ``causal`` says what they become.

    Raises:
        KeyError: for an unknown size.
    """
    s = SIZES[size]
    third = 1 / 3 if size == "1b" else 1.0
    return Phase(
        "cross",
        s.decay,
        7999,
        0.0 if causal else 0.15,
        LONG_THETA,
        LONG_THETA,
        0.5 * s.peak_lr,
        s.weight_decay,
        warmup=3e9 * third,
        cooldown=10e9 * third,
        batch_warmup=10e9,
        final_factor=0.02,
    )


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters of ``model``: matrices decay by ``weight_decay``, others do not.

    Norms and biases have one dimension.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


class StableAdamW(Optimizer):
    """AdamW that lowers a tensor's step when its gradient outruns the second moment.

    The step of each tensor is divided by ``max(1, rms)`` with ``rms^2 = mean(g^2 / max(v, eps^2))``
    (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2), in place of gradient clipping. Weight
    decay is fully decoupled, as in Ettin's runs: it follows ``lr / initial lr``, not ``lr``.

    Args:
        params: parameters or groups (:func:`param_groups`).
        lr: the peak learning rate.
        betas, eps: as in Adam, with bias correction inside the averages.
        weight_decay: share of a weight removed per step at the peak learning rate.

    Raises:
        ValueError: for an ``lr`` that is not positive.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = ADAM_BETAS,
        eps: float = ADAM_EPS,
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            group.setdefault("peak_lr", group["lr"])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss anew and makes its gradients; None: they are there.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, eps = self.state[p], group["eps"]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        m, v = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = (_corrected(beta, state["step"]) for beta in group["betas"])
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        rms = grad.square().div_(v.clamp(min=eps * eps)).mean().sqrt()
        scale = group["lr"] / rms.clamp(min=1.0)
        if group["weight_decay"]:
            p.mul_(1 - group["weight_decay"] * scale / group["peak_lr"])
        p.sub_(scale * m / (v.sqrt() + eps))


def _corrected(beta: float, step: int) -> float:
    """The decay rate at ``step`` whose running average needs no bias correction."""
    return (beta**step - beta) / (beta**step - 1)


def ranking_loss(queries: Tensor, documents: Tensor, *, scale: float = 20.0) -> Tensor:
    """Multiple-negatives ranking: document i is query i's, all others are its negatives.

    Args:
        queries: ``[B, C]``, unit length.
        documents: ``[B + extra, C]``, unit length; rows past B are further negatives.
        scale: inverse temperature of the cosine.

    Returns:
        0-dim, float32.
    """
    scores = scale * queries @ documents.t()
    return F.cross_entropy(scores.float(), torch.arange(len(queries), device=scores.device))


def cached_ranking_step(
    encode: Callable[[PackedBatch], Tensor],
    queries: Sequence[PackedBatch],
    documents: Sequence[PackedBatch],
    *,
    scale: float = 20.0,
) -> Tensor:
    """:func:`ranking_loss` over a batch too large to keep activations of: adds to ``.grad``.

    Embeds mini-batches without a graph, takes the loss's gradient with respect to the embeddings,
    then embeds each mini-batch again and sends its part of that gradient back (GradCache, Gao et
    al. 2021, arXiv 2101.06983). The second pass repeats the first one's dropout.

    Args:
        encode: token ids to unit-length embeddings ``[B, C]``.
        queries, documents: mini-batches; concatenated in order they are the batch.
        scale: inverse temperature of the cosine.

    Returns:
        The loss, detached.
    """
    chunks = [*queries, *documents]
    states, embedded = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_rng_state(chunk.device))
            embedded.append(encode(chunk))
    leaves = [e.detach().requires_grad_() for e in embedded]
    q, d = torch.cat(leaves[: len(queries)]), torch.cat(leaves[len(queries) :])
    loss = ranking_loss(q, d, scale=scale)
    loss.backward()
    devices = [chunks[0].device] if chunks[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for chunk, state, leaf in zip(chunks, states, leaves, strict=True):
            _set_rng_state(chunk.device, state)
            encode(chunk).backward(leaf.grad)
    return loss.detach()


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
