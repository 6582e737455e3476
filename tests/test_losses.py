"""Losses on packed rows beside one sequence at a time, and masking."""

import pytest
import torch
import torch.nn.functional as F

from encfast import PackedBatch, losses, ops
from encfast.data.masking import mask_tokens

pytestmark = pytest.mark.quick

LENGTHS = [5, 0, 1, 9, 0]
VOCAB = 11


@pytest.fixture
def tokens() -> PackedBatch:
    return PackedBatch.from_lengths(torch.randint(VOCAB, (sum(LENGTHS),)), LENGTHS)


def test_next_token_loss_never_crosses_a_border(tokens):
    logits = torch.randn(tokens.total, VOCAB, requires_grad=True)
    loss = losses.next_token_loss(logits, tokens)
    terms = [
        F.cross_entropy(part[:-1], ids[1:], reduction="sum")
        for part, ids in zip(logits.split(LENGTHS), tokens.split(), strict=True)
        if len(ids) > 1
    ]
    torch.testing.assert_close(loss, sum(terms) / (4 + 8))
    loss.backward()
    # Last rows of sequences predict nothing.
    assert not logits.grad[[4, 5, 14]].any()
    assert logits.grad[[0, 3, 6, 13]].any(1).all()


def test_next_token_labels_replace_the_ids(tokens):
    labels = tokens.data.clone()
    labels[:3] = losses.IGNORE
    ahead = losses.next_tokens(tokens, labels)
    assert ahead[:5].tolist() == [-100, -100, *labels[3:5].tolist(), -100]


def test_masked_rows_are_those_with_a_label():
    labels = torch.tensor([-100, 3, -100, 0])
    rows = losses.masked_lm_rows(labels)
    assert rows.tolist() == [1, 3]
    logits = torch.randn(4, VOCAB)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(losses.masked_lm_loss(logits[rows], labels[rows]), expected)


def test_span_loss_is_a_softmax_over_the_own_sequence(tokens):
    start, end = torch.randn(2, tokens.total, requires_grad=True).unbind(0)
    starts, ends = torch.tensor([1, 0, 0, 12, -100]), torch.tensor([4, 0, 0, 8, -100])
    loss = losses.span_loss(start, end, tokens, starts, ends)
    s, e = start.split(LENGTHS), end.split(LENGTHS)
    nll_start = [F.cross_entropy(s[b], starts[b]) for b in (0, 2)]
    nll_end = [F.cross_entropy(e[b], ends[b]) for b in (0, 2, 3)]
    torch.testing.assert_close(loss, sum(nll_start) / 4 + sum(nll_end) / 6)


def test_segment_logsumexp_survives_extreme_scores(tokens):
    scores = torch.full((tokens.total,), -torch.inf)
    scores[:5] = torch.tensor([300.0, 299.0, -torch.inf, 0.0, -400.0])
    out = losses.segment_logsumexp(scores, tokens)
    torch.testing.assert_close(out[0], scores[:5].logsumexp(0))
    assert out[1:].tolist() == [float("-inf")] * 4


@pytest.mark.parametrize("size", [0, 2], ids=["B0", "B2-empty"])
def test_nothing_to_predict_costs_nothing(size):
    """0, finite, and with a gradient that is zero."""
    empty = PackedBatch.from_lengths(torch.zeros(0, dtype=torch.int64), [0] * size)
    positions = torch.zeros(size, dtype=torch.int64)
    logits = torch.zeros(0, VOCAB, requires_grad=True)
    rows = torch.zeros(0, requires_grad=True)
    pooled = torch.zeros(size, 1, requires_grad=True)
    none_kept = torch.zeros(size, dtype=torch.bool)
    for loss in (
        losses.masked_lm_loss(logits, empty.data),
        losses.next_token_loss(logits, empty),
        losses.span_loss(rows, rows, empty, positions, positions),
        losses.classification_loss(pooled, positions - 100),
        losses.classification_loss(pooled, torch.ones(size), none_kept),
    ):
        assert loss.item() == 0
        loss.backward()
    assert not pooled.grad.any()


def test_classification_labels_decide_by_their_dtype():
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, -100, 2, 1])
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(losses.classification_loss(logits, labels), expected)
    values = torch.randn(4)
    expected = F.mse_loss(logits[:, 0], values)
    torch.testing.assert_close(losses.classification_loss(logits[:, :1], values), expected)
    several = torch.randn(4, 3)
    expected = F.mse_loss(logits, several)
    torch.testing.assert_close(losses.classification_loss(logits, several), expected)
    kept = torch.tensor([True, False, True, True])
    expected = F.mse_loss(logits[kept], several[kept])
    torch.testing.assert_close(losses.classification_loss(logits, several, kept), expected)
    with pytest.raises(ValueError, match=r"\(4,\), expected \(4, 3\)"):
        losses.classification_loss(logits, values)


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(300, VOCAB).bfloat16()
    targets = torch.randint(VOCAB, (300,))
    loss = losses.cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets))


def test_masking_takes_its_shares():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (60_000,), generator=generator)
    ids[::10] = 2
    tokens = PackedBatch.from_lengths(ids, [20_000, 0, 40_000])
    draw = {"vocab_size": 1000, "mask_id": 4, "special_ids": [2], "generator": generator}
    masked = mask_tokens(tokens, **draw)
    assert masked.tokens.cu_seqlens is tokens.cu_seqlens
    assert not (masked.targets == 2).any(), "a special token was chosen"
    assert torch.equal(masked.targets, ids[masked.rows])
    assert len(masked.rows) / 54_000 == pytest.approx(0.15, abs=0.01)
    untouched = torch.ones(len(ids), dtype=torch.bool)
    untouched[masked.rows] = False
    assert torch.equal(masked.tokens.data[untouched], ids[untouched])
    shown = masked.tokens.data[masked.rows]
    assert (shown == 4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == masked.targets).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(tokens.data, ids), "the input was written to"


def test_masking_everything_or_nothing(tokens):
    shares = {"vocab_size": VOCAB, "mask_id": 3, "mask_share": 1.0, "random_share": 0.0}
    every = mask_tokens(tokens, prob=1.0, **shares)
    assert (every.tokens.data == 3).all() and torch.equal(every.targets, tokens.data)
    none = mask_tokens(tokens, prob=0.0, **shares)
    assert none.rows.numel() == 0 and torch.equal(none.tokens.data, tokens.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prob": 1.5}, "prob must be in"),
        ({"mask_share": 0.8, "random_share": 0.3}, "add up to at most 1"),
        ({"mask_id": VOCAB}, "mask_id holds 11"),
        ({"special_ids": [-1]}, "special_ids holds -1"),
    ],
)
def test_masking_explains_bad_arguments(tokens, change, message):
    with pytest.raises(ValueError, match=message):
        mask_tokens(tokens, **{"vocab_size": VOCAB, "mask_id": 3} | change)


def test_scaled_cosine_error_at_known_angles():
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    for target, value in ((x, 0.0), (x @ torch.tensor([[0.0, 1], [-1, 0]]), 1.0), (-5 * x, 4.0)):
        mean = losses.scaled_cosine_error(x, target)
        torch.testing.assert_close(mean, torch.tensor(value), atol=1e-6, rtol=0)
        rescaled = losses.scaled_cosine_error(x, target, reduction="rescaled")
        torch.testing.assert_close(rescaled, mean / 3, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses.scaled_cosine_error(x, -x, beta=3), torch.tensor(8.0))


def test_scaled_cosine_error_of_random_rows():
    z, x = torch.randn(2, 40, 7, dtype=torch.float64).unbind(0)
    angle = (z * x).sum(1) / (z.norm(dim=1) * x.norm(dim=1))
    for beta in (1, 1.5, 2):
        expected = ((1 - angle) ** beta).mean()
        torch.testing.assert_close(losses.scaled_cosine_error(z, x, beta=beta), expected)
        printed = ((1 / 40 - angle / 40) ** beta).sum()
        rescaled = losses.scaled_cosine_error(z, x, beta=beta, reduction="rescaled")
        torch.testing.assert_close(rescaled, printed)


def test_scaled_cosine_error_is_finite_where_angles_are_not():
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1e-4, 1e-4]], requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 3.0]])
    loss = losses.scaled_cosine_error(z, x, beta=1.5)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 3) and z.grad.isfinite().all()
    empty = torch.zeros(0, 2, requires_grad=True)
    nothing = losses.scaled_cosine_error(empty, empty.detach())
    nothing.backward()
    assert nothing == 0


def test_scaled_cosine_error_names_what_is_wrong():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"beta must be >= 1, got 0\.5"):
        losses.scaled_cosine_error(x, x, beta=0.5)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'rescaled', got 'sum'"):
        losses.scaled_cosine_error(x, x, reduction="sum")
    with pytest.raises(ValueError, match=r"targets has shape \(2, 2\), expected \(3, 2\)"):
        losses.scaled_cosine_error(x, x[:2])


def test_dice_loss_by_hand():
    logits, targets = torch.randn(3, 4, 2, 5), torch.randint(4, (3, 2, 5))
    targets[1, 0, :2] = -100
    targets[2] = -100  # no label: left out
    terms = []
    for b in range(2):
        kept = targets[b] != -100
        p = logits[b].softmax(0)[:, kept]
        for k in range(4):
            t = (targets[b][kept] == k).float()
            terms.append(1 - 2 * (p[k] * t).sum() / (p[k].square().sum() + t.sum() + 1e-6))
    torch.testing.assert_close(losses.dice_loss(logits, targets), torch.stack(terms).mean())


def test_dice_loss_at_its_ends():
    targets = torch.randint(3, (2, 4, 4, 4))
    right = 100.0 * F.one_hot(targets, 3).movedim(-1, 1)
    assert losses.dice_loss(right, targets) == pytest.approx(0, abs=1e-5)
    assert losses.dice_loss(right.roll(1, 1), targets) == pytest.approx(1, abs=1e-5)
    nothing = torch.zeros(0, 3, 4, requires_grad=True)
    loss = losses.dice_loss(nothing, torch.zeros(0, 4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and nothing.grad.shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"targets has shape \(2, 4\), expected \[B, \*size\]"):
        losses.dice_loss(right, torch.zeros(2, 4, dtype=torch.int64))


def test_cross_entropy_of_a_grid_is_that_of_its_cells():
    logits, targets = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    targets[0, 1] = -100
    rows = logits.movedim(1, -1).flatten(0, 2)
    expected = losses.cross_entropy(rows, targets.flatten())
    torch.testing.assert_close(losses.cross_entropy(logits, targets), expected)


def routed(logits, top_k=1, **options):
    return ops.route_tokens(logits, top_k, **options)


def test_load_balance_is_one_at_balance_and_e_at_collapse():
    spread = torch.eye(4).repeat(5, 1) * 50
    torch.testing.assert_close(losses.load_balance_loss(routed(spread)), torch.tensor(1.0))
    collapsed = torch.zeros(20, 4)
    collapsed[:, 1] = 50
    torch.testing.assert_close(losses.load_balance_loss(routed(collapsed)), torch.tensor(4.0))
    both = losses.load_balance_loss(routed(spread.roll(1, 1) / 50, 4), choices="all")
    torch.testing.assert_close(both, torch.tensor(4.0))  # K at balance


def test_load_balance_matches_the_formula_and_its_gradient():
    """E * sum_e mean(p_te) * mean(1[argmax = e]), whatever capacity drops."""
    logits = torch.randn(33, 6)
    found = []
    for loss in (
        lambda x: losses.load_balance_loss(routed(x, 2, capacity_factor=0.5)),
        lambda x: 6 * (x.softmax(1).mean(0) * F.one_hot(x.argmax(1), 6).float().mean(0)).sum(),
    ):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        found.append((value, torch.autograd.grad(value, leaf)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_bag_of_words_counts_an_entry_once():
    pooled = torch.randn(3, 9, requires_grad=True)
    words = PackedBatch.from_list([[2, 5, 2, 7], [], [4]], dtype=torch.int64)
    w = torch.zeros(3, 9)
    w[0, [2, 5, 7]], w[2, 4] = 0.25, 1.0
    expected = -(w * pooled.log_softmax(1)).sum() / 2
    loss = losses.bag_of_words_loss(pooled, words)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, pooled)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("count", [0, 2])
def test_bag_of_no_words_is_zero(count):
    pooled = torch.randn(count, 9, requires_grad=True)
    words = PackedBatch.from_list([[]] * count, dtype=torch.int64)
    loss = losses.bag_of_words_loss(pooled, words)
    loss.backward()
    assert loss == 0 and not pooled.grad.any()
    with pytest.raises(ValueError, match=f"words has {count} sequences, expected 5"):
        losses.bag_of_words_loss(torch.randn(5, 9), words)


def test_load_balance_of_sigmoid_scores_is_normalised():
    logits = torch.randn(20, 5)
    loss = losses.load_balance_loss(routed(logits, 2, scoring="sigmoid"), normalise=True)
    scores = logits.sigmoid()
    share = F.one_hot(logits.topk(2).indices, 5).sum(1).float().mean(0)
    first = F.one_hot(logits.argmax(1), 5).float().mean(0)
    mean = (scores / scores.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(loss, 5 * (mean * first).sum())
    every = losses.load_balance_loss(
        routed(logits, 2, scoring="sigmoid"), choices="all", normalise=True
    )
    torch.testing.assert_close(every, 5 * (mean * share).sum())


def test_router_z_loss_matches_the_formula():
    logits = torch.randn(20, 5, dtype=torch.bfloat16)
    want = logits.float().logsumexp(1).square().mean()
    torch.testing.assert_close(losses.router_z_loss(logits), want)


def test_padding_reaches_no_routing_loss():
    """NaN in padding, neither in the values nor in the gradients."""
    real = torch.randn(12, 4)
    padded = torch.cat([real[:5], torch.full((3, 4), torch.nan), real[5:]]).requires_grad_()
    mask = torch.tensor([True] * 5 + [False] * 3 + [True] * 7)
    balance = losses.load_balance_loss(routed(padded, mask=mask))
    z = losses.router_z_loss(padded, mask)
    torch.testing.assert_close(balance, losses.load_balance_loss(routed(real)))
    torch.testing.assert_close(z, losses.router_z_loss(real))
    (grad,) = torch.autograd.grad(balance + z, padded)
    assert grad[mask].abs().sum() > 0 and not grad[~mask].any()


def test_routing_losses_of_nothing_are_zero():
    none, mask = torch.randn(3, 4, requires_grad=True), torch.zeros(3, dtype=torch.bool)
    loss = losses.load_balance_loss(routed(none, mask=mask)) + losses.router_z_loss(none, mask)
    loss = loss + losses.load_balance_loss(routed(none[:0])) + losses.router_z_loss(none[:0])
    loss.backward()
    assert loss == 0 and not none.grad.any()


def test_routing_losses_name_what_is_wrong():
    routing = routed(torch.randn(4, 2))
    with pytest.raises(ValueError, match="choices must be 'first' or 'all', got 'last'"):
        losses.load_balance_loss(routing, choices="last")
    given = ops.sort_choices(routing.expert_ids, routing.gates, 2)
    with pytest.raises(ValueError, match="routing has no probabilities"):
        losses.load_balance_loss(given)
