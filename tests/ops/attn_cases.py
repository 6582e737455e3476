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
        if self.layout != "contiguous":
            words.append(self.layout)
        return "-".join(words)

    @property
    def options(self) -> dict:
        """Keyword arguments that op and reference share, cu_seqlens_k and slopes included."""
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
        }


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


def run(attention, case: Case, qkv, douts, grad_dtype=None) -> dict[str, Tensor]:
    """out, lse and all gradients of `attention(q, k, v) -> (out, lse)`."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, lse = attention(*leaves)
    seen = torch.isfinite(lse)  # -inf where no key is visible: no gradient comes from there
    loss = (out * douts[0].to(out.dtype)).sum() + (lse.where(seen, 0) * douts[1]).sum()
    return dict(zip(RESULTS, (out, lse, *torch.autograd.grad(loss, leaves)), strict=True))


def run_op(case: Case, qkv, douts) -> dict[str, Tensor]:
    def attention(q, k, v):
        return ops.varlen_attn(q, k, v, cu_seqlens(case.lens), return_lse=True, **case.options)

    return run(attention, case, qkv, douts)


def run_reference(case: Case, qkv, douts, compute_dtype=None) -> dict[str, Tensor]:
    def attention(q, k, v):
        return reference(
            q, k, v, cu_seqlens(case.lens), compute_dtype=compute_dtype, **case.options
        )

    return run(attention, case, qkv, douts)


def make_douts(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse, exact in the test dtype."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(case.lens)
    dout = torch.randn(rows, case.heads, case.head_size, generator=generator).to(dtype)
    return dout.double(), torch.randn(case.heads, rows, generator=generator).bfloat16().double()


def assert_matches_reference(case: Case, *dtypes: torch.dtype, few_elements: bool = False) -> None:
    """The tolerance rule for out, lse and every gradient; dtypes and layout of the results.

    On a few elements the largest error of the plain maths may be small by luck; the rule then
    looks for wrong numbers rather than for lost digits.
    """
    qkv = make_qkv(case, *dtypes)
    promoted = torch.promote_types(torch.promote_types(qkv[0].dtype, qkv[1].dtype), qkv[2].dtype)
    douts = make_douts(case, promoted)
    actual = run_op(case, qkv, douts)
    expected = run_reference(case, [x.double() for x in qkv], douts)
    plain = run_reference(case, qkv, douts, compute_dtype=promoted)
    assert actual["out"].dtype == promoted and actual["lse"].dtype == torch.float32
    assert [actual[f"d{n}"].dtype for n in "qkv"] == [x.dtype for x in qkv]
    for name in RESULTS:
        assert actual[name].is_contiguous(), name
        assert_close_to_reference(
            f"{name} {'/'.join(str(d).removeprefix('torch.') for d in dtypes)}",
            actual[name],
            expected[name],
            plain[name],
            factor=8 if few_elements else 3 if name.startswith("d") else 2,
            eps_factor=8 if few_elements else 1,
            allow_degenerate=case.degenerate,
        )
    seen = torch.isfinite(expected["lse"])
    # lse is float32 in any test dtype, and feeds exp(): a rule scaled to bfloat16 is too kind.
    assert ((actual["lse"].double() - expected["lse"]).abs()[seen] < 1e-3).all()
