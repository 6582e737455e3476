"""The bench as it is run: every tiny variant, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_schema import check_schema

RUN = Path(__file__).resolve().parents[1] / "bench" / "run.py"


def test_tiny_suite_end_to_end(tmp_path):
    """All tiny variants pass their gates; tables, summary, JSON and picture come out.

    In a process of its own: the peers bring OpenMP runtimes whose threads a later fork (of a data
    loader's worker) did not survive.
    """
    for package in ("transformers", "rich", "matplotlib"):
        pytest.importorskip(package, reason="peers, report and chart need them")
    paths = {"json": tmp_path / "deep" / "x.json", "chart": tmp_path / "deep" / "x.png"}
    argv = [text for kind, path in paths.items() for text in (f"--{kind}", str(path))]
    command = [sys.executable, str(RUN), "--suite", "tiny", "--threads", "2", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encfast fp32 / SDPA fp32 loop" in done.stdout and "GF/s" in done.stdout
    assert paths["chart"].read_bytes().startswith(b"\x89PNG")
    check_schema(json.loads(paths["json"].read_text()))
