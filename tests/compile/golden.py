"""Figures of the kernels of quick calls as they were when last written down, in perf/static.

A kernel may get better unnoticed, but not worse. After a change that is meant, or with another
version of Triton or nvcc:

    pytest -m "" tests/compile --update-static
"""

import json
from pathlib import Path

from static_report import Report

FOLDER = Path(__file__).parents[2] / "perf" / "static"
# The scheduler moves a few instructions when a kernel is merely rearranged.
MORE_REGISTERS, LONGER_LOOP = 8, 1.1


def update(call: str, arch: str, reports: list[Report]) -> None:
    figures = _read(call)
    figures[arch] = [found.as_json() for found in reports]
    FOLDER.mkdir(parents=True, exist_ok=True)
    # A line per kernel: a change reads well in a diff, and the files stay short.
    sections = [
        f'"{name}": [\n' + ",\n".join(json.dumps(k, sort_keys=True) for k in kernels) + "\n]"
        for name, kernels in sorted(figures.items())
    ]
    _path(call).write_text("{\n" + ",\n".join(sections) + "\n}\n")


def regressions(call: str, arch: str, reports: list[Report]) -> list[str]:
    """What is worse than in the file, a line each."""
    known = _read(call).get(arch)
    if known is None:
        return [f"{_path(call).name} knows nothing of {arch}: run with --update-static"]
    names = [old["name"] for old in known]
    if names != [found.name for found in reports]:
        return [f"launched {[found.name for found in reports]}, expected {names}"]
    return [
        f"{call} on {arch}, {found.name}: {line}"
        for old, found in zip(known, reports, strict=True)
        for line in _worse(old, found)
    ]


def _worse(old: dict, found: Report) -> list[str]:
    lines = []
    if found.registers > old["registers"] + MORE_REGISTERS:
        lines.append(f"{found.registers} registers, were {old['registers']}")
    if found.spill_bytes > old["spill_bytes"]:
        lines.append(f"{found.spill_bytes} bytes spilt, were {old['spill_bytes']}")
    if found.shared > old["shared"]:
        lines.append(f"{found.shared} bytes of shared memory, were {old['shared']}")
    if found.occupancy < old["occupancy"]:
        lines.append(f"occupancy {found.occupancy} by {found.limiter}, was {old['occupancy']}")
    length, old_length = sum(found.loop.values()), sum(old["loop"].values())
    if length > old_length * LONGER_LOOP:
        lines.append(f"{length} instructions in the main loop, were {old_length}")
    return lines


def _read(call: str) -> dict:
    return json.loads(_path(call).read_text()) if _path(call).exists() else {}


def _path(call: str) -> Path:
    return FOLDER / f"{call}.json"
