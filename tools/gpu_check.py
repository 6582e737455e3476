"""All that a machine with a GPU can tell of encfast: `make gpu-check`.

    1. every op against its float64 reference, forward and backward: the tests of tests/ops with the
       GPU in the CPU's place, and those of tests/gpu
    2. compute-sanitizer (memcheck, racecheck) over a part of these, where it is installed
    3. the benches against flash-attn (where installed), SDPA, flex_attention and PyTorch's
       varlen_attn

writes perf/gpu/DEVICE.json: what passed, what failed, every figure, and where they come from.
Exit codes: 0 all passed; 1 something failed; 2 this machine cannot run it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "ops against float64": ["tests/ops", "--on-gpu"],
    "streams, graphs, devices, sizes": ["tests/gpu", "-m", "cuda"],
}
# A part that meets every kernel in under a minute; the sanitizer makes it tens of times slower.
SANITIZED = ["tests/gpu", "-m", "cuda", "-k", "same_bits or find_rows"]
# Ops that have no kernel for GPUs: their reference serves there.
CPU_ALONE = ("packed_linear", "linear_seg_max", "partial_ranking")
SANITIZERS = ("memcheck", "racecheck")


def why_not() -> str | None:
    """Why this machine cannot run the check, with the command that helps."""
    import torch

    from encfast import info, ops

    if reason := info.why_no_device():
        return f"{reason}; PyTorch {torch.__version__} is installed here"
    missing = {stem: ops.backends(stem)["cuda"] for stem in ops.OPS if stem not in CPU_ALONE}
    missing = {stem: who for stem, who in missing.items() if who.startswith("reference")}
    return "; ".join(f"{stem} is served by the {who}" for stem, who in missing.items()) or None


def run_tests(args: list[str]) -> dict:
    """pytest on `args`: its exit code, what passed and was skipped, the names of what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", *args, f"--junit-xml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():
            return {"exit_code": code, "passed": 0, "failed": ["pytest wrote no report"]}
        return {"exit_code": code, **counted(report.read_text())}


def counted(junit: str) -> dict:
    """Figures of a JUnit report."""
    cases = list(ET.fromstring(junit).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{c.get('classname')}::{c.get('name')}" for c in bad],
    }


def sanitize(tool: str) -> dict:
    """compute-sanitizer's verdict on SANITIZED."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    # PyTorch's pool would hide accesses behind the end of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, "-m", "pytest", "-q", *SANITIZED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    print(done.stdout[-2000:])
    summary = re.findall(r"========= (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", done.stdout)
    return {"exit_code": done.returncode, "summary": summary[-1] if summary else "none"}


def bench(suite: str) -> dict:
    """What bench/run.py measures on the GPU, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report, chart = Path(folder, "bench.json"), Path(folder, "bench.png")
        command = [sys.executable, "bench/run.py", "--device", "cuda", "--suite", suite]
        command += ["--json", str(report), "--chart", str(chart)]
        code = subprocess.run(command, cwd=ROOT).returncode
        found = json.loads(report.read_text()) if report.exists() else {}
        return {"exit_code": code, **found}


def device() -> dict:
    """What the figures belong to."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
    }


def failed(found: dict) -> list[str]:
    """The stages that did not pass."""
    stages = found["tests"] | found["sanitizers"] | {"bench": found["bench"]}
    return [name for name, stage in stages.items() if stage["exit_code"] != 0]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("tiny", "quick", "full"), default="quick")
    suite = parser.parse_args().suite
    if why := why_not():
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    os.environ["ENCFAST_REQUIRE_NATIVE"] = "1"
    where = device()
    found = {"device": where, "tests": {name: run_tests(args) for name, args in TESTS.items()}}
    tools = SANITIZERS if shutil.which("compute-sanitizer") else ()
    found["sanitizers"] = {tool: sanitize(tool) for tool in tools}
    del os.environ["ENCFAST_REQUIRE_NATIVE"]  # whole models use ops that only CPUs have kernels for
    found["bench"] = bench(suite)
    out = ROOT / "perf" / "gpu" / f"{re.sub('[^A-Za-z0-9]+', '-', where['name'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"gpu-check: {out.relative_to(ROOT)}; failed: {', '.join(failed(found)) or 'nothing'}")
    return 1 if failed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
