"""The tests of an op share its cases; pytest's importlib mode leaves the path to us."""

import contextlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import on_gpu


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--on-gpu"):
        return
    host = [item for item in items if item.get_closest_marker("host")]
    config.hook.pytest_deselected(items=host)
    items[:] = [item for item in items if item not in host]


@pytest.fixture(scope="session", autouse=True)
def _gpu_serves(request):
    asked = request.config.getoption("--on-gpu")
    with on_gpu.gpu_serves() if asked else contextlib.nullcontext():
        yield
