"""MAE learns from handwritten digits: to fill in what is hidden, and features along the way."""

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast.data import ImageBatch
from encfast.models.mae import Mae
from encfast.schedules import linear_schedule

pytestmark = pytest.mark.slow

DIGITS = {
    "image_size": (8, 8),
    "patch_size": (2, 2),
    "channels": 1,
    "pixel_mean": (0.0,),
    "pixel_std": (1.0,),
    "mask_ratio": 0.5,
    "norm_pix_loss": False,
}
LR = 4e-3  # at its peak


@pytest.fixture
def one_thread():
    """Small steps gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 images [1, 8, 8] of mean 0 and deviation 1, and their labels, in a fixed order."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1)[order]
    labels = torch.from_numpy(data.target).long()[order]
    return (images - images.mean()) / images.std(), labels


def pretrain(model: Mae, images: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.05)
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * linear_schedule(step, steps // 10, steps)
        rows = torch.randint(len(images), (64,), generator=generator)
        mask = model.draw_mask(64, generator=generator)
        loss = model.loss(ImageBatch(images[rows], mask)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def probe(model: Mae, train, test) -> float:
    """Accuracy of the nearest class mean over patch features: nothing is fitted but the means."""
    with torch.no_grad():
        features = [
            F.normalize(model.encode(x).data.unflatten(0, (len(x), -1))[:, 1:].mean(1), dim=-1)
            for x, _ in (train, test)
        ]
    means = torch.stack([features[0][train[1] == label].mean(0) for label in range(10)])
    centre = features[0].mean(0)
    scores = F.normalize(features[1] - centre, dim=-1) @ F.normalize(means - centre, dim=-1).t()
    return (scores.argmax(1) == test[1]).float().mean().item()


def test_pretraining_fills_in_digits(one_thread):
    images, labels = digits()
    train, held_out = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    model = encfast.create("mae/tiny", decoder_depth=2, **DIGITS)
    before = probe(model, train, held_out)
    history = pretrain(model, train[0], 800)
    assert sum(history[-20:]) < 0.6 * sum(history[:20])
    mask = model.draw_mask(len(held_out[0]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model.eval().loss(ImageBatch(held_out[0], mask)).total.item()
    # What one may say of hidden pixels without looking at the visible ones: their mean.
    mean_image = train[0].mean(0, keepdim=True).expand_as(held_out[0])
    rows = [
        model.encoder.embed.pixels(x, mask.hidden, channels_last=True)
        for x in (mean_image, held_out[0])
    ]
    baseline = F.mse_loss(*rows).item()
    after = probe(model, train, held_out)
    assert loss < 0.75 * baseline, f"loss {loss:.3f}, that of the mean image is {baseline:.3f}"
    assert after > before + 0.05, f"accuracy {before:.3f} before pre-training, {after:.3f} after"


def test_fine_tuning_learns_digits(one_thread):
    images, labels = digits()
    model = encfast.create(
        "mae/tiny", **{**DIGITS, "task": "classification", "drop_path": 0.1}
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = torch.randint(1500, (64,), generator=generator)
        optimizer.zero_grad()
        model.loss(ImageBatch(images[rows], labels=labels[rows])).total.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    assert accuracy > 0.9, f"accuracy {accuracy:.3f} on held-out digits"
