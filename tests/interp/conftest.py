"""Triton's interpreter runs the kernels on CPU tensors, in a process of its own (`make test`)."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

# The cases of tests/ops serve here too.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import bf16

    bf16.install()


@pytest.fixture(scope="module")
def triton_serves_attention():
    """encfast.ops.varlen_attn calls the Triton launchers on CPU tensors, behind its own checks and
    autograd: the cases of tests/ops serve the kernels too."""
    from encfast.kernels import varlen_attn as kernels

    library = torch.library.Library("encfast", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that a kernel is overridden
        library.impl("varlen_attn", kernels.varlen_attn, "CPU", allow_override=True)
        library.impl("varlen_attn_bwd", kernels.varlen_attn_bwd, "CPU", allow_override=True)
    yield
    library._destroy()
