"""encfast.compat.flash_attn.layers.rotary against the formula, over all arguments."""

import pytest
import torch

from encfast.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from encfast.compat.flash_attn.ops.triton.rotary import apply_rotary

pytestmark = pytest.mark.quick

B, S, H, D, R, TABLE = 3, 5, 2, 24, 16, 40
LENGTHS = (4, 0, 6)
OFFSETS = {"0": 0, "7": 7, "per-sequence": torch.tensor([3, 0, 11], dtype=torch.int32)}


def tables(dtype=torch.float32):
    angles = torch.rand(TABLE, R // 2) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x, cos, sin, start, interleaved):
    """One sequence [S, heads, D] in float64: the pairs as complex numbers, the rest as it is."""
    pairs = x[..., :R].double()
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    rows = slice(start, start + len(x))
    turn = torch.complex(cos[rows].double(), sin[rows].double())[:, None]
    out = torch.view_as_real(torch.complex(first, second) * turn)
    out = out.flatten(-2) if interleaved else out.mT.flatten(-2)
    return torch.cat((out, x[..., R:].double()), -1)


def formula(x, cos, sin, offsets, interleaved):
    """Sequences x [B, S, heads, D] or a list of them."""
    starts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * len(x)
    return [turned(s, cos, sin, at, interleaved) for s, at in zip(x, starts, strict=True)]


def close(got, want):
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want.double(), rtol=eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("packed", [False, True], ids=["grid", "packed"])
def test_apply_rotary_emb(packed, inplace, interleaved, offsets, dtype):
    cos, sin = tables()
    shape = (sum(LENGTHS), H, D) if packed else (B, S, H, D)
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(shape).to(dtype)
    cu = torch.tensor([0, 4, 4, 10], dtype=torch.int32) if packed else None
    leaf = x.clone().requires_grad_()
    offset = OFFSETS[offsets]
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, offset, cu, max(LENGTHS))
    sequences = (lambda x: x.split(LENGTHS)) if packed else list
    join = torch.cat if packed else torch.stack
    close(out, join(formula(sequences(x), cos, sin, offset, interleaved)))
    assert (out.data_ptr() == leaf.data_ptr()) == inplace
    (grad,) = torch.autograd.grad((out * weight).sum(), leaf)
    close(grad, join(formula(sequences(weight), cos, -sin, offset, interleaved)))


def test_other_names_are_the_same_function():
    cos, sin = tables()
    x = torch.randn(B, S, H, D)
    assert apply_rotary_emb_func is apply_rotary_emb
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary_emb(x, cos, sin))
    back = apply_rotary(apply_rotary(x, cos, sin, 2), cos, sin, 2, conjugate=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("k_tables", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("layout", ["5-D", "5-D view", "4-D"])
def test_qkv(layout, k_tables, interleaved, offsets):
    cos, sin = tables()
    of_k = tables() if k_tables else (None, None)
    offset, kv_heads = OFFSETS[offsets], 1 if layout == "4-D" else H
    x = torch.randn(B, S, H + 2 * kv_heads, D)

    def shaped(x):
        x = x.clone()
        if layout == "5-D view":  # the heads of q, k and v do not lie beside each other
            return x.unflatten(2, (3, H)).transpose(2, 3).contiguous().transpose(2, 3)
        return x if layout == "4-D" else x.unflatten(2, (3, H))

    def expected(x, sign=1):
        q, k, v = x.split((H, kv_heads, kv_heads), 2)
        cos_k, sin_k = of_k if k_tables else (cos, sin)
        q = torch.stack(formula(q, cos, sign * sin, offset, interleaved))
        k = torch.stack(formula(k, cos_k, sign * sin_k, offset, interleaved))
        return torch.cat((q, k, v.double()), 2)

    leaf = shaped(x).requires_grad_()
    heads = H if layout == "4-D" else None
    out = apply_rotary_emb_qkv_(leaf, cos, sin, *of_k, interleaved, offset, heads)
    assert out.data_ptr() == leaf.data_ptr() and out.shape == leaf.shape
    flat = (lambda x: x) if layout == "4-D" else (lambda x: x.flatten(2, 3))
    close(flat(out.detach()), expected(x))
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((flat(out) * weight).sum(), leaf)
    close(flat(grad), expected(weight, -1))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_kv(interleaved, offsets):
    cos, sin = tables()
    x = torch.randn(B, S, 2, H, D)
    leaf = x.clone().requires_grad_()
    out = apply_rotary_emb_kv_(leaf, cos, sin, interleaved, OFFSETS[offsets])
    assert out.data_ptr() == leaf.data_ptr()
    close(out[:, :, 0], torch.stack(formula(x[:, :, 0], cos, sin, OFFSETS[offsets], interleaved)))
    assert torch.equal(out[:, :, 1], x[:, :, 1])
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((out * weight).sum(), leaf)
    turned_back = formula(weight[:, :, 0], cos, -sin, OFFSETS[offsets], interleaved)
    close(grad[:, :, 0], torch.stack(turned_back))
    assert torch.equal(grad[:, :, 1], weight[:, :, 1])


def test_a_projection_is_overwritten_and_trained():
    """The way MHA uses it: the result of a Linear is not a leaf."""
    cos, sin = tables()
    weight = torch.randn(8, 3 * H * D, requires_grad=True)
    x, target = torch.randn(B, S, 8), torch.randn(B, S, 3, H, D)

    def loss(rotate):
        qkv = (x @ weight).unflatten(-1, (3, H, D))
        return (rotate(qkv) * target).sum()

    def plain(qkv):
        q, k, v = qkv.unbind(2)
        return torch.stack((*(apply_rotary_emb(t, cos, sin) for t in (q, k)), v), 2)

    got = torch.autograd.grad(loss(lambda qkv: apply_rotary_emb_qkv_(qkv, cos, sin)), weight)
    torch.testing.assert_close(got, torch.autograd.grad(loss(plain), weight))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_module(interleaved):
    rotary = RotaryEmbedding(R, base=100.0, interleaved=interleaved)
    angles = torch.arange(40.0)[:, None] * 100.0 ** (-torch.arange(0, R, 2) / R)
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(B, S, 3, H, D)
    want = apply_rotary_emb_qkv_(qkv.clone(), cos, sin, interleaved=interleaved, seqlen_offsets=9)
    assert torch.equal(rotary(qkv.clone(), seqlen_offset=9), want)
    per_sequence = OFFSETS["per-sequence"]
    want = apply_rotary_emb_qkv_(qkv.clone(), cos, sin, None, None, interleaved, per_sequence)
    assert torch.equal(rotary(qkv.clone(), seqlen_offset=per_sequence, max_seqlen=16), want)
    q, kv = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone()
    q, kv = rotary(q, kv, seqlen_offset=per_sequence)
    assert torch.equal(torch.cat((q[:, :, None], kv), 2), want)
    grouped = torch.randn(B, S, H + 2, D)
    want = apply_rotary_emb_qkv_(grouped.clone(), cos, sin, interleaved=interleaved, num_heads_q=H)
    assert torch.equal(rotary(grouped, num_heads_q=H), want)


def test_module_keeps_its_tables_exact_in_bfloat16():
    rotary = RotaryEmbedding(R).to(torch.bfloat16)
    assert rotary.inv_freq.dtype == torch.float32
    x = torch.randn(1, 2, 3, 1, R).bfloat16()
    exact = RotaryEmbedding(R)(x.double().float().clone(), seqlen_offset=8000)
    torch.testing.assert_close(
        rotary(x.clone(), seqlen_offset=8000).float(), exact, rtol=2**-8, atol=2**-8
    )


def test_module_xpos_scores_decay_with_the_distance_only():
    """q shrinks and k grows by the same factor per position: scores depend on the distance."""
    rotary = RotaryEmbedding(R, scale_base=64)
    qkv = torch.randn(1, 1, 3, 1, R).expand(1, 32, 3, 1, R).clone()
    q, k, v = rotary(qkv).unbind(2)
    scores = (q[0, :, 0] @ k[0, :, 0].T).double()
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert q[0, 0].norm() > q[0, 31].norm() and k[0, 0].norm() < k[0, 31].norm()
    assert torch.equal(v, qkv[:, :, 2])


X, (C, SIN) = torch.randn(B, S, H, D), tables()
ERRORS = {
    r"apply_rotary: x has shape \(5, 2, 24\), expected \[B, S, H, D\]": (
        lambda: apply_rotary_emb(X[0], C, SIN),
        ValueError,
    ),
    "seqlen_offsets has 2 entries, expected one for each of 3": (
        lambda: apply_rotary_emb(X, C, SIN, seqlen_offsets=torch.tensor([1, 2])),
        ValueError,
    ),
    "seqlen_offsets is float, expected": (
        lambda: apply_rotary_emb(X, C, SIN, seqlen_offsets=1.0),
        TypeError,
    ),
    "seqlen_offsets is torch.float32": (
        lambda: apply_rotary_emb(X, C, SIN, seqlen_offsets=torch.ones(3)),
        TypeError,
    ),
    "positions holds 42, the tables have 40 rows": (
        lambda: apply_rotary_emb(X, C, SIN, seqlen_offsets=38),
        ValueError,
    ),
    "qkv_: num_heads_q is None": (lambda: apply_rotary_emb_qkv_(X, C, SIN), ValueError),
    "qkv_: num_heads_q is 1 and qkv has 2 heads": (
        lambda: apply_rotary_emb_qkv_(X, C, SIN, num_heads_q=1),
        ValueError,
    ),
    "qkv_: sin_k is None; pass both": (
        lambda: apply_rotary_emb_qkv_(X[:, :, None].expand(B, S, 3, H, D), C, SIN, cos_k=C),
        ValueError,
    ),
    r"kv_: kv has shape .* expected \[B, S, 2, Hk, D\]": (
        lambda: apply_rotary_emb_kv_(X, C, SIN),
        ValueError,
    ),
    "RotaryEmbedding: max_seqlen is None": (
        lambda: RotaryEmbedding(R)(X, seqlen_offset=torch.tensor([0, 1, 2]), num_heads_q=1),
        ValueError,
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()
