"""`python -m encfast.info [--json]`: what is installed, what was built, and who serves each op.

The page to attach to a bug report.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from encfast import _load, ops
from encfast._version import __version__

# Every environment variable encfast reads, and where.
VARIABLES = {
    "ENCFAST_AUTOTUNE": "1: GPUs time the tiles of products once (encfast/kernels/_tune.py)",
    "ENCFAST_CHECK": "1: assert the values of CUDA tensors too, without waiting (encfast/ops)",
    "ENCFAST_CPU_ISA": "forces one of the usable CPU ISAs, read once (csrc/bind/isa.cpp)",
    "ENCFAST_CUDA": "build only; 0: no CUDA, 1: CUDA or an error (tools/cuda_toolkit.py)",
    "ENCFAST_REQUIRE_NATIVE": "1: an error, not reference kernels (encfast, setup.py)",
}


def collect() -> dict[str, Any]:
    """Everything this page shows, as JSON-serialisable values."""
    return {
        "versions": {
            "encfast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": installed("numpy"),
            "triton": installed("triton"),
            "transformers": installed("transformers"),
        },
        "library": {
            "loaded": _load.error is None,
            "why_not": None if _load.error is None else str(_load.error),
            "build": _load.record or None,
            "rebuild": _load.rebuild_command(),
        },
        "cpu": cpu(),
        "cuda": cuda(),
        "ops": {stem: ops.backends(stem) for stem in ops.OPS},
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def installed(distribution: str) -> str | None:
    """Version of a distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """The ISA in use, those this build and machine could use, and the threads of PyTorch."""
    loaded = _load.error is None
    return {
        "isa": torch.ops.encfast.cpu_isa() if loaded else None,
        "usable_isas": torch.ops.encfast.cpu_isas().split(",") if loaded else [],
        "built_isas": _load.record.get("isas", []),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def cuda() -> dict[str, Any]:
    """Whether CUDA kernels were built, for what, and whether a GPU is there to run them."""
    record = _load.record
    return {
        "built_with": record.get("cuda"),
        "built_archs": record.get("cuda_archs"),
        "why_not_built": record.get("cuda_why_not", "encfast was not compiled"),
        "torch_cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "why_no_device": why_no_device(),
    }


def why_no_device() -> str | None:
    """Why PyTorch sees no GPU, in its own words where it has some; None when it sees one."""
    if not torch.backends.cuda.is_built():  # true of PyTorch for ROCm too
        return "this PyTorch has no CUDA"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as cause:
        return str(cause).splitlines()[0]
    return "no GPU is visible"


def describe(info: dict[str, Any]) -> str:
    """`info`, what `collect()` returns, as text."""
    library, build = info["library"], info["library"]["build"]
    cpu, cuda = info["cpu"], info["cuda"]
    versions = [f"{k} {v or 'not installed'}" for k, v in info["versions"].items()]
    origin = (
        "-"
        if not build
        else "torch {torch}, python {python}, {compiler}, git {git}".format_map(build)
    )
    built = cuda["why_not_built"] or f"CUDA {cuda['built_with']} for {cuda['built_archs']}"
    rows = [
        ("versions", ", ".join(versions)),
        ("library", "loaded" if library["loaded"] else f"NOT loaded: {library['why_not']}"),
        ("built with", origin),
        ("CPU", f"{cpu['isa'] or 'reference'} in use, {cpu['threads']} threads, {cpu['machine']}"),
        ("CPU ISAs", f"usable {_listed(cpu['usable_isas'])}; built {_listed(cpu['built_isas'])}"),
        ("CUDA kernels", built if cuda["built_with"] else f"not built: {built}"),
        ("CUDA devices", cuda["why_no_device"] or _listed(cuda["devices"])),
        *((f"op {op}", served(devices)) for op, devices in info["ops"].items()),
        *((name, _setting(name, value)) for name, value in info["environment"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _listed(names: list[str]) -> str:
    return " ".join(names) or "none"


def served(devices: dict[str, str]) -> str:
    """`devices`, of `ops.backends`, with the languages of kernels in place of their kinds."""
    languages = {"cpu": {"native": "C++"}, "cuda": {"native": "CUDA C++", "triton": "Triton"}}
    return "; ".join(f"{device}: {languages[device].get(b, b)}" for device, b in devices.items())


def _setting(name: str, value: str | None) -> str:
    return f"{'not set' if value is None else repr(value)} ({VARIABLES[name]})"


def main() -> None:
    """Prints `collect()`, as text or, with --json, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m encfast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for machines")
    info = collect()
    print(json.dumps(info, indent=1) if parser.parse_args().json else describe(info))


if __name__ == "__main__":
    main()
