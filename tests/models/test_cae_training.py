"""CAE trained: tokens of hidden patches on digits, and the time that hidden patches save."""

import time
from statistics import median

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast import ops
from encfast.data import ImageBatch
from encfast.models.cae import Cae, PatchCodebook
from encfast.patch_mask import PatchMask


@pytest.fixture
def one_thread():
    """One thread's processor time is what a step costs, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> torch.Tensor:
    """fp32 [1797, 1, 16, 16] with mean 0 and deviation 1."""
    datasets = pytest.importorskip("sklearn.datasets")
    images = torch.from_numpy(datasets.load_digits().images).float()[:, None]
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return (images - images.mean()) / images.std()


def evaluated(model: Cae, batch: ImageBatch) -> tuple[float, float]:
    """Share of hidden tokens that are guessed, and the alignment error."""
    model.eval()
    with torch.no_grad():
        right = model(batch.images, batch.mask).argmax(1) == batch.targets
        alignment = model.loss(batch).alignment
    model.train()
    return right.float().mean().item(), alignment.item()


@pytest.mark.slow
def test_learns_the_tokens_of_hidden_patches(one_thread):
    """Better than the most frequent token; the alignment error falls meanwhile."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = digits()
    pixels = ops.gather_patches(images, None, (4, 4))
    codebook = PatchCodebook.k_means(pixels, 64, steps=10, generator=generator)
    ids = codebook(pixels).view(len(images), 16)
    model = encfast.create(
        "cae/tiny",
        image_size=(16, 16),
        channels=1,
        pixel_mean=(0.0,),
        pixel_std=(1.0,),
        dim=64,
        ffn_dim=128,
        regressor_depth=2,
        decoder_depth=2,
        decoder_dim=64,
        decoder_heads=4,
        decoder_ffn_dim=128,
    )

    def batch(chosen: torch.Tensor) -> ImageBatch:
        mask = model.draw_mask(len(chosen), generator=generator)
        return ImageBatch(images[chosen], mask, ids[chosen].flatten()[mask.hidden])

    held_out = batch(torch.arange(1536, 1797))
    share = held_out.targets.bincount().max().item() / len(held_out.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    history = [evaluated(model, held_out)]
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(batch(torch.randint(1536, (64,), generator=generator))).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    history.append(evaluated(model, held_out))
    accuracy, alignment = zip(*history, strict=True)
    print(f"most frequent token {share:.3f}, accuracy {accuracy}, alignment {alignment}")
    assert accuracy[1] >= 3 / 64 > accuracy[0], "three times chance"
    assert accuracy[1] > share, "a constant guess is as good"
    assert alignment[1] < 0.5 * alignment[0]


@pytest.mark.slow
def test_visible_patches_alone_cost_at_most_two_thirds(one_thread):
    """Forward and backward of the 192-channel encoder over 98 of 196 patches, and over all."""
    model = encfast.create("cae/ti", drop_path=0.0)
    images = torch.randn(32, 3, 224, 224)
    masks = {
        "visible": model.draw_mask(32, generator=torch.Generator().manual_seed(0)),
        "full": PatchMask.all_visible(32, 196),
    }

    def step(mask: PatchMask) -> float:
        start = time.process_time()
        model.encode(images, mask).data.square().mean().backward()
        return time.process_time() - start

    for mask in masks.values():
        step(mask)
    runs = [{name: step(mask) for name, mask in masks.items()} for _ in range(3)]
    seconds = {name: median(run[name] for run in runs) for name in masks}
    print(seconds, seconds["visible"] / seconds["full"])
    assert seconds["visible"] <= 0.65 * seconds["full"], seconds
