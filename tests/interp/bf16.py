"""bfloat16 in Triton's interpreter, which stock Triton 3.8 gets wrong.

The interpreter keeps bfloat16 as its bits in uint16, and most of its operations compute on these
bits as if they were numbers; a cast to bfloat16 cuts off instead of rounding. `install` makes every
operation take float32 values and round its result to nearest even, as a GPU does.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle

# Methods of the builder that take and return values of one dtype.
_ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf")


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; any NaN becomes the quiet one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def _is_bf16(x) -> bool:
    return (
        isinstance(x, TensorHandle)
        and not isinstance(x.dtype, tl.pointer_type)
        and x.dtype.scalar == tl.bfloat16
    )


def _widened(x):
    return TensorHandle(to_float32(x.data), tl.float32) if _is_bf16(x) else x


def _narrowed(x):
    is_float32 = isinstance(x, TensorHandle) and x.data.dtype == np.float32
    return TensorHandle(from_float32(x.data), tl.bfloat16) if is_float32 else x


def install() -> None:
    """Replaces methods of the interpreter, for the rest of the process."""
    for name in _ARITHMETIC:
        setattr(Builder, name, _in_float32(getattr(Builder, name)))
    Builder.get_bf16 = lambda self, value: _narrowed(
        TensorHandle(np.array([value], np.float32), tl.float32)
    )
    Builder.cast_impl = _casting(Builder.cast_impl)
    Builder.create_fp_to_fp = _converting(Builder.create_fp_to_fp)
    Builder.create_dot = _multiplying(Builder.create_dot)
    interpreter.ReduceScanOpInterface.apply = _reducing(interpreter.ReduceScanOpInterface.apply)


def _in_float32(operation):
    def widened(self, *args, **kwargs):
        if not any(_is_bf16(x) for x in args):
            return operation(self, *args, **kwargs)
        return _narrowed(operation(self, *(_widened(x) for x in args), **kwargs))

    return widened


def _casting(cast):
    def cast_impl(self, source, dtype):
        if source.dtype.scalar == dtype.scalar:
            return source
        if _is_bf16(source):
            wide = _widened(source)
            return wide if dtype.scalar == tl.float32 else cast(self, wide, dtype)
        if dtype.scalar == tl.bfloat16:
            return TensorHandle(from_float32(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, dtype)

    return cast_impl


def _converting(convert):
    def create_fp_to_fp(self, source, dtype, rounding):
        if tl.bfloat16 in (source.dtype.scalar, dtype.scalar):
            return self.cast_impl(source, dtype)
        return convert(self, source, dtype, rounding)

    return create_fp_to_fp


def _multiplying(dot):
    def create_dot(self, a, b, c, *precision):
        return dot(self, _widened(a), _widened(b), c, *precision)

    return create_dot


def _reducing(apply):
    def reduced(self, x):
        """The combined values stay in float32 until the end, as in a GPU's registers."""
        if not isinstance(x, tuple):
            return reduced(self, (x,))[0]
        narrow = [_is_bf16(t.handle) for t in x]
        if not any(narrow):
            return apply(self, x)
        results = apply(self, tuple(map(_wide_tensor, x)))
        return tuple(
            _narrow_tensor(t) if was and t.dtype == tl.float32 else t
            for t, was in zip(results, narrow, strict=True)
        )

    return reduced


def _wide_tensor(t: tl.tensor) -> tl.tensor:
    return _as_tensor(_widened(t.handle), t, tl.float32) if _is_bf16(t.handle) else t


def _narrow_tensor(t: tl.tensor) -> tl.tensor:
    return _as_tensor(_narrowed(t.handle), t, tl.bfloat16)


def _as_tensor(handle: TensorHandle, like: tl.tensor, dtype: tl.dtype) -> tl.tensor:
    kind = tl.block_type(dtype, list(like.shape)) if like.type.is_block() else dtype
    return tl.tensor(handle, kind)
