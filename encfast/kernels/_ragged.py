"""Whose rows a program has: tiles over packed sequences, or over groups of rows.

Rows in slots. Sequence b owns the tile slots cu_seqlens[b] // BLOCK + b and up, at least as many as
its rows fill, so that N // BLOCK + B programs cover any lengths, and one finds its sequence by a
binary search in cu_seqlens: no table is made, and the host needs no lengths.
"""

import triton
import triton.language as tl


@triton.jit
def find_slot(cu_seqlens, B, i_slot, BLOCK: tl.constexpr):
    """Sequence, its first row, and the slot's first row inside of it.

    The last may be beyond the length: the slot is not used. cu_seqlens[B] is not read.
    """
    i_b, end = 0, B
    while end - i_b > 1:
        middle = (i_b + end) // 2
        behind = tl.load(cu_seqlens + middle) // BLOCK + middle <= i_slot
        i_b = tl.where(behind, middle, i_b)
        end = tl.where(behind, end, middle)
    first = tl.load(cu_seqlens + i_b)
    return i_b, first, (i_slot - first // BLOCK - i_b) * BLOCK
