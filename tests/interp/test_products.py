"""Products of tiles under the interpreter: rounded once, and alike in both orientations."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

KINDS = {np.float32: tl.float32, np.float16: tl.float16}


def dot(a, b, c):
    handles = [TensorHandle(x, KINDS[x.dtype.type]) for x in (a, b, c)]
    return interpreter_builder.create_dot(*handles, None, 0).data


@pytest.mark.parametrize("dtype", KINDS)
def test_products_do_not_depend_on_their_orientation(dtype):
    """A BLAS adds in another order for another shape; dk and dv of large scores were off by it."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((33, 255), (255, 7)))
    c = rng.standard_normal((33, 7)).astype(np.float32)
    result = dot(a, b, c)
    assert result.dtype == np.float32
    assert np.array_equal(result, dot(b.T, a.T, c.T).T)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.array_equal(result, exact.astype(np.float32) + c)
