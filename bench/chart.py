"""The picture of a run: rates side by side, one panel per bench, useful work only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import Result, Row

OURS, PEER = "#1b7f5c", "#b8bcc4"
COLUMNS = 2


def draw(path: Path, results: Sequence[Result], env: dict[str, Any]) -> None:
    """Writes a PNG of the one-thread rates of the verified variants, where there is one to show."""
    shown = [r for r in results if r.spec.charted and any(row.rate for row in r.rows)]
    if not shown:
        return
    lines = -(-len(shown) // COLUMNS)
    bars = max(len(r.rows) for r in shown)
    size = (7.5 * COLUMNS, lines * (0.9 + 0.36 * bars) + 0.8)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, result in zip(axes.flat, shown, strict=False):
        _panel(axis, result)
    clock = "GPU events" if env["device"] == "cuda" else "one thread, process CPU time"
    versions = env["encfast"]["versions"]
    where = env["gpu"] or f"{env['cpu']} ({env['encfast']['cpu']['isa'] or 'reference kernels'})"
    figure.suptitle(
        f"Useful work per second, {clock}. {where}, torch {versions['torch']}, {env['date'][:10]}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, result: Result) -> None:
    rows: list[Row] = [row for row in result.rows if row.rate]
    rates = [row.rate for row in rows]
    drawn = axis.barh(
        [row.variant for row in rows], rates, color=[OURS if r.ours else PEER for r in rows]
    )
    axis.bar_label(drawn, [f"{r:,.0f}" if r >= 10 else f"{r:.1f}" for r in rates], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(f"{result.spec.title} ({result.spec.unit})", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
