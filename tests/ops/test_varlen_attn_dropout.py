"""Dropout of varlen_attn: the generator, its statistics, and the same mask wherever it is drawn."""

import pytest
import torch
from attn_cases import Case, cu_seqlens, drawn_key, make_biases, make_douts, make_qkv, run_op
from torch.utils.checkpoint import checkpoint

from encfast import ops
from encfast.ref.philox import dropout_keep, philox4x32

# Random123's kat_vectors: counter, key and result of philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.quick
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_numbers(counter, key, result):
    assert philox4x32(words(counter), words(key)) == words(result)


@pytest.mark.quick
def test_draws_are_the_half_words_in_order_of_the_keys():
    rng = torch.tensor([7 - 2**32, 9 + 2**40])  # only the low words are the key
    b, h, i = 2, 1, 3
    draws = []
    for j in range(11):
        counter = (j >> 3, i, h, b)
        block = philox4x32(tuple(map(torch.tensor, counter)), words("7 9"))
        draws.append(int(block[(j & 7) >> 1]) >> 16 * (j & 1) & 0xFFFF)
    for threshold in sorted(draws):
        keep, multiplier = dropout_keep(threshold / 65536, rng, b, (h + 1, i + 1, 11))
        assert keep[h, i].tolist() == [draw >= threshold for draw in draws]
        assert multiplier == 65536 / (65536 - threshold)


def probabilities(lens, heads, dropout_p, dtype=torch.float32):
    """P * keep / (1 - p) of every sequence, [H, Lq, Lk] each: attention with one-hot values."""
    size = max(lens)
    n = sum(lens)
    v = torch.cat([torch.eye(m, size) for m in lens])[:, None].expand(-1, heads, -1).to(dtype)
    q = torch.zeros(n, heads, size, dtype=dtype)
    out = ops.varlen_attn(q, q, v, cu_seqlens(lens), dropout_p=dropout_p)
    return [x[..., :m].transpose(0, 1) for x, m in zip(out.split(lens), lens, strict=True)]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_mask_is_that_of_the_reference(dropout_p, dtype):
    """Bit by bit, by (sequence, head, query, key), whatever tile the kernel is in."""
    lens = (5, 130, 0, 33, 1)
    key = drawn_key()
    torch.manual_seed(4)  # as drawn_key did: the op draws the same
    for b, p in enumerate(probabilities(lens, 3, dropout_p, dtype)):
        keep, multiplier = dropout_keep(dropout_p, key, b, p.shape)
        assert torch.equal(p != 0, keep)
        want = keep * multiplier / max(lens[b], 1)
        torch.testing.assert_close(p, want.to(dtype))


@pytest.mark.quick
@pytest.mark.parametrize("dropout_p", [1e-5, 0.1, 0.5, 0.999])
def test_kept_fraction_and_independence(dropout_p):
    """Within 4 standard deviations of p; over heads, rows and neighbouring keys uncorrelated."""
    (p,) = probabilities((256,), 8, dropout_p)
    kept = (p != 0).double()
    n, q = kept.numel(), round(dropout_p * 65536) / 65536
    sigma = max((q * (1 - q)) ** 0.5, 1e-9)
    assert (kept.mean() - (1 - q)).abs() <= 4 * sigma / n**0.5
    if dropout_p < 0.01:
        return
    spread = (kept.mean(-1) - (1 - q)).std() / (sigma / 256**0.5)
    assert 0.9 < spread < 1.1  # of row means: that of independent draws
    for a, b in (
        (kept[1:], kept[:-1]),
        (kept[:, 1:], kept[:, :-1]),
        (kept[..., 1:], kept[..., :-1]),
    ):
        correlation = ((a - (1 - q)) * (b - (1 - q))).mean() / sigma**2
        assert correlation.abs() < 4 / a.numel() ** 0.5


@pytest.mark.quick
def test_dropout_is_unbiased():
    """The mean over 400 masks is attention without dropout."""
    q, k, v = make_qkv(Case((12, 5), head_size=8), torch.float32)
    cu = cu_seqlens((12, 5))
    plain, outs = (
        ops.varlen_attn(q, k, v, cu),
        torch.stack([ops.varlen_attn(q, k, v, cu, dropout_p=0.2) for _ in range(400)]),
    )
    error = (outs.mean(0) - plain) / (outs.std(0) / 20)
    assert error.abs().max() < 5 and error.square().mean() < 1.2


@pytest.mark.quick
def test_a_seed_repeats_the_mask_and_only_the_seed_does():
    q, k, v = make_qkv(Case((30, 5)), torch.float32)

    def draw(seed=None, **options):
        if seed is not None:
            torch.manual_seed(seed)
        return ops.varlen_attn(q, k, v, cu_seqlens((30, 5)), **options)

    first = draw(3, dropout_p=0.3)
    following = draw(dropout_p=0.3)
    assert torch.equal(draw(3, dropout_p=0.3), first)
    assert not torch.equal(following, first)
    state = torch.get_rng_state()
    assert torch.equal(draw(dropout_p=0.0), draw())
    assert torch.equal(torch.get_rng_state(), state), "nothing to drop, yet numbers were drawn"


@pytest.mark.quick
def test_lse_is_that_without_dropout():
    q, k, v = make_qkv(Case((30, 5)), torch.float32)
    args = (q, k, v, cu_seqlens((30, 5)))
    _, dropped = ops.varlen_attn(*args, dropout_p=0.5, return_lse=True)
    assert torch.equal(dropped, ops.varlen_attn(*args, return_lse=True)[1])


@pytest.mark.quick
def test_a_p_that_rounds_to_zero_drops_nothing():
    q, k, v = make_qkv(Case((30, 5)), torch.float32)
    args = (q, k, v, cu_seqlens((30, 5)))
    assert torch.equal(ops.varlen_attn(*args, dropout_p=1e-6), ops.varlen_attn(*args))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradient_of_v_is_made_of_the_same_mask(dtype):
    """out is linear in v: its Jacobian, read off dv, is the matrix that made out."""
    torch.manual_seed(0)
    (p,) = probabilities((70,), 2, 0.4, dtype)
    q = torch.zeros(70, 2, 70, dtype=dtype)
    v = torch.zeros(70, 2, 70, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    out = ops.varlen_attn(q, q, v, cu_seqlens((70,)), dropout_p=0.4)
    eye = torch.eye(70, dtype=dtype)[:, None].expand(-1, 2, -1)
    (dv,) = torch.autograd.grad(out, v, eye)  # dv[j, h, i] = P[h, i, j]
    torch.testing.assert_close(dv.permute(1, 2, 0), p)


@pytest.mark.quick
def test_checkpointing_redraws_the_mask():
    case = Case((3, 0, 60), rel="H", bias="HT")
    inputs = dict(zip("qkv", make_qkv(case, torch.float32), strict=True))
    inputs |= make_biases(case, torch.float32)

    def block(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        return ops.varlen_attn(**arguments, cu_seqlens_q=cu_seqlens(case.lens), dropout_p=0.3)

    results = []
    for call in (block, lambda *x: checkpoint(block, *x, use_reentrant=False)):
        torch.manual_seed(7)
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = call(*leaves)
        torch.rand(3)  # what a later layer draws
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.quick
@pytest.mark.parametrize("needed", ["q", "v"])
def test_finite_differences_see_the_mask(needed):
    """The gradient is that of the function with this mask, not with another or with none."""
    case = Case((9,), heads=2, head_size=4, rel="H", rel_size=5, dropout=0.4)
    qkv, (dout, _) = make_qkv(case, torch.float32), make_douts(case, torch.float32)
    got = run_op(case, qkv, (dout, torch.zeros(2, 9)))[f"d{needed}"]
    index = "qkv".index(needed)
    direction = torch.randn(9, 2, 4)
    ends = []
    for step in (1e-2, -1e-2):
        moved = list(qkv)
        moved[index] = qkv[index] + step * direction
        ends.append((run_op(case, moved, (dout, torch.zeros(2, 9)))["out"] * dout).sum())
    slope = (ends[0] - ends[1]) / 2e-2
    torch.testing.assert_close(slope.float(), (got * direction).sum(), rtol=2e-2, atol=2e-2)
