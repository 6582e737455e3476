"""Triton's interpreter runs the kernels on CPU tensors, in a process of its own (`make test`)."""

import os
import sys
from pathlib import Path

# The cases of tests/ops serve here too.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import bf16

    bf16.install()
