"""Loads the compiled operators, encfast/_ops*.so, once.

Importing encfast never fails for want of them: a library that is missing or does not load leaves
the reference kernels, one warning that says why and how to rebuild, and `error`.
ENCFAST_REQUIRE_NATIVE=1 makes that an ImportError. An ENCFAST_CPU_ISA that is not to be had is an
error in any case.
"""

import json
import os
import platform
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from encfast._version import __version__

PACKAGE = Path(__file__).resolve().parent

error: ImportError | None = None  # why the compiled operators are not in use


def read_record() -> dict[str, Any]:
    """What setup.py wrote down about the build; empty without a compiled library."""
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


record = read_record()


def rebuild_command() -> str:
    """The command that compiles encfast again for the PyTorch that is running."""
    checkout = PACKAGE.parent
    if (checkout / "setup.py").is_file():
        return f"pip install --no-build-isolation --no-deps -e {checkout}"
    return "pip install --no-build-isolation --no-deps --force-reinstall --no-binary :all: encfast"


def find_library() -> Path:
    """The compiled library; ImportError unless it is there and its build record fits."""
    found = [p for s in EXTENSION_SUFFIXES if (p := PACKAGE / f"_ops{s}").is_file()]
    if not found:
        raise ImportError("encfast/_ops was not compiled for this Python")
    if not record:
        raise ImportError("encfast/_build_info.json, the record of the build, is missing")
    if record["encfast"] != __version__:
        raise ImportError(f"the library is of encfast {record['encfast']}, this is {__version__}")
    if record["machine"] != platform.machine():
        raise ImportError(f"the library is for {record['machine']}, this is {platform.machine()}")
    oldest = tuple(map(int, record["torch_at_least"].split(".")))
    if tuple(map(int, torch.__version__.split(".")[:2])) < oldest:
        raise ImportError(f"the library needs PyTorch {record['torch_at_least']} or later")
    return found[0]


def check_forced_isa() -> None:
    """ValueError if ENCFAST_CPU_ISA is set and names no ISA of this build and machine."""
    forced = os.environ.get("ENCFAST_CPU_ISA")
    usable = torch.ops.encfast.cpu_isas().split(",")
    if forced and forced not in usable:
        built = forced in record["isas"]
        why = "this machine cannot run it" if built else "the library was not built with it"
        raise ValueError(
            f"ENCFAST_CPU_ISA={forced!r}: {why}; expected one of {', '.join(usable)}, or nothing "
            "for the widest"
        )


def load() -> ImportError | None:
    """Loads the library; returns why it cannot, or raises that under ENCFAST_REQUIRE_NATIVE=1."""
    try:
        torch.ops.load_library(find_library())
    except (ImportError, OSError, RuntimeError) as cause:
        failed = ImportError(
            f"encfast runs on its slow reference kernels: {cause} (built with PyTorch "
            f"{record.get('torch', 'nothing')}, running {torch.__version__}). "
            f"Rebuild: {rebuild_command()}"
        )
        if os.environ.get("ENCFAST_REQUIRE_NATIVE") == "1":
            raise failed from cause
        warnings.warn(str(failed), RuntimeWarning, stacklevel=2)
        return failed
    check_forced_isa()
    return None


error = load()
