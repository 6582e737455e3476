"""Synthetic stick figures: 17 COCO joints in the plane whose limbs swing like sines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Each action: how far (radians) shoulders, elbows, hips and knees swing, and whether the right
# side moves against the left. What an action does not name sways a little.
ACTIONS = {
    "wave": (0.3, 0.9, 0.0, 0.0, True),
    "row": (0.9, 0.9, 0.0, 0.0, False),
    "march": (0.5, 0.2, 0.6, 0.5, True),
    "squat": (0.3, 0.0, 0.7, 1.0, False),
    "jack": (1.2, 0.0, 0.5, 0.0, False),
    "kick": (0.2, 0.0, 0.9, 0.3, True),
}
# Of a figure one unit tall, standing at the origin of its hips; y points down as in images.
_NECK, _HIP, _SHOULDER = -0.30, 0.09, 0.12
_UPPER_ARM, _FOREARM, _THIGH, _SHIN = 0.17, 0.15, 0.24, 0.23
_HEAD = ((0.0, -0.42), (0.03, -0.45), (-0.03, -0.45), (0.06, -0.43), (-0.06, -0.43))


def stick_figures(
    actions: Tensor, lengths: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Clips of figures that differ in build, place, size, tilt, tempo and phase.

    Args:
        actions: int64 ``[B]``, numbers of :data:`ACTIONS`.
        lengths: B frames each.
        generator: of all random numbers.

    Returns:
        fp32 ``[N, 17, 2]`` in image coordinates, N the sum of the lengths; left is at larger x.
    """
    clips = [
        _clip(int(action), frames, generator)
        for action, frames in zip(actions.tolist(), lengths, strict=True)
    ]
    return torch.cat(clips) if clips else torch.zeros(0, 17, 2)


def _clip(action: int, frames: int, generator: torch.Generator | None) -> Tensor:
    """``[T, 17, 2]``."""
    *swings, against = list(ACTIONS.values())[action]
    draw = torch.rand(32, generator=generator)
    tempo, phase = 0.15 + 0.25 * draw[0], 2 * math.pi * draw[1]
    turn = tempo * torch.arange(frames) + phase  # [T]
    angles = []
    for side in range(2):
        opposite = math.pi if side and against else 0.0
        for limb, swing in enumerate(swings):
            reach = swing * (0.7 + 0.6 * draw[2 + limb]) + 0.08 * draw[6 + 4 * side + limb]
            rest = 0.5 * (draw[14 + 4 * side + limb] - 0.5)
            angles.append(rest + reach * torch.sin(turn + opposite))
    figure = _figure(angles, 0.85 + 0.3 * draw[22:28])  # [T, 17, 2]
    tilt = 2.0 * (draw[28] - 0.5)  # as a gymnast's, up to one radian
    spin = torch.stack((tilt.cos(), -tilt.sin(), tilt.sin(), tilt.cos())).view(2, 2)
    return (50 + 150 * draw[29]) * figure @ spin + 300 * (1 + draw[30:32])


def _figure(angles: list[Tensor], build: Tensor) -> Tensor:
    """Joints ``[T, 17, 2]`` of eight limb angles ``[T]`` and six factors of build."""
    frames = angles[0].shape[0]
    joints = torch.zeros(frames, 17, 2)
    joints[:, :5] = torch.tensor(_HEAD) * build[0]
    for side, sign in enumerate((1.0, -1.0)):
        shoulder, elbow, hip, knee = angles[4 * side : 4 * side + 4]
        place = torch.tensor([sign * _SHOULDER * build[1], _NECK * build[0]])
        joints[:, 5 + side] = place
        upper = 0.3 + shoulder  # arms hang a little away from the body
        joints[:, 7 + side] = place + _UPPER_ARM * build[2] * _limb(upper, sign)
        joints[:, 9 + side] = joints[:, 7 + side] + _FOREARM * build[3] * _limb(
            upper + 0.3 + elbow, sign
        )
        place = torch.tensor([sign * _HIP * build[1], 0.0])
        joints[:, 11 + side] = place
        joints[:, 13 + side] = place + _THIGH * build[4] * _limb(0.1 + hip, sign)
        joints[:, 15 + side] = joints[:, 13 + side] + _SHIN * build[5] * _limb(
            0.1 + hip - 0.2 - knee, sign
        )
    return joints


def _limb(angle: Tensor, sign: float) -> Tensor:
    """Unit vectors ``[T, 2]`` at ``angle`` from straight down, outwards."""
    return torch.stack((sign * angle.sin(), angle.cos()), -1)
