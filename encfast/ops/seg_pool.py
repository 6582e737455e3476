"""One row per segment of a packed batch: means, sums, largest values, single rows, attention.

    mean       out_b = sum_i w_i x_i / sum_i w_i      over cu_seqlens[b] <= i < cu_seqlens[b + 1]
    sum        out_b = sum_i w_i x_i
    attention  out_b = sum_i softmax_b(w)_i x_i
    max        out_b[c] = max_i x_i[c]
    first, last  out_b = x_i of the segment's first or last i

each followed by y = out / max(|out|, 1e-12) with `normalize`.

Conventions. An empty segment gives zeros, as does a mean of weights that sum to 0. Of equal values
the first row's is the largest, and its row gets the gradient; NaN is larger than any number. A row
of zeros is normalised as `torch.nn.functional.normalize` does it. Groups of tokens within
sequences are segments too: `encfast.PackedBatch.groups` cuts them.

Sources: Reimers and Gurevych, Sentence-BERT (arXiv:1908.10084) for the means and largest values of
sentence embeddings; ARC-Encoder (kyutai, 2025) for means of groups.

Backends: C++ on the CPU, Triton on CUDA and HIP; elsewhere the reference.
"""

import torch
from torch import Tensor

from ..ref.seg_pool import chosen_rows as _ref_chosen
from ..ref.seg_pool import seg_pool as _ref_pool
from ..ref.seg_pool import seg_pool_bwd as _ref_bwd
from . import _backends
from ._checks import (
    FLOAT_DTYPES,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_tensor,
    check_values,
)

DISPATCHER_OPS = ("seg_pool", "seg_pool_bwd")
HOWS = ("mean", "sum", "max", "first", "last", "attention")
_WEIGHTED = ("mean", "sum", "attention")

# rows is int32 [B, C] for "max" and [0] else, norm float32 [B] with normalize and [0] without.
torch.library.define(
    "encfast::seg_pool",
    "(Tensor x, Tensor cu_seqlens, Tensor? weights, str how, bool normalize) "
    "-> (Tensor out, Tensor rows, Tensor norm)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# dweights is float32; what is not wanted is [0].
torch.library.define(
    "encfast::seg_pool_bwd",
    "(Tensor dout, Tensor x, Tensor cu_seqlens, Tensor? weights, Tensor out, Tensor rows, "
    "Tensor norm, str how, bool normalize, bool want_dx, bool want_dweights) "
    "-> (Tensor dx, Tensor dweights)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, cu_seqlens, weights, how) -> None:
    op = "seg_pool"
    check_tensor(op, "x", x, 2, "[N, C]")
    check_dtype(op, "x", x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.seg_pool")
    if x.shape[1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected at least one channel")
    check_segments(op, x, cu_seqlens)
    if how not in HOWS:
        raise ValueError(f"{op}: how is {how!r}, expected one of {', '.join(map(repr, HOWS))}")
    if weights is None:
        if how == "attention":
            raise ValueError(f"{op}: how is 'attention', expected weights [N], its scores")
        return
    if how not in _WEIGHTED:
        raise ValueError(f"{op}: weights were given, but how is {how!r}, which takes none")
    check_tensor(op, "weights", weights, 1, "[N]")
    check_dtype(op, "weights", weights, *FLOAT_DTYPES)
    check_device(op, "weights", weights, "x", x)
    if weights.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: weights has {weights.shape[0]} entries, x has {x.shape[0]} rows")
    if how == "mean":
        check_values(
            op,
            "weights",
            weights.detach(),
            lambda w: (w >= 0) & w.isfinite(),
            lambda: "expected finite numbers >= 0",
        )


def check_segments(op: str, x: Tensor, cu_seqlens: Tensor) -> None:
    """int32 [B + 1], where segments of x's rows begin."""
    check_tensor(op, "cu_seqlens", cu_seqlens, 1, "[B + 1]")
    check_dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    check_device(op, "cu_seqlens", cu_seqlens, "x", x)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens is empty, expected [B + 1] entries")
    check_cu_seqlens_values(op, "cu_seqlens", cu_seqlens, x.shape[0], "max_seqlen", None)


@torch.library.register_fake("encfast::seg_pool")
def _fake_fwd(x, cu_seqlens, weights, how, normalize):
    count, channels = cu_seqlens.shape[0] - 1, x.shape[1]
    return (
        x.new_empty((count, channels)),
        x.new_empty((count, channels) if how == "max" else 0, dtype=torch.int32),
        x.new_empty(count if normalize else 0, dtype=torch.float32),
    )


@torch.library.register_fake("encfast::seg_pool_bwd")
def _fake_bwd(
    dout, x, cu_seqlens, weights, out, rows, norm, how, normalize, want_dx, want_dweights
):
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(x.shape[0] if want_dweights else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, cu_seqlens, weights, ctx.how, ctx.normalize = inputs
    out, rows, norm = output
    ctx.mark_non_differentiable(rows, norm)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(x, cu_seqlens, weights, out, rows, norm)


def _backward(ctx, dout, drows, dnorm):
    weights = ctx.saved_tensors[2]
    need_x, _, need_weights, _, _ = ctx.needs_input_grad
    dx, dweights = torch.ops.encfast.seg_pool_bwd(
        dout, *ctx.saved_tensors, ctx.how, ctx.normalize, need_x, need_weights
    )
    return (
        dx if need_x else None,
        None,
        dweights.to(weights.dtype) if need_weights else None,
        None,
        None,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "seg_pool: double backward is not implemented; encfast.ref.seg_pool has one"
    )


torch.library.register_autograd("encfast::seg_pool", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::seg_pool_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _reference_fwd(x, cu_seqlens, weights, how, normalize):
    _check(x, cu_seqlens, weights, how)
    norm = x.new_empty(0, dtype=torch.float32)
    if normalize:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = _ref_pool(wide, cu_seqlens, how, weights).norm(dim=1)
    rows = x.new_empty(0, dtype=torch.int32)
    if how == "max":
        rows = _ref_chosen(x, cu_seqlens, how).int()
    return _ref_pool(x, cu_seqlens, how, weights, normalize), rows, norm


def _reference_bwd(
    dout, x, cu_seqlens, weights, out, rows, norm, how, normalize, want_dx, want_dweights
):
    if how in ("first", "last"):
        rows = _ref_chosen(x, cu_seqlens, how)
    grads = _ref_bwd(dout, x, cu_seqlens, weights, out, rows, norm, how, normalize)
    return _backends.wanted_only(grads, (want_dx, want_dweights))


def _triton_fwd(x, cu_seqlens, weights, how, normalize):
    from ..kernels import seg_pool as kernels

    _check(x, cu_seqlens, weights, how)
    return kernels.seg_pool(x, cu_seqlens, weights, how, normalize)


def _triton_bwd(*args):
    from ..kernels import seg_pool as kernels

    return kernels.seg_pool_bwd(*args)


_backends.register_reference("seg_pool", "seg_pool", _reference_fwd)
_backends.register_reference("seg_pool", "seg_pool_bwd", _reference_bwd)
_backends.register_triton("seg_pool", "seg_pool", _triton_fwd, _reference_fwd)
_backends.register_triton("seg_pool", "seg_pool_bwd", _triton_bwd, _reference_bwd)


def seg_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    how: str = "mean",
    *,
    weights: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """One row per segment; the module docstring has the formulas.

    Args:
        x: [N, C] float32, bfloat16 or float16; rows any distance apart.
        cu_seqlens: int32 [B + 1], where segments begin: 0, never decreasing, N.
        how: "mean", "sum", "max", "first", "last" or "attention".
        weights: [N] of any of the three dtypes: what each row weighs, >= 0 for "mean", any for
            "sum"; for "attention" the scores whose softmax over a segment weighs its rows.
        normalize: divide each result by its Euclidean length.

    Returns:
        [B, C], contiguous, of x's dtype. Differentiable in x and weights.

    Raises:
        TypeError, ValueError: a malformed argument; the message names it.

    Numerics: sums and norms in float32, rounded once. Bit-equal from run to run and for any number
    of threads; no atomics.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]])
        >>> cu_seqlens = torch.tensor([0, 2, 2, 3], dtype=torch.int32)  # the second is empty
        >>> ops.seg_pool(x, cu_seqlens, "mean")
        tensor([[2., 4.],
                [0., 0.],
                [5., 5.]])
        >>> ops.seg_pool(x, cu_seqlens, "max")
        tensor([[3., 6.],
                [0., 0.],
                [5., 5.]])
    """
    _check(x, cu_seqlens, weights, how)
    return torch.ops.encfast.seg_pool(x, cu_seqlens, weights, how, normalize)[0]


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
