"""encfast.compat.flash_attn: flash-attn's attention functions against the reference."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch

from encfast import ops, ref
from encfast.compat import flash_attn as fa
from encfast.testing import assert_close_to_reference

pytestmark = pytest.mark.quick

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
# name -> (arguments in flash-attn's words, the same in those of the reference)
RULES = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (2, 1)}, {"window": (2, 1)}),
    "left-window": ({"window_size": (3, -1)}, {"window": (3, -1)}),
    "scale-softcap": ({"softmax_scale": 0.4, "softcap": 5.0}, {"scale": 0.4, "softcap": 5.0}),
    "alibi": ({"alibi_slopes": "H"}, {"alibi_slopes": "H"}),
    "alibi-per-sequence": (
        {"alibi_slopes": "BH", "causal": True, "deterministic": True},
        {"alibi_slopes": "BH", "causal": True},
    ),
}


def cu_seqlens(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def rules(name, batch, heads):
    """The two keyword dicts, slopes filled in."""
    slopes = {"H": torch.rand(heads), "BH": torch.rand(batch, heads)}
    for rule in RULES[name]:
        yield {k: slopes[v] if k == "alibi_slopes" else v for k, v in rule.items()}


def grads(outputs, weights, leaves):
    seen = [torch.isfinite(o) for o in outputs]  # -inf where a query sees no key
    loss = sum(
        (o.where(s, 0) * w.to(o.dtype)).sum()
        for o, s, w in zip(outputs, seen, weights, strict=True)
    )
    return torch.autograd.grad(loss, leaves)


def assert_same(call, inputs, split, cu_q, cu_k, options, dense=None):
    """`call(*inputs)` -> (out, lse, None) against the reference on `split(*inputs)` -> q, k, v.

    `dense` = (B, S): the call's results are on a grid.
    """
    dtype = inputs[0].dtype

    def on_rows(out, lse):
        if dense is None:
            return out, lse
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    def results(attention, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        outputs = attention(leaves)
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in
                   enumerate(outputs)]  # fmt: skip
        return (*outputs, *grads(outputs, weights, leaves))

    def ours(leaves):
        out, lse, probs = call(*leaves)
        assert probs is None and lse.dtype == torch.float32 and out.dtype == dtype
        if dense is not None:
            assert out.shape[:2] == dense and lse.shape == (dense[0], out.shape[2], dense[1])
        return on_rows(out, lse)

    def reference(compute):
        def attention(leaves):
            return ref.varlen_attn(
                *split(*leaves), cu_q, cu_seqlens_k=cu_k, compute_dtype=compute, **options
            )

        return attention

    got = results(ours, dtype)
    exact = results(reference(torch.float64), torch.float64)
    plain = results(reference(dtype), dtype)
    for i, (a, e, p) in enumerate(zip(got, exact, plain, strict=True)):
        name = ("out", "lse")[i] if i < 2 else f"gradient {i - 2}"
        p = p.to(a.dtype)
        assert_close_to_reference(name, a, e.double(), p, 2 if i < 2 else 3, eps_factor=2)


@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_varlen(rule, dtype):
    """Packed, grouped heads, queries and keys of different lengths, a sequence of none."""
    lengths_q, lengths_k = (3, 0, 1, 6), (5, 2, 1, 4)
    cu_q, cu_k = cu_seqlens(*lengths_q), cu_seqlens(*lengths_k)
    q, kv = torch.randn(10, 4, 16).to(dtype), torch.randn(12, 2, 2, 16).to(dtype)
    theirs, options = rules(rule, 4, 4)
    lengths = (cu_q, cu_k, 6, 5)

    def packed(q, kv):
        return fa.flash_attn_varlen_kvpacked_func(q, kv, *lengths, return_attn_probs=True, **theirs)

    def separate(q, kv):
        k, v = kv.unbind(1)
        return fa.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **theirs)

    for call in (packed, separate):
        assert_same(call, (q, kv), lambda q, kv: (q, *kv.unbind(1)), cu_q, cu_k, options)
    k, v = kv.unbind(1)
    assert torch.equal(fa.flash_attn_varlen_func(q, k, v, *lengths, **theirs), separate(q, kv)[0])


@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_varlen_qkvpacked(rule, dtype):
    cu = cu_seqlens(3, 0, 6, 1)
    qkv = torch.randn(10, 3, 4, 16).to(dtype)
    theirs, options = rules(rule, 4, 4)

    def call(qkv):
        return fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 6, return_attn_probs=True, **theirs)

    assert_same(call, (qkv,), lambda qkv: qkv.unbind(1), cu, cu, options)


@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_dense(rule, dtype):
    """Multi-query heads, queries and keys of different lengths."""
    q, kv = torch.randn(2, 5, 4, 16).to(dtype), torch.randn(2, 7, 2, 1, 16).to(dtype)
    theirs, options = rules(rule, 2, 4)

    def split(q, kv):
        return (q.flatten(0, 1), *kv.flatten(0, 1).unbind(1))

    def packed(q, kv):
        return fa.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **theirs)

    def separate(q, kv):
        return fa.flash_attn_func(q, *kv.unbind(2), return_attn_probs=True, **theirs)

    for call in (packed, separate):
        args = (cu_seqlens(5, 5), cu_seqlens(7, 7), options, (2, 5))
        assert_same(call, (q, kv), split, *args)
    assert torch.equal(fa.flash_attn_func(q, *kv.unbind(2), **theirs), separate(q, kv)[0])


@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_dense_qkvpacked(rule, dtype):
    qkv = torch.randn(2, 6, 3, 4, 16).to(dtype)
    theirs, options = rules(rule, 2, 4)
    cu = cu_seqlens(6, 6)

    def call(qkv):
        return fa.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **theirs)

    assert_same(call, (qkv,), lambda x: x.flatten(0, 1).unbind(1), cu, cu, options, (2, 6))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)], ids=str)
def test_nothing_to_attend(shape):
    qkv = torch.randn(*shape, 3, 2, 8, requires_grad=True)
    out, lse, _ = fa.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    assert out.shape == (*shape, 2, 8) and lse.shape == (shape[0], 2, shape[1])
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_readme_causal_masks():
    """The two masks that flash-attn's README draws for unequal lengths."""
    for seqlen_q, seqlen_k, mask in (
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    ):
        q, k = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_k, 1, 8)
        v = torch.eye(seqlen_k, 8)[None, :, None]
        seen = fa.flash_attn_func(q, k, v, causal=True)[0, :, 0, :seqlen_k]
        assert (seen > 0).int().tolist() == mask


def readme_inputs():
    batch_size, seqlen, nheads, nheads_k, headdim = 2, 8, 6, 2, 32
    q = torch.randn(batch_size, seqlen, nheads, headdim)
    k, v = (torch.randn(batch_size, seqlen, nheads_k, headdim) for _ in "kv")
    qkv = torch.randn(batch_size, seqlen, 3, nheads, headdim)
    return q, k, v, qkv


README = """
from flash_attn import flash_attn_qkvpacked_func, flash_attn_func
from flash_attn import flash_attn_with_kvcache

a = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False,
                              window_size=(-1, -1), alibi_slopes=None, deterministic=False)
b = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False,
                    window_size=(-1, -1), alibi_slopes=None, deterministic=False)
c = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False)
d = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False)
e = flash_attn_with_kvcache(
    q,
    k,
    v,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),  # -1 means infinite context window
    rotary_interleaved=True,
    alibi_slopes=None,
)
"""


def test_usage_of_the_readme():
    """Its imports with the name replaced, its calls with their arguments, its shapes."""
    q, k, v, qkv = readme_inputs()
    scope = {"q": q, "k": k, "v": v, "qkv": qkv}
    exec(re.sub(r"\bfrom flash_attn\b", "from encfast.compat.flash_attn", README), scope)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    for name in "bde":
        torch.testing.assert_close(scope[name], want)
    want = torch.nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    for name in "ac":
        torch.testing.assert_close(scope[name], want.transpose(1, 2))


# Parameters of flash-attn 2.8 in their order; callers pass many of them by position.
OPTIONS = (
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs"
)
SIGNATURES = {
    "flash_attn_func": f"q k v {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv {OPTIONS}",
    "flash_attn_kvpacked_func": f"q kv {OPTIONS}",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    f"{OPTIONS} block_table",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {OPTIONS}",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    f"{OPTIONS}",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens "
    "cache_batch_idx cache_leftpad block_table softmax_scale causal window_size softcap "
    "rotary_interleaved alibi_slopes num_splits return_softmax_lse",
    "bert_padding.unpad_input": "hidden_states attention_mask unused_mask",
    "bert_padding.pad_input": "hidden_states indices batch seqlen",
    "bert_padding.unpad_input_for_concatenated_sequences": "hidden_states attention_mask_in_length",
    "layers.rotary.apply_rotary_emb": "x cos sin interleaved inplace seqlen_offsets cu_seqlens "
    "max_seqlen",
    "layers.rotary.apply_rotary_emb_qkv_": "qkv cos sin cos_k sin_k interleaved seqlen_offsets "
    "num_heads_q",
    "layers.rotary.apply_rotary_emb_kv_": "kv cos sin interleaved seqlen_offsets",
    "layers.rotary.RotaryEmbedding": "dim base interleaved scale_base device",
    "losses.cross_entropy.CrossEntropyLoss": "ignore_index reduction label_smoothing logit_scale "
    "lse_square_scale inplace_backward process_group return_z_loss",
    "ops.triton.cross_entropy.cross_entropy_loss": "logits labels precomputed_lse label_smoothing "
    "logit_scale lse_square_scale ignore_index inplace_backward process_group",
    "ops.triton.rotary.apply_rotary": "x cos sin seqlen_offsets cu_seqlens max_seqlen interleaved "
    "inplace conjugate",
    "ops.rms_norm.rms_norm": "x weight epsilon",
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    module, _, name = path.rpartition(".")
    where = importlib.import_module(".".join(filter(None, (fa.__name__, module))))
    parameters = inspect.signature(getattr(where, name)).parameters
    assert " ".join(parameters) == SIGNATURES[path]


def test_functions_are_found_in_their_module():
    interface = importlib.import_module("encfast.compat.flash_attn.flash_attn_interface")
    for name in fa.__all__:
        assert getattr(interface, name) is getattr(fa, name)


def test_encfast_does_not_import_it():
    code = (
        "import sys, encfast; assert not [m for m in sys.modules if 'compat' in m and 'encf' in m]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


Q, CU = torch.randn(2, 4, 2, 8), cu_seqlens(4, 4)
ROWS = Q.flatten(0, 1)


def varlen(**options):
    return fa.flash_attn_varlen_func(ROWS, ROWS, ROWS, CU, CU, 4, 4, **options)


ERRORS = {
    "flash_attn_varlen_func: block_table is given; gather the pages": (
        lambda: varlen(block_table=torch.zeros(2, 1, dtype=torch.int32)),
        NotImplementedError,
    ),
    "window_size is 3, expected": (lambda: varlen(window_size=3), TypeError),
    r"window_size is \(1.5, 2\), expected two ints": (
        lambda: varlen(window_size=(1.5, 2)),
        TypeError,
    ),
    "softmax_scale is str": (lambda: varlen(softmax_scale="a"), TypeError),
    "softcap is NoneType": (lambda: varlen(softcap=None), TypeError),
    "softcap is nan": (lambda: varlen(softcap=float("nan")), ValueError),
    "dropout_p is 1.5": (lambda: varlen(dropout_p=1.5), ValueError),
    "alibi_slopes has shape": (lambda: varlen(alibi_slopes=torch.rand(3)), ValueError),
    "max_seqlen_q has shape": (
        lambda: fa.flash_attn_varlen_func(ROWS, ROWS, ROWS, CU, CU, CU, 4),
        TypeError,
    ),
    "max_seqlen_k is 3, but": (
        lambda: fa.flash_attn_varlen_func(ROWS, ROWS, ROWS, CU, CU, 4, 3),
        ValueError,
    ),
    r"flash_attn_func: q has shape \(8, 2, 8\), expected \[B, S, heads, D\]": (
        lambda: fa.flash_attn_func(ROWS, ROWS, ROWS),
        ValueError,
    ),
    "flash_attn_func: k has 1 sequences, q has 2": (
        lambda: fa.flash_attn_func(Q, Q[:1], Q[:1]),
        ValueError,
    ),
    "flash_attn_func: v has 3 rows per sequence, k has 4": (
        lambda: fa.flash_attn_func(Q, Q, Q[:, :3]),
        ValueError,
    ),
    r"qkvpacked_func: qkv has shape \(2, 4, 2, 8\), expected \[B, S, 3, H, D\]": (
        lambda: fa.flash_attn_qkvpacked_func(Q),
        ValueError,
    ),
    r"kvpacked_func: kv has shape .* expected \[N, 2, Hk, D\]": (
        lambda: fa.flash_attn_varlen_kvpacked_func(ROWS, Q, CU, CU, 4, 4),
        ValueError,
    ),
    "qkv is list": (lambda: fa.flash_attn_qkvpacked_func([1]), TypeError),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


def test_lengths_may_be_tensors_and_bounds_any_negative():
    """Unpadding code often leaves max_seqlen as a 0-dim tensor; -2 is no bound for flash-attn."""
    want = varlen()
    got = fa.flash_attn_varlen_func(
        ROWS, ROWS, ROWS, CU, CU, torch.tensor(4), torch.tensor(4), window_size=(-2, -5)
    )
    assert torch.equal(got, want)


def test_dropout_is_passed_on(monkeypatch):
    """To the op, by its name there; 0 as no argument."""
    seen = []

    def varlen_attn(q, *args, dropout_p=None, **options):
        seen.append(dropout_p)
        return q, q.new_zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(ops, "varlen_attn", varlen_attn)
    for p in (0.25, 0.0):
        varlen(dropout_p=p)
        fa.flash_attn_func(Q, Q, Q, dropout_p=p)
        fa.flash_attn_qkvpacked_func(torch.stack((Q, Q, Q), 2), p)
    assert seen == [0.25] * 3 + [None] * 3


def test_dropout_keeps_the_mean():
    """Equal weights on 64 values of 1: the kept ones, scaled, sum to 1 on average."""
    torch.manual_seed(0)
    q = torch.zeros(2, 64, 4, 16)
    out = fa.flash_attn_func(q, q, torch.ones_like(q), dropout_p=0.5)
    assert abs(out.mean().item() - 1) < 0.02
    assert out.min() < 0.9 and out.max() > 1.1
