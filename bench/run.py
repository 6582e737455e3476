"""How fast packed encoders are on this machine: `python bench/run.py`, or `make bench`.

Runs a suite of benches on real text and real weights, verifies every variant before it is timed,
and leaves tables, a summary of ratios, a PNG chart and JSON. `--list` shows what there is.

Exit codes: 0 all verified; 1 a variant failed its verification; 2 something needed is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from pathlib import Path

# Before tokenizers is imported: its threads would count as CPU time of the one-thread rows.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Milliseconds the threads of Intel's OpenMP (in CTranslate2) spin after their work. By default 200:
# they would slow down the variant that is timed next.
os.environ.setdefault("KMP_BLOCKTIME", "1")

HERE = Path(__file__).resolve().parent
BENCHES = (
    "encoder",
    "training",
    "mae",
    "vivit",
    "frozen_in_time",
    "varlen_attn",
    "pad",
    "patch_gather",
    "moe_route",
    "rotary",
    "add_norm",
    "glu",
    "linear",
    "grouped_mm",
    "seg_pool",
    "moe",
    "linear_cross_entropy",
    "linear_kl",
    "linear_seg_max",
    "packed_linear",
    "rank_loss",
    "partial_ranking",
    "integrations",
    "integrations_sentence_transformers",
    "integrations_timm",
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", choices=("quick", "full", "tiny"), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", metavar="PATTERN", help="benches whose name contains or globs this"
    )
    parser.add_argument("--list", action="store_true", help="name the benches and stop")
    parser.add_argument(
        "--threads", type=int, default=min(2, cores), help="of the second measurement on a CPU"
    )
    parser.add_argument(
        "--json", type=Path, help="default: bench/results/SUITE-DEVICE[-PATTERN].json"
    )
    parser.add_argument(
        "--chart", type=Path, help="default: bench/results/SUITE-DEVICE[-PATTERN].png"
    )
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, expected at least 1")
    # A part of a suite does not overwrite the whole.
    part = f"-{re.sub(r'[^A-Za-z0-9]+', '-', args.only).strip('-')}" if args.only else ""
    name = f"{args.suite}-{args.device}{part}"
    args.json = args.json or HERE / "results" / f"{name}.json"
    args.chart = args.chart or HERE / "results" / f"{name}.png"
    return args


def collect(setting, pattern: str | None = None):
    """The specs of a suite whose names fit the pattern."""
    from harness import pick

    modules = (importlib.import_module(name) for name in BENCHES)
    return pick((spec for module in modules for spec in module.specs(setting)), pattern)


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    args = arguments(argv)
    try:
        from harness import MissingPackage, Setting, require

        import encfast  # noqa: F401
    except ModuleNotFoundError as missing:
        print(
            f"bench: could not find the package {missing.name}; `make bench` installs it, or: "
            "pip install 'encfast[bench]'",
            file=sys.stderr,
        )
        return 2
    setting = Setting(args.suite, args.device, args.threads)
    try:
        require(("rich", "matplotlib"))
        specs = collect(setting, args.only)
        if args.list:
            return show(specs)
        if not specs:
            print(f"bench: no bench is named like {args.only!r}; --list names all", file=sys.stderr)
            return 2
        require(module for spec in specs for module in spec.needs)
        check_device(args.device)
    except MissingPackage as missing:
        print(f"bench: {missing}", file=sys.stderr)
        return 2
    return run(specs, setting, args)


def check_device(device: str) -> None:
    """Raises MissingPackage with a sentence if the device cannot be used."""
    from harness import MissingPackage

    from encfast import info

    if device == "cuda" and (why := info.why_no_device()):
        raise MissingPackage(f"--device cuda cannot be used: {why}")


def show(specs) -> int:
    """Prints name, title and variants of each bench."""
    for spec in specs:
        print(f"{spec.name}\n    {spec.title}")
        print(f"    {', '.join(variant.name for variant in spec.variants)}")
    return 0


def run(specs, setting, args: argparse.Namespace) -> int:
    """Runs the benches and reports; returns the exit code."""
    import chart
    import report
    import roof
    import timing
    from harness import run_spec
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from targets import outcomes

    console = report.console()
    start = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("the machine's roof", total=len(specs))
        load = timing.OtherLoad()
        roofs = roof.measure(setting.device)
        env = report.environment(setting, roofs, load.cores())
        console.print(report.describe(env), soft_wrap=True)
        for spec in specs:

            def tell(what: str, name: str = spec.name) -> None:
                progress.update(task, description=f"{name}: {what}")

            results.append(run_spec(spec, setting, roofs, tell))
            console.print(report.table(results[-1], setting))
            progress.advance(task)
        env["cores_busy_with_other_programs"] = load.cores()  # of the whole run
    for line in report.other_load(env):
        console.print(line)
    console.print(report.summary(results, setting))
    if found := outcomes(results):
        console.print(report.target_table(found))
    report.write_json(args.json, results, env)
    chart.draw(args.chart, results, env)
    took = time.perf_counter() - start
    console.print(f"{took:.0f} s. Numbers: {args.json}. Picture: {args.chart}", soft_wrap=True)
    for sentence in report.failures(results):
        console.print(sentence, style="red", markup=False, soft_wrap=True)
    return 1 if report.failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
