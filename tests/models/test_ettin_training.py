"""How Ettin trains: its phases, its optimizer, its cached ranking loss, and its two modes compared.

The comparisons run on a toy language in which a word depends on the one before it and on the
document's topic, so that both directions of context carry something.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from encfast import PackedBatch, create
from encfast.data.masking import mask_tokens
from encfast.data.text import TextBatch
from encfast.models.ettin import (
    VARIANTS,
    Ettin,
    EttinConfig,
    StableAdamW,
    cached_ranking_step,
    cross_phase,
    param_groups,
    phases,
    ranking_loss,
)

from .common import assert_parity, random_tokens

TOPICS, WORDS, CHOICES, FIRST_WORD = 4, 40, 3, 4
STUDY = EttinConfig(
    dim=64,
    num_layers=4,
    num_heads=2,
    ffn_dim=96,
    vocab_size=FIRST_WORD + WORDS,
    half_window=8,
    bos_id=1,
    eos_id=2,
    pad_id=0,
    mask_id=3,
)
SIZES = [name.removeprefix("encoder-") for name in VARIANTS if name.startswith("encoder-")]
STEPS = 200


class ToyLanguage:
    """Documents of 8 to 60 words; after each word one of three, by a table of the topic."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.stack(
            [torch.randperm(WORDS, generator=draw)[:CHOICES] for _ in range(TOPICS * WORDS)]
        ).view(TOPICS, WORDS, CHOICES)
        self.shares = torch.tensor([0.7, 0.2, 0.1])

    def documents(self, seed: int, count: int = 16) -> PackedBatch:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(8, 61, (count,), generator=draw)
        topic = torch.randint(TOPICS, (count,), generator=draw)
        words = [torch.randint(WORDS, (count,), generator=draw)]
        for _ in range(int(lengths.max()) - 1):
            choice = torch.multinomial(self.shares, count, replacement=True, generator=draw)
            words.append(self.table[topic, words[-1], choice])
        grid = torch.stack(words, 1) + FIRST_WORD
        return PackedBatch.pack(grid, torch.arange(grid.shape[1]) < lengths[:, None])


LANGUAGE = ToyLanguage()
HELD_OUT = 1_000_000  # seeds from here on are never trained on


def batch(seed: int, causal: bool, mask_rate: float = 0.3) -> TextBatch:
    """The same documents for both modes, masked for an encoder."""
    documents = LANGUAGE.documents(seed)
    if causal:
        return TextBatch(documents)
    masked = mask_tokens(
        documents,
        vocab_size=STUDY.vocab_size,
        mask_id=STUDY.mask_id,
        prob=mask_rate,
        generator=torch.Generator().manual_seed(seed),
    )
    return TextBatch.from_masked(masked)


def fresh(causal: bool) -> Ettin:
    torch.manual_seed(0)
    return Ettin(dataclasses.replace(STUDY, causal=causal))


def flipped(model: Ettin) -> Ettin:
    """The other mode with the same weights."""
    other = Ettin(dataclasses.replace(model.config, causal=not model.config.causal))
    other.load_state_dict(model.state_dict())
    return other


def train(model: Ettin, first_seed: int, peak_lr: float) -> Ettin:
    model.train()
    optimizer = StableAdamW(param_groups(model, 3e-4), peak_lr)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        model.loss(batch(first_seed + step, model.config.causal)).total.backward()
        optimizer.step()
    return model


@torch.no_grad()
def held_out_loss(model: Ettin) -> float:
    model.eval()
    batches = [batch(HELD_OUT + i, model.config.causal, mask_rate=0.15) for i in range(8)]
    return sum(model.loss(b).total.item() for b in batches) / len(batches)


def accuracy_on_next_word_classes(model: Ettin) -> float:
    """Fine-tunes to label each word with a class of the word after it; held-out accuracy."""
    torch.manual_seed(1)
    head = torch.nn.Linear(STUDY.dim, 4)
    optimizer = StableAdamW([*model.parameters(), *head.parameters()], 1e-3)

    def scores_and_labels(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        documents = LANGUAGE.documents(seed)
        inner = torch.ones(documents.total, dtype=torch.bool)
        inner[documents.last_rows()] = False
        labels = documents.data.roll(-1) % 4
        return head(model(documents).data)[inner], labels[inner]

    model.train()
    for step in range(100):
        optimizer.zero_grad()
        F.cross_entropy(*scores_and_labels(2 * STEPS + step)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores, labels = scores_and_labels(HELD_OUT)
    return (scores.argmax(-1) == labels).float().mean().item()


@pytest.mark.slow
def test_paired_study_and_cross_objective():
    """One seed and one order of documents for both modes, as in the paper's comparison.

    Each mode is better at its own objective; the encoder wins where the right context holds the
    answer; 200 steps of the other objective lower its loss by far, yet native training over as many
    steps stays ahead.
    """
    encoder, decoder = train(fresh(False), 0, 3e-3), train(fresh(True), 0, 3e-3)
    crossed = {"encoder": flipped(decoder), "decoder": flipped(encoder)}
    before = {name: held_out_loss(model) for name, model in crossed.items()}
    assert held_out_loss(encoder) < 0.7 * before["encoder"]
    assert held_out_loss(decoder) < 0.7 * before["decoder"]

    native = {"encoder": encoder, "decoder": decoder}
    accuracy = {name: accuracy_on_next_word_classes(copy.deepcopy(m)) for name, m in native.items()}
    # The likeliest of three next words comes in 70 % of all cases: a decoder can hardly know more.
    assert accuracy["encoder"] > 0.95 and accuracy["decoder"] < 0.85, accuracy

    for name in native:
        after = held_out_loss(train(crossed[name], STEPS, 1.5e-3))
        assert after < 0.5 * before[name], (name, before[name], after)
        assert held_out_loss(train(native[name], STEPS, 1.5e-3)) < 0.9 * after


@pytest.mark.quick
def test_phases_follow_the_published_schedule():
    for causal in (False, True):
        for size in SIZES:
            pretrain, extend, decay = phases(size, causal=causal)
            peak = pretrain.peak_lr
            assert pretrain.lr(0) == 0 and pretrain.lr(pretrain.warmup) == peak
            assert pretrain.lr(pretrain.tokens) == extend.lr(0) == peak
            assert extend.lr(extend.tokens) == pytest.approx(0.5 * peak) == decay.lr(0)
            # 1 - sqrt: a quarter of the way is half of the fall.
            assert extend.lr(extend.tokens / 4) == pytest.approx(0.75 * peak)
            assert decay.lr(decay.tokens) == pytest.approx(0.02 * peak)
            rates = [0, 0, 0] if causal else [0.3, 0.3, 0.15]
            assert [p.mask_rate for p in (pretrain, extend, decay)] == rates
            assert [p.max_length for p in (pretrain, extend, decay)] == [1024, 7999, 7999]
            assert pretrain.rope_theta_global == pretrain.rope_theta_local == 10_000
            released = VARIANTS[f"{'decoder' if causal else 'encoder'}-{size}"]
            assert decay.rope_theta_global == released.rope_theta_global == 160_000
            assert decay.rope_theta_local == released.rope_theta_local
    assert {phases(s, causal=False)[0].peak_lr for s in ("17m", "32m", "68m")} == {3e-3}
    assert [p.tokens for p in phases("1b", causal=True)] == [1.7e12, 83.333e9, 16.666666667e9]


@pytest.mark.quick
def test_cross_objective_phase():
    cross = cross_phase("150m", causal=False)
    assert cross.mask_rate == 0.15 and cross_phase("150m", causal=True).mask_rate == 0.0
    assert cross.lr(0) == 0 and cross.lr(3e9) == cross.lr(40e9) == 4e-4
    assert cross.lr(cross.tokens) == pytest.approx(0.02 * 4e-4)


@pytest.mark.quick
def test_batch_size_warmup_spends_equal_steps_on_every_size():
    phase = phases("150m", causal=False)[0]
    assert phase.batch_size(0, 72) == 72
    assert phase.batch_size(phase.batch_warmup, 72) == phase.batch_size(1e12, 72) == 4608
    tokens, steps, halfway = 0.0, 0, None
    while (size := phase.batch_size(tokens, 72)) < 4608:
        halfway = steps if halfway is None and size >= (72 + 4608) / 2 else halfway
        tokens, steps = tokens + size * 1024, steps + 1
    assert halfway / steps == pytest.approx(0.5, abs=0.01)


@pytest.mark.quick
def test_stable_adamw_is_adamw_until_a_gradient_spikes():
    start = torch.randn(6, 5)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    a = StableAdamW([ours], 1e-2)
    b = torch.optim.AdamW([theirs], 1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for step in range(5):
        # Shrinking gradients stay below the second moment: no step is cut.
        grad = torch.randn(6, 5).sign() * 0.5**step
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    assert_parity("weights", ours, theirs, 1e-5)
    before = ours.detach().clone()
    ours.grad = theirs.grad = torch.full((6, 5), 50.0)
    a.step()
    moment = a.state[ours]["exp_avg_sq"]
    rms = (ours.grad.square() / moment).mean().sqrt().item()
    b.step()
    assert rms > 2
    assert_parity("cut step", ours - before, (theirs - before) / rms, 1e-3)


@pytest.mark.quick
def test_weight_decay_is_decoupled_and_spares_norms():
    model = create("ettin/tiny")
    groups = param_groups(model, 0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = StableAdamW(groups, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        # Half the peak rate removes half of the 10 %; the rate itself is not a factor.
        factor = 1.0 if "norm" in name or name.endswith("bias") else 0.95
        torch.testing.assert_close(p.detach(), factor * old[name])


@pytest.mark.parametrize("variant", ["tiny", "tiny-decoder"])
def test_cached_ranking_equals_the_whole_batch(variant):
    """Loss and gradients over mini-batches are those of one batch, dropout included."""
    model = create(f"ettin/{variant}").train()
    queries = [random_tokens([5, 9], 512, seed=0), random_tokens([3, 3], 512, seed=1)]
    documents = [random_tokens([12, 4], 512, seed=2), random_tokens([7, 20, 6], 512, seed=3)]
    results = []
    for cached in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        if cached:
            loss = cached_ranking_step(model.encode, queries, documents)
        else:
            q = torch.cat([model.encode(b) for b in queries])
            d = torch.cat([model.encode(b) for b in documents])
            loss = ranking_loss(q, d)
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (loss, grads), (cached_loss, cached_grads) = results
    assert torch.equal(loss, cached_loss) and grads.keys() == cached_grads.keys()
    for name, grad in grads.items():
        assert_parity(f"gradient of {name}", cached_grads[name], grad)


@pytest.mark.slow
def test_retrieval_fine_tuning_learns_to_match():
    """A document's first half finds its document among 16 held-out ones."""
    torch.manual_seed(0)
    model = fresh(False)
    optimizer = StableAdamW(param_groups(model, 3e-4), 1e-3)

    def pairs(seed: int) -> tuple[PackedBatch, PackedBatch]:
        texts = LANGUAGE.documents(seed).split()
        cut = [len(t) // 2 for t in texts]
        first = [t[:c] for t, c in zip(texts, cut, strict=True)]
        return PackedBatch.from_list(first), PackedBatch.from_list(texts)

    def accuracy() -> float:
        with torch.no_grad():
            q, d = (model.encode(b) for b in pairs(HELD_OUT))
        return ((q @ d.t()).argmax(1) == torch.arange(16)).float().mean().item()

    for step in range(150):
        optimizer.zero_grad()
        queries, documents = pairs(step)
        cached_ranking_step(model.encode, [queries], [documents])
        optimizer.step()
    model.eval()
    assert accuracy() > 0.8
