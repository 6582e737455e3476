"""DeepSpeed-MoE in training: mixtures against their dense base, PR-MoE against MoE, students.

Text of many domains: the first token of a text names its domain, whose table says which of three
words follow a word. More tables than the MLPs of a small GPT can learn in the time; experts share
them out.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch

import encfast
from encfast import PackedBatch
from encfast.data.text import TextBatch
from encfast.layers import MoE
from encfast.models.deepspeed_moe import DeepSpeedMoE, MoELosses, StagedDistillation

pytestmark = pytest.mark.slow

DOMAINS, WORDS, LENGTH, TEXTS = 16, 40, 32, 32
STEPS, PEAK_LR = 600, 5e-3
HELD_OUT = 1_000_000  # seeds from here on are never trained on
SHARES = torch.tensor([0.8, 0.15, 0.05])

MODELS = {
    "dense": {"experts": ()},
    "moe": {"experts": (20, 20)},
    "pr-moe": {"experts": (5, 10), "residual": True},
    "student": {"depth": 3, "experts": (10,), "residual": True},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps this small spend more on waking a second thread than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def tables() -> torch.Tensor:
    """``[domain, word, 3]``: what may follow."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randperm(WORDS, generator=draw)[:3] for _ in range(DOMAINS * WORDS)]
    return torch.stack(rows).view(DOMAINS, WORDS, 3)


def texts(seed: int) -> TextBatch:
    draw = torch.Generator().manual_seed(seed)
    domain = torch.randint(DOMAINS, (TEXTS,), generator=draw)
    words = [torch.randint(WORDS, (TEXTS,), generator=draw)]
    for _ in range(LENGTH - 2):
        choice = torch.multinomial(SHARES, TEXTS, replacement=True, generator=draw)
        words.append(tables()[domain, words[-1], choice])
    grid = torch.stack([WORDS + domain, *words], 1)
    return TextBatch(PackedBatch.from_lengths(grid.flatten(), [LENGTH] * TEXTS))


def fresh(kind: str, **fields) -> DeepSpeedMoE:
    torch.manual_seed(0)
    same = {
        "dim": 32,
        "vocab_size": WORDS + DOMAINS,
        "max_positions": LENGTH,
        "priority": "random",
        "init_std": 0.05,
        "dropout": 0.0,
        "attn_dropout": 0.0,
    }
    return encfast.create("deepspeed_moe/tiny", **same | MODELS[kind] | fields)


def train(
    model: DeepSpeedMoE, loss: Callable[[TextBatch, int], MoELosses], steps: int = STEPS
) -> DeepSpeedMoE:
    """AdamW, 50 steps of warmup, half a cosine to 0; ``loss`` of a batch at a step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01
    )
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / 50) * cosine
        optimizer.zero_grad()
        loss(texts(step), step).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@functools.cache
def trained(kind: str) -> DeepSpeedMoE:
    model = fresh(kind)
    return train(model, lambda batch, step: model.loss(batch))


@torch.no_grad()
def held_out(model: DeepSpeedMoE) -> float:
    """Cross entropy of unseen texts."""
    return sum(model.loss(texts(HELD_OUT + i)).lm.item() for i in range(10)) / 10


@torch.no_grad()
def imbalance(model: DeepSpeedMoE) -> float:
    """Most tokens that choose one expert, in units of the mean; the worst layer of 5 batches."""
    found, handles = [], []
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        handles.append(moe.register_forward_hook(lambda m, i, out: found.append(out.routing)))
    for i in range(5):
        model.loss(texts(HELD_OUT + i))
    for handle in handles:
        handle.remove()
    loads = [r.expert_ids.flatten().long().bincount(minlength=r.num_experts) for r in found]
    return max((n.max() / n.float().mean()).item() for n in loads)


def test_a_mixture_beats_its_dense_base():
    """Sheet, check 6: lower loss with the same parameters on a token's way but for the gates."""
    dense, moe = trained("dense"), trained("moe")
    gates = sum(moe.config.experts) * moe.config.dim
    assert moe.activated_parameters() == dense.num_parameters() + gates
    losses = held_out(moe), held_out(dense)
    assert losses[0] < 0.97 * losses[1], losses


def test_pyramid_residual_mixtures_keep_up():
    """Sheet, check 6: within 2 % of the mixture's loss with less than half of its parameters."""
    moe, pyramid = trained("moe"), trained("pr-moe")
    assert pyramid.num_parameters() < 0.5 * moe.num_parameters()
    losses = held_out(pyramid), held_out(moe)
    assert losses[0] <= 1.02 * losses[1], losses


def test_staged_distillation_helps_a_student():
    """Sheet, check 6: a student taught for the first 60 % is no worse than one that was not."""
    teacher, alone, student = trained("pr-moe"), trained("student"), fresh("student")
    assert alone.num_parameters() < teacher.num_parameters()
    stages = StagedDistillation(cutoff=int(0.6 * STEPS))
    train(student, lambda batch, step: stages.loss(student, batch, teacher, step))
    losses = held_out(student), held_out(alone), held_out(teacher)
    assert losses[0] <= losses[1], losses


def lopsided(balance_weight: float) -> DeepSpeedMoE:
    """Two gates so large, and opposite, that nearly every token chooses one of two experts."""
    model = fresh("moe", balance_weight=balance_weight)
    with torch.no_grad():
        for moe in (m for m in model.modules() if isinstance(m, MoE)):
            moe.router.weight[0] *= 4
            moe.router.weight[1] = -moe.router.weight[0]
    return model


def test_the_balance_loss_spreads_tokens():
    """Sheet, check 3: with 0.01 no expert has three times its share, whatever the gates began as.

    Without the loss most tokens stay where they were.
    """
    assert imbalance(trained("moe")) < 3
    spread, left = lopsided(0.01), lopsided(0.0)
    assert imbalance(spread) > 6
    for model in (spread, left):
        train(model, lambda batch, step, model=model: model.loss(batch), steps=200)
    assert imbalance(spread) < 3 < imbalance(left), (imbalance(spread), imbalance(left))
