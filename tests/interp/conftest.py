"""Triton's interpreter runs the kernels on CPU tensors, in a process of its own (`make test`)."""

import importlib
import os
import sys
from pathlib import Path

import pytest

# The cases of tests/ops serve here too.
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
sys.path.insert(0, str(Path(__file__).parent))

import cpu_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import bf16
    import products

    products.install()
    bf16.install()  # hands it bfloat16 as float32


def _serving(launchers, *ops):
    """The dispatcher ops call the Triton launchers of their name."""
    with cpu_kernels.replaced({op: getattr(launchers, op) for op in ops}):
        yield


@pytest.fixture(scope="module")
def triton_serves_attention():
    """The cases of tests/ops serve the kernels of encfast.ops.varlen_attn too."""
    from encfast.kernels import varlen_attn as kernels

    yield from _serving(kernels, "varlen_attn", "varlen_attn_bwd")


@pytest.fixture
def triton_serves_add_norm():
    from encfast.kernels import add_norm as kernels

    yield from _serving(kernels, "add_norm", "add_norm_bwd")


@pytest.fixture
def triton_serves_seg_pool():
    from encfast.kernels import seg_pool as kernels

    yield from _serving(kernels, "seg_pool", "seg_pool_bwd")


@pytest.fixture
def triton_serves_vocabularies():
    """By what the ops put around their launchers: checks, memory to keep, rows put back."""
    kernels = {}
    for stem in ("linear_cross_entropy", "linear_kl"):
        op = importlib.import_module(f"encfast.ops.{stem}")
        kernels |= {stem: op._triton_fwd, f"{stem}_bwd": op._triton_bwd}
    with cpu_kernels.replaced(kernels):
        yield


@pytest.fixture
def triton_serves_rank_loss():
    from encfast.kernels import rank_loss as kernels

    yield from _serving(kernels, "info_nce", "info_nce_bwd", "siglip", "siglip_bwd")
