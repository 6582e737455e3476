"""What the projection head is for: probes before and behind it, on made and on real data."""

import pytest
import torch

import encfast
from encfast.data import ImageBatch
from encfast.models.projection_head import probe_accuracy

FEATURES = 16


def train(model, batches):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-6)
    for views in batches:
        optimizer.zero_grad()
        model.loss(ImageBatch(views[0], targets=views[1])).total.backward()
        optimizer.step()
    return model.eval()


def mlp(size, widths, **overrides):
    width = {"head_hidden": widths[-1], "head_out": widths[-1]}
    fields = {"encoder": "mlp", "image_size": size, "widths": widths, **width, **overrides}
    return encfast.create("projection_head/tiny", **fields)


def misaligned_accuracies(head, kappa, widths, seed):
    """Of probes for a feature's sign: on z and on u where half of the views have it drawn anew, and
    on u where all views have it."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=g)).Q

    def signs(n):
        return 2.0 * torch.randint(2, (n, FEATURES), generator=g) - 1

    def view(s):
        kept = s.clone()
        redrawn = torch.rand(len(s), generator=g) < 0.5
        kept[redrawn, 0] = signs(int(redrawn.sum()))[:, 0]
        return (kept + 0.3 * torch.randn(s.shape, generator=g)) @ mixing

    def batches():
        for _ in range(400):
            s = signs(256)
            yield view(s), view(s)

    model = train(mlp((FEATURES,), widths, head=head, kappa=kappa), batches())
    s = signs(3000)
    x, labels = (s + 0.3 * torch.randn(s.shape, generator=g)) @ mixing, (s > 0).long()
    with torch.no_grad():
        found = model(x)
    return tuple(
        probe_accuracy(r[:2000], labels[:2000, feature], r[2000:], labels[2000:, feature])
        for r, feature in ((found.before, 0), (found.after, 0), (found.after, 1))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "kappa", "widths"),
    [("mlp", 1.05, (64, 64)), ("reweight", 1.05, (64, 256)), ("reweight", 1.5, (64,))],
    ids=["mlp", "reweight", "reweight, linear encoder"],
)
def test_a_feature_that_augmentation_destroys_survives_before_the_head(head, kappa, widths):
    """Acceptance 4, calibrated on seeds 10 to 12 and judged on 0 to 2.

    For a gap under the fixed head z must still have what u has lost. u loses by the powers of
    kappa: the head can be inverted, up to the probe's penalty. z loses as the hidden layer forgets,
    for all its coordinates at once. Means over seeds 10 to 12, behind 64 hidden channels:

        kappa  p    kappa^(p - 1)  on z   on u
        1.05    64   2e1           0.561  0.541
        1.2     64   1e5           0.565  0.528   after 200 of 400 steps 0.805 and 0.589
        1.5     64   1e11          0.588  0.569   after 200 of 400 steps 0.890 and 0.572
        1.05   256   3e5           0.700  0.560   judged here; SimCLR's kappa
        1.05   512   7e10          0.638  0.604   p of the paper's runs

    One linear layer, as in the theory, has nothing before z that could forget.
    """
    runs = torch.tensor([misaligned_accuracies(head, kappa, widths, seed) for seed in range(3)])
    before, after, kept = runs.mean(0).tolist()
    print(f"{head}: {before:.3f} before, {after:.3f} behind; {kept:.3f} of a feature that all keep")
    assert before >= after + 0.05
    assert kept > 0.9, "the head has lost what the objective asks for, too"


def augmented(images, g):
    """Moved by up to one pixel each way, and noisy."""
    n = len(images)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    at = torch.randint(3, (2, n, 1), generator=g) + torch.arange(8)
    moved = padded[torch.arange(n)[:, None, None], 0, at[0, :, :, None], at[1, :, None]]
    return (moved + 0.2 * torch.randn(moved.shape, generator=g))[:, None]


@pytest.mark.slow
def test_simclr_on_digits_beats_pca_of_the_same_width():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.target), generator=g)
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    width, known = 64, slice(0, 1300)

    def batches():
        for _ in range(400):
            chosen = images[torch.randint(1300, (256,), generator=g)]
            yield augmented(chosen, g), augmented(chosen, g)

    model = train(mlp((1, 8, 8), (256, width)), batches())

    def accuracy(features):
        return probe_accuracy(features[known], labels[known], features[1300:], labels[1300:])

    pixels = images.flatten(1)
    centred = pixels - pixels[known].mean(0)
    basis = torch.linalg.svd(centred[known], full_matrices=False).Vh[:width]
    pca = accuracy(centred @ basis.T)
    with torch.no_grad():
        found = model(images)
        ours, behind = accuracy(found.before), accuracy(found.after)
        model.head = torch.nn.Identity()
        assert torch.equal(model(images, False), found.before)
        without = accuracy(model(images).after)
    print(f"probe: pixels' PCA {pca:.3f}, z {ours:.3f}, u {behind:.3f}")
    assert ours > pca and without == ours
