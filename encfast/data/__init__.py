"""Data-loader helpers: packing plans, token-budget batches, collation, masking."""

from encfast.data.collate import PackedCollator
from encfast.data.masking import mask_tokens
from encfast.data.packing import bucket_by_length, pack_ffd
from encfast.data.sampler import TokenBudgetSampler
from encfast.data.text import TextBatch

__all__ = [
    "PackedCollator",
    "TextBatch",
    "TokenBudgetSampler",
    "bucket_by_length",
    "mask_tokens",
    "pack_ffd",
]
