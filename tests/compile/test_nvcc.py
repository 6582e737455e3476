"""Every CUDA file compiles for every architecture without a warning or a register spill."""

import re
import subprocess
from pathlib import Path

import pytest

from cuda_toolkit import find_nvcc

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p.relative_to(ROOT) for p in ROOT.glob("csrc/cuda/*.cu"))


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: neither a CUDA toolkit nor its wheels")
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_compiles_clean(source, arch, tmp_path):
    strict = [
        "-Werror",
        "all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror",
        "-Xptxas=-v,-warn-spills",
    ]
    command = [find_nvcc(), "-O3", "-std=c++17", "-Icsrc", f"-arch=sm_{arch}", *strict]
    command += ["-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills
    assert set(spills) == {"0"}, done.stderr
