"""Data-loader helpers: packing plans, token-budget batches, collation, masking, patch masks."""

from encfast.data.clips import ClipBatch
from encfast.data.collate import PackedCollator
from encfast.data.images import ImageBatch
from encfast.data.mask_grids import (
    block_hidden,
    group_hidden,
    keep_count,
    random_hidden,
    tube_hidden,
)
from encfast.data.masking import mask_tokens
from encfast.data.packing import bucket_by_length, pack_ffd
from encfast.data.patches import group_mask, random_mask, tube_mask
from encfast.data.sampler import LengthBucketSampler, TokenBudgetSampler
from encfast.data.text import TextBatch

__all__ = [
    "ClipBatch",
    "ImageBatch",
    "LengthBucketSampler",
    "PackedCollator",
    "TextBatch",
    "TokenBudgetSampler",
    "block_hidden",
    "bucket_by_length",
    "group_hidden",
    "group_mask",
    "keep_count",
    "mask_tokens",
    "pack_ffd",
    "random_hidden",
    "random_mask",
    "tube_hidden",
    "tube_mask",
]
