"""Regularized auto-encoders: what both objectives learn, the Jacobian, data, grids."""

import math
from dataclasses import replace

import pytest
import torch

from encfast import PackedBatch
from encfast.models.regularized_autoencoder import (
    VARIANTS,
    PointBatch,
    RegularizedAutoencoderConfig,
    corrupted,
    fit_lbfgs,
    grid_dae,
    grid_rcae,
    spiral,
    two_bumps,
)
from encfast.testing import assert_close_to_reference

from .common import assert_parity
from .regularized_nets import build, points, rng
from .two_modes import density, score

EYE = torch.eye(2, dtype=torch.float64)
ACTIVATIONS = ("tanh", "sigmoid", "identity")


# The network and its Jacobian.


def autograd_jacobian(model, x):
    rows = [torch.autograd.functional.jacobian(model.reconstruct, row) for row in x]
    return torch.stack(rows)


@pytest.mark.quick
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("hidden", [(9,), (9, 4), (7, 5, 3)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output", ACTIVATIONS)
def test_the_penalty_is_that_of_the_whole_reconstruction(tied, hidden, activation, output):
    """One that contracts the encoder alone, as the classic contractive auto-encoder, differs."""
    scale = 1.0 if output == "identity" else 3.0
    model = build(
        dim=3,
        hidden=hidden,
        tied=tied,
        activation=activation,
        output_activation=output,
        output_scale=scale,
        learn_scale=False,
    )
    x = points(5, 3)
    expected = autograd_jacobian(model, x)  # [N, d, d]
    assert_parity("jacobian", model.jacobian(x), expected, 1e-12)
    norm = expected.square().sum((1, 2))
    assert_parity("penalty", model.contraction(x), norm, 1e-10)
    encoder = torch.stack([torch.autograd.functional.jacobian(model.encode, row) for row in x])
    assert ((encoder.square().sum((1, 2)) - norm).abs() > 1e-2 * norm).all()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["tiny", "tiny-deep"])
def test_the_penalty_has_the_gradients_of_plain_autograd(name):
    """In float32 too: the closed form loses no more digits than a backward per output."""

    def gradients(model, x, plain):
        if plain:
            rows = torch.autograd.functional.jacobian(
                lambda x: model.reconstruct(x).sum(0), x, create_graph=True
            )  # [d, N, d]
            norm = rows.square().sum((0, 2))
        else:
            norm = model.contraction(x)
        found = torch.autograd.grad(norm.mean(), list(model.parameters()), allow_unused=True)
        return norm, dict(zip((n for n, _ in model.named_parameters()), found, strict=True))

    model64 = build(name)
    model = build(name, dtype=torch.float32)
    model.load_state_dict(model64.state_dict())
    model64.load_state_dict(model.state_dict())
    x = points(33).float()
    norm, grads = gradients(model, x, plain=False)
    plain_norm, plain_grads = gradients(model, x, plain=True)
    norm64, grads64 = gradients(model64, x.double(), plain=True)
    assert_close_to_reference("penalty", norm, norm64, plain_norm)
    compared = 0
    for parameter, grad in grads.items():
        if grad is None:
            assert plain_grads[parameter] is None, parameter
        elif grad.numel() > 1:
            compared += 1
            assert_close_to_reference(
                parameter, grad, grads64[parameter], plain_grads[parameter], 3.0
            )
    assert compared >= 3
    if name == "tiny":
        assert_parity("scale", grads["scale"], grads64["scale"], 1e-6)


@pytest.mark.quick
def test_random_directions_estimate_the_penalty_without_bias():
    model = build("tiny-deep", dim=3)
    x = points(4, 3)
    exact = model.contraction(x)
    probes = torch.randn((20_000, 4, 3), dtype=torch.float64, generator=rng())
    one = torch.stack([model.contraction(x, v[None]) for v in probes[:100]])  # [100, N]
    assert torch.allclose(one.mean(0), model.contraction(x, probes[:100]), rtol=1e-12)
    assert (one.std(0) > 0.1 * exact).all()
    error = one.std(0) / math.sqrt(len(probes))
    assert ((model.contraction(x, probes) - exact).abs() < 5 * error).all()


@pytest.mark.quick
def test_reconstruction_is_the_formula_of_the_paper():
    model = build("spiral-250")
    encoder, decoder = model.encoder[0], model.decoder[0]
    wc, wb = encoder.weight.t(), decoder.weight  # both [d, H]
    x = points(7)
    expected = 2.0 * torch.tanh(torch.tanh(x @ wc + encoder.bias) @ wb.t() + decoder.bias)
    assert_parity("r", model.reconstruct(x), expected, 1e-14)
    for weight, bound in ((wc, 1.0), (wb, 1.0), (encoder.bias, 0.1)):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.mean().abs() < 0.15 * bound
    assert decoder.bias.abs().max() <= 0.1


def test_sizes_and_ties():
    for name, hidden in (("spiral-250", 250), ("spiral-500", 500), ("spiral-1000", 1000)):
        assert build(name, device="meta").num_parameters() == 5 * hidden + 2
    bumps = VARIANTS["two-bumps-250"]
    assert build("two-bumps-250", device="meta").num_parameters() == 1252
    assert (bumps.output_scale, bumps.sigma) == (40.0, 1.0)
    tied = build("spiral-250", tied=True, learn_scale=True)
    assert tied.num_parameters() == 3 * 250 + 2 + 1
    assert tied.scale.item() == 2.0
    deep = build("tiny", hidden=(6, 4), tied=True, learn_scale=False)
    assert deep.num_parameters() == 2 * 6 + 6 * 4 + 6 + 4 + 6 + 2
    assert [p.shape[0] for n, p in deep.named_parameters() if n.startswith("decoder")] == [6, 2]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "tanhh"}, "did you mean 'tanh'"),
        ({"objective": "cae"}, "objective 'cae' is unknown"),
        ({"hidden": ()}, "hidden must name one layer or more"),
        ({"hidden": (3, 0)}, "hidden must name one layer or more"),
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"sigma": 0.0}, r"sigma must be > 0, got 0\.0"),
        ({"sigma": float("nan")}, "sigma must be > 0, got nan"),
        ({"far_share": 1.5}, r"far_share must be in \[0, 1\], got 1\.5"),
        ({"far_share": 0.1, "objective": "rcae"}, "far_share needs objective 'dae'"),
        ({"output_activation": "identity"}, r"expected output_scale 1\.0"),
    ],
    ids=str,
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        RegularizedAutoencoderConfig(**fields)


# The objectives.


@pytest.mark.quick
def test_losses_are_the_objectives_of_the_paper():
    x = points(6)
    dae = build("tiny-dae")
    noisy = x + 0.1 * torch.randn((3, 6, 2), dtype=torch.float64, generator=rng())
    losses = dae.loss(PointBatch(PackedBatch.from_lengths(x, [4, 0, 2]), noisy=noisy))
    each = [(dae.reconstruct(y) - x).square().sum() for y in noisy]
    assert_parity("dae", losses.total, sum(each) / 18, 1e-14)
    rcae = build("tiny")
    losses = rcae.loss(PointBatch(PackedBatch.from_lengths(x, [6])))
    error = (rcae.reconstruct(x) - x).square().sum() / 6
    norm = autograd_jacobian(rcae, x).square().sum() / 6
    assert_parity("reconstruction", losses.reconstruction, error, 1e-14)
    assert_parity("contraction", losses.contraction, norm, 1e-12)
    assert_parity("total", losses.total, error + 0.1**2 * norm, 1e-12)


@pytest.mark.quick
def test_a_loss_names_what_its_batch_lacks():
    bare = PointBatch(PackedBatch.from_lengths(points(3), [3]))
    with pytest.raises(ValueError, match=r"'dae' needs batch\.noisy, which is None"):
        build("tiny-dae").loss(bare)
    with pytest.raises(ValueError, match=r"'hutchinson' needs batch\.probes, which is None"):
        build("tiny-deep").loss(bare)
    with pytest.raises(ValueError, match="dim 2, the model takes dim 3"):
        build(dim=3).example_batch()


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["rcae", "dae"])
def test_linear_networks_reach_the_closed_form_of_a_gaussian(objective):
    """W = S (S + sigma^2 I)^-1, hence the score of the Gaussian blurred by sigma.

    Points and noises of exact covariance stand for both expectations.
    """
    sigma, spread = 0.5, math.sqrt(2) * torch.cat((EYE, -EYE))  # [4, d], covariance I
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    x = spread @ torch.linalg.cholesky(covariance).t()
    model = build(
        "tiny-dae",
        objective=objective,
        sigma=sigma,
        hidden=(4,),
        activation="identity",
        output_activation="identity",
        output_scale=1.0,
        far_share=0.0,
        tied=False,
    )
    batch = PointBatch(PackedBatch.from_lengths(x, [4]), noisy=x + sigma * spread[:, None])
    losses = fit_lbfgs(model, batch)
    assert losses[0] > 2 * losses[-1]
    precision = torch.linalg.inv(covariance + sigma**2 * EYE)
    y = points(20)
    with torch.no_grad():
        jacobian, learned, hessian = model.jacobian(y), model.score(y), model.hessian(y)
    assert (jacobian - covariance @ precision).abs().max() < 1e-5
    assert (learned + y @ precision).abs().max() < 1e-5
    assert (hessian + precision).abs().max() < 1e-5


@pytest.mark.quick
def test_fitting_asks_for_float64():
    model = build(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"is torch\.float32, expected torch\.float64"):
        fit_lbfgs(model, model.example_batch(rng()))


# Data and corruption.


@pytest.mark.quick
def test_some_copies_lie_far_away():
    x = torch.zeros((20_000, 2), dtype=torch.float64)
    near = corrupted(x, 2, 0.1, generator=rng())
    assert near.shape == (2, 20_000, 2)
    assert near.std().item() == pytest.approx(0.1, rel=0.02)
    assert (near[0] - near[1]).std() > 0.13, "the copies share their noise"
    mixed = corrupted(x, 2, 0.1, far_share=0.05, far_factor=10.0, generator=rng())
    far = mixed.norm(dim=-1) > 0.6
    # |N(0, 1) in the plane| > 0.6 has probability exp(-0.18); 6 sigma is out of the others' reach.
    assert far.double().mean().item() == pytest.approx(0.05 * math.exp(-0.18), rel=0.05)
    assert mixed[~far].std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(mixed, corrupted(x, 2, 0.1, far_share=0.05, generator=rng()))


@pytest.mark.quick
def test_data_sets_are_those_of_the_paper():
    x = spiral(5000, generator=rng())
    t = x.norm(dim=1) / 0.04
    assert 3.0 <= t.min() < 3.02 and 14.98 < t.max() <= 15.0
    assert t.mean().item() == pytest.approx(9.0, abs=0.2)
    assert torch.allclose(x, 0.04 * t[:, None] * torch.stack((t.sin(), t.cos()), 1), atol=1e-12)
    noisy = spiral(5000, noise=0.01, generator=rng())
    assert (noisy.norm(dim=1) - x.norm(dim=1)).std().item() == pytest.approx(0.01, rel=0.05)

    x = two_bumps(40_000, generator=rng())
    second = x.t() @ x / len(x)
    flipped = torch.tensor([[22.5 + 25.0, 0.0], [0.0, 22.5]])
    assert torch.allclose(second.float(), flipped, atol=0.8)
    x[:, 0] *= x[:, 0].sign()
    # Undone where the Gaussian's own first coordinate rarely is below 0.
    up = x[x[:, 0] > 15] - torch.tensor([5.0, 0.0])
    slope = (up[:, 0] * up[:, 1]).abs().mean() / up[:, 0].square().mean()
    assert slope.item() == pytest.approx(17.5 / 22.5, rel=0.1)


# Grids.


@pytest.fixture(scope="module")
def line():
    return torch.linspace(-4.0, 4.0, 2001, dtype=torch.float64)


@pytest.mark.quick
@pytest.mark.parametrize("solve", [grid_rcae, grid_dae])
def test_scores_of_grids_converge_with_sigma(solve, line):
    p, inside = density(line), line.abs() < 2.5
    weight, errors = p[inside] / p[inside].sum(), []
    for sigma in (0.2, 0.1, 0.05):
        error = (solve(line, p, sigma) - line) / sigma**2 - score(line)
        errors.append((weight @ error[inside].square()).sqrt().item())
    assert errors[0] >= 3 * errors[1] >= 9 * errors[2], errors
    assert errors[2] < 0.04, errors


@pytest.mark.quick
def test_the_best_denoiser_holds_the_score_of_the_blurred_density(line):
    """Exactly, for any sigma (Tweedie's formula): what remains of the DAE's error is the blur."""
    inside = line.abs() < 2.0
    for sigma in (0.3, 0.1):
        found = (grid_dae(line, density(line), sigma) - line) / sigma**2
        assert_parity(f"sigma {sigma}", found[inside], score(line, sigma)[inside], 1e-5)
        assert (found - score(line))[inside].abs().max() > 0.1


@pytest.mark.quick
@pytest.mark.parametrize("solve", [grid_rcae, grid_dae])
def test_reconstruction_error_is_no_energy(solve, line):
    """It vanishes at the minimum of p between two modes, far below its value on the slope."""
    error = (solve(line, density(line), 0.1) - line).abs()

    def at(x):
        return (line - x).abs().argmin()

    assert density(line)[at(0.0)] < 0.3 * density(line)[at(1.2)]
    assert error[at(0.0)] < 0.1 * error[at(0.6)]


@pytest.mark.quick
def test_the_grid_solution_minimises_its_sum():
    x = torch.tensor([-1.0, -0.4, 0.3, 0.5, 1.1, 2.0], dtype=torch.float64)
    p = torch.tensor([0.3, 1.0, 0.4, 0.2, 0.9, 0.1], dtype=torch.float64)
    d, sigma = x.diff(), 0.7
    r = grid_rcae(x, p, sigma).requires_grad_()
    fit = (p[:-1] * d * (r[:-1] - x[:-1]).square()).sum()
    (fit + sigma**2 * (p[:-1] * r.diff().square() / d).sum()).backward()
    assert (r - x).abs().max() > 0.1
    assert r.grad.abs().max() < 1e-14
    at = torch.tensor([-0.2, 0.9], dtype=torch.float64)
    weights = p * torch.exp(-(x - at[:, None]).square() / (2 * sigma**2))
    expected = (weights * x).sum(1) / weights.sum(1)
    assert_parity("dae", grid_dae(x, p, sigma, at), expected, 1e-14)
    far = torch.tensor([1e3, -1e3], dtype=torch.float64)
    assert grid_dae(x, p, sigma, far).tolist() == [2.0, -1.0]


@pytest.mark.quick
def test_grids_refuse():
    x, p = torch.arange(3.0), torch.ones(3)
    for solve in (grid_rcae, grid_dae):
        with pytest.raises(ValueError, match=r"of one shape \[n\], n >= 1, got \(3,\) and \(2,\)"):
            solve(x, p[:2], 0.1)
        with pytest.raises(ValueError, match=r"p must be positive, its minimum is 0\.0"):
            solve(x, torch.tensor([1.0, 0.0, 1.0]), 0.1)
        with pytest.raises(ValueError, match="sigma must be > 0, got 0"):
            solve(x, p, 0)
    with pytest.raises(ValueError, match="at least 2"):
        grid_rcae(x[:1], p[:1], 0.1)
    with pytest.raises(ValueError, match="x must rise strictly"):
        grid_rcae(x.flip(0), p, 0.1)


@pytest.mark.quick
def test_variants_are_complete():
    assert set(VARIANTS) >= {"spiral-250", "spiral-500", "spiral-1000", "two-bumps-250", "tiny"}
    assert replace(VARIANTS["spiral-1000"], hidden=(250,)) == VARIANTS["spiral-250"]
