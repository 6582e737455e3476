"""What the tests of seg_pool share: its reductions, the same in plain PyTorch, a comparison."""

import torch
import torch.nn.functional as F
from row_cases import FP32, assert_same

from encfast import ops, ref

LENGTHS = (3, 0, 1, 40, 0, 17)
N = sum(LENGTHS)
HOWS = ("mean", "sum", "max", "first", "last", "attention")
# how, and whether weights are given.
CHOOSE = ("max", "first", "last")
CASES = [(how, False) for how in HOWS[:-1]] + [(how, True) for how in ("mean", "sum", "attention")]


def ends(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(x, cu_seqlens, how="mean", weights=None, normalize=False):
    """The same segment by segment, in plain PyTorch at the dtype of x."""
    found = []
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        part = x[begin:end]
        w = None if weights is None else weights[begin:end].to(x.dtype)[:, None]
        if len(part) == 0:
            found.append(part.sum(0))
        elif how == "mean":
            found.append(part.mean(0) if w is None else (w * part).sum(0) / w.sum())
        elif how == "sum":
            found.append((part if w is None else w * part).sum(0))
        elif how == "attention":
            found.append((w.softmax(0) * part).sum(0))
        else:
            found.append({"max": part.max(0).values, "first": part[0], "last": part[-1]}[how])
    out = torch.stack(found)
    return F.normalize(out, dim=1) if normalize else out


def compare(x, cu_seqlens=None, weights=None, sparse=False, **options):
    """With `sparse` gradients may be mostly zero: one row of a segment alone has one."""
    cu_seqlens = ends() if cu_seqlens is None else cu_seqlens
    inputs = {"x": x, "weights": weights}

    def bound(f):
        return lambda x, weights=None: f(x, cu_seqlens, weights=weights, **options)

    grads = [torch.randn(cu_seqlens.shape[0] - 1, x.shape[1]).to(x.dtype)]
    # The gradient of a weight is what is left of sums that cancel.
    terms = {"dweights": float(x.double().abs().amax() * x.shape[1])}
    assert_same(
        *map(bound, (ops.seg_pool, ref.seg_pool, plain)),
        inputs,
        grads,
        terms,
        allow_degenerate=sparse,
    )


def weights_for(how, dtype=FP32, n=N):
    return torch.rand(n).to(dtype) + 0.1 if how == "mean" else 2 * torch.randn(n).to(dtype)
