"""tools/: what setup.py is made of. Incremental compiling, ISA flags, and the choice of nvcc."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compiler
import cuda_toolkit

ROOT = Path(__file__).parent.parent
TORCH_WITH_CUDA = SimpleNamespace(__version__="2.99.0", version=SimpleNamespace(cuda="13.0"))
TORCH_WITHOUT = SimpleNamespace(__version__="2.99.0+cpu", version=SimpleNamespace(cuda=None))

pytestmark = pytest.mark.quick


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def unit(tmp_path):
    """An (object, command) of a source that includes a header."""
    header, source = tmp_path / "one.h", tmp_path / "one.cpp"
    header.write_text("inline int one() { return 1; }\n")
    source.write_text('#include "one.h"\nint two() { return one() + one(); }\n')
    for path in (header, source):
        os.utime(path, (1000, 1000))
    return str(tmp_path / "out" / "one.o"), [*compiler.CXX, "-c", str(source)]


def made(unit, capfd) -> bool:
    """Compiles; whether there was something to do."""
    compiler.compile_all([unit])
    return "one.o" in capfd.readouterr().out


def test_compiles_only_what_changed(unit, tmp_path, capfd):
    assert made(unit, capfd)
    assert not made(unit, capfd)
    os.utime(tmp_path / "one.h")
    assert made(unit, capfd), "a header changed"
    os.utime(tmp_path / "one.h", (1000, 1000))
    assert not made(unit, capfd)
    obj, command = unit
    assert made((obj, [*command, "-O1"]), capfd), "the command changed"
    os.remove(obj)
    assert made(unit, capfd), "the object is gone"


def test_failed_compile_is_an_error_and_is_tried_again(unit, tmp_path):
    (tmp_path / "one.cpp").write_text("int two( {\n")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            compiler.compile_all([unit])


def test_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert compiler.jobs() == 7
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= compiler.jobs() <= os.cpu_count()


@pytest.mark.skipif(len(compiler.ISAS) == 1, reason="one ISA only on this architecture")
def test_isa_without_compiler_flags_is_left_out(monkeypatch, tmp_path, capsys):
    old = script(tmp_path / "old-cxx", 'case "$*" in *amx*) exit 1;; esac')
    monkeypatch.setattr(compiler, "CXX", [old])
    assert list(compiler.known_isas()) == ["base", "avx2", "avx512", "avx512bf16"]
    assert "no avx512amx kernels" in capsys.readouterr().out


@pytest.mark.parametrize("count", range(1, len(compiler.ISAS) + 1))
def test_dispatch_compiles_with_any_set_of_isas(count):
    built = " ".join(f"X({isa})" for isa in list(compiler.ISAS)[:count])
    include = Path(torch.__file__).parent / "include"
    flags = [f"-DENCFAST_BUILT_ISAS(X)={built}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = [*compiler.CXX, *compiler.FLAGS, "-Werror", *flags, "-isystem", str(include)]
    subprocess.run([*command, "-fsyntax-only", "csrc/bind/isa.cpp"], cwd=ROOT, check=True)


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """An nvcc 13.0 in CUDA_HOME."""
    (tmp_path / "bin").mkdir()
    found = script(tmp_path / "bin/nvcc", "echo Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("ENCFAST_CUDA", raising=False)
    return found


def test_nvcc_that_fits(nvcc):
    assert cuda_toolkit.nvcc_or_reason(TORCH_WITH_CUDA) == (nvcc, None)


def test_nvcc_of_another_minor(nvcc, monkeypatch):
    other = SimpleNamespace(__version__="2.99.0", version=SimpleNamespace(cuda="13.2"))
    reason = "nvcc 13.0 does not match the CUDA 13.2 of PyTorch"
    assert cuda_toolkit.nvcc_or_reason(other) == (None, reason)
    monkeypatch.setenv("ENCFAST_CUDA", "1")
    with pytest.raises(SystemExit, match=f"ENCFAST_CUDA=1, but: {reason}"):
        cuda_toolkit.nvcc_or_reason(other)


def test_reasons_against_cuda(nvcc, monkeypatch):
    assert "has no CUDA" in cuda_toolkit.nvcc_or_reason(TORCH_WITHOUT)[1]
    script(Path(nvcc), "exit 1")
    assert "no working nvcc" in cuda_toolkit.nvcc_or_reason(TORCH_WITH_CUDA)[1]
    monkeypatch.setenv("ENCFAST_CUDA", "0")
    assert "ENCFAST_CUDA=0" in cuda_toolkit.nvcc_or_reason(TORCH_WITH_CUDA)[1]
    monkeypatch.setenv("ENCFAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="ENCFAST_CUDA='yes': expected 0"):
        cuda_toolkit.nvcc_or_reason(TORCH_WITH_CUDA)


def test_nvcc_from_pip(monkeypatch, tmp_path):
    pins = cuda_toolkit.pip_requirements(TORCH_WITH_CUDA)
    assert "nvidia-cuda-nvcc==13.0.*" in pins
    assert all(pin.endswith("==13.0.*") for pin in pins)
    with pytest.raises(SystemExit, match="has no CUDA; nvcc comes from pip for CUDA 13 or later"):
        cuda_toolkit.pip_requirements(TORCH_WITHOUT)
    older = SimpleNamespace(__version__="2.10.0", version=SimpleNamespace(cuda="12.8"))
    with pytest.raises(SystemExit, match=r"PyTorch 2\.10\.0 has CUDA 12\.8; nvcc comes"):
        cuda_toolkit.pip_requirements(older)
    monkeypatch.setattr(cuda_toolkit.sysconfig, "get_path", lambda name: str(tmp_path))
    home = tmp_path / "nvidia" / "cu13"
    with pytest.raises(SystemExit, match=f"no nvcc in {home}/bin"):
        cuda_toolkit.pip_home(TORCH_WITH_CUDA)
    (home / "bin").mkdir(parents=True)
    script(home / "bin" / "nvcc", "exit 0")
    assert cuda_toolkit.pip_home(TORCH_WITH_CUDA) == str(home)


def test_every_cuda_file_is_compiled(nvcc, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = dict(cuda_toolkit.units(nvcc, "8.0;12.0+PTX", "objects"))
    assert made.keys() == {f"objects/{p.relative_to(ROOT)}.o" for p in ROOT.glob("csrc/cuda/*.cu")}
    for command in made.values():
        assert command[0] == nvcc
        assert set(cuda_toolkit.gencode("8.0;12.0+PTX")) < set(command)


def test_gencode():
    assert cuda_toolkit.gencode("8.0;9.0a 12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=[compute_120,sm_120]",
    ]
    with pytest.raises(SystemExit, match="'Ampere' is not like"):
        cuda_toolkit.gencode("Ampere")
