"""Every CUDA file compiles for every architecture without a warning or a register spill, and all of
them within a minute.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from compiler import compile_all
from cuda_toolkit import DEFAULT_ARCHS, ask, find_nvcc, units

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p.relative_to(ROOT) for p in ROOT.glob("csrc/cuda/*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
STRICT = ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,-warn-spills"]
NVCC = find_nvcc()
FIGURES_OF = "release 13.0"  # the nvcc whose figures perf/static holds
WARPS = 8  # of a block, which in csrc/cuda has 256 threads

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="no nvcc: neither a CUDA toolkit nor its wheels"
)


class Compiled(NamedTuple):
    source: Path
    arch: str
    cubin: Path
    log: str  # what ptxas says of every kernel


@pytest.fixture(
    scope="module",
    params=[(source, arch) for source in SOURCES for arch in ARCHS],
    ids=lambda case: f"{case[0].stem}-{case[1]}",
)
def compiled(request, tmp_path_factory) -> Compiled:
    """One file for one architecture; any warning is an error."""
    source, arch = request.param
    folder = tmp_path_factory.mktemp(f"{source.stem}_{arch}")
    command = [NVCC, "-O3", "-std=c++17", "-Icsrc", f"-arch={arch}", *STRICT, "-c", str(source)]
    command += ["-o", str(folder / "out.o"), "--keep", f"--keep-dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert done.returncode == 0, done.stderr
    (cubin,) = folder.glob("*.cubin")
    return Compiled(source, arch, cubin, done.stderr)


def test_compiles_clean(compiled):
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", compiled.log)
    assert spills
    assert set(spills) == {"0"}, compiled.log


def test_figures_are_not_worse(compiled, request):
    """Registers, spills and loops of every kernel, against perf/static."""
    pytest.importorskip("triton")  # brings the disassemblers
    import golden
    from static_report import reports_of_cubin

    name, arch = f"{compiled.source.stem}_cuda", compiled.arch
    if FIGURES_OF not in ask(NVCC, "--version"):
        pytest.skip(f"perf/static holds figures of nvcc, {FIGURES_OF}")
    reports = reports_of_cubin(compiled.cubin.read_bytes(), arch, WARPS)
    assert len(reports) == compiled.log.count("Compiling entry function")
    assert not [problem for found in reports for problem in found.problems]
    if request.config.getoption("--update-static"):
        golden.update(name, arch, reports)
    worse = golden.regressions(name, arch, reports)
    assert not worse


@pytest.mark.slow
def test_the_whole_build_takes_a_minute(tmp_path, monkeypatch, capsys):
    """All files, all architectures and PTX by setup.py's own commands, strict, on two cores."""
    monkeypatch.chdir(ROOT)
    made = units(NVCC, DEFAULT_ARCHS, str(tmp_path))
    strict = [(obj, [*command, *STRICT[:-1]]) for obj, command in made]
    cores, before = os.sched_getaffinity(0), os.times()
    os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        compile_all(strict)
    finally:
        os.sched_setaffinity(0, cores)
    after = os.times()
    wall = after.elapsed - before.elapsed
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    with capsys.disabled():
        print(f"\nall of csrc/cuda for {DEFAULT_ARCHS}: {wall:.1f} s, {cpu:.1f} s of CPU time")
    # On a busy machine the wall clock says nothing; this much work still fits into a minute.
    assert min(wall, cpu) <= 60
