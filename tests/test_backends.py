"""Who serves an op, and what a call is told that ends on the reference."""

import warnings

import pytest
import torch

from encfast.ops import _backends


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU of 2017 at cuda:0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA V100")
    monkeypatch.setattr(_backends, "_warned", set())
    _backends.why_not_triton.cache_clear()
    yield torch.device("cuda", 0)
    _backends.why_not_triton.cache_clear()


@pytest.mark.quick
def test_an_old_gpu_gets_the_reference_and_one_warning_that_names_it(old_gpu):
    why = _backends.why_not_triton(old_gpu)
    with pytest.warns(RuntimeWarning, match="NVIDIA V100 is sm_70, expected sm_80 or later"):
        _backends._announce("glu", "cuda", why)
    with warnings.catch_warnings(action="error"):
        _backends._announce("glu", "cuda", why)
    with pytest.warns(RuntimeWarning, match="another reason"):
        _backends._announce("glu", "cuda", "another reason")


@pytest.mark.quick
def test_an_old_gpu_is_an_error_where_native_kernels_are_required(old_gpu, monkeypatch):
    monkeypatch.setenv("ENCFAST_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"sm_70.*ENCFAST_REQUIRE_NATIVE=1 forbids"):
        _backends._announce("glu", "cuda", _backends.why_not_triton(old_gpu))


@pytest.mark.quick
def test_a_new_gpu_runs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _backends.why_not_triton.cache_clear()
    assert _backends.why_not_triton(torch.device("cuda", 0)) is None
    _backends.why_not_triton.cache_clear()
