"""Energies and chains of regularized auto-encoders, against densities of which all is known."""

import math

import pytest
import torch

from encfast.models.regularized_autoencoder import energy_difference, sample_chains

from .common import assert_parity
from .regularized_nets import build, points, rng
from .two_modes import density, log_density, score, second_derivative


@pytest.mark.quick
def test_energy_differences_by_the_number_of_nodes():
    """Error of second, third order in the step, then the trapezoid rule's 1/m^2."""
    x = torch.tensor([[-0.9], [0.2], [1.4]], dtype=torch.float64)

    def error(step, nodes):
        exact = log_density(x) - log_density(x + step)
        found = energy_difference(score, x, x + step, nodes=nodes)
        return (found - exact[:, 0]).abs()

    for nodes, order in ((1, 2), (2, 3)):
        ratio = error(0.02, nodes) / error(0.01, nodes)
        assert torch.allclose(ratio, torch.full_like(ratio, 2.0**order), rtol=0.1), ratio
    ratio = error(0.4, 17) / error(0.4, 33)
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0), rtol=0.1), ratio
    there, back = (energy_difference(score, *way, nodes=5) for way in ((x, x + 1), (x + 1, x)))
    assert torch.allclose(there, -back, rtol=1e-12)
    with pytest.raises(ValueError, match="nodes must be >= 1, got 0"):
        energy_difference(score, x, x, nodes=0)


@pytest.mark.quick
def test_a_models_energies_are_integrals_of_its_score():
    model = build("spiral-250", sigma=0.5)
    x, y = points(4), points(4, seed=2)
    with torch.no_grad():
        expected = energy_difference(model.score, x, y, nodes=9)
        assert_parity("energy", model.energy_difference(x, y, nodes=9), expected, 0.0)
        first = -((model.reconstruct(x) - x) / 0.25 * (y - x)).sum(-1)
        assert_parity("first order", model.energy_difference(x, y, nodes=1), first, 1e-14)


COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian_chains(n=700, chains=256, seed=0, **options):
    """Chains of the correlated Gaussian that start in it: `n * chains` steps in all."""
    generator = rng(seed)
    start = torch.randn((chains, 2), dtype=torch.float64, generator=generator)
    start = start @ torch.linalg.cholesky(COVARIANCE).t()
    drawn = sample_chains(
        lambda x: -x @ PRECISION,
        start,
        n,
        hessian=lambda x: -PRECISION.expand(len(x), 2, 2),
        generator=generator,
        **options,
    )
    return drawn, torch.cov(drawn.points.flatten(0, 1).t())


@pytest.mark.parametrize("nodes", [2, 4])
def test_chains_reach_a_known_covariance(nodes):
    chains, covariance = gaussian_chains(step=0.4, nodes=nodes)
    assert ((covariance - COVARIANCE).abs() < 0.05).all(), covariance
    assert 0.5 < chains.acceptance.mean() < 0.9


def test_first_order_energies_inflate_the_variance():
    _, covariance = gaussian_chains(step=0.4, nodes=1)
    assert (covariance.diag() > 1.2).all(), covariance


def test_temperature_scales_the_covariance():
    _, covariance = gaussian_chains(step=0.4, temperature=0.5)
    assert ((covariance - 0.5 * COVARIANCE).abs() < 0.05).all(), covariance


def test_langevin_proposals_are_corrected():
    """Accepting every one of them leaves a covariance that is off."""
    options = {"n": 500, "step": 0.4, "drift": 0.08}
    chains, corrected = gaussian_chains(**options)
    assert ((corrected - COVARIANCE).abs() < 0.05).all(), corrected
    assert 0.7 < chains.acceptance.mean() < 0.9
    chains, plain = gaussian_chains(accept_all=True, **options)
    assert (chains.acceptance == 1).all()
    assert (plain.diag() < 0.95).all(), plain


def test_langevin_proposals_need_the_determinant():
    """Between two modes the proposal spreads points; without log|det| too few remain there."""

    def middle(hessian):
        generator = rng()
        start = 0.5 * torch.randn((512, 1), dtype=torch.float64, generator=generator)
        start += torch.where(torch.rand((512, 1), generator=generator) < 0.5, 1.2, -1.2)
        chains = sample_chains(
            score, start, 400, step=0.4, drift=0.08, hessian=hessian, nodes=5, generator=generator
        )
        return (chains.points.abs() < 0.4).double().mean().item()

    line = torch.linspace(-6, 6, 60_001, dtype=torch.float64)
    expected = (density(line)[line.abs() < 0.4].sum() / density(line).sum()).item()
    assert middle(second_derivative) == pytest.approx(expected, rel=0.1)
    assert middle(lambda x: torch.zeros_like(x)[..., None]) < 0.7 * expected


@pytest.mark.quick
def test_a_hessian_left_out_is_derived():
    x0 = points(3, 1)
    chains = [
        sample_chains(score, x0, 5, step=0.3, drift=0.05, hessian=h, generator=rng()).points
        for h in (None, second_derivative)
    ]
    assert_parity("points", *chains, 1e-12)


@pytest.mark.quick
def test_chains_repeat_thin_and_do_not_meet():
    def draw(x0, n=6, **options):
        return sample_chains(score, x0, n, step=0.5, generator=rng(), **options)

    x0 = points(4, 1)
    full = draw(x0, 12)
    assert full.points.shape == (12, 4, 1)
    assert torch.equal(full.points, draw(x0, 12).points)
    thinned = draw(x0, 3, thinning=3, burn_in=3)
    assert torch.equal(thinned.points, full.points[5::3])
    moved = (full.points[3:] != full.points[2:-1]).double().mean((0, 2))
    assert torch.allclose(thinned.acceptance, moved)
    assert moved.min() > 0 and moved.max() < 1
    other = x0.clone()
    other[0] += 1.0
    assert torch.equal(draw(other, 12).points[:, 1:], full.points[:, 1:])
    assert draw(x0, 0).points.shape == (0, 4, 1)
    assert draw(x0[:0]).points.shape == (6, 0, 1)


@pytest.mark.quick
def test_chains_reject_where_the_score_is_no_number():
    """A proposal that the score knows nothing about must not become a sample."""

    def bounded(x):
        return torch.where(x > 0, -x, math.nan)

    chains = sample_chains(bounded, torch.full((8, 1), 0.5), 50, step=0.5, nodes=2, generator=rng())
    assert (chains.points > 0).all()
    assert 0 < chains.acceptance.mean() < 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": torch.zeros(2)}, r"x0 must be \[B, d\], got \(2,\)"),
        ({"n": -1}, "n must be >= 0, got -1"),
        ({"step": 0.0}, r"step must be > 0, got 0\.0"),
        ({"temperature": 0.0}, r"temperature must be > 0, got 0\.0"),
        ({"thinning": 0}, "thinning must be >= 1, got 0"),
        ({"burn_in": -1}, "burn_in must be >= 0, got -1"),
        ({"nodes": 0}, "nodes must be >= 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chains_refuse(options, message):
    options = {"x0": torch.zeros(2, 1), "n": 1, "step": 0.1} | options
    with pytest.raises(ValueError, match=message):
        sample_chains(score, options.pop("x0"), options.pop("n"), **options)


@pytest.mark.quick
def test_a_models_proposal_is_a_blend_with_its_reconstruction():
    model = build("spiral-250", sigma=0.3)
    x0, blend, step = points(5), 0.4, 0.2
    chains = model.sample(x0, 1, step=step, blend=blend, accept_all=True, generator=rng())
    noise = torch.randn((5, 2), dtype=torch.float64, generator=rng())
    with torch.no_grad():
        start = (1 - blend) * x0 + blend * model.reconstruct(x0)
        y = start + step * noise
        expected = (1 - blend) * y + blend * model.reconstruct(y)
    assert_parity("proposal", chains.points[0], expected, 1e-12)
    assert not chains.points.requires_grad
