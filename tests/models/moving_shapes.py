"""A small world for VL-JEPA: a coloured shape moves over noise; texts say what it is and does.

Every attribute value has several words, which is what paraphrases differ in, and so has their
order. A stream shows one scene after another, for a while each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from encfast import PackedBatch

SIDE = 16  # pixels
FRAMES = 4  # of a clip
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
SHAPES = ("square", "bars", "cross")
STEPS = torch.tensor([[0, 3], [3, 0], [0, 0]])  # pixels per frame, down and right
NOISE = 0.3
SIZES = (len(COLOURS), len(SHAPES), len(STEPS))
CLASSES = 27
WORDS = 3  # for each value of an attribute
BOS, EOS, FIRST = 1, 2, 3  # ids; words follow
VOCABULARY = FIRST + 3 * 3 * WORDS


class Scenes(NamedTuple):
    """What there is to see, one row a clip."""

    attributes: Tensor  # int64 [B, 3]: colour, shape, motion

    @property
    def classes(self) -> Tensor:
        return (self.attributes * torch.tensor([9, 3, 1])).sum(1)


def scenes_of(classes: Tensor) -> Scenes:
    return Scenes(torch.stack((classes // 9, classes // 3 % 3, classes % 3), 1))


def masks() -> Tensor:
    """bool `[3, 6, 6]`, the shapes."""
    square = torch.ones(6, 6, dtype=torch.bool)
    bars = square & (torch.arange(6) % 3 != 2)[:, None]
    middle = (torch.arange(6) >= 2) & (torch.arange(6) < 4)
    return torch.stack((square, bars, middle[:, None] | middle[None]))


def paint(scenes: Scenes, frames: int, generator: torch.Generator) -> Tensor:
    """Frames `[B, frames, 3, SIDE, SIDE]`, from a random place on, around the edges."""
    colour, shape, motion = scenes.attributes.unbind(1)
    count = len(colour)
    start = torch.randint(SIDE, (count, 1, 2), generator=generator)
    time = torch.arange(frames)[None, :, None]
    corner = (start + time * STEPS[motion][:, None]) % SIDE  # [B, F, 2]
    offset = (torch.arange(SIDE) - corner[..., None]) % SIDE  # [B, F, 2, SIDE]
    y, x = offset.unbind(2)  # [B, F, SIDE]
    on = masks()[shape][
        torch.arange(count)[:, None, None, None],
        y.clamp(max=5)[..., :, None],
        x.clamp(max=5)[..., None, :],
    ]
    on = on & (y < 6)[..., :, None] & (x < 6)[..., None, :]
    pixels = on[:, :, None] * COLOURS[colour][:, None, :, None, None] * 2
    return pixels + NOISE * torch.randn(pixels.shape, generator=generator)


def paraphrases(scenes: Scenes, generator: torch.Generator) -> PackedBatch:
    """Ids from BOS to EOS, `[5 B]`: a word for each attribute, in any order."""
    count = len(scenes.attributes)
    word = torch.randint(WORDS, (count, 3), generator=generator)
    ids = FIRST + (torch.arange(3) * 3 + scenes.attributes) * WORDS + word
    order = torch.rand(count, 3, generator=generator).argsort(1)
    ends = torch.tensor([BOS]).expand(count, 1), torch.tensor([EOS]).expand(count, 1)
    rows = torch.cat((ends[0], ids.gather(1, order), ends[1]), 1)
    return PackedBatch.from_lengths(rows.flatten(), [5] * count)


def understood(text: Tensor) -> int:
    """The class that a text names, -1 if it leaves an attribute open or says it twice."""
    words = [int(t) - FIRST for t in text if int(t) >= FIRST]
    found = {w // (3 * WORDS): w // WORDS % 3 for w in words}
    if len(words) != 3 or len(found) != 3:
        return -1
    return found[0] * 9 + found[1] * 3 + found[2]


class Stream(NamedTuple):
    """One long clip and what is right at each of its windows."""

    frames: Tensor  # [T, 3, SIDE, SIDE]
    classes: Tensor  # int64 [S], of the scene in the middle of a window


# The design of the stream that selective decoding is judged on: fixed, with its seed and its bounds
# in test_vl_jepa_training.py, before any model was trained.
STREAM_SEED = 2026
SCENES = 24
SHORTEST, LONGEST = 5, 15  # windows that a scene lasts
STRIDE = 2  # frames between windows


def stream() -> Stream:
    """SCENES scenes, each unlike the one before it, as windows of FRAMES frames see them."""
    generator = torch.Generator().manual_seed(STREAM_SEED)
    lasting = torch.randint(SHORTEST, LONGEST + 1, (SCENES,), generator=generator).tolist()
    jumps = torch.randint(1, CLASSES, (SCENES,), generator=generator)
    classes = jumps.cumsum(0) % CLASSES
    parts = [
        paint(scenes_of(c[None]), n * STRIDE, generator)[0]
        for c, n in zip(classes, lasting, strict=True)
    ]
    frames = torch.cat(parts)
    owner = torch.repeat_interleave(classes, torch.tensor(lasting) * STRIDE)  # [T]
    count = 1 + (len(frames) - FRAMES) // STRIDE
    return Stream(frames, owner[torch.arange(count) * STRIDE + FRAMES // 2])
