"""flash-attn's names, signatures and module paths on `encfast.ops`: any device, also float32.

Replace `flash_attn` by `encfast.compat.flash_attn` in an import, submodules included. The interface
is that of flash-attn 2.8 (Dao, arXiv:2307.08691). What differs:

- Malformed arguments are errors that name them: lengths that do not end at the number of rows,
  positions outside of the rotary tables, labels outside of the vocabulary.
- A query that sees no key has output 0, as there, and log-sum-exp -inf.
- The log-sum-exp of `return_attn_probs=True` is differentiable; the third value is always None.
- Results are deterministic whatever `deterministic` says.
- Paged caches (`block_table`) and left-padded ones (`cache_leftpad`) are refused, tensor parallel
  losses (`process_group`) too.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # of the interface

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
