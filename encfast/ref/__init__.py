"""References: the meaning of every op in plain PyTorch, differentiable, at any floating dtype.

They import nothing from the rest of encfast, and serve as the fallback backend of `encfast.ops`.
"""

from .add_norm import add_norm
from .glu import glu
from .grouped_mm import grouped_mm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import linear_kl
from .linear_seg_max import linear_seg_max
from .moe_route import (
    moe_jitter,
    moe_permute,
    moe_route,
    moe_unpermute,
    sort_choices,
)
from .packed_linear import pack_linear, packed_linear
from .pad import find_rows, gather_rows, scatter_rows
from .partial_ranking import candidate_dots, hard_negatives, partial_ranking
from .patch_gather import (
    fold_patches,
    gather_patches,
    restore_rows,
    select_patches,
    unfold_patches,
)
from .rank_loss import info_nce, siglip
from .rotary import rotary
from .seg_pool import seg_pool
from .varlen_attn import varlen_attn

__all__ = [
    "add_norm",
    "candidate_dots",
    "find_rows",
    "fold_patches",
    "gather_patches",
    "gather_rows",
    "glu",
    "grouped_mm",
    "hard_negatives",
    "info_nce",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_seg_max",
    "moe_jitter",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "pack_linear",
    "packed_linear",
    "partial_ranking",
    "restore_rows",
    "rotary",
    "scatter_rows",
    "seg_pool",
    "select_patches",
    "siglip",
    "sort_choices",
    "unfold_patches",
    "varlen_attn",
]
