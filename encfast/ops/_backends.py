"""Which backend serves an op on a device: a question for the PyTorch dispatcher, nothing else.

Each op registers its reference, and how it runs on GPUs: `register_triton` or `register_cuda`.
Kernels for the CPU register themselves when the compiled library loads. A call that ends on the
reference is told once why, and which command changes that, by the words that `describe` has too.
"""

import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _load
from ._checks import check_device

# Device types that encfast has kernels for, and their dispatch keys. PyTorch calls AMD's GPUs cuda.
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_AMD = ("gfx90a", "gfx942")  # what the Triton kernels are compiled and checked for
_NOT_ON_AMD = "its kernels in CUDA C++ do not run on AMD's GPUs"

# op -> "triton" or "native": what its GPU kernels are, whether or not they are there.
_gpu_kernels: dict[str, str] = {}
_warned: set[tuple[str, str, str]] = set()
references: dict[str, Callable] = {}  # by dispatcher op


def describe(ops: Sequence[str]) -> dict[str, str]:
    """Per device type, who serves these dispatcher ops; op by op where they differ."""
    answer = {}
    for device_type in _KEYS:
        by_op = {op: served_by(op, device_type) for op in ops}
        if len(set(by_op.values())) == 1:
            answer[device_type] = by_op[ops[0]]
        else:
            answer[device_type] = "; ".join(f"{op} {text}" for op, text in by_op.items())
    return answer


def served_by(op: str, device_type: str) -> str:
    """'native' (compiled), 'triton' or 'reference: why', in this process and on its current GPU."""
    if not _has_kernel(op, device_type):
        return f"reference: {why_reference(op, device_type)}"
    if device_type == "cpu":
        return "native"
    kind = _gpu_kernels[op]
    if torch.cuda.is_available():
        why = why_not_on(torch.device("cuda", torch.cuda.current_device()), kind)
        if why is not None:
            return f"reference: {why}"
    return kind


def _has_kernel(op: str, device_type: str) -> bool:
    # A library built with CUDA also loads on a PyTorch without it.
    if device_type == "cuda" and not torch.backends.cuda.is_built():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"encfast::{op}", _KEYS[device_type])


def why_reference(op: str, device_type: str) -> str:
    """Why there is no kernel of `op` for this device type, and the command that brings it."""
    kind = {"cpu": "native", "cuda": _gpu_kernels.get(op)}.get(device_type)
    if kind is None:
        return f"encfast has no {device_type} kernel of it"
    if device_type == "cuda" and not torch.backends.cuda.is_built():
        language = "Triton" if kind == "triton" else "CUDA C++"
        return f"its kernels in {language} need a PyTorch with CUDA, this one has none"
    if kind == "triton":
        return "Triton is not installed; `pip install triton` brings it"
    if device_type == "cuda" and torch.version.hip is not None:
        return _NOT_ON_AMD
    if _load.error is not None:
        command = _cuda_command() if device_type == "cuda" else _load.rebuild_command()
        return (
            "the compiled library is not loaded (encfast._load.error says why); "
            f"`{command}` compiles it"
        )
    if device_type == "cpu":
        return (
            f"the compiled library is older than this op; `{_load.rebuild_command()}` compiles it"
        )
    return f"no CUDA in this build ({_load.record['cuda_why_not']}); `{_cuda_command()}` brings it"


def _cuda_command() -> str:
    return f"ENCFAST_CUDA=1 {_load.rebuild_command()}"


@functools.cache
def why_not_on(device: torch.device, kind: str) -> str | None:
    """Why kernels of this kind, 'triton' or 'native', cannot run on a GPU; None where they can."""
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        if kind == "native":
            return _NOT_ON_AMD
        arch = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if arch in _AMD else f"{name} is {arch}, expected {' or '.join(_AMD)}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"{name} is sm_{major}{minor}, expected sm_80 or later"
    if kind == "triton" or has_code_for(_load.record["cuda_archs"], (major, minor)):
        return None
    return (
        f"{name} is sm_{major}{minor}, the compiled library is for {_load.record['cuda_archs']}; "
        f"`TORCH_CUDA_ARCH_LIST={major}.{minor} {_cuda_command()}` compiles it for this GPU"
    )


def has_code_for(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a library compiled for `archs`, like "8.0;9.0a;12.0+PTX", runs on a GPU.

    Machine code runs on its major version from its minor on, with an "a" nowhere else; PTX is
    compiled on the spot by any later GPU.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", archs):
        built = int(major), int(minor)
        later = built <= capability and (ptx or built[0] == capability[0])
        if built == capability or (later and suffix != "a"):
            return True
    return False


def wanted_only(grads: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients as backward ops return them: [0] in place of those that nobody wants."""
    return tuple(
        g.contiguous() if want else g.new_empty(0) for g, want in zip(grads, wanted, strict=True)
    )


def register_reference(stem: str, op: str, reference: Callable) -> None:
    """Serves `encfast::op` by `reference` on every device that has no kernel for it."""
    names = _argument_names(op)
    references[op] = reference

    @functools.wraps(reference)
    def serve(*args):
        device_type = one_device(op, names, args).type
        _announce(stem, device_type, why_reference(op, device_type))
        return reference(*args)

    torch.library.impl(f"encfast::{op}", "CompositeExplicitAutograd", serve)


def register_triton(stem: str, op: str, serve: Callable, reference: Callable) -> None:
    """Serves `encfast::op` on GPUs by `serve`, which calls `encfast.kernels`.

    A GPU that the kernels do not run on gets the reference, announced like any other. Where Triton
    is not installed, nothing is registered.
    """
    _gpu_kernels[op] = "triton"
    if importlib.util.find_spec("triton") is not None:
        dispatch = gpu_or_reference(stem, op, serve, reference)
        torch.library.impl(f"encfast::{op}", _KEYS["cuda"], dispatch)


def register_cuda(stem: str, op: str, reference: Callable) -> None:
    """Stands before the kernel of csrc/cuda, where this build has it, as `register_triton` does."""
    _gpu_kernels[op], key = "native", _KEYS["cuda"]
    if _has_kernel(op, "cuda"):
        dispatch = gpu_or_reference(stem, op, compiled_kernel(op, key), reference)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an override, which this is
            torch.library.impl(f"encfast::{op}", key, dispatch)


def register_around(kernel: str, op: str, serve: Callable) -> None:
    """Serves `op` on the CPU by `serve`, Python around `kernel`, where this build has that."""
    if _has_kernel(kernel, "cpu"):
        torch.library.impl(f"encfast::{op}", _KEYS["cpu"], serve)


def compiled_kernel(op: str, key: str) -> Callable:
    """The kernel registered for this dispatch key now; it stays callable when overridden."""
    kernel = torch.library.get_kernel(f"encfast::{op}", key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(kernel.call_boxed, keys)


def gpu_or_reference(stem: str, op: str, serve: Callable, reference: Callable) -> Callable:
    """`serve` on the GPU of its arguments, `reference` where that GPU cannot run it."""
    names = _argument_names(op)

    def dispatch(*args):
        device = one_device(op, names, args)
        why = why_not_on(device, _gpu_kernels[op])
        if why is not None:
            _announce(stem, device.type, why)
            return reference(*args)
        with torch.cuda.device(device):
            return serve(*args)

    return dispatch


def _argument_names(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.encfast, op).default._schema.arguments]


def one_device(op: str, names: Sequence[str], args: Sequence) -> torch.device:
    """The device of all tensors among an op's arguments; ValueError names two that differ.

    The public functions have checked that. Direct calls and gradients come here unchecked, and a
    kernel would take a pointer to another device's memory for one of its own.
    """
    (first_name, first), *others = (
        (name, x) for name, x in zip(names, args, strict=True) if isinstance(x, Tensor)
    )
    for name, x in others:
        check_device(op, name, x, first_name, first)
    return first.device


def _announce(stem: str, device_type: str, why: str) -> None:
    """One warning per op, device and reason; an error under ENCFAST_REQUIRE_NATIVE=1."""
    text = f"encfast.ops.{stem} has no native kernel on {device_type}: {why}"
    if os.environ.get("ENCFAST_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"{text}; ENCFAST_REQUIRE_NATIVE=1 forbids the reference")
    if (stem, device_type, why) not in _warned:
        _warned.add((stem, device_type, why))
        warnings.warn(
            f"{text}. The plain PyTorch reference serves it: same results, far slower. "
            "`python -m encfast.info` lists what is built",
            RuntimeWarning,
            stacklevel=3,
        )
