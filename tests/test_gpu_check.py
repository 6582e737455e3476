"""tools/gpu_check.py: what it counts, what it calls failed, and what it says without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.quick

JUNIT = """<testsuites><testsuite>
  <testcase classname="tests.gpu.test_gpu" name="test_a" />
  <testcase classname="tests.gpu.test_gpu" name="test_b"><failure message="no" /></testcase>
  <testcase classname="tests.gpu.test_gpu" name="test_c"><skipped message="one GPU" /></testcase>
  <testcase classname="tests.gpu.test_gpu" name="test_d"><error message="no" /></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted():
    failed = ["tests.gpu.test_gpu::test_b", "tests.gpu.test_gpu::test_d"]
    assert gpu_check.counted(JUNIT) == {"passed": 1, "skipped": 1, "failed": failed}


def test_a_run_of_pytest_is_reported(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_yes(): pass\ndef test_no(): assert False\n")
    found = gpu_check.run_tests([str(tmp_path)])
    assert found["exit_code"] == 1 and found["passed"] == 1
    assert [name.endswith("test_it::test_no") for name in found["failed"]] == [True]
    assert gpu_check.run_tests([str(tmp_path / "absent")])["exit_code"] != 0


def test_a_stage_that_exits_with_an_error_has_failed():
    stages = {"tests": {"ops": {"exit_code": 0}}, "sanitizers": {"memcheck": {"exit_code": 1}}}
    assert gpu_check.failed(stages | {"bench": {"exit_code": 1}}) == ["memcheck", "bench"]
    assert gpu_check.failed(stages | {"sanitizers": {}, "bench": {"exit_code": 0}}) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    command = [sys.executable, "tools/gpu_check.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: ") and torch.__version__ in done.stderr
