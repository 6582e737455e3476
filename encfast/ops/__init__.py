"""Named ops on tensors. Each module says what its op means, `backends` says who runs it."""

import importlib

from .add_norm import add_norm
from .glu import glu
from .grouped_mm import grouped_mm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_kl import linear_kl
from .linear_seg_max import linear_seg_max
from .moe_route import jitter_rows, permute_rows, route_tokens, sort_choices, unpermute_rows
from .packed_linear import pack_linear, packed_linear
from .pad import Unpadded, find_rows, gather_rows, pad, scatter_rows, select_rows, unpad
from .partial_ranking import candidate_dots, hard_negatives, partial_ranking, teacher_order
from .patch_gather import (
    PatchSelection,
    fold_patches,
    gather_patches,
    masked_norm,
    restore_rows,
    select_patches,
)
from .rank_loss import info_nce, siglip
from .rotary import rotary, rotary_qk
from .seg_pool import seg_pool
from .varlen_attn import varlen_attn

OPS = (
    "varlen_attn",
    "pad",
    "rotary",
    "add_norm",
    "glu",
    "packed_linear",
    "linear",
    "patch_gather",
    "moe_route",
    "grouped_mm",
    "seg_pool",
    "rank_loss",
    "linear_cross_entropy",
    "linear_kl",
    "linear_seg_max",
    "partial_ranking",
)

# Ops that run on the C++ of another one.
LENT_CORES = {
    "linear": "grouped_mm",
    "linear_kl": "linear_cross_entropy",
    "linear_seg_max": "seg_pool",
}

__all__ = [
    "LENT_CORES",
    "OPS",
    "PatchSelection",
    "Unpadded",
    "add_norm",
    "backends",
    "candidate_dots",
    "find_rows",
    "fold_patches",
    "gather_patches",
    "gather_rows",
    "glu",
    "grouped_mm",
    "hard_negatives",
    "info_nce",
    "jitter_rows",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_seg_max",
    "masked_norm",
    "pack_linear",
    "packed_linear",
    "pad",
    "partial_ranking",
    "permute_rows",
    "restore_rows",
    "rotary",
    "rotary_qk",
    "route_tokens",
    "scatter_rows",
    "seg_pool",
    "select_patches",
    "select_rows",
    "siglip",
    "sort_choices",
    "teacher_order",
    "unpad",
    "unpermute_rows",
    "varlen_attn",
]


def backends(stem: str) -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'.

    Args:
        stem: one of `OPS`.

    Returns:
        An entry for each type of device that some backend of the op knows.

    Raises:
        ValueError: for another name.

    Examples:
        >>> sorted(ops.backends("varlen_attn"))
        ['cpu', 'cuda']
    """
    if stem not in OPS:
        raise ValueError(f"ops.backends: {stem!r} is not an op, expected one of {', '.join(OPS)}")
    return importlib.import_module(f".{stem}", __name__).backends()
