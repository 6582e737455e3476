"""The CPU cores under AddressSanitizer + UBSan and ThreadSanitizer, without PyTorch."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DRIVER = Path(__file__).with_name("driver.cpp")
SOURCES = (CSRC / "cpu" / "varlen_attn.cpp", CSRC / "cpu" / "pad.cpp", DRIVER)

X86_AVX2 = ("-mavx2", "-mfma", "-mf16c")
X86_AVX512 = (*X86_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def widest_isa() -> tuple[str, tuple[str, ...]]:
    """The widest ISA of this machine whose memory accesses a sanitizer sees (not AMX)."""
    flags = set()
    if platform.machine() == "x86_64":
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next((x for x in cpuinfo if x.startswith("flags")), "").split())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"} <= flags:
        return "avx512bf16", X86_AVX512
    if {"avx2", "fma", "f16c"} <= flags:
        return "avx2", X86_AVX2
    return "base", ()


def build_and_run(tmp_path: Path, sanitizer: str, isa: str, flags: tuple[str, ...]) -> None:
    program = tmp_path / "driver"
    # Unoptimised: the same accesses, and a fifth of the time to compile.
    options = ("-O0", "-std=c++17", "-fno-math-errno", "-pthread", f"-I{CSRC}")
    checks = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    command = ["g++", *options, *flags, *checks, f"-DENCFAST_ISA={isa}"]
    built = subprocess.run(
        [*command, *map(str, SOURCES), "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_memory_and_undefined_behaviour(tmp_path: Path) -> None:
    """No access outside a tensor or workspace, every output written, 1 thread equal to 4."""
    build_and_run(tmp_path, "address,undefined", *widest_isa())


def test_threads(tmp_path: Path) -> None:
    """No data race. The threading is the same in every build; the portable one compiles fastest."""
    build_and_run(tmp_path, "thread", "base", ())
