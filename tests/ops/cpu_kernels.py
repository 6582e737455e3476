"""Other kernels in the place of the CPU's, so that the tests of an op are theirs too."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch

from encfast.ops import _linear_cross_entropy_in_place as in_place


@contextmanager
def replaced(kernels: Mapping[str, Callable]) -> Iterator[None]:
    """Dispatcher ops, by name, are served by these on CPU tensors, behind their own checks and
    autograd; what the public functions do without the op they do by it."""
    library = torch.library.Library("encfast", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that a kernel is overridden
        for op, kernel in kernels.items():
            library.impl(op, kernel, "CPU", allow_override=True)
    try:
        with by_the_op():
            yield
    finally:
        library._destroy()


@contextmanager
def by_the_op() -> Iterator[None]:
    """linear_cross_entropy runs by its functional op, as in compiled graphs, also in eager mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "is_for", lambda *tensors: False)
        yield
