"""Softmax attention over packed sequences of unequal length, forward and backward.

For each sequence b and head h, query row i (of Lq) attends to the key rows j (of Lk) it can see:

    s_ij  = softcap * tanh(scale * q_i k_j / softcap)
            - slope * |j - p_i| + rel_bias[clip(j - p_i, -r, r) + r] + bias_ij     p_i = i + Lk - Lq
    P_i   = softmax(s_i)                        lse_i = log sum_j exp(s_ij)
    out_i = sum_j P_ij keep_ij v_j / (1 - dropout_p)

Conventions. Query i stands at position p_i among the keys: with unequal lengths the last query and
the last key are aligned, as in flash-attn. `window=(left, right)` is inclusive: position p sees
keys p - left .. p + right, and -1 is no bound; `causal` sets right to 0. ALiBi is symmetric, its
slopes are positive and are subtracted. `rel_bias` has R = 2 r + 1 entries, offset -r first; farther
keys take the entry at the end. `bias` holds one matrix per sequence, packed. Order: softcap, then
ALiBi and the biases, then the mask. Without softcap, s_ij starts from scale * q_i k_j.
A bias that takes s_ij below -1e38 hides the pair, as -inf does.

Dropout. keep_ij compares 16 bits of Philox4x32-10, counted by (sequence, head, i, j) and keyed by
`rng`, with p: forward, backward and every backend draw the same mask (`encfast.ref.philox`).

A sequence without queries yields nothing. A query that sees no key (no keys, all outside of the
window, or all hidden by the bias) yields out 0, lse -inf and gradients 0. What lies in one
sequence, NaN included, never reaches another.

Sources: Dao, FlashAttention-2 (arXiv:2307.08691); Press et al., ALiBi (arXiv:2108.12409), symmetric
as in MosaicBERT (arXiv:2312.17482); relative biases as in T5 (arXiv:1910.10683) and SpeechT5
(arXiv:2110.07205); softcap as in Gemma 2 (arXiv:2408.00118); Salmon et al., Philox (SC 2011).

Backends: C++ on the CPU, Triton on NVIDIA GPUs from sm_80 on and on AMD's gfx90a and gfx942 (both a
blocked online softmax, O(N) memory); elsewhere the reference, which holds one Lq x Lk matrix per
head of one sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ref.varlen_attn import varlen_attn as _ref_fwd
from ..ref.varlen_attn import varlen_attn_bwd as _ref_bwd
from . import _backends
from ._varlen_attn_checks import (
    check_arguments,
    check_biases,
    check_geometry,
    check_rng,
    pairs_per_sequence,
)
from ._varlen_attn_global import check_global_kv, with_global_kv

DISPATCHER_OPS = ("varlen_attn", "varlen_attn_bwd")

# Numbers are nullable, not defaulted: under torch.compile(dynamic=True) a float shared by two
# checkpointed blocks fails to trace, None does not. max_seqlen is a SymInt so that a new batch
# geometry is not a new graph.
torch.library.define(
    "encfast::varlen_attn",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? scale, bool causal, int[2] window, "
    "Tensor? alibi_slopes, Tensor? rel_bias, Tensor? bias, Tensor? bias_offsets, float? softcap, "
    "float? dropout_p, Tensor? rng) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::varlen_attn_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float? scale, bool causal, int[2] window, Tensor? alibi_slopes, Tensor? rel_bias, "
    "Tensor? bias, Tensor? bias_offsets, float? softcap, float? dropout_p, Tensor? rng, "
    "bool rel_bias_grad, bool bias_grad) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor drel_bias, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _promoted(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


@torch.library.register_fake("encfast::varlen_attn")
def _fake_fwd(q, k, v, *_):
    out = q.new_empty(q.shape, dtype=_promoted(q, k, v))
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("encfast::varlen_attn_bwd")
def _fake_bwd(dout, dlse, q, k, v, *args):
    rel_bias, bias, *_, rel_bias_grad, bias_grad = args[-8:]
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    for x, wanted in ((rel_bias, rel_bias_grad), (bias, bias_grad)):
        grads.append(x.new_empty(x.shape) if wanted else q.new_empty(0))
    return tuple(grads)


# Where the differentiable inputs stand in the schema: q, k, v, rel_bias, bias.
_DIFFERENTIABLE = (0, 1, 2, 11, 12)


def _setup_context(ctx, inputs, output) -> None:
    (
        q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, slopes,
        rel_bias, bias, offsets, softcap, dropout_p, rng,
    ) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE):
        ctx.save_for_backward(
            q, k, v, *output, cu_q, cu_k, slopes, rel_bias, bias, offsets, rng
        )  # fmt: skip
    ctx.lengths = (max_q, max_k)
    ctx.score_rule = (scale, causal, window)
    ctx.softcap, ctx.dropout_p = softcap, dropout_p


def _backward(ctx, dout, dlse):
    grads = [None] * 17
    if dout is None and dlse is None:
        return tuple(grads)
    q, k, v, out, lse, cu_q, cu_k, slopes, rel_bias, bias, offsets, rng = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    computed = torch.ops.encfast.varlen_attn_bwd(
        torch.zeros_like(out) if dout is None else dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        *ctx.lengths,
        *ctx.score_rule,
        slopes,
        rel_bias,
        bias,
        offsets,
        ctx.softcap,
        ctx.dropout_p,
        rng,
        *needed[3:],
    )
    for i, need, grad in zip(_DIFFERENTIABLE, needed, computed, strict=True):
        grads[i] = grad if need else None
    return tuple(grads)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "varlen_attn: double backward is not implemented; encfast.ref.varlen_attn has one"
    )


torch.library.register_autograd("encfast::varlen_attn", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::varlen_attn_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _reference_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
    alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng,
):  # fmt: skip
    check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_biases(q, cu_seqlens_q, cu_seqlens_k, rel_bias, bias, bias_offsets)
    check_rng(rng, dropout_p, q)
    return _ref_fwd(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        causal=causal,
        window=tuple(window),
        alibi_slopes=alibi_slopes,
        rel_bias=rel_bias,
        bias=bias,
        bias_offsets=bias_offsets,
        softcap=softcap,
        dropout_p=dropout_p,
        rng=rng,
    )


def _reference_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    scale, causal, window, alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng,
    rel_bias_grad, bias_grad,
):  # fmt: skip
    return _ref_bwd(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        causal=causal,
        window=tuple(window),
        alibi_slopes=alibi_slopes,
        rel_bias=rel_bias,
        bias=bias,
        bias_offsets=bias_offsets,
        softcap=softcap,
        dropout_p=dropout_p,
        rng=rng,
        rel_bias_grad=rel_bias_grad,
        bias_grad=bias_grad,
    )


def _triton_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rule):
    from ..kernels import varlen_attn as kernels

    rel_bias, bias, bias_offsets, _, dropout_p, rng = rule[-6:]
    check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_biases(q, cu_seqlens_q, cu_seqlens_k, rel_bias, bias, bias_offsets)
    check_rng(rng, dropout_p, q)
    geometry = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return kernels.varlen_attn(q, k, v, *geometry, *rule)


def _triton_bwd(*args):
    from ..kernels import varlen_attn as kernels

    return kernels.varlen_attn_bwd(*args)


_backends.register_reference("varlen_attn", "varlen_attn", _reference_fwd)
_backends.register_reference("varlen_attn", "varlen_attn_bwd", _reference_bwd)
_backends.register_triton("varlen_attn", "varlen_attn", _triton_fwd, _reference_fwd)
_backends.register_triton("varlen_attn", "varlen_attn_bwd", _triton_bwd, _reference_bwd)


def varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    bias: Tensor | None = None,
    bias_offsets: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float | None = None,
    global_kv: tuple[Tensor, Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within each packed sequence; the module docstring has the formula.

    Args:
        q: [Nq, H, D] float32, bfloat16 or float16, D in 1..256. Any strides: views of a fused
            projection are read in place as long as the last dimension is contiguous.
        k: [Nk, Hk, D], H a multiple of Hk: query heads share key heads in blocks of H / Hk.
        v: [Nk, Hk, D].
        cu_seqlens_q: [B + 1] int32 running sum of the query lengths, from 0 to Nq.
        cu_seqlens_k: the same for the keys; the query's by default.
        max_seqlen_q: an upper bound of the query lengths. May be omitted on the CPU.
        max_seqlen_k: an upper bound of the key lengths; that of the queries by default.
        scale: multiplies q k; 1 / sqrt(D) by default.
        causal: a query sees no key behind its own position.
        window: (left, right), inclusive; -1 is unlimited.
        alibi_slopes: [H] or [B, H] float32, finite; not differentiable.
        rel_bias: [H, R] or [Nq, H, R], R odd, float32, bfloat16 or float16: a table of relative
            positions, of the head or of the head and the query. Any strides.
        bias: [T] (for all heads) or [H, T], T the sum of Lq * Lk: the matrices [Lq, Lk] of the
            sequences, row by row, one after the other. Bool (False hides the key) or float32,
            bfloat16 or float16, added to the scores; -inf hides the key. Any strides.
        bias_offsets: [B + 1] int64 running sum of Lq * Lk; computed by default.
        softcap: > 0, or None for none.
        dropout_p: probability in [0, 1) with which a softmax weight is zeroed, the others divided
            by 1 - p; p is rounded to a multiple of 2^-16. The random key comes from torch's
            generator of q's device, so torch.manual_seed repeats the mask. lse is that without
            dropout.
        global_kv: (k_g [G, Hk, D], v_g [G, Hk, D], group [B] int64): sequence b also sees row
            group[b] of k_g and v_g, a key without a position that sequences may share. Not together
            with causal, window, alibi_slopes, rel_bias or bias.
        return_lse: also return the log-sum-exp of the scores, differentiable like the output.

    Returns:
        out [Nq, H, D], contiguous, in the promoted dtype of q, k and v; with `return_lse` also lse
        [H, Nq] float32, natural logarithm.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. Values of tensors
            are checked in eager mode on the CPU; a GPU asserts them under ENCFAST_CHECK=1.
        RuntimeError: malformed values met by the native kernel in compiled code.

    Numerics: scores, softmax and sums in float32, for bfloat16 and float16 the probabilities are
    rounded to the input dtype before the second product. Bit-equal from run to run and for any
    number of threads; no atomics. Mixed dtypes compute in the promoted one; autocast casts nothing.

    Examples:
        >>> q, k, v = torch.randn(3, 5, 2, 16)  # 5 rows, 2 heads of 16
        >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)  # of two sequences
        >>> out = ops.varlen_attn(q, k, v, cu_seqlens)
        >>> alone = ops.varlen_attn(q[3:], k[3:], v[3:], torch.tensor([0, 2], dtype=torch.int32))
        >>> torch.equal(out[3:], alone)
        True
    """
    check_arguments(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
        window, alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p,
    )  # fmt: skip
    if global_kv is not None:
        check_global_kv(global_kv, k, cu_seqlens_q, causal, window, alibi_slopes, rel_bias, bias)
        k, v, cu_seqlens_k = with_global_kv(k, v, cu_seqlens_q, cu_seqlens_k, *global_kv)
        longest = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        max_seqlen_k = None if longest is None else longest + 1
    if bias is not None and bias_offsets is None:
        bias_offsets = F.pad(pairs_per_sequence(cu_seqlens_q, cu_seqlens_k).cumsum(0), (1, 0))
    rng = None
    if dropout_p is not None and dropout_p > 0:
        rng = torch.randint(0, 2**32, (2,), dtype=torch.int64, device=q.device)
    out, lse = torch.ops.encfast.varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
        alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
