"""Logits a slice of the vocabulary at a time: which slices there are, where they lie, products.

              V
      +------+------+------+------+
   M  | slot | slot | kept | kept |    one slot for all slices that are computed and dropped;
      +------+------+------+------+    the last ones stay, as many as fit into the memory

The first pass goes from left to right, the second back again: it finds the last slices in memory
and multiplies again for the others.

Kept logits may lie at the front of the memory of the weight's gradient [V, C], whose rows the
second pass writes from the last one on. When it writes those of a slice that begins at v, the
logits still to be read are those before column v. They end at byte p(v) = (v - f) M (bytes of a
logit), where f columns are not kept; the rows begin at byte g(v) = v C (bytes of a weight).
p(f) <= g(f), and p(V) <= g(V) because the kept logits fit; both are linear, so p(v) <= g(v) from f
to V: no row is written over logits still to be read, whatever M, C and the dtypes are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _load

# Memory for the gradient of a weight, in large pages where the system has them: gradients of
# vocabularies are the largest tensors of all and fresh at every step.
torch.library.define("encfast::vocab_weight_grad", "(Tensor weight) -> Tensor")
# What the CPU does between products, on its own slices of logits.
torch.library.define(
    "encfast::vocab_scan",
    "(Tensor logits, Tensor? bias, Tensor targets, int first, float softcap, Tensor(a!) stats) "
    "-> ()",
)
torch.library.define(
    "encfast::vocab_grad",
    "(Tensor logits, Tensor? bias, Tensor targets, int first, float softcap, Tensor coefficients, "
    "Tensor(a!) grad) -> ()",
)

# Logits that the second pass need not compute again. With a slot, and gradients of some thousand
# rows, a call stays within 25 MiB beside the gradient of the weight.
KEPT_BYTES = 13 * 2**20
SLOT_BYTES = 4 * 2**20  # wider slices make better products; half of it measured 1 % slower
# Fewer columns make the products inefficient, more columns no better.
_LEAST_COLUMNS, _MOST_COLUMNS, _STEP = 512, 4096, 64
# Copies of a slice of the weight and of its gradient, where they are not of the dtype of the
# products.
_COPY_BYTES = 2 * 2**20


def kept_floats(x: Tensor, rows: int, vocab: int) -> int:
    """float32 elements of the buffer of kept logits; `rows` and `vocab` may be symbols.

    No more than the logits fill: what is beyond them is never written.
    """
    in_a_float = 4 // product_dtype(x).itemsize
    return torch.sym_min((rows * vocab + in_a_float - 1) // in_a_float, KEPT_BYTES // 4)


def new_kept(x: Tensor, rows: int, vocab: int, keep: bool) -> Tensor:
    """Memory for kept logits, in float32 whatever they are; nothing if they are not to be kept."""
    return x.new_empty(kept_floats(x, rows, vocab) if keep else 0, dtype=torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of the operands of products on the CPU: bfloat16 only where instructions multiply it."""
    if x.dtype != torch.bfloat16 or _load.error is not None:
        return torch.float32
    multiplies = torch.ops.encfast.cpu_isa() in ("avx512bf16", "avx512amx")
    return torch.bfloat16 if multiplies else torch.float32


class VocabSlices:
    """Logits of some rows, before bias and softcap.

    Args:
        x: [M, C], M > 0.
        weight: [V, C].
        kept: contiguous memory of any dtype for slices that stay, from the forward to the backward.
        dtype: of the products.
        scale: of the logits.
        columns: of a slice, where another head's slices must be as wide; chosen by default.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        kept: Tensor,
        dtype: torch.dtype,
        scale: float = 1.0,
        columns: int | None = None,
    ) -> None:
        self.x = x.to(dtype)
        self._weight, self._scale = weight, scale
        self._vocab, m = weight.shape[0], x.shape[0]
        self._width = columns or columns_per_slice(m, x.shape[1], weight.dtype, dtype)
        self._count = -(-self._vocab // self._width)
        self._kept = _elements(kept, dtype)
        columns_dropped = max(0, self._vocab - self._kept.numel() // m)
        self._first_kept = -(-columns_dropped // self._width)
        self._slot = x.new_empty(m * min(self._width, self._vocab), dtype=dtype)
        # Of the slice of the weight, and of its gradient, where they are not of that dtype.
        self._copies = None
        if weight.dtype != dtype:
            self._copies = x.new_empty((2, self._width, x.shape[1]), dtype=dtype)

    def forward(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their logits [M, columns]) from left to right."""
        for j in range(self._count):
            columns = self._columns(j)
            yield columns, self._multiply(j, self._part_of_weight(columns))

    def backward(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(columns, logits, memory for their gradient, weight [columns, C]) from right to left.

        The memory may be that of the logits; kept logits must not be written to. All but those are
        valid until the next slice.
        """
        for j in reversed(range(self._count)):
            columns = self._columns(j)
            weight = self._part_of_weight(columns)
            known = j >= self._first_kept
            logits = self._place(j) if known else self._multiply(j, weight)
            yield columns, logits, _matrix(self._slot, logits.shape), weight

    def put_grad(self, dlogits: Tensor, dweight: Tensor) -> None:
        """dlogits^T x of a slice into its rows of the weight's gradient."""
        if self._copies is None:
            torch.mm(dlogits.mT, self.x, out=dweight)
        else:
            dweight.copy_(torch.mm(dlogits.mT, self.x, out=self._copies[1, : len(dweight)]))

    def _columns(self, j: int) -> slice:
        return slice(j * self._width, min((j + 1) * self._width, self._vocab))

    def _part_of_weight(self, columns: slice) -> Tensor:
        weight = self._weight[columns]
        return weight if self._copies is None else self._copies[0, : len(weight)].copy_(weight)

    def _multiply(self, j: int, weight: Tensor) -> Tensor:
        place = self._place(j)
        if self._scale == 1:
            return torch.mm(self.x, weight.mT, out=place)
        return torch.addmm(place, self.x, weight.mT, beta=0, alpha=self._scale, out=place)

    def _place(self, j: int) -> Tensor:
        columns, m = self._columns(j), self.x.shape[0]
        shape = (m, columns.stop - columns.start)
        if j < self._first_kept:
            return _matrix(self._slot, shape)
        return _matrix(self._kept[(j - self._first_kept) * m * self._width :], shape)


def new_weight_grad(weight: Tensor, wanted: bool) -> Tensor:
    """Memory for the gradient of a weight, [0] where it is not wanted."""
    return torch.ops.encfast.vocab_weight_grad(weight) if wanted else weight.new_empty(0)


def add_product(total: Tensor, a: Tensor, b: Tensor, memory: Tensor) -> None:
    """total += a b, `total` in float32; `memory` is of total's shape and a's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out=memory))


def columns_per_slice(m: int, c: int, given: torch.dtype, dtype: torch.dtype) -> int:
    """For m rows of c channels and a weight given in one dtype and multiplied in another."""
    most = _MOST_COLUMNS
    if given != dtype:
        most = min(most, max(_COPY_BYTES // (4 * c + 1), _LEAST_COLUMNS))
    fit = SLOT_BYTES // (m * dtype.itemsize)
    return min(max(fit, _LEAST_COLUMNS), most) // _STEP * _STEP


def _elements(memory: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous memory as [n] of another dtype, as many as are whole."""
    bytes_used = memory.nbytes // dtype.itemsize * dtype.itemsize
    return memory.flatten()[: bytes_used // memory.itemsize].view(dtype)


def _matrix(memory: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)
