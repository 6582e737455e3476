"""Calls of every launcher, one per set of kernels that users get."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from encfast.kernels import (
    add_norm,
    glu,
    grouped_mm,
    linear_cross_entropy,
    linear_kl,
    rank_loss,
    rotary,
    seg_pool,
    varlen_attn,
)


@dataclass(frozen=True)
class Call:
    """`launch` makes CPU tensors and calls a launcher of `encfast.kernels` with them."""

    launch: Callable[[], object]
    tensor_kernels: Sequence[str]  # kernels that must use tensor cores
    quick: bool


CALLS: dict[str, Call] = {}


def call(*, tensor_kernels: Sequence[str] = (), quick: bool = False):
    """Lists the function under its name; `quick` calls compile in every run of the tests."""

    def listed(launch):
        CALLS[launch.__name__] = Call(launch, tensor_kernels, quick)
        return launch

    return listed


def _bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def _add_norm(C, dtype=torch.bfloat16, parameters=torch.bfloat16, N=1000):
    """Both ways, with everything there is."""
    rows, parameter = torch.zeros(N, C, dtype=dtype), torch.zeros(C, dtype=parameters)
    rest = (parameter, parameter, parameter, "layernorm", None, True)
    _, total, mean, rstd = add_norm.add_norm(rows, rows, *rest)
    rest = (rows, parameter, parameter, "layernorm", True, True)
    add_norm.add_norm_bwd(rows, rows, total, mean, rstd, *rest)


@call(quick=True)
def add_norm_both():
    _add_norm(768)


@call()
def add_norm_float32():
    for C in (384, 1024):
        _add_norm(C, torch.float32, torch.float32)


@call()
def add_norm_mixed():
    """bfloat16 with parameters of float32, and a residual stream of float32."""
    _add_norm(768, parameters=torch.float32)
    x, residual, weight = _bf16(100, 768), torch.zeros(100, 768), torch.zeros(768)
    rest = (weight, None, None, "layernorm", None, True)
    _, total, mean, rstd = add_norm.add_norm(x, residual, *rest)
    rest = (None, weight, None, "layernorm", True, False)
    add_norm.add_norm_bwd(residual, residual, total, mean, rstd, *rest)


@call()
def add_norm_of_one_tensor():
    """RMSNorm and LayerNorm of x alone, without and with a weight."""
    for kind, C, weighted in (
        ("rmsnorm", 768, False),
        ("rmsnorm", 768, True),
        ("rmsnorm", 10240, True),
        ("layernorm", 768, False),
    ):
        x, weight = _bf16(1000, C), _bf16(C) if weighted else None
        y, _, mean, rstd = add_norm.add_norm(x, None, weight, None, None, kind, None, False)
        rest = (None, weight, None, kind, weighted, False)
        add_norm.add_norm_bwd(y, None, x, mean, rstd, *rest)


@call()
def add_norm_narrow_and_odd():
    for C in (1, 33, 64, 1023):
        _add_norm(C)


@call()
def add_norm_wide():
    """The widest rows that registers take each way, and rows beyond."""
    for C in (4096, 8192, 10240):
        for dtype in (torch.bfloat16, torch.float32):
            _add_norm(C, dtype, dtype)


@call()
def add_norm_ones():
    """Sizes of 1, which the compiler takes for constants."""
    for C in (1, 768):
        _add_norm(C, N=1)


@call(quick=True)
def glu_gated():
    x, dout, bias = _bf16(100, 1536), _bf16(100, 768), torch.zeros(1536)
    glu.glu(x, bias, "gelu", True, False)
    glu.glu_bwd(dout, x, bias, "gelu", True, False, True)


@call()
def glu_plain():
    x = torch.zeros(100, 768)
    for activation in ("gelu", "gelu_tanh", "silu", "relu"):
        glu.glu(x, None, activation, False, False)
        glu.glu_bwd(x, x, None, activation, False, False, False)


@call()
def glu_gated_second_half_activated():
    x, dout = _bf16(100, 1536), _bf16(100, 768)
    for activation in ("gelu_tanh", "silu", "relu"):
        glu.glu(x, None, activation, True, True)
        glu.glu_bwd(dout, x, None, activation, True, True, False)


@call()
def glu_odd_width():
    """33 columns: nothing is divisible by 16, so no access is vectorised."""
    x, dout, bias = _bf16(5, 66), _bf16(5, 33), torch.zeros(66)
    glu.glu(x, bias, "silu", True, False)
    glu.glu_bwd(dout, x, bias, "silu", True, False, True)


_PRODUCTS = ("grouped_mm_kernel", "grouped_mm_dweight_kernel")


def _grouped_mm(C, F, dtype=torch.bfloat16, rows=512, E=8, transposed=False):
    """Both ways, of `rows` a group on average."""
    x, dout = torch.zeros(rows * E, C, dtype=dtype), torch.zeros(rows * E, F, dtype=dtype)
    weight, bias = torch.zeros(E, F, C, dtype=dtype), torch.zeros(E, F, dtype=dtype)
    if transposed:
        weight = weight.mT.contiguous().mT
    cu = torch.zeros(E + 1, dtype=torch.int32)
    grouped_mm.grouped_mm(x, weight, cu, bias)
    grouped_mm.grouped_mm_bwd(dout, x, weight, cu, True, True, True)


@call(tensor_kernels=_PRODUCTS, quick=True)
def grouped_mm_768():
    """To twice as many columns, groups of 512 rows on average."""
    _grouped_mm(768, 1536)


@call(tensor_kernels=_PRODUCTS)
def grouped_mm_few_rows():
    """Also weights that lie transposed, as some checkpoints have them."""
    _grouped_mm(768, 1536, rows=16)
    _grouped_mm(768, 1536, torch.float16, rows=16, transposed=True)


@call()
def grouped_mm_float32():
    for rows in (16, 512):
        _grouped_mm(768, 1536, torch.float32, rows)


@call(tensor_kernels=_PRODUCTS)
def grouped_mm_edges():
    """Multiples of 16 that fill no tile: masks, and a last step of fewer terms."""
    _grouped_mm(208, 80)
    _grouped_mm(208, 80, rows=16)
    _grouped_mm(208, 80, torch.float32)


@call(tensor_kernels=_PRODUCTS)
def grouped_mm_odd_widths():
    for C, F in ((100, 45), (33, 64)):
        _grouped_mm(C, F)
        _grouped_mm(C, F, torch.float32)


@call(tensor_kernels=_PRODUCTS)
def grouped_mm_ones():
    """Sizes of 1, which the compiler takes for constants."""
    _grouped_mm(768, 1536, E=1)
    _grouped_mm(768, 1, rows=1, E=1)
    _grouped_mm(1, 768, rows=1, E=1)


@call(quick=True)
def rotary_both():
    q, angles = _bf16(100, 12, 64), torch.zeros(128, 32)
    rotary.rotary(q, q, angles, angles, torch.zeros(100, dtype=torch.int64), False, False)


@call()
def rotary_interleaved():
    q, angles = torch.zeros(100, 12, 64), torch.zeros(128, 32)
    rotary.rotary(q, None, angles, angles, torch.zeros(100, dtype=torch.int32), True, True)


@call()
def rotary_part_of_a_head():
    """40 of 96 channels turn; no positions: row n stands at n. k has fewer heads."""
    q, k, angles = _bf16(100, 12, 96), _bf16(100, 4, 96), torch.zeros(100, 20)
    for interleaved in (False, True):
        rotary.rotary(q, k, angles, angles, None, interleaved, False)


def _seg_pool(C, hows, dtype=torch.bfloat16, N=1000, B=8, normalize=True):
    """Both ways; of each of `hows`, whether there are weights."""
    x, dout = torch.zeros(N, C, dtype=dtype), torch.zeros(B, C, dtype=dtype)
    cu, weights = torch.zeros(B + 1, dtype=torch.int32), torch.zeros(N, dtype=dtype)
    for how, weighted in hows:
        given = weights if weighted else None
        saved = seg_pool.seg_pool(x, cu, given, how, normalize)
        seg_pool.seg_pool_bwd(dout, x, cu, given, *saved, how, normalize, True, weighted)


_POOLS = [(how, False) for how in ("mean", "sum", "max", "first", "last")]
_POOLS += [(how, True) for how in ("mean", "sum", "attention")]


@call(quick=True)
def seg_pool_most():
    """Every kernel: attention, normalised, and largest values."""
    _seg_pool(768, [("attention", True), ("max", False)])


@call()
def seg_pool_every_reduction():
    _seg_pool(768, [p for p in _POOLS if p[0] not in ("max", "attention")], normalize=False)


@call()
def seg_pool_odd_widths_and_ones():
    """33 columns, of which no access is vectorised, and sizes of 1, which are constants."""
    for C, N, B in ((33, 1000, 8), (1, 1, 1)):
        _seg_pool(C, [("attention", True), ("max", False)], torch.float32, N=N, B=B)


def _vocabulary(C, dtype=torch.bfloat16, M=500, V=1000, options=(None, None, None)):
    """Both ways; options are label smoothing, z-loss and softcap."""
    x, weight = torch.zeros(M, C, dtype=dtype), torch.zeros(V, C, dtype=dtype)
    head = x, weight, torch.zeros(M, dtype=torch.int64), torch.zeros(V), None
    _, lse = linear_cross_entropy.linear_cross_entropy(*head, -100, *options)
    rest = (lse, -100, *options, True, True, True)
    linear_cross_entropy.linear_cross_entropy_bwd(torch.zeros(M), *head, *rest)


_VOCABULARY = ("row_stats_kernel", "vocab_grad_kernel")


@call(tensor_kernels=_VOCABULARY, quick=True)
def linear_cross_entropy_768():
    _vocabulary(768)


@call(tensor_kernels=_VOCABULARY)
def linear_cross_entropy_everything():
    _vocabulary(768, options=(0.1, 1e-4, 30.0))
    _vocabulary(100, torch.float16, options=(0.1, 1e-4, 30.0))
    _vocabulary(33)


@call()
def linear_cross_entropy_float32_and_ones():
    _vocabulary(768, torch.float32, options=(0.1, 1e-4, 30.0))
    _vocabulary(33, torch.float32)
    _vocabulary(1, torch.float32, M=1, V=1)


def _divergence(C, teacher_C, dtype=torch.bfloat16, M=500, V=1000, temperature=2.0):
    x, teacher_x = torch.zeros(M, C, dtype=dtype), torch.zeros(M, teacher_C, dtype=dtype)
    weights = (torch.zeros(V, c, dtype=dtype) for c in (C, teacher_C))
    weight, teacher_weight = weights
    heads = x, weight, teacher_x, teacher_weight, torch.zeros(V), torch.zeros(V), temperature
    _, lse = linear_kl.linear_kl(*heads)
    linear_kl.linear_kl_bwd(torch.zeros(M), *heads, lse, True, True, True)


@call(tensor_kernels=("kl_stats_kernel", "kl_grad_kernel"), quick=True)
def linear_kl_768():
    """Of a teacher of 1024 channels."""
    _divergence(768, 1024)


@call()
def linear_kl_edges():
    """Channels that fill no step, odd ones, float32, and sizes of 1, which are constants."""
    _divergence(208, 80, torch.float16, temperature=None)
    _divergence(100, 33)
    _divergence(768, 1024, torch.float32)
    _divergence(1, 1, torch.float32, M=1, V=1)


def _rank_loss(D, dtype=torch.bfloat16, B=500, M=1000, both=True, excluded=True):
    """InfoNCE and SigLIP both ways."""
    a, b, scale = torch.zeros(B, D, dtype=dtype), torch.zeros(M, D, dtype=dtype), torch.ones(())
    positives, row = torch.zeros(B, dtype=torch.int64), torch.zeros(B)
    head = a, b, scale, positives, positives if excluded else None
    *_, row_stats, col_stats = rank_loss.info_nce(*head, both)
    rest = (row_stats, col_stats, both, True, True)
    rank_loss.info_nce_bwd(row, row, row, *head, *rest)
    rank_loss.siglip(a, b, scale, scale, positives)
    rank_loss.siglip_bwd(row, a, b, scale, scale, positives, True, True)


_PAIRS = ("row_stats_kernel", "info_nce_grad_kernel", "siglip_kernel", "siglip_grad_kernel")


@call(tensor_kernels=_PAIRS, quick=True)
def rank_loss_512():
    _rank_loss(512)


@call()
def rank_loss_edges():
    """One direction, odd channels, float32, and sizes of 1, which are constants."""
    _rank_loss(100, torch.float16, both=False, excluded=False)
    _rank_loss(33)
    _rank_loss(512, torch.float32)
    _rank_loss(1, torch.float32, B=1, M=1)


_RULE = ["scale", "causal", "window", "alibi_slopes", "rel_bias", "bias", "bias_offsets"]
_RULE += ["softcap", "dropout_p", "rng"]
_ATTENTION = ("varlen_attn_kernel", "varlen_attn_dq_kernel", "varlen_attn_dkv_kernel")
_OFFSETS = torch.zeros(9, dtype=torch.int64)
_DROPOUT = {"dropout_p": 0.1, "rng": torch.zeros(2, dtype=torch.int64)}


def _attention(head_size, dtype=torch.bfloat16, N=1000, H=12, key_heads=12, B=8, **options):
    """The forward and the backward of one shape; `options` name arguments of the op."""
    q, k = (torch.zeros(N, heads, head_size, dtype=dtype) for heads in (H, key_heads))
    cu, lse = torch.zeros(B + 1, dtype=torch.int32), torch.zeros(H, N)
    given = {"causal": False, "window": (-1, -1)} | options
    rule = [given.get(name) for name in _RULE]
    wanted = [name in given for name in ("rel_bias", "bias")]
    varlen_attn.varlen_attn(q, k, k, cu, None, N, None, *rule)
    varlen_attn.varlen_attn_bwd(q, None, q, k, k, q, lse, cu, None, N, None, *rule, *wanted)


@call(tensor_kernels=_ATTENTION, quick=True)
def varlen_attn_64():
    _attention(64)


@call(tensor_kernels=_ATTENTION, quick=True)
def varlen_attn_128():
    _attention(128)


@call(tensor_kernels=_ATTENTION)
def varlen_attn_wide_heads():
    _attention(256, torch.float16)
    _attention(130, torch.float16)


@call(tensor_kernels=_ATTENTION)
def varlen_attn_narrow_heads():
    for head_size in (1, 24, 32, 80):
        _attention(head_size, key_heads=4, causal=True)


@call()
def varlen_attn_float32():
    for head_size in (64, 128, 256):
        _attention(head_size, torch.float32)


@call(tensor_kernels=_ATTENTION)
def varlen_attn_alibi_and_window():
    slopes = torch.zeros(12)
    for head_size in (64, 128, 256):
        _attention(head_size, window=(64, 64), alibi_slopes=slopes)
    _attention(64, torch.float32, window=(64, 64), alibi_slopes=slopes)


@call(tensor_kernels=_ATTENTION)
def varlen_attn_table_of_relative_positions():
    for head_size in (64, 128, 256):
        _attention(head_size, rel_bias=torch.zeros(12, 257), **_DROPOUT)


@call(tensor_kernels=_ATTENTION)
def varlen_attn_bias_of_each_head():
    _attention(64, bias=torch.zeros(12, 10000), bias_offsets=_OFFSETS)
    _attention(64, bias=torch.zeros(10000, dtype=torch.bool), bias_offsets=_OFFSETS)


@call(tensor_kernels=_ATTENTION)
def varlen_attn_everything():
    """All terms at once, of the query-dependent kind of relative positions, and one bias."""
    for head_size in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            _attention(
                head_size,
                dtype,
                window=(64, 64),
                alibi_slopes=torch.zeros(8, 12),
                rel_bias=torch.zeros(1000, 12, 257),
                bias=torch.zeros(10000),
                bias_offsets=_OFFSETS,
                softcap=30.0,
                **_DROPOUT,
            )


@call(tensor_kernels=_ATTENTION)
def varlen_attn_ones():
    """Sizes of 1, which the compiler takes for constants."""
    one = {"N": 100, "H": 1, "key_heads": 1, "B": 1}
    offsets = torch.zeros(2, dtype=torch.int64)
    _attention(64, **one | {"N": 1})
    _attention(64, **one | {"H": 2}, window=(1, 1), alibi_slopes=torch.zeros(1, 2))
    _attention(64, **one, rel_bias=torch.zeros(1, 1))
    _attention(64, **one, rel_bias=torch.zeros(100, 1, 3))
    drop = _DROPOUT | {"dropout_p": 2**-16}
    _attention(64, **one, bias=torch.zeros(10000), bias_offsets=offsets, **drop)
