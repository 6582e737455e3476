"""What training teaches regularized auto-encoders: the two objectives meet, the spiral is sampled.

The encoder starts with units as wide as the structure in the data and spread over it, the decoder
smaller than the author's U(-1, 1): what takes his start thousands of steps takes this one hundreds.
"""

import pytest
import torch

import encfast
from encfast import PackedBatch
from encfast.models.regularized_autoencoder import (
    PointBatch,
    RegularizedAutoencoder,
    energy_difference,
    fit_lbfgs,
    spiral,
    two_bumps,
)

from .two_modes import density

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    """Small steps gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(
    variant: str, steeper: float, spread: float = 30.0, **overrides
) -> RegularizedAutoencoder:
    torch.manual_seed(0)
    name = f"regularized_autoencoder/{variant}"
    model = encfast.create(name, dtype=torch.float64, **overrides)
    with torch.no_grad():
        model.encoder[0].weight.mul_(steeper)
        model.encoder[0].bias.mul_(spread)
        model.decoder[0].weight.mul_(0.1)
    return model


def quantiles(count: int) -> torch.Tensor:
    """Points of equal mass under the density with two modes ``[count, 1]``."""
    line = torch.linspace(-4.0, 4.0, 80_001, dtype=torch.float64)
    below = density(line).cumsum(0)
    mass = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return line[torch.searchsorted(below / below[-1], mass), None]


def gap(model: RegularizedAutoencoder, batch: PointBatch) -> float:
    """|L_DAE - L_RCAE| / sigma^2 of one network."""
    x = batch.tokens.data
    with torch.no_grad():
        denoising = (model.reconstruct(batch.noisy) - x).square().sum(-1).mean()
        error = (model.reconstruct(x) - x).square().sum(-1).mean()
        contractive = error + model.sigma**2 * model.contraction(x).mean()
    return ((denoising - contractive) / model.sigma**2).abs().item()


@pytest.mark.parametrize("objective", ["rcae", "dae"])
def test_the_objectives_meet_at_the_optimum(objective):
    """Their difference over sigma^2 vanishes with sigma at an optimum, and at no other network.

    There r - x is of order sigma^2 itself; that is also why r says nothing of p's height: between
    the modes, where p is least, it is as close to x as on them.
    """
    x = quantiles(100)
    noise = torch.special.ndtri((torch.arange(21, dtype=torch.float64) + 0.5) / 21)
    noise /= noise.square().mean().sqrt()
    fitted, drawn = [], []
    for sigma in (0.2, 0.1):
        overrides = {"dim": 1, "hidden": (20,), "output_scale": 4.0, "sigma": sigma}
        model = build("spiral-250", 2.0, objective=objective, **overrides)
        noisy = x + sigma * noise[:, None, None]
        batch = PointBatch(PackedBatch.from_lengths(x, [100]), noisy=noisy)
        drawn.append(gap(model, batch))
        fit_lbfgs(model, batch, iterations=300)
        fitted.append(gap(model, batch))
    assert fitted[1] < fitted[0] / 3, fitted
    assert drawn[1] > drawn[0] / 2, drawn

    places = torch.tensor([[0.0], [0.6]], dtype=torch.float64)
    with torch.no_grad():
        error = (model.reconstruct(places) - places).abs().flatten()
        rise = energy_difference(model.score, places[1:], places[:1], nodes=50)
    assert density(places[0]) < 0.5 * density(places[1])
    assert error[0] < 0.1 * error[1]
    assert rise.item() == pytest.approx(
        (density(places[1]) / density(places[0])).log().item(), rel=0.2
    )


def distance_to_spiral(points: torch.Tensor) -> torch.Tensor:
    t = torch.linspace(3.0, 15.0, 4001, dtype=torch.float64)
    curve = 0.04 * t[:, None] * torch.stack((t.sin(), t.cos()), 1)
    return torch.cdist(points, curve).min(1).values


def test_chains_stay_on_the_spiral():
    """The published net and noise; half the points, four copies, noise that falls in stages."""
    generator = torch.Generator().manual_seed(0)
    points = PackedBatch.from_lengths(spiral(500, generator=generator), [500])
    weights = None
    for sigma, iterations in ((0.05, 150), (0.02, 250), (0.01, 400)):
        model = build("spiral-250", 8.0, sigma=sigma, replicas=4)
        if weights is not None:
            model.load_state_dict(weights)
        batch = model.corrupt(points, generator=generator)
        losses = fit_lbfgs(model, batch, iterations=iterations)
        weights = model.state_dict()
    # Noise of 2 sigma^2 comes in, the half across the curve is taken out again.
    assert losses[-1] < 1.2 * 0.01**2

    start = spiral(100, generator=generator)
    chains = model.sample(start, 20, step=0.03, burn_in=200, thinning=20, generator=generator)
    bound = 3 * 0.01 + 0.02
    assert distance_to_spiral(chains.points.flatten(0, 1)).mean() < bound
    assert chains.acceptance.min() > 0.05 and chains.acceptance.max() < 0.98
    travelled = (chains.points[-1] - chains.points[0]).norm(dim=1)
    assert travelled.mean() > 0.1, "the chains stand still"
    langevin = model.sample(start, 20, step=0.01, blend=0.5, burn_in=50, generator=generator)
    assert distance_to_spiral(langevin.points.flatten(0, 1)).mean() < bound
    assert langevin.acceptance.mean() > chains.acceptance.mean()
    uniform = 1.2 * torch.rand((2000, 2), dtype=torch.float64, generator=generator) - 0.6
    assert distance_to_spiral(uniform).mean() > bound


def test_the_score_of_the_two_bumps():
    """That of the true density blurred by the noise, up to the error of a fifth of the points."""
    generator = torch.Generator().manual_seed(0)
    model = build("two-bumps-250", 0.1, 20.0, replicas=4)
    points = PackedBatch.from_lengths(two_bumps(2000, generator=generator), [2000])
    fit_lbfgs(model, model.corrupt(points, generator=generator), iterations=200)

    covariance = torch.tensor([[22.5, 17.5], [17.5, 22.5]], dtype=torch.float64)
    flip = torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    mean = torch.tensor([5.0, 0.0], dtype=torch.float64)
    bumps = torch.distributions.MultivariateNormal(
        torch.stack((mean, flip @ mean)),
        torch.stack((covariance, flip @ covariance @ flip)) + torch.eye(2),
    )
    x = two_bumps(2000, generator=generator).requires_grad_()
    log_p = bumps.log_prob(x[:, None]).logsumexp(1)
    (exact,) = torch.autograd.grad(log_p.sum(), x)
    with torch.no_grad():
        error = (model.score(x) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.45
