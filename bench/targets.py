"""The project's performance targets, and which of them a run has reached.

Each names a bench, and how many times as fast as the fastest of its peers in that very run encfast
must be; `stretch` is the aim. They were set on an AMD Zen 4 (AVX512-BF16, no AMX); where peers use
AMX through oneDNN, as on newer Intel CPUs, ratios in bf16 are harder to reach. One thread by the
CPU clock, unless the target is about threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness import Result, Row


@dataclass(frozen=True)
class Target:
    """What encfast must reach in one bench."""

    subject: str
    spec: str  # name of the bench
    ours: tuple[str, ...]  # variants; the fastest counts
    peers: tuple[str, ...]  # variants; the fastest counts. Empty: one thread of the same variant
    must: float
    stretch: float


@dataclass(frozen=True)
class Outcome:
    """What a run says about a target."""

    target: Target
    ours: str  # the variant that counted
    peer: str
    ratio: float | None  # None: not measured
    verdict: str  # stretch, must, short, or why it was not measured


def _attention(
    phase: str, dtype: str, bars: dict[tuple[int, ...], tuple[float, float]]
) -> tuple[Target, ...]:
    peers = (f"SDPA {dtype} contiguous", f"SDPA {dtype} qkv views")
    return tuple(
        Target(
            f"attention {phase} {dtype}, dense S={length}",
            f"varlen_attn/S{length}-D64-{phase}-{dtype}",
            (f"encfast {dtype}",),
            peers,
            *bar,
        )
        for lengths, bar in bars.items()
        for length in lengths
    )


def _alibi(dtype: str, must: float, stretch: float) -> tuple[Target, ...]:
    return tuple(
        Target(
            f"attention fwd {dtype} with ALiBi, dense S={length}",
            f"varlen_attn/alibi-S{length}-D64-fwd-{dtype}",
            (f"encfast {dtype}",),
            (f"SDPA {dtype} materialised bias",),
            must,
            stretch,
        )
        for length in (512, 2048)
    )


def _ragged(phase: str, dtype: str, must: float, stretch: float) -> tuple[Target, ...]:
    """Where there are gradients also against the loop by slices, as it is written at first."""
    spec = f"varlen_attn/docstrings-D64-{phase}-{dtype}"
    ours, loops = (f"encfast {dtype}",), ("loop", "sliced loop") if "bwd" in phase else ("loop",)
    subject = f"attention {phase} {dtype}, ragged"
    return (
        *(Target(subject, spec, ours, (f"SDPA {dtype} {x}",), must, stretch) for x in loops),
        Target(f"threads 1 -> 2, {subject}", spec, ours, (), 1.7, 1.9),
    )


def _encoder(
    model: str, spec: str, dtype: str, bars: dict[str, tuple[float, float]]
) -> tuple[Target, ...]:
    ours = (f"encfast {dtype} packed", f"encfast engine {dtype}")
    return tuple(
        Target(f"{model} {dtype}", spec, ours, (peer,), *bar) for peer, bar in bars.items()
    )


def _training(dtype: str, padded: tuple[float, float], by_length: tuple[float, float]):
    spec, ours = f"training/docstrings-{dtype}", (f"encfast {dtype} packed",)
    bars = {"padded": padded, "length-sorted": by_length}
    return tuple(
        Target(f"training step {dtype}", spec, ours, (f"transformers {dtype} {peer}",), *bar)
        for peer, bar in bars.items()
    )


def _masking(
    case: str, subject: str, recipe: str, plain: str, bars: dict[str, tuple[float, float]]
) -> tuple[Target, ...]:
    """By dtype against the published recipe, and in any dtype against the better plain PyTorch."""
    return tuple(
        Target(f"{subject} {dtype}", f"patch_gather/{case}-{dtype}", ("encfast",), (peer,), *bar)
        for dtype, recipe_bar in bars.items()
        for peer, bar in ((recipe, recipe_bar), (plain, (1.1, 1.3)))
    )


def _masks(case: str, bars: dict[str, tuple[float, float]]) -> tuple[Target, ...]:
    return _masking(f"mask-{case}", f"mask {case}", "argsort + gather", "topk + index_select", bars)


def _restores(case: str) -> tuple[Target, ...]:
    bars = {"fp32": (5.0, 6.0), "bf16": (12.0, 20.0)}
    peers = "cat + gather", "expand + index_copy_"
    return _masking(f"restore-{case}-fwd", f"restore {case} fwd", *peers, bars)


def _experts(phase: str, dtype: str) -> tuple[Target, ...]:
    bars = {"one-hot einsum": (5.0, 50.0), "argsort + index": (1.1, 1.5)}
    spec = f"moe_route/layer-{phase}-switch-{dtype}"
    return tuple(
        Target(f"to experts and back {phase} {dtype}", spec, ("encfast",), (peer,), *bar)
        for peer, bar in bars.items()
    )


def _grouped(dtype: str) -> Target:
    spec = f"grouped_mm/fwd+bwd-E64-N1024-C768-F1536-{dtype}"
    ours, peer = ("encfast",), ("F.grouped_mm",)
    return Target(f"grouped_mm fwd+bwd E=64 {dtype}", spec, ours, peer, 1.2, 1.4)


def _mixture(dtype: str) -> tuple[Target, ...]:
    """Inference with weights packed once, and training, where they change."""
    peer = ("transformers grouped_mm",)
    return tuple(
        Target(
            f"mixture {phase} E={experts} {dtype}",
            f"moe/block-{phase}-E{experts}-T512-C768-F1536-{dtype}",
            ours,
            peer,
            *bars,
        )
        for phase, experts, ours, bars in (
            ("fwd", 8, ("encfast packed",), (1.1, 1.15)),
            ("fwd", 64, ("encfast packed",), (1.55, 1.9)),
            ("fwd+bwd", 64, ("encfast",), (1.2, 1.4)),
        )
    )


def _info_nce(dtype: str, must: float, stretch: float) -> tuple[Target, ...]:
    spec, bars = f"rank_loss/info_nce-B4096-D512-fwd+bwd-{dtype}", {"plain": (must, stretch)}
    return tuple(
        Target(f"InfoNCE {dtype}, B=4096", spec, ("encfast",), (peer,), *bar)
        for peer, bar in (bars | {"tiled": (1.1, 1.3)}).items()
    )


def _partial_ranking(dtype: str, must: float, stretch: float) -> tuple[Target, ...]:
    spec = f"partial_ranking/B1024-M8192-D256-K4096-fwd+bwd-{dtype}"
    return (
        Target(f"partial ranking {dtype}, K=4096", spec, ("encfast",), ("plain",), must, stretch),
    )


def _vocab_head(dtype: str) -> tuple[Target, ...]:
    bars = {"logits of all tokens": (7.0, 9.0), "F.linear_cross_entropy": (1.0, 1.15)}
    spec = f"linear_cross_entropy/mlm-N2048-V50368-C768-{dtype}"
    return tuple(
        Target(f"MLM head fwd+bwd {dtype}", spec, ("encfast",), (peer,), *bar)
        for peer, bar in bars.items()
    )


_ALL_LENGTHS = (64, 128, 256, 512, 1024, 2048)
TARGETS: tuple[Target, ...] = (
    *_attention(
        "fwd",
        "bf16",
        {(64,): (2.1, 2.8), (128,): (2.3, 2.8), (256, 512): (2.2, 2.8), (1024, 2048): (2.1, 2.8)},
    ),
    *_attention("fwd", "fp32", {(64, 128): (1.25, 1.5), (256, 512, 1024, 2048): (1.15, 1.3)}),
    *_attention(
        "fwd+bwd",
        "bf16",
        {(64,): (4.5, 6), (128,): (3.8, 5), (256,): (2.3, 3), (512, 1024, 2048): (1.9, 2.5)},
    ),
    *_attention("fwd+bwd", "fp32", {_ALL_LENGTHS: (1.12, 1.3)}),
    *_alibi("bf16", 2.2, 2.7),
    *_alibi("fp32", 1.25, 1.4),
    *_ragged("fwd", "bf16", 2.6, 3.5),
    *_ragged("fwd", "fp32", 1.3, 1.5),
    *_ragged("fwd+bwd", "bf16", 6, 8),
    *_ragged("fwd+bwd", "fp32", 2.8, 3.5),
    *_encoder(
        "MiniLM",
        "minilm/sorted",
        "bf16",
        {
            "transformers bf16 length-sorted": (1.7, 2.0),
            "openvino bf16": (1.35, 1.65),
            "ctranslate2 int8": (1.15, 1.4),
            "sentence-transformers default": (3.0, 3.7),
        },
    ),
    *_encoder("MiniLM", "minilm/padded", "bf16", {"transformers fp32 padded": (7, 9)}),
    *_encoder(
        "MiniLM",
        "minilm/sorted",
        "fp32",
        {"transformers fp32 length-sorted": (1.45, 1.6), "ctranslate2 fp32": (1.1, 1.25)},
    ),
    Target(
        "MiniLM int8",
        "minilm/sorted",
        ("encfast engine int8",),
        ("encfast bf16 packed", "encfast engine bf16"),
        1.3,
        1.3,
    ),
    *_encoder(
        "BERT-base",
        "bert-base/sorted",
        "bf16",
        {
            "transformers bf16 length-sorted": (1.8, 2.3),
            "openvino bf16": (1.6, 1.9),
            "ctranslate2 int8": (1.1, 1.25),
        },
    ),
    *_training("bf16", (5, 7), (2.0, 2.7)),
    *_training("fp32", (5, 7), (1.8, 2.4)),
    *_masks("N196-fwd", {"fp32": (5, 6), "bf16": (8, 12)}),
    *_masks("N1568-fwd", {"fp32": (3, 3.5), "bf16": (7, 9)}),
    *_masks("N196-fwd+bwd", {"fp32": (1.3, 1.5), "bf16": (4, 8)}),
    *_masks("N1568-fwd+bwd", {"fp32": (1.3, 1.5), "bf16": (4, 8)}),
    *_restores("N196"),
    *_restores("N1568"),
    _grouped("fp32"),
    _grouped("bf16"),
    *_mixture("fp32"),
    *_mixture("bf16"),
    *_info_nce("fp32", 1.45, 1.65),
    *_info_nce("bf16", 2.1, 2.5),
    *_partial_ranking("fp32", 3.0, 4.0),
    *_partial_ranking("bf16", 3.0, 4.0),
    *_vocab_head("fp32"),
    *_vocab_head("bf16"),
    *(
        Target(
            "divided attention fwd+bwd fp32, 4 frames",
            "frozen_in_time/attention-F4-fwd+bwd-fp32",
            ("encfast divided",),
            (peer,),
            *bar,
        )
        for peer, bar in {"SDPA joint": (1.4, 1.7), "encfast joint": (1.15, 1.4)}.items()
    ),
    *(
        t
        for phase in ("fwd", "fwd+bwd")
        for dtype in ("fp32", "bf16")
        for t in _experts(phase, dtype)
    ),
)


def outcomes(results: Iterable[Result]) -> list[Outcome]:
    """Of the targets whose bench was run."""
    by_name = {result.spec.name: result for result in results}
    return [_outcome(t, by_name[t.spec]) for t in TARGETS if t.spec in by_name]


def _outcome(target: Target, result: Result) -> Outcome:
    ours = _fastest(result, target.ours)
    peer = _fastest(result, target.peers) if target.peers else ours
    if ours is None or peer is None or ours.one is None or peer.one is None:
        lost = target.ours if ours is None else target.peers
        return Outcome(target, "", "", None, f"not measured: {' and '.join(lost)}")
    if target.peers:
        return _judge(target, ours.variant, peer.variant, peer.one.median / ours.one.median)
    if ours.many is None:
        return Outcome(target, ours.variant, "", None, "not measured: one thread only")
    # The CPU clock of one thread is its wall time when nothing else runs.
    return _judge(target, ours.variant, "itself, 1 thread", ours.one.median / ours.many.median)


def _judge(target: Target, ours: str, peer: str, ratio: float) -> Outcome:
    verdict = "stretch" if ratio >= target.stretch else "must" if ratio >= target.must else "short"
    return Outcome(target, ours, peer, ratio, verdict)


def _fastest(result: Result, names: tuple[str, ...]) -> Row | None:
    timed = [row for row in result.rows if row.variant in names and row.one]
    return min(timed, key=lambda row: row.one.median, default=None)  # type: ignore[union-attr]
