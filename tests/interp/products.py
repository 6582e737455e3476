"""Products of tiles in Triton's interpreter, whose rounding must not depend on their orientation.

A GPU adds the products of k qT in the order of those of q kT, so that scores computed in the
forward and, transposed, in the backward are the same bits, and exp(score - lse) is exact where both
are large. The interpreter hands tiles to a BLAS, which adds in another order for another shape.
`install` has every product rounded once, from float64.
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle


def install() -> None:
    """Replaces the interpreter's product, for the rest of the process."""
    Builder.create_dot = _rounding_once(Builder.create_dot)


def _rounding_once(dot):
    def create_dot(self, a, b, c, *precision):
        if c.data.dtype != np.float32 or a.data.dtype.kind != "f" or b.data.dtype.kind != "f":
            return dot(self, a, b, c, *precision)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle(product.astype(np.float32) + c.data, c.dtype.scalar)

    return create_dot
