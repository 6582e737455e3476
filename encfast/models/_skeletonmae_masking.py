"""The COCO skeleton, its body parts, and masks over both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_JOINTS = 17
# In COCO's order (HRNet's output): nose, eyes, ears, then left and right shoulders, elbows, wrists,
# hips, knees and ankles; left is odd.
COCO_EDGES = (
    *((15, 13), (13, 11), (16, 14), (14, 12)),  # legs
    *((11, 5), (12, 6)),  # sides of the trunk
    *((9, 7), (7, 5), (10, 8), (8, 6)),  # arms
    *((5, 0), (6, 0), (1, 0), (2, 0), (3, 1), (4, 2)),  # head
)
HEAD, TORSO, LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG = range(6)
COCO_PARTS = (
    (0, 1, 2, 3, 4),
    (5, 6, 11, 12),
    (7, 9),
    (8, 10),
    (13, 15),
    (14, 16),
)


def check_parts(parts: Sequence[Sequence[int]], num_joints: int) -> None:
    """Raises ValueError unless there are parts, none empty, of joints in [0, V), none in two."""
    if not parts:
        raise ValueError("parts is empty, expected at least one list of joints")
    seen: set[int] = set()
    for r, part in enumerate(parts):
        if not part:
            raise ValueError(f"parts[{r}] is empty, expected at least one joint")
        for joint in part:
            if not 0 <= joint < num_joints:
                raise ValueError(f"parts[{r}] holds joint {joint}, expected [0, {num_joints})")
            if joint in seen:
                raise ValueError(f"parts[{r}] holds joint {joint} a second time")
            seen.add(joint)


def check_choice(choice: Sequence[int], count: int, num_parts: int) -> None:
    """Raises ValueError unless ``count`` of the parts numbered in ``choice`` can be drawn."""
    if not choice:
        raise ValueError("maskable_parts is empty: the mask would hide nothing")
    for part in choice:
        if not 0 <= part < num_parts:
            raise ValueError(f"maskable_parts holds {part}, expected a part in [0, {num_parts})")
    if len(set(choice)) < len(choice):
        raise ValueError(f"maskable_parts holds a part twice: {tuple(choice)}")
    if not 1 <= count <= len(choice):
        raise ValueError(
            f"num_masked_parts must be in [1, {len(choice)}], the number of maskable parts, "
            f"got {count}"
        )


def mask_parts(
    frames: int,
    parts: Sequence[Sequence[int]] = COCO_PARTS,
    *,
    count: int = 1,
    choice: Sequence[int] | None = None,
    num_joints: int = NUM_JOINTS,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Hides whole body parts, in every frame ``count`` others.

    Args:
        frames: N.
        parts: joints of each part; no joint is in two.
        count: parts to hide in a frame.
        choice: numbers of the parts that may be hidden; all if None.
        num_joints: V.
        generator: of the draw, on its own device.
        device: of the result.

    Returns:
        bool ``[N, V]``, True where hidden.

    Raises:
        ValueError: if no part may be hidden, ``count`` is not in 1..len(choice), or a part or a
            joint is not there.
    """
    choice = range(len(parts)) if choice is None else choice
    check_parts(parts, num_joints)
    check_choice(choice, count, len(parts))
    members = torch.zeros(len(choice), num_joints, dtype=torch.bool)
    for row, part in enumerate(choice):
        members[row, list(parts[part])] = True
    drawn = _draw_subsets(frames, len(choice), count, generator)  # [N, count]
    return members.to(drawn.device)[drawn].any(1).to(device)


def mask_joints(
    frames: int,
    ratio: float,
    *,
    num_joints: int = NUM_JOINTS,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Hides ``round(ratio * V)`` joints of every frame, wherever they are: bool ``[N, V]``.

    Args:
        frames: N.
        ratio: share of the joints, in (0, 1]; at least one joint of V after rounding.
        num_joints: V.
        generator: of the draw, on its own device.
        device: of the result.

    Returns:
        bool ``[N, V]``, True where a joint is hidden.

    Raises:
        ValueError: for a ratio outside of its range, or one that hides nothing.
    """
    count = check_ratio(ratio, num_joints)
    drawn = _draw_subsets(frames, num_joints, count, generator)  # [N, count]
    mask = torch.zeros(frames, num_joints, dtype=torch.bool, device=drawn.device)
    return mask.scatter_(1, drawn, True).to(device)


def check_ratio(ratio: float, num_joints: int) -> int:
    """How many joints ``ratio`` hides, or ValueError."""
    if not 0 < ratio <= 1:
        raise ValueError(f"mask_ratio must be in (0, 1], got {ratio}")
    count = round(ratio * num_joints)
    if count == 0:
        raise ValueError(f"mask_ratio={ratio} hides none of {num_joints} joints")
    return count


def _draw_subsets(rows: int, size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """int64 ``[rows, count]``: distinct numbers below ``size``, every subset equally likely."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(rows, size, generator=generator, device=device).argsort(1)[:, :count]
