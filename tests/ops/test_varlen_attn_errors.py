"""Malformed calls of varlen_attn: refused before any kernel, by argument name and value."""

import pytest
import torch
from attn_cases import cu_seqlens

from encfast import ops

N, H, HK, D = 6, 4, 2, 8
CU = cu_seqlens((2, 4))


def good():
    return {
        "q": torch.randn(N, H, D),
        "k": torch.randn(N, HK, D),
        "v": torch.randn(N, HK, D),
        "cu_seqlens_q": CU,
    }


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def longs(*values):
    return torch.tensor(values, dtype=torch.int64)


T = 2 * 2 + 4 * 4
G = torch.ones(3, HK, D)
GROUP = longs(2, 0)


def biased(**other):
    return {"bias": torch.ones(T), **other}


def shared(k_g=G, v_g=G, group=GROUP, **other):
    return {"global_kv": (k_g, v_g, group), **other}


# argument -> what is passed, the exception, and what the message must hold besides the argument.
ERRORS = [
    ({"q": [1.0]}, TypeError, "q is list"),
    ({"q": torch.randn(N, H)}, ValueError, r"q has shape \(6, 4\)"),
    ({"k": torch.randn(2, N, HK, D)}, ValueError, r"k has shape \(2, 6, 2, 8\)"),
    ({"q": torch.randn(N, H, D).double()}, TypeError, "q is float64.*encfast.ref.varlen_attn"),
    ({"v": torch.ones(N, HK, D).long()}, TypeError, "v is int64, expected float32 or bfloat16"),
    ({"v": torch.randn(N, HK, D).to_sparse()}, TypeError, "v has layout torch.sparse_coo"),
    ({"k": torch.randn(N, HK, D, device="meta")}, ValueError, "k is on meta, q is on cpu"),
    ({"q": torch.randn(N, H, 0)}, ValueError, "q has head size 0, expected 1..256"),
    ({"q": torch.randn(N, H, 257)}, ValueError, "q has head size 257"),
    ({"k": torch.randn(N, HK, 9)}, ValueError, "k has head size 9, q has 8"),
    ({"v": torch.randn(N, HK, 9)}, ValueError, r"v has shape \(6, 2, 9\)"),
    ({"v": torch.randn(5, HK, D)}, ValueError, r"v has shape \(5, 2, 8\)"),
    ({"q": torch.randn(N, 5, D)}, ValueError, "q has 5 heads and k has 2"),
    ({"k": torch.randn(N, 0, D), "v": torch.randn(N, 0, D)}, ValueError, "k has 0"),
    (
        {"k": torch.randn(7, HK, D), "v": torch.randn(7, HK, D)},
        ValueError,
        "k has 7 rows.*cu_seqlens_k",
    ),
    ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q is list"),
    ({"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q is int64, expected int32"),
    ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
    ({"cu_seqlens_q": CU[:0]}, ValueError, "cu_seqlens_q is empty"),
    ({"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q is on meta"),
    ({"cu_seqlens_q": ints(1, 2, 6)}, ValueError, "cu_seqlens_q starts at 1, expected 0"),
    ({"cu_seqlens_q": ints(0, 4, 2, 6)}, ValueError, "cu_seqlens_q decreases from 4 to 2"),
    ({"cu_seqlens_q": ints(0, 2, 7)}, ValueError, "cu_seqlens_q ends at 7, .* 6"),
    ({"cu_seqlens_q": ints(0, 2, 5)}, ValueError, "cu_seqlens_q ends at 5, .* 6"),
    ({"cu_seqlens_q": ints(0, 2**31 - 1, -(2**31), 6)}, ValueError, "cu_seqlens_q decreases from"),
    ({"cu_seqlens_k": ints(0, 6)}, ValueError, "cu_seqlens_k has 2 entries, cu_seqlens_q has 3"),
    ({"cu_seqlens_k": ints(0, 3, 5)}, ValueError, "cu_seqlens_k ends at 5"),
    ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q is 3, but sequence 1 of cu_seqlens_q has 4"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q is -1"),
    ({"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q is float, expected an int"),
    ({"max_seqlen_q": torch.tensor(4)}, TypeError, "max_seqlen_q is Tensor, expected an int"),
    ({"cu_seqlens_k": CU, "max_seqlen_k": 1}, ValueError, "max_seqlen_k is 1, but sequence 1"),
    ({"max_seqlen_k": 1}, ValueError, "max_seqlen_k is 1, but sequence 1"),
    ({"scale": float("nan")}, ValueError, "scale is nan"),
    ({"scale": "big"}, TypeError, "scale is str"),
    ({"causal": 1.5}, TypeError, "causal is float"),
    ({"window": (-2, 0)}, ValueError, r"window is \(-2, 0\), expected bounds >= -1"),
    ({"window": 5}, TypeError, "window is 5"),
    ({"window": (1.0, 2)}, TypeError, r"window is \(1.0, 2\)"),
    ({"window": (1, 2, 3)}, TypeError, r"window is \(1, 2, 3\)"),
    ({"alibi_slopes": [1.0]}, TypeError, "alibi_slopes is list"),
    ({"alibi_slopes": torch.ones(H).bfloat16()}, TypeError, "alibi_slopes is bfloat16"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes has shape \(3,\).*\(2, 4\)"),
    ({"alibi_slopes": torch.ones(3, H)}, ValueError, r"alibi_slopes has shape \(3, 4\)"),
    ({"alibi_slopes": torch.ones(())}, ValueError, r"alibi_slopes has shape \(\)"),
    ({"alibi_slopes": torch.tensor([1, 1, torch.inf, 1])}, ValueError, "alibi_slopes holds inf"),
    ({"alibi_slopes": torch.ones(H).requires_grad_()}, ValueError, "alibi_slopes.detach"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a number > 0"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, expected 0 <= dropout_p < 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
    ({"dropout_p": "half"}, TypeError, "dropout_p is str, expected a float"),
    ({"rel_bias": [1.0]}, TypeError, "rel_bias is list"),
    ({"rel_bias": torch.ones(H, 5).long()}, TypeError, "rel_bias is int64, expected float32 or"),
    ({"rel_bias": torch.ones(H, 5).double()}, TypeError, "rel_bias is float64"),
    ({"rel_bias": torch.ones(H, 5, device="meta")}, ValueError, "rel_bias is on meta, q is on"),
    ({"rel_bias": torch.ones(5)}, ValueError, r"rel_bias has shape \(5,\), .*\(4, R\) or \(6, 4"),
    ({"rel_bias": torch.ones(HK, 5)}, ValueError, r"rel_bias has shape \(2, 5\)"),
    ({"rel_bias": torch.ones(N - 1, H, 5)}, ValueError, r"rel_bias has shape \(5, 4, 5\)"),
    ({"rel_bias": torch.ones(H, 4)}, ValueError, "rel_bias has 4 entries.*an odd number"),
    ({"rel_bias": torch.ones(H, 0)}, ValueError, "rel_bias has 0 entries.*an odd number"),
    ({"bias": [True]}, TypeError, "bias is list"),
    ({"bias": torch.ones(T).double()}, TypeError, "bias is float64, expected bool or float32"),
    ({"bias": torch.ones(T).byte()}, TypeError, "bias is uint8, expected bool"),
    ({"bias": torch.ones(T, device="meta")}, ValueError, "bias is on meta, q is on cpu"),
    (
        {"bias": torch.ones(HK, T)},
        ValueError,
        r"bias has shape \(2, 20\), expected \(T,\) or \(4, T",
    ),
    ({"bias": torch.ones(1, H, T)}, ValueError, r"bias has shape \(1, 4, 20\)"),
    ({"bias": torch.ones(())}, ValueError, r"bias has shape \(\)"),
    ({"bias": torch.ones(T - 1)}, ValueError, "bias has 19 entries per head, .* Lq . Lk, 20"),
    ({"bias": torch.ones(H, T + 1)}, ValueError, "bias has 21 entries per head"),
    ({"bias": torch.ones(T), "cu_seqlens_k": ints(0, 3, 6)}, ValueError, "bias has 20 .* 18"),
    ({"bias_offsets": longs(0, 4, T)}, ValueError, "bias_offsets is given without bias"),
    (biased(bias_offsets=[0, 4, T]), TypeError, "bias_offsets is list"),
    (biased(bias_offsets=ints(0, 4, T)), TypeError, "bias_offsets is int32, expected int64"),
    (biased(bias_offsets=longs(0, T)), ValueError, "bias_offsets has 2 entries, .* 3"),
    (biased(bias_offsets=longs(0, 4, T)[None]), ValueError, r"bias_offsets has shape \(1, 3\)"),
    (biased(bias_offsets=longs(0, 4, T).to("meta")), ValueError, "bias_offsets is on meta"),
    (biased(bias_offsets=longs(1, 5, T)), ValueError, "bias_offsets starts at 1, expected 0"),
    (biased(bias_offsets=longs(0, 5, T)), ValueError, "bias_offsets goes from 0 to 5 .* 4"),
    (biased(bias_offsets=longs(0, 4, T + 1)), ValueError, "bias_offsets goes from 4 to 21 .* 16"),
    (biased(bias_offsets=longs(0, -(2**62), T)), ValueError, "bias_offsets goes from 0 to -46"),
    (shared(causal=True), ValueError, "global_kv does not go together with causal"),
    (shared(window=(1, -1)), ValueError, "global_kv does not go together with window"),
    (shared(alibi_slopes=torch.ones(H)), ValueError, "global_kv .* with alibi_slopes"),
    (shared(rel_bias=torch.ones(H, 5)), ValueError, "global_kv .* with rel_bias"),
    (shared(bias=torch.ones(T)), ValueError, "global_kv does not go together with bias"),
    ({"global_kv": torch.ones(3, HK, D)}, TypeError, "global_kv is Tensor, expected"),
    ({"global_kv": (G, G)}, ValueError, r"global_kv has 2 parts, expected \(k_g, v_g, group\)"),
    (shared(k_g=torch.ones(3, H, D)), ValueError, r"global_kv\[0\] has shape \(3, 4, 8\)"),
    (shared(k_g=G.double()), TypeError, r"global_kv\[0\] is float64"),
    (shared(v_g=torch.ones(2, HK, D)), ValueError, r"global_kv\[1\] has shape \(2, 2, 8\)"),
    (shared(v_g=G.to("meta")), ValueError, r"global_kv\[1\] is on meta"),
    (shared(group=ints(0, 1)), TypeError, r"global_kv\[2\] is int32, expected int64"),
    (shared(group=longs(0)), ValueError, r"global_kv\[2\] has 1 entries, expected B, 2"),
    (shared(group=longs(0, 3)), ValueError, r"global_kv\[2\] holds 3, expected 0 <= row < 3"),
    (shared(group=longs(-1, 0)), ValueError, r"global_kv\[2\] holds -1"),
]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("bad", "kind", "message"), ERRORS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_errors_name_argument_and_value(bad, kind, message):
    with pytest.raises(kind, match=message):
        ops.varlen_attn(**{**good(), **bad})


@pytest.mark.quick
def test_the_good_call_is_good():
    ops.varlen_attn(**good(), max_seqlen_q=4, max_seqlen_k=9, window=[0, 3], dropout_p=0.0, scale=1)


def offset(**other):
    return {"bias": torch.ones(T), "bias_offsets": longs(0, 4, T), **other}


def keyed(**other):
    return {"dropout_p": 0.5, "rng": longs(1, 2), **other}


# Direct calls skip the Python checks; the kernel's own must hold.
DIRECT = [
    ({"q": torch.randn(N, H)}, "q"),
    ({"q": torch.randn(N, H, 300)}, "q has head size 300"),
    ({"q": torch.randn(N, H, D).double()}, "q"),
    ({"k": torch.randn(N, HK, 9)}, "k"),
    ({"k": torch.randn(N, 3, D), "v": torch.randn(N, 3, D)}, "heads"),
    ({"v": torch.randn(5, HK, D)}, "v has shape"),
    ({"cu_seqlens_q": CU.long()}, "cu_seqlens_q"),
    ({"cu_seqlens_q": CU[:0]}, "cu_seqlens_q"),
    ({"cu_seqlens_q": CU[None]}, "cu_seqlens_q"),
    ({"cu_seqlens_q": ints(1, 6)}, "cu_seqlens_q starts at 1"),
    ({"cu_seqlens_q": ints(0, 5, 3, 6)}, "cu_seqlens_q decreases from 5 to 3"),
    ({"cu_seqlens_q": ints(0, 7)}, "cu_seqlens_q ends at 7"),
    ({"cu_seqlens_q": ints(0)}, "cu_seqlens_q ends at 0"),
    ({"cu_seqlens_k": ints(0, 2, 2**30)}, "cu_seqlens_k ends at"),
    ({"cu_seqlens_k": ints(0, 6)}, "cu_seqlens_k has 2"),
    ({"max_seqlen_q": 3}, "max_seqlen"),
    ({"window": [-2, 0]}, "window"),
    ({"softcap": -1.0}, "softcap"),
    ({"scale": float("inf")}, "scale"),
    ({"alibi_slopes": torch.ones(3)}, "alibi_slopes"),
    ({"alibi_slopes": torch.ones(H).double()}, "alibi_slopes"),
    ({"rel_bias": torch.ones(3)}, "rel_bias"),
    ({"rel_bias": torch.ones(HK, 5)}, "rel_bias"),
    ({"rel_bias": torch.ones(N + 1, H, 5)}, "rel_bias"),
    ({"rel_bias": torch.ones(H, 4)}, "rel_bias"),
    ({"rel_bias": torch.ones(H, 0)}, "rel_bias"),
    ({"rel_bias": torch.ones(H, 5).double()}, "rel_bias"),
    (offset(bias=torch.ones(T - 1)), "bias"),
    (offset(bias=torch.ones(T + 1)), "bias"),
    (offset(bias=torch.ones(HK, T)), "bias"),
    (offset(bias=torch.ones(1, H, T)), "bias"),
    (offset(bias=torch.ones(T).double()), "bias"),
    (offset(bias=None), "bias"),
    (offset(bias_offsets=ints(0, 4, T)), "bias_offsets"),
    (offset(bias_offsets=longs(0, T)), "bias_offsets"),
    (offset(bias_offsets=longs(0, 4, T)[None]), "bias_offsets"),
    (offset(bias_offsets=longs(1, 5, T)), "bias_offsets"),
    (offset(bias_offsets=longs(0, 16, T)), "bias_offsets"),
    (offset(bias_offsets=longs(0, 2**62, T)), "bias_offsets"),
    (offset(bias_offsets=longs(0, -(2**62), T)), "bias_offsets"),
    (keyed(dropout_p=1.0), "dropout_p"),
    (keyed(dropout_p=-0.5), "dropout_p"),
    (keyed(dropout_p=float("nan")), "dropout_p"),
    (keyed(rng=None), "rng"),
    (keyed(rng=longs(1)), "rng"),
    (keyed(rng=ints(1, 2)), "rng"),
    (keyed(rng=longs(1, 2)[None]), "rng"),
]
DEFAULTS = {
    "cu_seqlens_k": None,
    "max_seqlen_q": None,
    "max_seqlen_k": None,
    "scale": None,
    "causal": False,
    "window": [-1, -1],
    "alibi_slopes": None,
    "rel_bias": None,
    "bias": None,
    "bias_offsets": None,
    "softcap": None,
    "dropout_p": None,
    "rng": None,
}


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.parametrize(("bad", "message"), DIRECT, ids=lambda x: x if isinstance(x, str) else "")
def test_direct_calls_are_checked_by_the_kernel(bad, message):
    if ops.backends("varlen_attn")["cpu"] != "native":
        pytest.skip("no compiled library: the reference cannot read out of bounds")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.encfast.varlen_attn(**{**good(), **DEFAULTS, **bad})


BWD = [
    ({"lse": torch.zeros(H, N + 1)}, "lse has shape"),
    ({"dlse": torch.zeros(H - 1, N)}, "dlse has shape"),
    ({"out": torch.zeros(N, H, D + 1)}, "out has shape"),
    ({"dout": torch.zeros(N - 1, H, D)}, "dout has shape"),
    ({"rel_bias_grad": True}, "rel_bias"),
    ({"bias_grad": True}, "bias"),
    (offset(bias=torch.ones(T) > 0, bias_grad=True), "bias"),
    (offset(bias_offsets=longs(0, 16, T)), "bias_offsets"),
    ({"rel_bias": torch.ones(H, 4)}, "rel_bias"),
    (keyed(rng=longs(1)), "rng"),
]


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.parametrize(("bad", "message"), BWD, ids=lambda x: x if isinstance(x, str) else "")
def test_direct_calls_of_the_backward_are_checked_by_the_kernel(bad, message):
    if ops.backends("varlen_attn")["cpu"] != "native":
        pytest.skip("no compiled library: the reference cannot read out of bounds")
    args = {**good(), **DEFAULTS, "dlse": None, "dout": torch.zeros(N, H, D)}
    args |= {"out": torch.zeros(N, H, D), "lse": torch.zeros(H, N)}
    args |= {"rel_bias_grad": False, "bias_grad": False}
    torch.ops.encfast.varlen_attn_bwd(**args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.encfast.varlen_attn_bwd(**{**args, **bad})
