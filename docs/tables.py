"""Writes the generated parts of README.md: figures, the tables of models and ops, the example.

The figures are those of docs/bench.json, which with its picture comes from

    python bench/run.py --json docs/bench.json --chart docs/bench.png

python docs/tables.py            rewrites README.md in place
python docs/tables.py --check    exits 1 if README.md is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import encfast

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def model_table() -> str:
    """One row per system, its published sizes behind it."""
    rows = ["| system | paper | tasks | variants (parameters) |", "|---|---|---|---|"]
    systems: dict[str, list[str]] = {}
    for name in encfast.list_models():
        systems.setdefault(name.split("/")[0], []).append(name)
    for system, names in systems.items():
        described = sorted((encfast.describe(n) for n in names), key=lambda d: d.parameters)
        info = described[0].info
        sizes = ", ".join(f"`{d.name.split('/')[1]}` {_count(d.parameters)}" for d in described)
        tasks = ", ".join(info.tasks)
        rows.append(
            f"| `{system}` | {info.title} ({info.paper}, {info.year}) | {tasks} | {sizes} |"
        )
    return "\n".join(rows)


def op_table() -> str:
    """One row per op: what it is, and which files hold which of its rooms."""
    rows = ["| op | what | CPU | CUDA |", "|---|---|---|---|"]
    for stem in encfast.ops.OPS:
        cells = (f"[{kind}]({path})" if path else kind for kind, path in op_rooms(stem))
        what = f"[`{stem}`](encfast/ops/{stem}.py) | {op_summary(stem)}"
        rows.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(rows)


def op_summary(stem: str) -> str:
    """The first sentence of the op's module."""
    module = (ROOT / "encfast" / "ops" / f"{stem}.py").read_text()
    return " ".join(re.match(r'"""(.+?)(?:\n\n|""")', module, re.S)[1].split())  # type: ignore[index]


def op_rooms(stem: str) -> list[tuple[str, str | None]]:
    """Kind of the kernel on the CPU and on GPUs, and its file; None: the reference serves."""
    core = f"csrc/cpu/{encfast.ops.LENT_CORES.get(stem, stem)}.cpp"
    cpu = [("C++", core), ("reference", None)]
    gpu = [
        ("Triton", f"encfast/kernels/{stem}.py"),
        ("CUDA C++", f"csrc/cuda/{stem}.cu"),
        ("reference: no kernel", None),
    ]
    return [next(r for r in rooms if not r[1] or (ROOT / r[1]).exists()) for rooms in (cpu, gpu)]


def figures() -> str:
    """The ratios of docs/bench.json and where they come from."""
    run = json.loads((ROOT / "docs" / "bench.json").read_text())
    env, titles = run["environment"], {r["name"]: r["title"] for r in run["results"]}
    versions, threads = env["encfast"]["versions"], env["threads"]
    rows = [
        f"| | encfast | against | one thread, CPU time | {threads} threads, wall time |",
        "|---|---|---|---|---|",
    ]
    for r in strongest(run["ratios"]):
        one, many = f"{r['one']:.2f} x", f"{r['many']:.2f} x" if r["many"] else "-"
        rows.append(f"| {titles[r['spec']]} | {r['ours']} | {r['peer']} | {one} | {many} |")
    peers = ", ".join(f"{name} {which}" for name, which in env["peers"].items() if which)
    busy = env["cores_busy_with_other_programs"] or 0
    where = (
        f"{env['cpu']} with {env['cores']} cores (kernel table `{env['encfast']['cpu']['isa']}`), "
        f"PyTorch {versions['torch']}, {peers}, "
        f"{env['date'][:10]}, suite `{env['suite']}`; other programs kept {busy:.1f} cores busy."
    )
    return f"![throughput](docs/bench.png)\n\n{where}\n\n" + "\n".join(rows)


def strongest(ratios: list[dict]) -> list[dict]:
    """Of each variant of ours the row with the peer that comes closest; row moves left out."""
    found: dict[tuple[str, str], dict] = {}
    for r in ratios:
        key = r["spec"], r["ours"]
        if not r["spec"].startswith("pad/") and (key not in found or r["one"] < found[key]["one"]):
            found[key] = r
    return list(found.values())


def example() -> str:
    """What examples/train_mosaicbert.py does, without its function for the texts."""
    source = (ROOT / "examples" / "train_mosaicbert.py").read_text()
    imports = re.search(r"^from importlib.*?(?=\n\n\ndef )", source, re.M | re.S)
    body = re.search(r"    torch.manual_seed.*?history.append\(.*?\)\n", source, re.S)
    if not imports or not body:
        raise SystemExit("examples/train_mosaicbert.py no longer has the parts README.md shows")
    used = imports[0].replace("from pathlib import Path\n", "")  # by the texts alone
    return f"```python\n{used}\n\n{textwrap.dedent(body[0])}```"


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def rendered(text: str) -> str:
    """The README with its generated parts made anew."""
    parts = {
        "bench": figures(),
        "example": example(),
        "ops": op_table(),
        "models": model_table(),
    }
    return filled(text, parts, "docs/tables.py")


def filled(text: str, parts: dict[str, str], source: str) -> str:
    """`text` with each part between its markers, which name the script that `source` is."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin ({source}) -->", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"the page lacks the markers {begin} ... {end}")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"
    return text


def run(page: Path, rendered: Callable[[str], str], source: str) -> int:
    """Rewrites a page, or with --check says whether it is stale; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Writes the generated parts of {page.name}.")
    parser.add_argument("--check", action="store_true", help=f"only say whether {page} is stale")
    check = parser.parse_args().check
    now = page.read_text()
    fresh = rendered(now)
    if check:
        if fresh != now:
            print(f"{page.name} is stale; run: python {source}")
        return int(fresh != now)
    page.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(run(README, rendered, "docs/tables.py"))
