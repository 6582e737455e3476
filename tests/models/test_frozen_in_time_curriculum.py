"""What Frozen in Time's curriculum saves: one frame first, four frames last.

A square of a shade and a pattern travels, hidden in a quarter of the frames; captions name the look
alone. One frame says most of what four say.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from encfast import PackedBatch
from encfast.models.frozen_in_time import CaptionedClips, FrozenInTime, sample_frames

from .test_frozen_in_time_training import LENGTH, SHADES, SIDE, SQUARE, model_for
from .test_frozen_in_time_training import Training as TrainingOnDirections

PATTERNS = 4
LOOKS = len(SHADES) * PATTERNS

Sample = Callable[[Tensor, torch.Generator], CaptionedClips]


@pytest.fixture(autouse=True)
def one_thread():
    """Small steps gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def patterns() -> Tensor:
    """bool `[PATTERNS, SQUARE, SQUARE]`: all of the square, rows, columns, its edge."""
    whole = torch.ones(SQUARE, SQUARE, dtype=torch.bool)
    rows = whole & (torch.arange(SQUARE) % 2 == 0)[:, None]
    middle = (torch.arange(SQUARE) > 0) & (torch.arange(SQUARE) < SQUARE - 1)
    return torch.stack((whole, rows, rows.t(), ~(middle[:, None] & middle)))


def videos(looks: Tensor, generator: torch.Generator) -> Tensor:
    """Noisy frames `[2 B, LENGTH, 1, SIDE, SIDE]`: each of B looks to the right and back."""
    noise = 0.1 * torch.randn(2 * len(looks), LENGTH, 1, SIDE, SIDE, generator=generator)
    squares = SHADES[looks % len(SHADES), None, None] * patterns()[looks // len(SHADES)]
    frames = torch.zeros(len(looks), LENGTH, 1, SIDE, SIDE)
    top = SIDE // 3
    for left in range(LENGTH):
        frames[:, left, 0, top : top + SQUARE, left : left + SQUARE] = squares
    return torch.stack((frames, frames.flip(1)), 1).flatten(0, 1) + noise


def flickering(
    looks: Tensor, generator: torch.Generator, frames: int, how="random"
) -> CaptionedClips:
    """A clip of each look, hidden in a quarter of its frames; a caption of the look alone."""
    shown = torch.rand(len(looks), LENGTH, generator=generator) < 0.75
    seen = videos(looks, generator)[::2] * shown[:, :, None, None, None]
    clips = [video[sample_frames(frames, LENGTH, how=how, generator=generator)] for video in seen]
    return CaptionedClips(PackedBatch.from_list(clips), captions(looks))


def captions(looks: Tensor) -> PackedBatch:
    """[CLS] shade pattern [SEP]."""
    start = torch.full_like(looks, 126)
    ids = torch.stack((start, 10 + looks % len(SHADES), 20 + looks // len(SHADES), start + 1), 1)
    return PackedBatch.from_lengths(ids.flatten(), [4] * len(looks))


class Training(TrainingOnDirections):
    """AdamW on one model; keeps count of the scores of its attention.

    Args:
        model: see above.
        looks: int64 ``[L]``, what there is to see.
        seed: of what is drawn.
        size: looks in a batch.
    """

    text_rate = 2e-3  # one frame tells most looks apart, and so keeps their captions apart

    def __init__(self, model: FrozenInTime, looks: Tensor, seed: int, size: int) -> None:
        self.looks, self.size = looks, size
        super().__init__(model, seed)

    def run(self, steps: int, sample: Sample) -> None:
        """Steps on what ``sample`` makes of the looks drawn."""
        for _ in range(steps):
            drawn = torch.randperm(len(self.looks), generator=self.generator)[: self.size]
            data = sample(self.looks[drawn], self.generator)
            self.optimizer.zero_grad()
            self.model.loss(data).total.backward()
            self.optimizer.step()
            of_a_clip = self.model.config.attention_scores(data.clips.max_seqlen)
            self.scores += data.clips.batch_size * of_a_clip


@torch.no_grad()
def score(model: FrozenInTime, looks: Tensor, sample: Sample) -> tuple[float, float]:
    """Loss of 16 batches of all looks, and the share of their clips that find their caption."""
    generator = torch.Generator().manual_seed(99)
    total, right = 0.0, 0.0
    for _ in range(16):
        data = sample(looks, generator)
        total += model.loss(data).total.item()
        found = model(data.clips, data.text)
        best = (found.clips @ found.text.t()).argmax(1)
        right += (best == torch.arange(len(best))).float().mean().item()
    return total / 16, right / 16


@pytest.mark.slow
def test_one_frame_first_saves_attention():
    """Acceptance 6: from one frame to four, at less than 0.6 of the scores of four throughout.

    Measured: a loss of 0.021 at 0.56 of the scores that lead to 0.030 on four frames throughout; of
    1.24 on one frame before the second stage.
    """
    looks, found, scores = torch.arange(LOOKS), [], []
    for first, last in ((0, 400), (600, 100)):
        torch.manual_seed(0)
        training = Training(model_for(1 if first else 4), looks, seed=0, size=LOOKS)
        training.run(first, partial(flickering, frames=1))
        if first:
            training.use(training.model.with_frames(4))
        training.run(last, partial(flickering, frames=4))
        sample = partial(flickering, frames=4, how="middle")
        found.append(score(training.model, looks, sample)[0])
        scores.append(training.scores)
    assert scores[1] < 0.6 * scores[0], scores
    assert found[1] <= found[0], found
