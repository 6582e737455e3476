"""`make wheel-cuda`: one wheel, compiled by an nvcc from pip, serves every PyTorch from 2.10 on.

Each PyTorch gets a fresh environment of several GB, removed again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cuda_toolkit import DEFAULT_ARCHS

ROOT = Path(__file__).parent.parent
MAKEFILE = dict(re.findall(r"^(\w+) \?= (.*)$", (ROOT / "Makefile").read_text(), re.M))
NEWEST = MAKEFILE["TORCH_CUDA"]
TORCHES = ["torch==2.10.0", NEWEST, f"{MAKEFILE['TORCH']}+cpu"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("make"), reason="no make"),
]


def run(*command, cwd: Path, **env: str) -> str:
    """Output of a command without encfast's and make's variables; skips where pip finds nothing."""
    taken = ("ENCFAST_", "PYTHON", "MAKE", "CUDA", "TORCH_CUDA_ARCH_LIST")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean | env, capture_output=True, text=True
    )
    if missing := re.search(r"^ERROR: No matching distribution found for (.*)", done.stderr, re.M):
        pytest.skip(f"pip cannot get {missing[1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """What `make wheel-cuda` leaves in dist/cuda, made where every nvcc but pip's fails."""
    broken = tmp_path_factory.mktemp("toolkit")
    (broken / "bin").mkdir()
    (broken / "bin" / "nvcc").write_text("#!/bin/sh\nexit 9\n")
    (broken / "bin" / "nvcc").chmod(0o755)
    path = f"{broken / 'bin'}{os.pathsep}{os.environ['PATH']}"
    try:
        make = ["make", "wheel-cuda", f"PY={sys.executable}"]
        run(*make, cwd=checkout, PATH=path, CUDA_HOME=str(broken))
    finally:
        shutil.rmtree(checkout / "build", ignore_errors=True)
    (made,) = (checkout / "dist" / "cuda").glob("*.whl")
    return made


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    yield tmp_path / "venv"
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.parametrize("torch", TORCHES)
def test_every_cpu_op_runs(wheel, environment, torch, tmp_path):
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", torch, wheel, cwd=tmp_path)
    found = json.loads(run(python, ROOT / "tests/ops/every_op.py", cwd=tmp_path))
    assert Path(found["file"]).is_relative_to(environment)
    assert found["versions"]["torch"].startswith(torch.removeprefix("torch=="))
    assert found["done"].keys() == found["ops"].keys()
    assert found["library"]["loaded"], found["library"]["why_not"]
    assert all(devices["cpu"] == "native" for devices in found["ops"].values())

    # What the library holds, and what becomes of it under this PyTorch.
    cuda, text = found["cuda"], run(python, "-m", "encfast.info", cwd=tmp_path)
    assert (cuda["built_archs"], cuda["why_not_built"]) == (DEFAULT_ARCHS, None)
    assert re.search(rf"^CUDA kernels +CUDA {cuda['built_with']} for ", text, re.M)
    if torch == NEWEST:
        assert cuda["built_with"] == cuda["torch_cuda"]
    if torch.endswith("+cpu"):
        assert cuda["torch_cuda"] is None
        assert cuda["why_no_device"] == "this PyTorch has no CUDA"
        assert all(devices["cuda"].startswith("reference: ") for devices in found["ops"].values())
        assert re.search("PyTorch.* CUDA", found["ops"]["pad"]["cuda"])
    else:
        assert found["ops"]["pad"]["cuda"] == "native"
    print(f"{found['versions']['torch']} (CUDA {cuda['torch_cuda']}): {found['done']}\n{text}")


def test_machine_code_for_every_architecture(wheel, tmp_path):
    """Of each CUDA file: what DEFAULT_ARCHS names, and PTX for what comes after."""
    triton = pytest.importorskip("triton")  # brings a disassembler
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with zipfile.ZipFile(wheel) as packed:
        (library,) = (name for name in packed.namelist() if name.startswith("encfast/_ops"))
        packed.extract(library, tmp_path)
    listed = run(cuobjdump, "--list-elf", "--list-ptx", library, cwd=tmp_path)
    held = sorted(re.findall(r"\.(sm_\d+)\.(cubin|ptx)", listed))
    archs = [arch.replace(".", "") for arch in DEFAULT_ARCHS.split(";")]
    wanted = [(f"sm_{arch.removesuffix('+PTX')}", "cubin") for arch in archs]
    wanted += [(f"sm_{a.removesuffix('+PTX')}", "ptx") for a in archs if a.endswith("+PTX")]
    assert held == sorted(wanted * len(list(ROOT.glob("csrc/cuda/*.cu")))), listed
