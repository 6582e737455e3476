"""The CPU cores under AddressSanitizer + UBSan and ThreadSanitizer, without PyTorch."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from compiler import ISAS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# A driver has the name of the core it runs.
OPS = sorted(path.stem for path in HERE.glob("*.cpp"))

# The ISAs whose memory accesses a sanitizer sees (it does not see AMX), narrowest first, with what
# /proc/cpuinfo must list for them.
NEEDS = {
    "base": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512bf16": {"avx512_bf16"},
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def runnable() -> list[str]:
    """The sanitizable ISAs of this machine, narrowest first."""
    have: set[str] = set()
    if platform.machine() == "x86_64":
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        have = set(next((x for x in cpuinfo if x.startswith("flags")), "").split())
    names: list[str] = []
    for isa, needs in NEEDS.items():
        if isa not in ISAS or not needs <= have:
            break
        names.append(isa)
    return names


def build_and_run(tmp_path: Path, op: str, sanitizer: str, isa: str) -> None:
    program = tmp_path / op
    # Unoptimised: the same accesses, and a fifth of the time to compile.
    options = ("-O0", "-std=c++17", "-fno-math-errno", "-pthread", f"-I{CSRC}", f"-I{HERE}")
    checks = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    command = ["g++", *options, *ISAS[isa], *checks, f"-DENCFAST_ISA={isa}"]
    sources = [str(CSRC / "cpu" / f"{op}.cpp"), str(HERE / f"{op}.cpp")]
    built = subprocess.run([*command, *sources, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("op", OPS)
def test_memory_and_undefined_behaviour(tmp_path: Path, op: str) -> None:
    """No access outside a tensor or workspace, every output written, 1 thread equal to 4."""
    build_and_run(tmp_path, op, "address,undefined", runnable()[-1])


@pytest.mark.parametrize("op", OPS)
def test_threads(tmp_path: Path, op: str) -> None:
    """No data race. The threading is the same in every build; the portable one compiles fastest."""
    build_and_run(tmp_path, op, "thread", "base")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("op", OPS)
def test_every_isa(tmp_path: Path, op: str, isa: str, sanitizer: str) -> None:
    """What the two tests above show of one ISA, for all that this machine runs: `make sanitize`."""
    build_and_run(tmp_path, op, sanitizer, isa)
