"""Which backend serves an op on a device: a question for the PyTorch dispatcher, nothing else."""

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# device type -> dispatch key; devices for which encfast ships native kernels at all.
_NATIVE_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_warned: set[tuple[str, str, str]] = set()


def has_native(op: str, device_type: str) -> bool:
    """Whether `encfast::op` has a compiled kernel for this device type in this process."""
    key = _NATIVE_DEVICES.get(device_type)
    if key is None or (device_type == "cuda" and not torch.backends.cuda.is_built()):
        return False  # a library built with CUDA also loads on a PyTorch without it
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"encfast::{op}", key)


def describe(ops: Sequence[str]) -> dict[str, str]:
    """Per device type, who serves these dispatcher ops: 'native', or 'reference: why'."""
    answer = {}
    for device_type in _NATIVE_DEVICES:
        missing = [op for op in ops if not has_native(op, device_type)]
        if not missing:
            answer[device_type] = "native"
        else:
            which = "" if len(missing) == len(ops) else f" for {', '.join(missing)}"
            answer[device_type] = f"reference{which}: {why_reference(device_type)}"
    return answer


def why_reference(device_type: str) -> str:
    if getattr(sys.modules.get("encfast._load"), "error", None) is not None:
        return "the compiled library is not loaded (encfast._load.error says why)"
    if device_type == "cuda" and not torch.backends.cuda.is_built():
        return "this PyTorch has no CUDA"
    return f"no {device_type} kernel in this build"


def register_reference(stem: str, op: str, reference: Callable) -> None:
    """Serves `encfast::op` by `reference` on every device that has no native kernel for it."""

    @functools.wraps(reference)
    def serve(*args):
        device_type = next(a for a in args if isinstance(a, Tensor)).device.type
        _announce(stem, device_type, why_reference(device_type))
        return reference(*args)

    torch.library.impl(f"encfast::{op}", "CompositeExplicitAutograd", serve)


def register_triton(stem: str, op: str, serve: Callable, reference: Callable) -> None:
    """Serves `encfast::op` on CUDA and HIP tensors by `serve`, which calls `encfast.kernels`.

    Does nothing where Triton is not installed; a device that Triton's kernels do not run on gets
    the reference, announced like any other.
    """
    if importlib.util.find_spec("triton") is None:
        return

    @functools.wraps(serve)
    def dispatch(*args):
        device = next(a for a in args if isinstance(a, Tensor)).device
        if why := why_not_triton(device):
            _announce(stem, device.type, why)
            return reference(*args)
        with torch.cuda.device(device):
            return serve(*args)

    torch.library.impl(f"encfast::{op}", "CUDA", dispatch)


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this GPU, None where they can."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, expected sm_80 or later"
    return None


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
