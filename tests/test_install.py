"""Installing, importing and the page of encfast.info, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import encfast
from encfast import _load, info

ROOT = Path(__file__).parent.parent
needs_library = pytest.mark.skipif(_load.error is not None, reason=f"not compiled: {_load.error}")


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Runs the interpreter of this test away from the checkout, without encfast's variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ENCFAST_", "PYTHON"))}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)


def succeed(code: str, cwd: Path, **env: str) -> str:
    done = python("-c", code, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fail(code: str, cwd: Path, **env: str) -> str:
    done = python("-c", code, cwd=cwd, **env)
    assert done.returncode == 1, f"{done.returncode}: {done.stdout}"
    return done.stderr


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder that holds encfast without its compiled libraries; for PYTHONPATH."""
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "encfast", tmp_path / "encfast", ignore=ignore)
    return tmp_path


# Importing.


@pytest.mark.quick
def test_import_is_light(tmp_path):
    """No optional package, installed or not, no model, no GPU driver: import is safe anywhere."""
    code = """
import sys, torch
before = set(sys.modules)
import encfast
heavy = {"triton", "transformers", "sentence_transformers", "tokenizers", "matplotlib", "rich"}
print(sorted({m.split(".")[0] for m in set(sys.modules) - before} & heavy))
print([m for m in sys.modules if m.startswith("encfast.models")])
print(torch.cuda.is_initialized(), "libcuda.so" in open("/proc/self/maps").read())
"""
    assert succeed(code, tmp_path).splitlines() == ["[]", "[]", "False False"]


WITHOUT_TRITON = """
import sys, time, torch
sys.modules["triton"] = None
start = time.perf_counter()
import encfast
print(time.perf_counter() - start)
x = torch.arange(1.0, 13).reshape(2, 6).requires_grad_()
encfast.ops.glu(x, activation="relu").sum().backward()
assert x.grad.tolist() == [[4, 5, 6, 1, 2, 3], [10, 11, 12, 7, 8, 9]], x.grad
"""


@pytest.mark.quick
def test_import_without_triton_or_driver_is_quick(tmp_path):
    """At most 1.5 s on top of PyTorch, the best of three on a busy machine; ops then work."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    seconds = [float(succeed(WITHOUT_TRITON, tmp_path, **hidden)) for _ in range(3)]
    print(f"import encfast: {min(seconds):.2f} s over import torch")
    assert min(seconds) <= 1.5


# Ends with what the reference computes, so that the fallback is seen to serve.
REPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import encfast
print([str(w.message) for w in caught if "encfast" in str(w.message)])
print(encfast._load.error)
warnings.simplefilter("ignore")
import torch
print(encfast.ops.gather_rows(torch.arange(3), torch.tensor([2, -1, 0])).tolist())
"""


def reported(package: Path) -> str:
    """The one warning of importing `package`, after checking that the reference serves."""
    warned, error, rows = succeed(REPORT, package, PYTHONPATH=str(package)).splitlines()
    assert warned == repr([error])
    assert rows == "[2, 0, 0]"
    return error


@pytest.mark.quick
def test_import_without_library(package):
    error = reported(package)
    assert "not compiled" in error
    assert "running 2." in error
    assert "Rebuild: pip install --no-build-isolation" in error


@needs_library
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encfast", "0.0.0", "the library is of encfast 0.0.0, this is"),
        ("torch_at_least", "99.1", "the library needs PyTorch 99.1 or later"),
        ("machine", "vax", "the library is for vax, this is"),
    ],
)
def test_build_record_is_checked(package, field, value, message):
    record = _load.record | {field: value}
    (package / "encfast" / "_build_info.json").write_text(json.dumps(record))
    shutil.copy(_load.find_library(), package / "encfast")
    assert message in reported(package)


@needs_library
@pytest.mark.parametrize("content", ["no library", ""], ids=["garbage", "empty"])
def test_broken_library(package, content):
    record = _load.record | {"torch": "1.2.3"}
    (package / "encfast" / "_build_info.json").write_text(json.dumps(record))
    (package / "encfast" / _load.find_library().name).write_text(content)
    assert "(built with PyTorch 1.2.3, running 2." in reported(package)


@needs_library
def test_missing_record(package):
    shutil.copy(_load.find_library(), package / "encfast")
    assert "_build_info.json" in reported(package)


@pytest.mark.quick
def test_require_native(package):
    env = {"PYTHONPATH": str(package), "ENCFAST_REQUIRE_NATIVE": "1"}
    assert "ImportError: encfast runs on its slow reference kernels" in fail(
        "import encfast", package, **env
    )


def test_checkout_on_the_path_shadows_no_distribution(tmp_path):
    """A top-level folder `kernels` once stood in for the distribution transformers probes for."""
    pytest.importorskip("transformers")
    code = "from transformers.utils import is_kernels_available as a; print(a())"
    outside = succeed(code, tmp_path)
    assert succeed(code, tmp_path, PYTHONPATH=str(ROOT)) == outside


# The ISA in use.


@needs_library
@pytest.mark.parametrize("isa", _load.record.get("isas", []))
def test_forced_isa(tmp_path, isa):
    """Each ISA of the build either serves, or says by name that this machine cannot run it."""
    code = "import torch, encfast; print(torch.ops.encfast.cpu_isa())"
    if isa in info.cpu()["usable_isas"]:
        assert succeed(code, tmp_path, ENCFAST_CPU_ISA=isa) == isa
    else:
        assert f"ENCFAST_CPU_ISA='{isa}': this machine cannot run it" in fail(
            code, tmp_path, ENCFAST_CPU_ISA=isa
        )


@needs_library
def test_unknown_isa(tmp_path):
    error = fail("import encfast", tmp_path, ENCFAST_CPU_ISA="avx1024")
    assert "ValueError: ENCFAST_CPU_ISA='avx1024': the library was not built with it" in error
    assert "expected one of base" in error


@needs_library
def test_unknown_isa_without_package(tmp_path):
    """The compiled library by itself refuses as well, instead of choosing another ISA."""
    load = f"import torch; torch.ops.load_library({str(_load.find_library())!r})"
    error = fail(f"{load}; torch.ops.encfast.cpu_isa()", tmp_path, ENCFAST_CPU_ISA="avx1024")
    assert "RuntimeError" in error
    assert "ENCFAST_CPU_ISA='avx1024': not an ISA that this build has" in error


@needs_library
@pytest.mark.quick
def test_widest_isa_is_chosen():
    if os.environ.get("ENCFAST_CPU_ISA"):
        pytest.skip("ENCFAST_CPU_ISA forces one")
    assert info.cpu()["isa"] == info.cpu()["usable_isas"][-1]


# Linux refuses the tile registers to a process with a signal stack too small to save them on.
SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import torch, encfast
print(torch.ops.encfast.cpu_isa())
"""


@needs_library
@pytest.mark.skipif("avx512amx" not in info.cpu()["usable_isas"], reason="no AMX here")
def test_refused_tile_registers(tmp_path):
    """Without the permission the next narrower ISA serves, and AMX cannot be forced."""
    assert succeed(SMALL_SIGNAL_STACK, tmp_path) == "avx512bf16"
    error = fail(SMALL_SIGNAL_STACK, tmp_path, ENCFAST_CPU_ISA="avx512amx")
    assert "ENCFAST_CPU_ISA='avx512amx': this machine cannot run it" in error


# encfast.info.


@pytest.mark.quick
def test_info_text():
    text = info.describe(info.collect())
    assert f"encfast {encfast.__version__}" in text
    for name in (*(f"op {op}" for op in encfast.ops.OPS), *info.VARIABLES):
        assert f"\n{name} " in text


def test_info_command(package):
    """Text and JSON, on an install without compiled operators too."""
    done = python("-m", "encfast.info", "--json", cwd=package)
    assert done.returncode == 0, done.stderr
    page = json.loads(done.stdout)
    assert page["versions"]["encfast"] == encfast.__version__
    assert page["library"]["loaded"] is False
    assert "not compiled" in page["library"]["why_not"]
    assert set(page["ops"]) == set(encfast.ops.OPS)
    text = python("-m", "encfast.info", cwd=package).stdout
    assert "NOT loaded" in text
    assert "reference" in text


@pytest.mark.quick
def test_every_variable_is_listed():
    """encfast.info and README name every ENCFAST_* that the sources read; six at most."""
    sources = [*ROOT.glob("encfast/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "setup.py"]
    sources += [*ROOT.glob("csrc/bind/*")]
    text = "\n".join(p.read_text() for p in sources)
    read = {w for w in text.replace('"', "\n").split("\n") if w.startswith("ENCFAST_")}
    assert {w for w in read if w.isidentifier()} == set(info.VARIABLES)
    assert len(info.VARIABLES) <= 6
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in info.VARIABLES if name not in readme]


# Building.


def backend(call: str, cwd: Path, **env: str) -> None:
    """Calls the build backend where PyTorch cannot be imported."""
    blocked = "import sys; sys.modules['torch'] = None"
    succeed(f"{blocked}; from setuptools import build_meta; build_meta.{call}", cwd, **env)


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    backend(f"build_sdist({str(out)!r})", checkout)
    return next(out.glob("*.tar.gz"))


def test_sdist_holds_all_sources(sdist, checkout):
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc", "tools", "encfast")
    wanted = [p for folder in folders for p in checkout.glob(f"{folder}/**/*.*")]
    wanted += [checkout / name for name in ("setup.py", "pyproject.toml", "LICENSE", "Makefile")]
    sources = {str(p.relative_to(checkout)) for p in wanted if p.suffix != ".pyc"}
    missing = sources - names
    assert not missing
    assert not [n for n in names if n.endswith(".so") or "_build_info" in n]


def test_wheel_without_compiler(sdist, tmp_path):
    """No compiler and no PyTorch at hand: the pure Python package still installs."""
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    backend(f"build_wheel({str(tmp_path)!r})", source, CXX="no-such-compiler")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "encfast").glob("**/*.py")}
    assert modules | {"encfast/py.typed"} <= names
    assert not [n for n in names if n.startswith(("tests/", "tools/", "csrc/"))]


@pytest.mark.slow
def test_wheel_from_sdist(sdist, tmp_path):
    """A wheel compiled from the sdist alone loads and runs its kernels."""
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target"]
    done = python(*command, str(tmp_path / "site"), str(sdist), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    env = {"PYTHONPATH": str(tmp_path / "site"), "ENCFAST_REQUIRE_NATIVE": "1"}
    code = "import encfast, encfast._host; print(encfast.__file__)"
    assert succeed(code, tmp_path, **env).startswith(str(tmp_path / "site"))


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_names_the_package_it_cannot_get(checkout):
    """Without a network and without cached packages, the message says what is missing."""
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE"))} | offline
    command = ["make", "lint", f"PY={sys.executable}", "TORCH=torch==2.13.0"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "encfast: could not get torch==2.13.0 (no network?)" in done.stderr
