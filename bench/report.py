"""What the benches found: tables for a terminal, a summary of ratios, a picture, and JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Result, Row, Setting
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from targets import Outcome, outcomes

from encfast import info

MIB = 2**20
MAX_OTHER_LOAD = 0.25  # cores; beyond it wall times are not to be trusted
PEERS = ("transformers", "sentence-transformers", "onnxruntime", "openvino", "ctranslate2")
SCHEMA = 1  # of the JSON; raised when a key changes its meaning or goes away


def environment(
    setting: Setting, roofs: dict[str, float], other_load: float | None
) -> dict[str, Any]:
    """Where the numbers come from: enough to judge them, and to try again."""
    gpu = torch.cuda.get_device_name() if setting.device == "cuda" else None
    installed = info.collect()
    del installed["library"]["rebuild"]  # a path, and no part of what was measured
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "suite": setting.suite,
        "device": setting.device,
        "threads": setting.threads,
        "clock": "one thread: process CPU time; several threads: wall time; GPU: events",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "cores_busy_with_other_programs": other_load,
        "gpu": gpu,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}",
        "peers": {p: info.installed(p) for p in PEERS},
        "roofs": roofs,
        "encfast": installed,
    }


def _commit() -> str | None:
    """Commit of the checkout this file is in, with a + if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = [*git, "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
        run = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def describe(env: dict[str, Any]) -> str:
    """The environment in a few lines, with one more on a busy machine."""
    cpu, versions = env["encfast"]["cpu"], env["encfast"]["versions"]
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    ran = (
        f"{where}; encfast {versions['encfast']} ({cpu['isa'] or 'reference kernels'}), "
        f"torch {versions['torch']}"
    )
    peers = ", ".join(f"{name} {which or 'not installed'}" for name, which in env["peers"].items())
    lines = [ran, f"peers: {peers}", _roofs(env["roofs"])]
    return "\n".join([*lines, *other_load(env)])


def other_load(env: dict[str, Any]) -> list[str]:
    """A line where other programs took so much of the machine that wall times mean little."""
    busy = env["cores_busy_with_other_programs"]
    if busy is None or busy <= MAX_OTHER_LOAD or env["threads"] < 2:
        return []
    return [
        f"[yellow]other programs keep {busy:.1f} cores busy: the wall times of "
        f"{env['threads']} threads mean little[/]"
    ]


def _roofs(roofs: dict[str, float]) -> str:
    def named(peak: bool) -> str:
        return ", ".join(
            f"{name.removesuffix(' peak')} {value:.0f} {'GB/s' if name == 'copy' else 'GF/s'}"
            for name, value in roofs.items()
            if name.endswith(" peak") == peak
        )

    alone = named(peak=True) or "not measured (no C compiler, or no x86)"
    return (
        f"measured in this run, one thread: roof {named(peak=False)} (GEMM of 2048, copy); "
        f"peak {alone} (multiply-adds alone)"
    )


def table(result: Result, setting: Setting) -> Table:
    """One row per variant."""
    spec = result.spec
    cpu = setting.device == "cpu"
    first = "1 thread, CPU ms" if cpu else "ms"
    grid = Table(
        title=f"{spec.title}  [dim]({spec.name}, {result.took_s:.0f} s)[/]",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("variant", no_wrap=True)
    for name in (first, "p10..p90", spec.unit, "% of roof", "% of peak"):
        grid.add_column(name, justify="right")
    if cpu and setting.threads > 1:
        grid.add_column(f"{setting.threads} threads, {spec.unit}", justify="right")
    grid.add_column("peak MiB", justify="right")
    grid.add_column("verified")
    for row in result.rows:
        grid.add_row(*_cells(row, cpu and setting.threads > 1), style="bold" if row.ours else "")
    notes = [f"{r.variant}: {r.missing or r.note}" for r in result.rows if r.missing or r.note]
    grid.caption, grid.caption_justify = escape("\n".join([*notes, *spec.facts])), "left"
    return grid


def _cells(row: Row, with_many: bool) -> list[str]:
    name = row.variant
    if row.one is None or row.rate is None or row.gate is None:
        dashes = ["-"] * (7 if with_many else 6)
        failed = f"[red]FAILED: {escape(row.gate.text)}[/]" if row.gate else ""
        said = failed or "[yellow]left out[/]"
        return [name, *dashes, said]
    cells = [
        name,
        _ms(row.one.median),
        f"{_ms(row.one.p10)}..{_ms(row.one.p90)}",
        _rate(row.rate),
        *("-" if share is None else f"{share:.1%}" for share in (row.roof_share, row.peak_share)),
    ]
    if with_many:
        cells.append("-" if row.rate_many is None else _rate(row.rate_many))
    cells.append("-" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.0f}")
    return [*cells, row.gate.text]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast as a peer encfast is, in one run."""

    spec: str
    ours: str
    peer: str
    one: float
    many: float | None


def ratios(results: Iterable[Result]) -> list[Ratio]:
    """Of all pairs whose two sides passed their gates."""
    found = []
    for result in results:
        for ours_name, peer_name in result.spec.pairs:
            ours, peer = result.row(ours_name), result.row(peer_name)
            if ours.one is None or peer.one is None:
                continue
            many = peer.many.median / ours.many.median if peer.many and ours.many else None
            one = peer.one.median / ours.one.median
            found.append(Ratio(result.spec.name, ours_name, peer_name, one, many))
    return found


def summary(results: Sequence[Result], setting: Setting) -> Table:
    """The ratios of all pairs."""
    grid = Table(
        title="encfast against its peers, times as fast", title_justify="left", box=box.SIMPLE_HEAD
    )
    grid.add_column("bench", no_wrap=True)
    grid.add_column("encfast / peer")
    cpu = setting.device == "cpu"
    grid.add_column("1 thread (CPU time)" if cpu else "events", justify="right")
    if cpu and setting.threads > 1:
        grid.add_column(f"{setting.threads} threads (wall time)", justify="right")
    for r in ratios(results):
        cells = [r.spec, f"{r.ours} / {r.peer}", f"{r.one:.2f}x"]
        if cpu and setting.threads > 1:
            cells.append("-" if r.many is None else f"{r.many:.2f}x")
        grid.add_row(*cells)
    return grid


def target_table(found: Sequence[Outcome]) -> Table:
    """What the run says about the project's performance targets."""
    reached = sum(o.verdict in ("must", "stretch") for o in found)
    grid = Table(
        title=f"performance targets: {reached} of {len(found)} reached, times as fast as the peer",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("subject", "encfast", "peer"):
        grid.add_column(name)
    for name in ("measured", "must", "stretch"):
        grid.add_column(name, justify="right")
    grid.add_column("reached")
    for o in found:
        measured = "-" if o.ratio is None else f"{o.ratio:.2f}x"
        bars = (f"{o.target.must:g}x", f"{o.target.stretch:g}x")
        style = {"must": "", "stretch": "green"}.get(o.verdict, "yellow")
        cells = (o.target.subject, o.ours, o.peer, measured, *bars, o.verdict)
        grid.add_row(*cells, style=style)
    return grid


def failures(results: Iterable[Result]) -> list[str]:
    """A sentence for every red gate."""
    return [
        f"{result.spec.name}: {row.variant} is wrong ({row.gate.text}), so it was not timed"
        for result in results
        for row in result.rows
        if row.gate and not row.gate.ok
    ]


def to_json(results: Sequence[Result], env: dict[str, Any]) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "schema": SCHEMA,
        "environment": env,
        "results": [
            {
                "name": result.spec.name,
                "title": result.spec.title,
                "unit": result.spec.unit,
                "work": result.work,
                "facts": list(result.spec.facts),
                "took_s": result.took_s,
                "rows": [dataclasses.asdict(row) for row in result.rows],
            }
            for result in results
        ],
        "ratios": [dataclasses.asdict(r) for r in ratios(results)],
        "targets": [dataclasses.asdict(o) for o in outcomes(results)],
    }


def write_json(path: Path, results: Sequence[Result], env: dict[str, Any]) -> None:
    """`to_json` in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(results, env), indent=1, allow_nan=False) + "\n")


def console() -> Console:
    """A terminal as it is; wide enough for the tables where output goes to a file."""
    found = Console()
    return found if found.is_terminal else Console(width=160)
