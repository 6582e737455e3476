"""Softmax attention over packed sequences of unequal length, forward and backward.

For each sequence b and head h, query row i (of Lq) attends to the key rows j (of Lk) it can see:

    s_ij  = softcap * tanh(scale * q_i k_j / softcap) - slope * |i + Lk - Lq - j|
    out_i = sum_j softmax(s_i)_j v_j        lse_i = log sum_j exp(s_ij)

Conventions. Query i stands at position i + Lk - Lq among the keys: with unequal lengths the last
query and the last key are aligned, as in flash-attn. `window=(left, right)` is inclusive: position
p sees keys p - left .. p + right, and -1 is no bound; `causal` sets right to 0. ALiBi is symmetric,
its slopes are positive and are subtracted. Order: softcap, then ALiBi, then the mask. Without
softcap, s_ij = scale * q_i k_j.

A sequence without queries yields nothing. A query that sees no key (no keys, or all outside of the
window) yields out 0, lse -inf and gradients 0. What lies in one sequence, NaN included, never
reaches another.

Sources: Dao, FlashAttention-2 (arXiv:2307.08691); Press et al., ALiBi (arXiv:2108.12409), symmetric
as in MosaicBERT (arXiv:2312.17482); softcap as in Gemma 2 (arXiv:2408.00118).

Backends: C++ on the CPU (blocked online softmax, O(N) memory); elsewhere the reference, which holds
one Lq x Lk matrix per head of one sequence.
"""

import math

import torch
from torch import Tensor

from ..ref.varlen_attn import varlen_attn as _ref_fwd
from ..ref.varlen_attn import varlen_attn_bwd as _ref_bwd
from . import _backends
from ._checks import (
    FLOAT_DTYPES,
    can_read_values,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_tensor,
)

MAX_HEAD_SIZE = 256
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
    "float? scale, bool causal, int[2] window, Tensor? alibi_slopes, float? softcap) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
    alibi_slopes, softcap,
) -> None:  # fmt: skip
    op = "varlen_attn"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x, 3, "[N, heads, head size]")
        check_dtype(op, name, x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.varlen_attn")
        check_device(op, name, x, "q", q)
    _check_shapes(q, k, v)
    _check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_score_rule(scale, causal, window, softcap)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, q, cu_seqlens_q.shape[0] - 1)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    heads, head_size = q.shape[1:]
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"varlen_attn: q has head size {head_size}, expected 1..{MAX_HEAD_SIZE}")
    if k.shape[2] != head_size:
        raise ValueError(f"varlen_attn: k has head size {k.shape[2]}, q has {head_size}")
    if v.shape != k.shape:
        raise ValueError(
            f"varlen_attn: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}"
        )
    if heads < 1 or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            f"varlen_attn: q has {heads} heads and k has {k.shape[1]}; expected a multiple"
        )


def _check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    op = "varlen_attn"
    _check_lengths("q", cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is not None:
        _check_lengths("k", cu_seqlens_k, max_seqlen_k, k)
        if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
            raise ValueError(
                f"{op}: cu_seqlens_k has {cu_seqlens_k.shape[0]} entries, cu_seqlens_q has "
                f"{cu_seqlens_q.shape[0]}; expected B + 1 in both"
            )
    elif k.shape[0] != q.shape[0]:
        raise ValueError(
            f"{op}: k has {k.shape[0]} rows and q has {q.shape[0]}; pass cu_seqlens_k unless keys "
            "and queries have the same lengths"
        )
    elif max_seqlen_k is not None:
        _check_lengths("k", cu_seqlens_q, max_seqlen_k, k)


def _check_lengths(side: str, cu_seqlens: Tensor, max_seqlen: int | None, rows: Tensor) -> None:
    op, name, max_name = "varlen_attn", f"cu_seqlens_{side}", f"max_seqlen_{side}"
    check_tensor(op, name, cu_seqlens, 1, "[B + 1]")
    check_dtype(op, name, cu_seqlens, torch.int32)
    check_device(op, name, cu_seqlens, side, rows)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: {name} is empty, expected B + 1 entries, the first of them 0")
    if max_seqlen is None:
        if rows.device.type == "cuda":
            raise ValueError(
                f"{op}: {max_name} is None; pass it as an int, on {rows.device} reading it from "
                f"{name} would wait for the device"
            )
    elif not isinstance(max_seqlen, int | torch.SymInt) or isinstance(max_seqlen, bool):
        raise TypeError(f"{op}: {max_name} is {type(max_seqlen).__name__}, expected an int")
    elif max_seqlen < 0:
        raise ValueError(f"{op}: {max_name} is {max_seqlen}, expected >= 0")
    if can_read_values(cu_seqlens):
        check_cu_seqlens_values(op, name, cu_seqlens, rows.shape[0], max_name, max_seqlen)


def _check_score_rule(scale, causal, window, softcap) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"varlen_attn: causal is {type(causal).__name__}, expected a bool")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not isinstance(number, int | float | torch.SymFloat):
            raise TypeError(f"varlen_attn: {name} is {type(number).__name__}, expected a float")
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"varlen_attn: window is {window!r}, expected (left, right)")
    for bound in window:
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise TypeError(f"varlen_attn: window is {window!r}, expected two ints")
        if bound < -1:
            raise ValueError(f"varlen_attn: window is {window!r}, expected bounds >= -1")
    if torch.compiler.is_compiling():
        return  # a guard on a float's value would compile once per value
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"varlen_attn: scale is {scale}, expected a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"varlen_attn: softcap is {softcap}, expected a number > 0 or None")


def _check_slopes(slopes: Tensor, q: Tensor, batch: int) -> None:
    op, name = "varlen_attn", "alibi_slopes"
    check_tensor(op, name, slopes)
    check_dtype(op, name, slopes, torch.float32)
    check_device(op, name, slopes, "q", q)
    heads = q.shape[1]
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):
        raise ValueError(
            f"{op}: {name} has shape {tuple(slopes.shape)}, expected ({heads},) or "
            f"({batch}, {heads})"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} has no gradient; pass {name}.detach()")
    if can_read_values(slopes) and not slopes.isfinite().all():
        raise ValueError(f"{op}: {name} holds {slopes[~slopes.isfinite()][0]}, expected finite")


def _refuse_unserved(rel_bias, bias, bias_offsets, dropout_p) -> None:
    for name, value in (("rel_bias", rel_bias), ("bias", bias), ("bias_offsets", bias_offsets)):
        if value is not None:
            raise NotImplementedError(
                f"varlen_attn: {name} is not served yet; alibi_slopes, window and softcap are"
            )
    if dropout_p is not None and not 0 <= dropout_p < 1:
        raise ValueError(f"varlen_attn: dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if dropout_p:
        raise NotImplementedError(
            f"varlen_attn: dropout_p is {dropout_p}; dropout is not served yet, pass None or 0"
        )


def _promoted(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


@torch.library.register_fake("encfast::varlen_attn")
def _fake_fwd(q, k, v, *_):
    out = q.new_empty(q.shape, dtype=_promoted(q, k, v))
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("encfast::varlen_attn_bwd")
def _fake_bwd(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    (q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, slopes, *_, softcap, _, _) = inputs
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad[:3]):
        ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, slopes)
    ctx.lengths = (max_q, max_k)
    ctx.score_rule = (scale, causal, window)
    ctx.softcap = softcap


def _backward(ctx, dout, dlse):
    nothing = (None,) * 14
    if dout is None and dlse is None:
        return None, None, None, *nothing
    q, k, v, out, lse, cu_q, cu_k, slopes = ctx.saved_tensors
    grads = torch.ops.encfast.varlen_attn_bwd(
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
        ctx.softcap,
    )
    needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return *needed, *nothing


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
    _refuse_unserved(rel_bias, bias, bias_offsets, dropout_p)
    _check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
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
        softcap=softcap,
    )


def _reference_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    scale, causal, window, alibi_slopes, softcap,
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
        softcap=softcap,
    )[:3]


_backends.register_reference("varlen_attn", "varlen_attn", _reference_fwd)
_backends.register_reference("varlen_attn", "varlen_attn_bwd", _reference_bwd)


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
        rel_bias, bias, bias_offsets: refused, not served yet.
        softcap: > 0, or None for none.
        dropout_p: None or 0; other values are refused, not served yet.
        return_lse: also return the log-sum-exp of the scores, differentiable like the output.

    Returns:
        out [Nq, H, D], contiguous, in the promoted dtype of q, k and v; with `return_lse` also lse
        [H, Nq] float32, natural logarithm.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. Values of tensors
            are checked in eager mode on the CPU, on a GPU under ENCFAST_CHECK=1.
        NotImplementedError: an argument this version does not serve.
        RuntimeError: malformed values met by the native kernel in compiled code.

    Numerics: scores, softmax and sums in float32, for bfloat16 and float16 the probabilities are
    rounded to the input dtype before the second product. Bit-equal from run to run and for any
    number of threads; no atomics. Mixed dtypes compute in the promoted one; autocast casts nothing.
    """
    _refuse_unserved(rel_bias, bias, bias_offsets, dropout_p)
    _check(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
        window, alibi_slopes, softcap,
    )  # fmt: skip
    out, lse = torch.ops.encfast.varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
        alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, None,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def backends() -> dict[str, str]:
    """Device type -> 'native', or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
