"""Cases of varlen_attn: geometries by name, inputs in every layout, results of op and reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from encfast import ops
from encfast.ref import varlen_attn as reference
from encfast.testing import assert_close_to_reference

RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One call of varlen_attn; `str` gives the readable test id."""

    lens: tuple[int, ...]
    lens_k: tuple[int, ...] | None = None
    heads: int = 4
    kv_heads: int | None = None
    head_size: int = 40
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    alibi: str = ""  # "H" or "BH": the shape of the slopes
    softcap: float | None = None
    scale: float | None = None
    rel: str = ""  # "H" or "NH": rel_bias [H, R] or [Nq, H, R]
    rel_size: int = 33  # R
    bias: str = ""  # "T" or "HT": bias [T] or [H, T]; "bool T", "bool HT"
    bias_dtype: torch.dtype | None = None  # of both; that of the result by default
    dropout: float | None = None
    layout: str = "contiguous"  # or qkv, transposed, expanded, offset
    degenerate: bool = False  # the result is meant to be mostly zero or empty

    def __str__(self) -> str:
        def lengths(x):
            return "[" + ",".join(map(str, x)) + "]"

        words = [f"B{len(self.lens)}", f"len{lengths(self.lens)}"]
        if self.lens_k is not None:
            words.append(f"k{lengths(self.lens_k)}")
        words.append(f"H{self.heads}")
        if self.kv_heads is not None:
            words.append(f"Hk{self.kv_heads}")
        words.append(f"D{self.head_size}")
        if self.causal:
            words.append("causal")
        if self.window != (-1, -1):
            words.append(f"window({self.window[0]},{self.window[1]})")
        if self.alibi:
            words.append(f"alibi{self.alibi}")
        if self.softcap is not None:
            words.append(f"softcap{self.softcap:g}")
        if self.scale is not None:
            words.append(f"scale{self.scale:g}")
        if self.rel:
            words.append(f"rel{self.rel}{self.rel_size}")
        if self.bias:
            words.append(f"bias{self.bias.replace(' ', '')}")
        if self.bias_dtype is not None:
            words.append(str(self.bias_dtype).removeprefix("torch."))
        if self.dropout:
            words.append(f"dropout{self.dropout:g}")
        if self.layout != "contiguous":
            words.append(self.layout)
        return "-".join(words)

    @property
    def options(self) -> dict:
        """Keyword arguments that op and reference share and that take no gradient."""
        generator = torch.Generator().manual_seed(2)
        slopes = None
        if self.alibi:
            shape = (self.heads,) if self.alibi == "H" else (len(self.lens), self.heads)
            slopes = torch.rand(shape, generator=generator)
        return {
            "cu_seqlens_k": None if self.lens_k is None else cu_seqlens(self.lens_k),
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "alibi_slopes": slopes,
            "softcap": self.softcap,
            "dropout_p": self.dropout,
        }

    @property
    def pairs(self) -> int:
        """T, the entries of one head's bias."""
        return sum(a * b for a, b in zip(self.lens, self.lens_k or self.lens, strict=True))


def cu_seqlens(lens) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def make_qkv(case: Case, *dtypes: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v of the case in its layout; one dtype for all, or one each."""
    generator = torch.Generator().manual_seed(seed)
    if len(dtypes) == 1:
        dtypes *= 3
    rows_q = sum(case.lens)
    rows_k = rows_q if case.lens_k is None else sum(case.lens_k)
    kv_heads = case.kv_heads or case.heads
    shapes = [(rows_q, case.heads), (rows_k, kv_heads), (rows_k, kv_heads)]
    return [
        in_layout(case.layout, i, (*shape, case.head_size), dtype, generator)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def in_layout(layout: str, i: int, shape, dtype, generator) -> Tensor:
    """A random tensor of this shape that lies in memory as `layout` says."""
    rows, heads, size = shape
    if layout == "qkv":  # a slice of [N, 3, H, D], as a fused projection leaves it
        return torch.randn(rows, 3, heads, size, generator=generator).to(dtype)[:, i]
    if layout == "transposed":  # [H, N, D] and, for v, a last dimension that is not contiguous
        if i == 2:
            return torch.randn(rows, size, heads, generator=generator).to(dtype).mT
        return torch.randn(heads, rows, size, generator=generator).to(dtype).transpose(0, 1)
    if layout == "expanded" and i > 0:  # one row, or one head, for all: stride 0
        one = (1, heads, size) if i == 1 else (rows, 1, size)
        return torch.randn(one, generator=generator).to(dtype).expand(shape)
    if layout == "offset":  # starts at an odd element, rows further apart than they are long
        apart = heads * size + 3
        flat = torch.randn(1 + rows * apart, generator=generator).to(dtype)
        return flat.as_strided(shape, (apart, size, 1), storage_offset=1)
    return torch.randn(shape, generator=generator).to(dtype)


def make_biases(case: Case, dtype: torch.dtype, seed: int = 3) -> dict[str, Tensor]:
    """rel_bias and bias of the case by name; in bias some keys, and all of one row, are hidden."""
    generator = torch.Generator().manual_seed(seed)
    dtype = case.bias_dtype or dtype
    biases = {}
    if case.rel:
        rows = (sum(case.lens),) if case.rel == "NH" else ()
        biases["rel_bias"] = bias_in_layout(
            case.layout, torch.randn(*rows, case.heads, case.rel_size, generator=generator), dtype
        )
    if case.bias:
        heads = (case.heads,) if case.bias.endswith("HT") else ()
        matrix = torch.randn(*heads, case.pairs, generator=generator)
        hidden = torch.rand(matrix.shape, generator=generator) < 0.2
        last_keys = (case.lens_k or case.lens)[-1]
        hidden[..., case.pairs - last_keys :] = True
        if case.bias.startswith("bool"):
            matrix, dtype = ~hidden, torch.bool
        else:
            matrix = matrix.masked_fill(hidden, float("-inf"))
        biases["bias"] = bias_in_layout(case.layout, matrix, dtype)
    return biases


def bias_in_layout(layout: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as it lies in memory under this layout; 'expanded' keeps one head, with stride 0."""
    x = x.to(dtype)
    if layout == "transposed":  # the last dimension is not contiguous
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "expanded" and x.dim() > 1:
        return x.narrow(-2, 0, 1).expand_as(x)
    if layout == "offset":
        flat = torch.cat((x.new_zeros(1), x.flatten()))
        return flat[1:].view(x.shape)
    return x


def run(attention, case: Case, qkv, douts, biases) -> dict[str, Tensor]:
    """out, lse and all gradients of `attention(q, k, v, **biases) -> (out, lse)`."""
    inputs = {**dict(zip("qkv", qkv, strict=True)), **biases}
    inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    out, lse = attention(**inputs)
    seen = torch.isfinite(lse)  # -inf where no key is visible: no gradient comes from there
    loss = (out * douts[0].to(out.dtype)).sum() + (lse.where(seen, 0) * douts[1]).sum()
    leaves = {f"d{name}": x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "lse": lse, **dict(zip(leaves, grads, strict=True))}


def drawn_key() -> Tensor:
    """The key of a dropout mask that the op draws next after `torch.manual_seed(4)`."""
    torch.manual_seed(4)
    return torch.randint(0, 2**32, (2,), dtype=torch.int64)


def run_op(case: Case, qkv, douts, biases=None) -> dict[str, Tensor]:
    def attention(q, k, v, **biases):
        torch.manual_seed(4)
        cu = cu_seqlens(case.lens)
        return ops.varlen_attn(q, k, v, cu, return_lse=True, **case.options, **biases)

    if biases is None:
        biases = make_biases(case, promoted(qkv))
    return run(attention, case, qkv, douts, biases)


def run_reference(case: Case, qkv, douts, compute_dtype=None, biases=None) -> dict[str, Tensor]:
    rng = drawn_key() if case.dropout else None

    def attention(q, k, v, **biases):
        return reference(
            q,
            k,
            v,
            cu_seqlens(case.lens),
            rng=rng,
            compute_dtype=compute_dtype,
            **case.options,
            **biases,
        )

    if biases is None:
        biases = make_biases(case, promoted(qkv))
    return run(attention, case, qkv, douts, biases)


def promoted(qkv) -> torch.dtype:
    return torch.promote_types(torch.promote_types(qkv[0].dtype, qkv[1].dtype), qkv[2].dtype)


def make_douts(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse, exact in the test dtype."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(case.lens)
    dout = torch.randn(rows, case.heads, case.head_size, generator=generator).to(dtype)
    return dout.double(), torch.randn(case.heads, rows, generator=generator).bfloat16().double()


def cancelling_terms(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, float]:
    """Largest terms of dq and dk: dP, which its mean over a row is taken from, times k or q."""
    v = v.repeat_interleave(dout.shape[1] // v.shape[1], 1).double()
    dp = torch.einsum("ihd,jhd->hij", dout, v).abs().max() / (1 - (case.dropout or 0))
    dp = dp * (q.shape[2] ** -0.5 if case.scale is None else abs(case.scale))
    return {"dq": float(dp * k.abs().max()), "dk": float(dp * q.abs().max())}


def assert_matches_reference(
    case: Case, *dtypes: torch.dtype, few_elements: bool = False, cancels: bool = False
) -> None:
    """The tolerance rule for out, lse and every gradient; dtypes and layout of the results.

    On a few elements the largest error of the plain maths may be small by luck, and with one
    visible key dq and dk are what is left of a difference; the rule then looks for wrong numbers
    rather than for lost digits, at the scale of the largest gradient. A bias may be wider than out,
    whose rounding is in its gradient as well: the mean of dP over a row is that of dout and out.

    Where `cancels`, some rows see one key among others that see many: an eps is then granted at the
    scale of the terms that cancel, which the plain maths takes from each other without rounding.
    """
    qkv = make_qkv(case, *dtypes)
    dtype = promoted(qkv)
    biases = make_biases(case, dtype)
    douts = make_douts(case, dtype)
    actual = run_op(case, qkv, douts, biases)
    expected = run_reference(
        case,
        [x.double() for x in qkv],
        douts,
        biases={n: x.double() if x.is_floating_point() else x for n, x in biases.items()},
    )
    plain = run_reference(case, qkv, douts, compute_dtype=dtype, biases=biases)
    assert actual["out"].dtype == dtype and actual["lse"].dtype == torch.float32
    assert [actual[f"d{n}"].dtype for n in "qkv"] == [x.dtype for x in qkv]
    assert all(actual[f"d{n}"].dtype == x.dtype for n, x in biases.items() if f"d{n}" in expected)
    assert actual.keys() == expected.keys()
    scale = {n: max(x[x.isfinite()].abs().tolist(), default=0.0) for n, x in expected.items()}
    largest = max(x for n, x in scale.items() if n.startswith("d"))
    terms = cancelling_terms(case, *qkv, douts[0]) if cancels else {}
    for name in expected:
        assert actual[name].is_contiguous(), name
        above = largest / max(scale[name], 1e-30) if name.startswith("d") else 1
        if name.startswith("d"):
            above *= max(1, torch.finfo(dtype).eps / torch.finfo(actual[name].dtype).eps)
        assert_close_to_reference(
            f"{name} {'/'.join(str(d).removeprefix('torch.') for d in dtypes)}",
            actual[name],
            expected[name],
            plain[name],
            factor=8 if few_elements else 3 if name.startswith("d") else 2,
            eps_factor=8 * max(above, 1)
            if few_elements
            else max(1, terms.get(name, 0) / max(scale[name], 1e-30)),
            allow_degenerate=case.degenerate,
        )
    seen = torch.isfinite(expected["lse"])
    # lse is float32 in any test dtype, and feeds exp(): a rule scaled to bfloat16 is too kind.
    assert ((actual["lse"].double() - expected["lse"]).abs()[seen] < 1e-3).all()
