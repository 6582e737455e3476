"""Every test starts from one seed, and memory nobody wrote holds NaN."""

import os

# No test may reach for a hub: what a test needs lies on disk or is made here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors gain nothing from a second thread, and on a busy machine two threads that wait for
# each other cost many times the work. Tests of threading set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(Path(__file__).parent))  # processes.py, bench_schema.py


def pytest_addoption(parser):
    # Here and not in tests/compile: pytest reads options of the outermost folders only.
    parser.addoption(
        "--update-static", action="store_true", help="write perf/static instead of comparing"
    )
    parser.addoption(
        "--on-gpu", action="store_true", help="tests/ops: a GPU serves every op it has kernels for"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` hands out NaN (integers: their maximum), also to the native kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files a fresh clone would have."""
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__"
    )
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "encfast", ignore=ignore)
