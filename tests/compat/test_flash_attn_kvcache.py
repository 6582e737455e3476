"""flash_attn_with_kvcache: step by step equal to attention over everything at once."""

import pytest
import torch

from encfast import ref
from encfast.compat.flash_attn import flash_attn_func, flash_attn_with_kvcache

pytestmark = pytest.mark.quick

B, STEPS, H, HK, D, CAPACITY = 3, 7, 4, 2, 16, 12
STARTS = torch.tensor([0, 4, 2], dtype=torch.int32)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def caches(parts=B):
    """Rows nobody has written hold NaN: they must not be read."""
    return [torch.full((parts, CAPACITY, HK, D), float("nan")) for _ in "kv"]


def rotate(x, cos, sin, start, interleaved):
    """x [S, H, D] at positions start, start + 1, ..."""
    positions = torch.arange(start, start + len(x))
    return ref.rotary(x, cos, sin, positions, interleaved=interleaved)


RULES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 0)},
    "alibi": {"alibi_slopes": torch.rand(B, H, generator=torch.Generator().manual_seed(0))},
    "softcap": {"softcap": 3.0, "softmax_scale": 0.5},
}


@pytest.mark.parametrize("rotary", ["", "halves", "interleaved"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_equal_attention_over_all_keys(rule, rotary):
    """Sequences of different lengths, one or two new rows at a time, grouped heads."""
    options = RULES[rule]
    moving = options.get("causal", False) or "window_size" in options
    interleaved = rotary == "interleaved"
    angles = torch.rand(CAPACITY, D // 4) * 6.3  # half of each head is rotated
    tables = (angles.cos(), angles.sin())
    k_cache, v_cache = caches()
    keys = [torch.randn(n, HK, D) for n in STARTS]
    values = [torch.randn(n, HK, D) for n in STARTS]
    for b, n in enumerate(STARTS):
        k_cache[b, :n], v_cache[b, :n] = keys[b], values[b]
    used = STARTS.clone()
    for step in range(4):
        new = 1 + step % 2
        q, k, v = (torch.randn(B, new, h, D) for h in (H, HK, HK))
        given = {"rotary_cos": tables[0], "rotary_sin": tables[1]} if rotary else {}
        out, lse = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=used,
            rotary_interleaved=interleaved,
            return_softmax_lse=True,
            **given,
            **options,
        )
        assert out.shape == q.shape and lse.shape == (B, H, new)
        for b in range(B):
            start, q_b, k_b = int(used[b]), q[b], k[b]
            if rotary:
                k_b = rotate(k_b, *tables, start, interleaved)
                at = [start + i if moving else start for i in range(new)]
                q_b = ref.rotary(q_b, *tables, torch.tensor(at), interleaved=interleaved)
            keys[b], values[b] = torch.cat((keys[b], k_b)), torch.cat((values[b], v[b]))
            of_b = {k: x[b : b + 1] if k == "alibi_slopes" else x for k, x in options.items()}
            want, want_lse, _ = flash_attn_func(
                q_b[None], keys[b][None], values[b][None], return_attn_probs=True, **of_b
            )
            close(out[b], want[0])
            close(lse[b], want_lse[0])
            close(k_cache[b, : start + new], keys[b])
            assert torch.equal(v_cache[b, : start + new], values[b])
            assert k_cache[b, start + new :].isnan().all()
        used += new


def test_an_int_of_cache_seqlens_is_that_of_every_sequence():
    k_cache, v_cache = torch.randn(2, B, CAPACITY, HK, D)
    q = torch.randn(B, 2, H, D)
    want = flash_attn_func(q, k_cache[:, :5], v_cache[:, :5], causal=True)
    close(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5, causal=True), want)
    lengths = torch.full((B,), 5, dtype=torch.int32)
    close(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=True), want)
    full = flash_attn_with_kvcache(q, k_cache, v_cache)
    close(full, flash_attn_func(q, k_cache, v_cache))


def test_cache_batch_idx_chooses_the_parts():
    k_cache, v_cache = caches(5)
    parts = torch.tensor([4, 0, 2], dtype=torch.int32)
    for b, n in zip(parts, STARTS, strict=True):
        k_cache[b, :n], v_cache[b, :n] = torch.randn(2, n, HK, D)
    near = [c[parts.long()].clone() for c in (k_cache, v_cache)]
    q, k, v = (torch.randn(B, 2, h, D) for h in (H, HK, HK))
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=STARTS, cache_batch_idx=parts
    )
    close(got, flash_attn_with_kvcache(q, *near, k, v, cache_seqlens=STARTS))
    assert torch.equal(k_cache[parts.long()].nan_to_num(), near[0].nan_to_num())
    assert k_cache[[1, 3]].isnan().all()


def test_empty_sequences_see_nothing():
    k_cache, v_cache = caches()
    q = torch.randn(B, 1, H, D)
    used = torch.tensor([0, 0, 1], dtype=torch.int32)
    k_cache[2, :1], v_cache[2, :1] = 1.0, 2.0
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=used, return_softmax_lse=True
    )
    assert (out[:2] == 0).all() and (lse[:2] == -float("inf")).all()
    assert (out[2] == 2).all()


def test_no_gradient_as_in_flash_attn():
    q = torch.randn(B, 1, H, D, requires_grad=True)
    out = flash_attn_with_kvcache(q, *torch.randn(2, B, CAPACITY, HK, D))
    assert not out.requires_grad


X, Q = torch.randn(B, CAPACITY, HK, D), torch.randn(B, 1, H, D)
N, T = torch.randn(B, 1, HK, D), torch.rand(CAPACITY, 4)
I32 = torch.int32


def call(q=Q, k_cache=X, v_cache=X, k=None, v=None, **options):
    return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)


ERRORS = {
    "block_table is given": (lambda: call(block_table=T.int()), NotImplementedError),
    "cache_leftpad is given": (lambda: call(cache_leftpad=STARTS), NotImplementedError),
    r"q has shape \(3, 4, 16\)": (lambda: call(Q[:, 0]), ValueError),
    "v_cache has shape .* expected that of k_cache": (
        lambda: call(v_cache=X[:, :5]),
        ValueError,
    ),
    "v is None; pass both k and v": (lambda: call(k=N), ValueError),
    "cache_seqlens is None; with k and v": (lambda: call(k=N, v=N), ValueError),
    r"k has shape \(3, 1, 4, 16\), expected \(3, 1, 2, 16\)": (
        lambda: call(k=Q, v=Q, cache_seqlens=0),
        ValueError,
    ),
    "k is torch.bfloat16, the caches are torch.float32": (
        lambda: call(k=N.bfloat16(), v=N.bfloat16(), cache_seqlens=0),
        TypeError,
    ),
    "12 in use and 1 new ones do not fit": (
        lambda: call(k=N, v=N, cache_seqlens=CAPACITY),
        ValueError,
    ),
    "cache_seqlens holds 13, the caches have 12 rows": (
        lambda: call(cache_seqlens=13),
        ValueError,
    ),
    "cache_seqlens holds -1": (
        lambda: call(cache_seqlens=torch.tensor([0, -1, 3], dtype=I32)),
        ValueError,
    ),
    "cache_seqlens has 2 entries, q has 3": (
        lambda: call(cache_seqlens=STARTS[:2]),
        ValueError,
    ),
    "cache_seqlens is torch.float32": (lambda: call(cache_seqlens=STARTS.float()), TypeError),
    "rotary_sin is None; pass both tables": (
        lambda: call(k=N, v=N, cache_seqlens=0, rotary_cos=T),
        ValueError,
    ),
    "rotary_cos needs new keys": (lambda: call(rotary_cos=T, rotary_sin=T), ValueError),
    "cache_batch_idx holds 3, the caches have 3 sequences": (
        lambda: call(cache_batch_idx=torch.tensor([0, 1, 3], dtype=I32)),
        ValueError,
    ),
    "k_cache has 2 sequences, q has 3": (lambda: call(k_cache=X[:2], v_cache=X[:2]), ValueError),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    bad, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        bad()
