"""Writes the generated parts of docs/gpu.md: what perf/static says of every GPU kernel.

pytest -m "" tests/compile --update-static    makes perf/static from the kernels
python docs/gpu.py                            rewrites docs/gpu.md in place
python docs/gpu.py --check                    exits 1 if docs/gpu.md is stale
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from tables import ROOT, filled, run

PAGE = ROOT / "docs" / "gpu.md"
STATIC = ROOT / "perf" / "static"
SEQLEN = 512  # rows of the sequences or groups that some kernels' intensity is given for
TENSOR = ("mma", "wgmma", "tcgen05", "mfma")


class Board(NamedTuple):
    """Public peak figures of one board per architecture, dense, entered by hand."""

    name: str
    tensor_tflops: float  # bf16 with float32 sums
    float_tflops: float  # fp32, outside of the tensor cores
    gb_per_s: float


# Vendors' data sheets and architecture whitepapers.
BOARDS = {
    "sm_80": Board("A100 SXM 80 GB", 312, 19.5, 2039),
    "sm_86": Board("RTX A6000", 154.8, 38.7, 768),
    "sm_89": Board("L40S", 362, 91.6, 864),
    "sm_90": Board("H100 SXM", 989, 66.9, 3352),
    "sm_100": Board("B200", 2250, 80, 8000),
    "sm_120": Board("RTX PRO 6000 Blackwell", 503.8, 125, 1792),
    "gfx90a": Board("one die of an MI250X", 191.5, 23.9, 1638),
    "gfx942": Board("MI300X", 1307, 163.4, 5300),
}

Work = tuple[float, float]  # floating-point operations, bytes that must move

# Per row and head of attention (D channels, bf16), per row of grouped_mm (D channels to 2 D), per
# row of a loss over SEQLEN rows and as many candidates, per channel of a row elsewhere. Operations
# are counted as the formulas stand, a special function as one; bytes are those of reading each
# input and writing each result once.
WORK: dict[str, Callable[[int], Work]] = {
    "varlen_attn_kernel": lambda D: (4 * SEQLEN * D, 2 * 4 * D + 4),
    "varlen_attn_row_terms_kernel": lambda D: (2 * D, 2 * 2 * D + 8),
    "varlen_attn_dq_kernel": lambda D: (6 * SEQLEN * D, 2 * 5 * D + 8),
    "varlen_attn_dkv_kernel": lambda D: (8 * SEQLEN * D, 2 * 6 * D + 8),
    "grouped_mm_kernel": lambda D: (4 * D * D, 2 * 3 * D + 2 * 2 * D * D / SEQLEN),
    "grouped_mm_dweight_kernel": lambda D: (4 * D * D, 2 * 3 * D + 2 * 2 * D * D / SEQLEN),
    "grouped_mm_dbias_kernel": lambda D: (2 * D, 2 * 2 * D),
    "row_stats_kernel": lambda D: (2 * SEQLEN * D, 4 * D + 8),
    "vocab_grad_kernel": lambda D: (2 * SEQLEN * D, 4 * D + 2 * SEQLEN),
    "kl_stats_kernel": lambda D: (4 * SEQLEN * D, 8 * D + 20),
    "kl_grad_kernel": lambda D: (4 * SEQLEN * D, 8 * D + 2 * SEQLEN),
    "info_nce_grad_kernel": lambda D: (2 * SEQLEN * D, 4 * D + 2 * SEQLEN),
    "siglip_kernel": lambda D: (2 * SEQLEN * D, 4 * D + 4),
    "siglip_grad_kernel": lambda D: (2 * SEQLEN * D, 4 * D + 2 * SEQLEN),
    "column_sums_kernel": lambda D: (SEQLEN, 16),
    # Of an element of a row; of a weight; of a result's element.
    "seg_pool_sum_kernel": lambda D: (2, 2),
    "seg_pool_max_kernel": lambda D: (1, 2),
    "seg_pool_rows_kernel": lambda D: (3, 4),
    "seg_pool_stats_kernel": lambda D: (4, 4),
    "seg_pool_weights_kernel": lambda D: (6, 10),
    "seg_pool_norm_kernel": lambda D: (3, 6),
    "seg_pool_grad_kernel": lambda D: (5, 8),
    "glu_kernel": lambda D: (8, 6),
    "glu_bwd_kernel": lambda D: (20, 10),
    "rotary_kernel": lambda D: (3, 4),
    "add_norm_kernel": lambda D: (10, 8),
    "add_norm_bwd_kernel": lambda D: (20, 14),
    "sum_partials_kernel": lambda D: (1, 4),
    "gather_rows_kernel": lambda D: (0, 4),
    "sum_rows_kernel": lambda D: (1, 4),
    "row_starts_kernel": lambda D: (0, 16),
    "count_kept_kernel": lambda D: (0, 1),
    "scan_tiles_kernel": lambda D: (0, 8),
    "place_kept_kernel": lambda D: (0, 9),
    "rank_patches_kernel": lambda D: (SEQLEN, 12),  # of a patch: compared with each of them
    "place_patches_kernel": lambda D: (0, 24),
    "gather_patches_kernel": lambda D: (2, 4),
    "restore_rows_kernel": lambda D: (1, 6),
    "sum_sources_kernel": lambda D: (1, 2),
    # Of a token's logit, choice or channel, two choices each.
    "choose_kernel": lambda D: (8, 6),
    "count_choices_kernel": lambda D: (0, 8),
    "find_starts_kernel": lambda D: (1, 8),
    "place_choices_kernel": lambda D: (0, 12),
    "select_choices_kernel": lambda D: (32, 16),
    "gates_kernel": lambda D: (2, 16),
    "route_bwd_kernel": lambda D: (5, 10),
    "permute_kernel": lambda D: (0, 4),
    "unpermute_kernel": lambda D: (4, 6),
    "unpermute_bwd_kernel": lambda D: (3, 6),
    "jitter_kernel": lambda D: (30, 4),
}


def tables() -> str:
    """One table per call of perf/static."""
    return "\n\n".join(_table(path) for path in sorted(STATIC.glob("*.json")))


def _table(path: Path) -> str:
    head = "kernel | GPU | registers | spilt | shared | occupancy | tensor | FLOP/B | roof | pipes"
    rows = [f"### {path.stem}\n", f"| {head} |", "|---|---|" + "---:|" * 8]
    figures = json.loads(path.read_text())
    head_size = re.search(r"_(\d+)$", path.stem)
    D = int(head_size[1]) if head_size else 1
    names = dict.fromkeys(_base(k["name"]) for kernels in figures.values() for k in kernels)
    for name in names:
        for arch in sorted(figures, key=list(BOARDS).index):
            found = [k for k in figures[arch] if _base(k["name"]) == name]
            if found:
                rows.append(_row(name, arch, found, D))
    return "\n".join(rows)


def _base(name: str) -> str:
    """A template's name without what it is instantiated for."""
    return name.partition("<")[0]


def _row(name: str, arch: str, found: list[dict], D: int) -> str:
    """The instances of a kernel in one line: the most registers, the least occupancy."""
    tight = min(found, key=lambda k: (k["occupancy"], -k["registers"]))
    tensor = sorted({c for k in found for c in TENSOR if c in k["instructions"]})
    intensity, roof = _roof(name, arch, D, bool(tensor))
    bound = tight["tensor_use_bound"]
    cells = [
        f"`{name}`" if len(found) == 1 else f"`{name}` ({len(found)})",
        arch,
        str(max(k["registers"] for k in found)),
        f"{max(k['spill_bytes'] for k in found)} B",
        f"{max(k['shared'] for k in found) / 1024:.0f} KiB",
        f"{tight['occupancy']:.0%} ({tight['limiter']})",
        ", ".join(tensor) or "-",
        f"{intensity:.3g}",
        roof,
        "-" if bound is None else f"{bound:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def _roof(name: str, arch: str, D: int, tensor: bool) -> tuple[float, str]:
    """FLOP per byte, and what the roofline leaves of the pipes' peak, by what."""
    flops, moved = WORK[name](D)
    board = BOARDS[arch]
    ridge = (board.tensor_tflops if tensor else board.float_tflops) * 1e3 / board.gb_per_s
    if flops / moved >= ridge:
        return flops / moved, "arithmetic"
    return flops / moved, f"memory ({flops / moved / ridge:.0%})"


def boards() -> str:
    """The figures that the roof is computed from."""
    rows = [
        "| GPU | board | tensor TFLOP/s, bf16 | fp32 TFLOP/s | GB/s |",
        "|---|---|---:|---:|---:|",
    ]
    for arch, board in BOARDS.items():
        figures = f"{board.tensor_tflops:g} | {board.float_tflops:g} | {board.gb_per_s:g}"
        rows.append(f"| {arch} | {board.name} | {figures} |")
    return "\n".join(rows)


def rendered(text: str) -> str:
    """docs/gpu.md with its generated parts made anew."""
    return filled(text, {"boards": boards(), "static": tables()}, "docs/gpu.py")


if __name__ == "__main__":
    sys.exit(run(PAGE, rendered, "docs/gpu.py"))
