"""What ViViT's two stages learn of motion: a square that moves in one of four directions.

A clip and its reversal show the same frames, so no frame tells a direction to a model that does not
know its time. A ViT is trained on still images first, to say where the square is.
"""

from statistics import mean

import pytest
import torch
from torch import Tensor, nn

import encfast
from encfast import PackedBatch
from encfast.config import replace_fields
from encfast.data import ClipBatch
from encfast.models._vivit_weights import inflate
from encfast.models.vivit import Vivit

SIDE, SQUARE, TRAVEL = 12, 4, 4  # pixels
NOISE = 0.5  # deviation; the square is 1 brighter than the ground
FRAMES = 16  # of stage 2
CLIPS = 32  # in a batch
BATCHES = 32  # of the training set of stage 2, whose frozen features are kept
IMAGE_STEPS, FIRST_STEPS, SECOND_STEPS = 60, 250, 50


@pytest.fixture(autouse=True)
def one_thread():
    """Small steps gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def paint(corners: Tensor, generator: torch.Generator) -> Tensor:
    """Corners `[B, T, 2]` of the square -> noisy frames `[B, 1, T, SIDE, SIDE]`."""
    offset = torch.arange(SIDE) - corners[..., None]
    inside = (offset >= 0) & (offset < SQUARE)  # [B, T, 2, SIDE]
    square = inside[..., 0, :, None] & inside[..., 1, None, :]
    noise = NOISE * torch.randn(square.shape, generator=generator)
    return (noise + square)[:, None]


def clips(count: int, frames: int, generator: torch.Generator) -> ClipBatch:
    """Squares that travel TRAVEL pixels, in however many frames; labels are directions."""
    labels = torch.randint(4, (count,), generator=generator)
    step = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])[labels]
    time = (torch.arange(frames) + 0.5) / frames - 0.5  # as interpolated positions see it
    margin = (SIDE - SQUARE - TRAVEL * step.abs()) / 2  # of the path's centre
    centre = (SIDE - SQUARE) / 2 + margin * (2 * torch.rand(count, 2, generator=generator) - 1)
    corners = centre[:, None] + TRAVEL * time[:, None] * step[:, None]
    return ClipBatch.from_dense(paint(corners.round().long(), generator), labels)


def images(count: int, generator: torch.Generator) -> ClipBatch:
    """Still squares, each twice as a tubelet wants it; labels are the ninths they start in."""
    corners = torch.randint(SIDE - SQUARE + 1, (count, 1, 2), generator=generator)
    frames = paint(corners, generator)[:, 0, 0, None].repeat_interleave(2, 0)
    ninth = corners[:, 0] // 3
    return ClipBatch(PackedBatch.from_lengths(frames, [2] * count), 3 * ninth[:, 0] + ninth[:, 1])


def model_for(frames: int, num_labels: int = 4) -> Vivit:
    model = encfast.create(
        "vivit/tiny",
        image_size=(SIDE, SIDE),
        patch_size=(2, 4, 4),
        frames=frames,
        channels=1,
        pixel_mean=(0.5,),
        pixel_std=(0.5,),
        temporal_depth=2,
        num_labels=num_labels,
    )
    spread_positions(model)
    return model


def spread_positions(model: Vivit) -> None:
    """Larger than they start by default: so short a training would hardly find them."""
    for transformer in (model.spatial, model.temporal):
        nn.init.normal_(transformer.positions.table, std=0.5)


def train(model: Vivit, steps: int, rate: float, batch) -> None:
    """AdamW, the rate linear up and down; `batch` makes that of a step."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps)
    )
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(batch(step)).total.backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model: Vivit, batches: list[ClipBatch]) -> float:
    model.eval()
    right = [
        model.classify(b.features if b.clips is None else model.features(b.clips)).argmax(1)
        == b.labels
        for b in batches
    ]
    model.train()
    return torch.cat(right).float().mean().item()


def image_model(generator: torch.Generator) -> Vivit:
    model = model_for(2, num_labels=9)
    train(model, IMAGE_STEPS, 5e-3, lambda _: images(64, generator))
    return model


def from_images(image: Vivit, frames: int) -> Vivit:
    """A model of clips whose tubelets see the central frame as `image` sees images."""
    model = model_for(frames)
    model.spatial.load_state_dict(image.spatial.state_dict())
    model.embed.load_state_dict(image.embed.state_dict())
    kernel = image.embed.proj.weight.detach().view(-1, 1, *image.config.patch_size).sum(2)
    with torch.no_grad():
        model.embed.proj.weight.copy_(inflate(kernel, 2, "central").flatten(1))
    return model


def first_stage(image: Vivit, frames: int, generator: torch.Generator) -> Vivit:
    model = from_images(image, frames)
    train(model, FIRST_STEPS, 5e-3, lambda _: clips(CLIPS, frames, generator))
    return model


def trained_whole(second: Vivit) -> Vivit:
    """A model of stage 2 with nothing frozen."""
    model = Vivit(replace_fields(second.config, {"freeze_spatial": False}))
    model.load_state_dict(second.state_dict())
    return model


class SecondStages:
    """Trains models of stage 2 on one set of clips, for equally many steps."""

    def __init__(self, generator: torch.Generator) -> None:
        self.data = [clips(CLIPS, FRAMES, generator) for _ in range(BATCHES)]
        self.test = [clips(128, FRAMES, generator) for _ in range(8)]

    def __call__(self, model: Vivit) -> float:
        """Trains a model; returns its accuracy on 1024 other clips."""
        data, test = self.data, self.test
        if model.config.freeze_spatial:
            data, test = ([model.cache(b) for b in batches] for batches in (data, test))
        train(model, SECOND_STEPS, 3e-3, lambda step: data[step % BATCHES])
        return accuracy(model, test)


def fresh(first: Vivit) -> Vivit:
    """A model of stage 2 without an adapter, whose temporal transformer has learned nothing."""
    torch.manual_seed(0)
    model = first.second_stage(frames=FRAMES, adapter="none", temporal_init="random")
    nn.init.normal_(model.temporal.positions.table, std=0.5)
    return model


@pytest.mark.slow
def test_frozen_with_temporal_weights_learns_what_full_training_does():
    """Mean accuracies of 3 seeds after 50 steps of stage 2, all from one stage 1 on 8 frames.

    Measured: naive (features of images) 0.485, frozen with a random temporal transformer 0.627,
    with that of stage 1 0.784, with the adapter too 0.785, trained whole 0.804.
    """
    runs: dict[str, list[float]] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        image = image_model(generator)
        second = SecondStages(generator)
        first = first_stage(image, 8, generator)
        initialised = first.second_stage(frames=FRAMES, adapter="none")
        models = {
            "full": trained_whole(initialised),
            "naive": fresh(from_images(image, FRAMES)),
            "random": fresh(first),
            "initialised": initialised,
            "adapter": first.second_stage(frames=FRAMES),
        }
        for name, model in models.items():
            runs.setdefault(name, []).append(second(model))
    found = {name: mean(values) for name, values in runs.items()}
    assert found["naive"] + 0.05 <= found["random"], found
    assert found["random"] + 0.08 <= found["initialised"], found
    assert found["initialised"] - 0.02 <= found["adapter"], found
    assert found["adapter"] >= found["full"] - 0.05, found


@pytest.mark.slow
def test_first_stage_on_fewer_frames():
    """Accuracies after stage 1 on 2, 4 and 8 frames of a clip and stage 2 with the adapter.

    Measured: 0.276, 0.283 and 0.682, in the order of the paper's ablation. One seed does not place
    4 frames reliably, so only the ends are compared.
    """
    found: dict[int, float] = {}
    generator = torch.Generator().manual_seed(0)
    image = image_model(generator)
    second = SecondStages(generator)
    for frames in (2, 4, 8):
        first = first_stage(image, frames, generator)
        found[frames] = second(first.second_stage(frames=FRAMES))
    assert found[2] + 0.10 <= found[8], found
