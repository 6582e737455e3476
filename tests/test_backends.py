"""Who serves an op, and what a call is told that ends on the reference.

No GPU is needed: what would look at one is replaced by what it would find.
"""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from encfast import _load, info, ops
from encfast.ops import _backends

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
LIBRARY_ARCHS = "8.0;9.0;10.0;12.0+PTX"  # what setup.py builds for by default


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing said yet, no GPU looked at."""
    monkeypatch.setattr(_backends, "_warned", set())
    _backends.why_not_on.cache_clear()
    yield
    _backends.why_not_on.cache_clear()


@pytest.fixture
def torch_with_cuda(monkeypatch):
    """A PyTorch that has CUDA, and a library that was built without."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    record = _load.record | {"cuda": None, "cuda_archs": None, "cuda_why_not": "no working nvcc"}
    monkeypatch.setattr(_load, "record", record)
    monkeypatch.setattr(_load, "error", None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)


def pretend_gpu(monkeypatch, name, capability=None, gfx=None):
    """The GPU at cuda:0, with a library that has CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(gcnArchName=gfx)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", gfx and "7.0")
    monkeypatch.setattr(_load, "record", _load.record | {"cuda_archs": LIBRARY_ARCHS})


# What was found, and which command changes it.


def test_no_triton_is_said_with_the_command(torch_with_cuda):
    said = "Triton is not installed; `pip install triton` brings it"
    for op in ("varlen_attn", "varlen_attn_bwd", "glu", "rotary"):
        assert _backends.served_by(op, "cuda") == f"reference: {said}"


def test_a_library_without_cuda_is_said_with_the_command(torch_with_cuda):
    assert ops.backends("pad")["cuda"] == (
        "reference: no CUDA in this build (no working nvcc); "
        f"`ENCFAST_CUDA=1 {_load.rebuild_command()}` brings it"
    )


def test_no_library_is_said_with_the_command(torch_with_cuda, monkeypatch):
    monkeypatch.setattr(_load, "error", ImportError("not compiled"))
    monkeypatch.setattr(_load, "record", {})
    command = _load.rebuild_command()
    assert f"not loaded (encfast._load.error says why); `{command}`" in ops.backends("glu")["cpu"]
    assert f"; `ENCFAST_CUDA=1 {command}`" in ops.backends("pad")["cuda"]
    assert "pip install triton" in ops.backends("glu")["cuda"]


def test_a_torch_without_cuda_is_said(monkeypatch):
    """Also by a library that has CUDA kernels: such a PyTorch cannot call them."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    for stem, language in (("pad", "CUDA C++"), ("glu", "Triton")):
        assert ops.backends(stem) == {
            "cpu": "native",
            "cuda": f"reference: its kernels in {language} need a PyTorch with CUDA, this one has "
            "none",
        }


def test_an_op_without_kernels_says_so(torch_with_cuda):
    assert ops.backends("packed_linear")["cuda"] == "reference: encfast has no cuda kernel of it"
    assert _backends.why_reference("glu", "mps") == "encfast has no mps kernel of it"


def test_a_library_from_before_an_op_is_named():
    """It used to be put down to the missing CUDA, which brings no kernel to a CPU."""
    why = _backends.why_reference("find_rows", "cpu")
    assert why.startswith("the compiled library is older than this op; `pip install")


def test_cuda_kernels_are_not_promised_to_amd(torch_with_cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _backends.why_reference("gather_rows", "cuda") == (
        "its kernels in CUDA C++ do not run on AMD's GPUs"
    )


def test_kinds_are_told_apart(monkeypatch):
    """On a GPU that runs everything: native, triton and reference; op by op where they differ."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: key == "CPU" or op != "encfast::packed_linear",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    pretend_gpu(monkeypatch, "NVIDIA H100", (9, 0))
    assert ops.backends("pad") == {"cpu": "native", "cuda": "native"}
    assert ops.backends("rotary") == {"cpu": "native", "cuda": "triton"}
    assert _backends.describe(("glu", "packed_linear"))["cuda"] == (
        "glu triton; packed_linear reference: encfast has no cuda kernel of it"
    )
    _backends.why_not_on.cache_clear()
    pretend_gpu(monkeypatch, "NVIDIA V100", (7, 0))
    why = "reference: NVIDIA V100 is sm_70, expected sm_80 or later"
    assert ops.backends("pad") == {"cpu": "native", "cuda": why}
    assert ops.backends("rotary") == {"cpu": "native", "cuda": why}


def test_info_names_languages():
    assert info.served({"cpu": "native", "cuda": "native"}) == "cpu: C++; cuda: CUDA C++"
    assert info.served({"cpu": "reference: why", "cuda": "triton"}) == (
        "cpu: reference: why; cuda: Triton"
    )


# Which GPUs run which kernels.


@pytest.mark.parametrize(
    ("capability", "kind", "why"),
    [
        ((7, 0), "triton", "GPU is sm_70, expected sm_80 or later"),
        ((7, 5), "native", "GPU is sm_75, expected sm_80 or later"),
        ((8, 0), "triton", None),
        ((8, 6), "native", None),
        ((11, 0), "triton", None),
        ((11, 0), "native", "GPU is sm_110, the compiled library is for 8.0;9.0;10.0;12.0+PTX; "),
    ],
)
def test_nvidia_gpus(monkeypatch, capability, kind, why):
    pretend_gpu(monkeypatch, "GPU", capability)
    found = _backends.why_not_on(GPU, kind)
    assert found == why if why is None else found.startswith(why)


def test_an_unforeseen_gpu_gets_the_command_that_compiles_for_it(monkeypatch):
    pretend_gpu(monkeypatch, "GPU", (11, 0))
    command = f"`TORCH_CUDA_ARCH_LIST=11.0 ENCFAST_CUDA=1 {_load.rebuild_command()}`"
    assert command in _backends.why_not_on(GPU, "native")


def test_amd_gpus(monkeypatch):
    pretend_gpu(monkeypatch, "MI300X", gfx="gfx942:sramecc+:xnack-")
    assert _backends.why_not_on(GPU, "triton") is None
    assert "do not run on AMD's GPUs" in _backends.why_not_on(GPU, "native")
    _backends.why_not_on.cache_clear()
    pretend_gpu(monkeypatch, "RX 7900", gfx="gfx1100")
    why = "RX 7900 is gfx1100, expected gfx90a or gfx942"
    assert _backends.why_not_on(GPU, "triton") == why


def test_compiled_code_runs_on_its_major_version():
    gpus = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]

    def runs(archs):
        return [gpu for gpu in gpus if _backends.has_code_for(archs, gpu)]

    assert runs("8.6") == [(8, 6)]
    assert runs("8.0 9.0a") == [(8, 0), (8, 6), (9, 0)]
    assert runs("10.0a") == []
    assert runs("12.0") == [(12, 0), (12, 1)]
    assert runs("8.0;9.0;10.0;12.0+PTX") == [g for g in gpus if g not in ((7, 5), (11, 0))]
    assert runs("8.6+PTX") == [g for g in gpus if g >= (8, 6)]


# What a call does.


@pytest.fixture
def registered(monkeypatch):
    """{(op, dispatch key): function} of what is registered from here on, without registering it."""
    found = {}
    monkeypatch.setattr(
        torch.library, "impl", lambda op, key, function: found.update({(op, key): function})
    )
    return found


GLU_OPTIONS = ("gelu", True, False)


def reference(*args):
    return "reference"


def kernel(*args):
    return "kernel"


def test_the_reference_warns_once_a_reason(registered, torch_with_cuda, monkeypatch):
    _backends.register_reference("glu", "glu", reference)
    serve = registered["encfast::glu", "CompositeExplicitAutograd"]
    with FakeTensorMode():
        x = torch.empty(2, 4, device="cuda")
    with pytest.warns(RuntimeWarning, match=r"ops.glu .*on cuda: Triton is not .*`pip install tr"):
        assert serve(x, None, *GLU_OPTIONS) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert serve(x, None, *GLU_OPTIONS) == "reference"
    monkeypatch.setitem(_backends._gpu_kernels, "glu", "native")
    with pytest.warns(RuntimeWarning, match="no CUDA in this build"):
        serve(x, None, *GLU_OPTIONS)
    monkeypatch.setenv("ENCFAST_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"`ENCFAST_CUDA=1 .*ENCFAST_REQUIRE_NATIVE=1 forbids"):
        serve(x, None, *GLU_OPTIONS)


@pytest.mark.parametrize(("op", "kind"), [("glu", "Triton"), ("gather_rows", "CUDA C++")])
def test_a_gpu_call_runs_on_its_device_or_falls_back(monkeypatch, op, kind):
    entered = []

    @contextlib.contextmanager
    def device_guard(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", device_guard)
    dispatch = _backends.gpu_or_reference("stem", op, kernel, reference)
    with FakeTensorMode():
        tensors = [torch.empty(2, 4, device="cuda:1"), torch.empty(4, device="cuda:1")]
    args = (*tensors, *GLU_OPTIONS) if op == "glu" else tensors
    pretend_gpu(monkeypatch, "NVIDIA H100", (9, 0))
    assert dispatch(*args) == "kernel"
    assert entered == [torch.device("cuda", 1)]
    _backends.why_not_on.cache_clear()
    pretend_gpu(monkeypatch, "NVIDIA V100", (7, 0))
    with pytest.warns(RuntimeWarning, match="NVIDIA V100 is sm_70, expected sm_80 or later"):
        assert dispatch(*args) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch(*args) == "reference"
    monkeypatch.setenv("ENCFAST_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"sm_70.*ENCFAST_REQUIRE_NATIVE=1 forbids"):
        dispatch(*args)
    assert len(entered) == 1


def test_mixed_devices_are_named_to_direct_calls(registered):
    """The public functions check it too; their tests are in tests/ops."""
    _backends.register_reference("glu", "glu", reference)
    paths = (
        registered["encfast::glu", "CompositeExplicitAutograd"],
        _backends.gpu_or_reference("glu", "glu", kernel, reference),
    )
    with FakeTensorMode():
        cpu, cuda0 = torch.empty(2, 4), torch.empty(2, 4, device="cuda:0")
        cuda1 = torch.empty(4, device="cuda:1")
    for serve in paths:
        with pytest.raises(ValueError, match="glu: bias is on cuda:1, x is on cpu"):
            serve(cpu, cuda1, *GLU_OPTIONS)
        with pytest.raises(ValueError, match="glu: bias is on cuda:1, x is on cuda:0"):
            serve(cuda0, cuda1, *GLU_OPTIONS)
    names = ("dlse", "q", "cu_seqlens_k", "k")
    with pytest.raises(ValueError, match="op: k is on cpu, q is on cuda:0; move one of them"):
        _backends.one_device("op", names, (None, cuda0, None, cpu))


def test_triton_registers_only_where_it_is_installed(registered, monkeypatch):
    monkeypatch.setitem(_backends._gpu_kernels, "glu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _backends.register_triton("glu", "glu", kernel, reference)
    assert not registered
    assert _backends._gpu_kernels["glu"] == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    _backends.register_triton("glu", "glu", kernel, reference)
    assert list(registered) == [("encfast::glu", "CUDA")]


OVERRIDE = """
import contextlib, warnings
warnings.simplefilter("error")
import torch
from encfast import ops
from encfast.ops import _backends

# The CPU's key and kernels stand in for the GPU's.
_backends._KEYS["cuda"] = "CPU"
torch.backends.cuda.is_built = lambda: True
torch.cuda.device = lambda device: contextlib.nullcontext()
why = None
_backends.why_not_on = lambda device, kind: why
for op in ("gather_rows", "scatter_rows"):
    _backends.register_cuda("pad", op, lambda *args: torch.full((1,), 7.0))

x, rows = torch.arange(6.0).reshape(3, 2).requires_grad_(), torch.tensor([2, 0, 2])
out = ops.select_rows(x, rows)
assert out.tolist() == [[4, 5], [0, 1], [4, 5]], out
out.sum().backward()
assert x.grad.tolist() == [[1, 1], [0, 0], [2, 2]], x.grad
why = "it is too old"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert ops.select_rows(x.detach(), rows).tolist() == [7]
assert ["it is too old" in str(w.message) for w in said] == [True], said
"""


@pytest.mark.skipif(_load.error is not None, reason=f"not compiled: {_load.error}")
def test_a_compiled_kernel_is_still_called_behind_the_look_at_the_gpu():
    subprocess.run([sys.executable, "-c", OVERRIDE], check=True, cwd=ROOT)
