"""What Regularized Auto-Encoders Learn from the Data-Generating Distribution (Alain and Bengio,
JMLR 15, 2014; arXiv 1211.4246).

A small auto-encoder r: R^d -> R^d is trained to reconstruct points while the whole of r, decoder
included, is kept flat (RCAE), or to undo Gaussian noise (DAE). For small sigma both find
``r(x) = x + sigma^2 grad log p(x)``: a score without a normaliser, whose integral along a path is
an energy difference, which is all that Metropolis-Hastings asks for. The reconstruction error
itself is no energy: it vanishes at minima and saddles of p as it does at its maxima.

Sizes, initialisation, data and the Langevin proposal are those of the first author's code
(github.com/gyom/denoising_autoencoder): one hidden layer, tanh twice, the output times a scale.
That code starts its Langevin chains with a preimage that is not one; here they start where it is
known. Networks with several hidden layers, their decoder mirroring the encoder, and the estimate of
the contraction from random directions are additions. The author fits by BFGS; here it is L-BFGS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import nearest
from encfast.layers.base import Model
from encfast.models._regularized_autoencoder_data import (
    DATA,
    PointBatch,
    corrupted,
    spiral,
    two_bumps,
)
from encfast.models._regularized_autoencoder_fit import fit_lbfgs
from encfast.models._regularized_autoencoder_grid import grid_dae, grid_rcae
from encfast.models._regularized_autoencoder_sampling import (
    Chains,
    energy_difference,
    sample_chains,
)
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register

__all__ = [
    "Chains",
    "Losses",
    "PointBatch",
    "RegularizedAutoencoder",
    "RegularizedAutoencoderConfig",
    "corrupted",
    "energy_difference",
    "fit_lbfgs",
    "grid_dae",
    "grid_rcae",
    "sample_chains",
    "spiral",
    "two_bumps",
]

Activation = Literal["tanh", "sigmoid", "identity"]
Objective = Literal["dae", "rcae"]
Contraction = Literal["exact", "hutchinson"]
Data = Literal["spiral", "two-bumps"]


@dataclass(frozen=True)
class RegularizedAutoencoderConfig:
    """The network of the spiral."""

    dim: int = 2  # d: coordinates of a point
    hidden: tuple[int, ...] = (250,)  # H: units of the encoder's layers; the decoder mirrors them
    activation: Activation = "tanh"  # of every hidden layer
    output_activation: Activation = "tanh"
    output_scale: float = 2.0  # s: the output lies in (-s, s), or in (0, s) with sigmoid
    learn_scale: bool = False  # s is a parameter that starts at output_scale
    tied: bool = False  # the decoder's weights are the encoder's, transposed

    objective: Objective = "dae"
    sigma: float = 0.01  # of the noise, and what weighs the contraction; in the data's units
    replicas: int = 10  # R: corrupted copies of a point, if "dae"
    far_share: float = 0.0  # of the copies that get far_factor times the noise, if "dae"
    far_factor: float = 10.0
    contraction: Contraction = "exact"  # or from random directions, if "rcae"
    probes: int = 1  # K: random directions per point, if "hutchinson"

    weight_range: float = 1.0  # weights start uniform in +- this
    bias_range: float = 0.1
    data: Data = "spiral"  # what example_batch draws

    def __post_init__(self) -> None:
        kinds = {
            "activation": Activation,
            "output_activation": Activation,
            "objective": Objective,
            "contraction": Contraction,
            "data": Data,
        }
        for name, kind in kinds.items():
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; {nearest(value, known)}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must name one layer or more of >= 1 units, got {self.hidden}")
        for name in ("dim", "replicas", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("sigma", "output_scale", "far_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0.0 <= self.far_share <= 1.0:
            raise ValueError(f"far_share must be in [0, 1], got {self.far_share}")
        if self.far_share and self.objective != "dae":
            raise ValueError(f"far_share needs objective 'dae', got {self.objective!r}")
        if self.output_activation == "identity" and (self.learn_scale or self.output_scale != 1.0):
            raise ValueError(
                "output_activation 'identity' is unbounded already: expected output_scale 1.0 and "
                f"learn_scale False, got {self.output_scale} and {self.learn_scale}"
            )


@dataclass(frozen=True, eq=False)
class Losses:
    """The total and its terms, each a mean over the points of a sum over coordinates."""

    total: Tensor
    reconstruction: Tensor  # |r - x|^2, of corrupted points if "dae"
    contraction: Tensor | None = None  # |dr/dx|_F^2, not yet times sigma^2


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class RegularizedAutoencoder(Model):
    """r, and what it says about the density its points came from."""

    _no_split_modules: ClassVar[list[str]] = []

    def __init__(
        self,
        config: RegularizedAutoencoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.sigma = config, config.sigma
        widths = [config.dim, *config.hidden]
        self.encoder = nn.ModuleList(nn.Linear(a, b, **factory) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(
            _Transposed(b, **factory) if config.tied else nn.Linear(a, b, **factory)
            for a, b in pairwise(reversed(widths))
        )
        self.scale: Tensor | float = config.output_scale
        if config.learn_scale:
            self.scale = nn.Parameter(torch.empty((), **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        c = self.config
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):
                layer.weight.uniform_(-c.weight_range, c.weight_range)
            layer.bias.uniform_(-c.bias_range, c.bias_range)
        if isinstance(self.scale, Tensor):
            self.scale.fill_(c.output_scale)

    def forward(self, tokens: PackedBatch) -> Tensor:
        """r of the points of ``tokens``, ``[N, d]`` -> ``[N, d]``."""
        return self.reconstruct(tokens.data)

    def reconstruct(self, x: Tensor) -> Tensor:
        """r(x), ``[..., d]`` -> ``[..., d]``."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """Points x ``[..., d]`` -> the code ``[..., H]``."""
        for layer in self.encoder:
            x = _ACTIVATIONS[self.config.activation](layer(x))
        return x

    def decode(self, h: Tensor) -> Tensor:
        """The code h ``[..., H]`` -> points ``[..., d]``."""
        weights = self._decoder_weights()
        for layer, weight in zip(self.decoder[:-1], weights[:-1], strict=True):
            h = _ACTIVATIONS[self.config.activation](F.linear(h, weight, layer.bias))
        out = F.linear(h, weights[-1], self.decoder[-1].bias)  # [..., d]
        return self.scale * _ACTIVATIONS[self.config.output_activation](out)

    def _decoder_weights(self) -> list[Tensor]:
        """``[out, in]`` of every decoder layer."""
        tied = self.config.tied
        layers: list[Any] = list(self.encoder)[::-1] if tied else list(self.decoder)
        return [layer.weight.t() if tied else layer.weight for layer in layers]

    def jacobian(self, x: Tensor) -> Tensor:
        """dr/dx of the reconstruction at x ``[N, d]`` -> ``[N, d, d]`` (outputs, then inputs).

        In closed form for one hidden layer, ``s diag(f'(Wb h + b)) Wb diag(h') Wc^T``: a matmul
        with a table of d^2 H products, too many for large d. By ``torch.func.jacrev`` for more
        layers. Both can be differentiated.
        """
        if len(self.encoder) > 1:
            return torch.func.vmap(torch.func.jacrev(self.reconstruct))(x)
        c, (up,), bias = self.config, self._decoder_weights(), self.decoder[0].bias
        down = self.encoder[0].weight  # [H, d]
        h = self.encode(x)  # [N, H]
        out = _ACTIVATIONS[c.output_activation](F.linear(h, up, bias))  # [N, d]
        products = up[:, None, :] * down.t()[None]  # [d, d, H]
        inner = F.linear(_slope(c.activation, h), products.flatten(0, 1))  # [N, d * d]
        outer = self.scale * _slope(c.output_activation, out)  # [N, d]
        return outer[:, :, None] * inner.unflatten(-1, (c.dim, c.dim))

    def contraction(self, x: Tensor, probes: Tensor | None = None) -> Tensor:
        """Squared Frobenius norm of dr/dx.

        Args:
            x: ``[N, d]``.
            probes: ``[K, N, d]`` from N(0, I): then the mean of ``|J^T v|^2`` over them, whose
                expectation is that norm, as is that of ``|J v|^2``; one backward pass each
                instead of d. None: exact.

        Returns:
            ``[N]``.
        """
        if probes is None:
            return self.jacobian(x).square().sum((-2, -1))
        pullback = torch.func.vjp(self.reconstruct, x)[1]
        (pulled,) = torch.func.vmap(pullback)(probes)  # [K, N, d]
        return pulled.square().sum(-1).mean(0)

    def score(self, x: Tensor) -> Tensor:
        """Estimate of grad log p, ``(r(x) - x) / sigma^2``, ``[..., d]`` -> ``[..., d]``."""
        return (self.reconstruct(x) - x) / self.sigma**2

    def hessian(self, x: Tensor) -> Tensor:
        """Estimate ``[N, d, d]`` of log p's Hessian at x ``[N, d]``: ``(dr/dx - I) / sigma^2``.

        It need not be symmetric: nothing makes r a gradient.
        """
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return (self.jacobian(x) - eye) / self.sigma**2

    def energy_difference(self, x: Tensor, y: Tensor, *, nodes: int = 2) -> Tensor:
        """log p(x) - log p(y), ``[..., d]`` twice -> ``[...]``.

        ``nodes`` of the quadrature as in :func:`energy_difference`.
        """
        return energy_difference(self.score, x, y, nodes=nodes)

    def sample(
        self, x0: Tensor, n: int, *, step: float, blend: float = 0.0, **options: Any
    ) -> Chains:
        """Metropolis-Hastings chains over the learned score.

        Args:
            x0: ``[B, d]``, where the chains start.
            n: samples per chain.
            step: standard deviation of a proposal's noise, in the data's units.
            blend: b of the proposal ``(1 - b) y + b r(y)``, y the noisy point; 0: y itself, a
                random walk; ``step^2 / (2 sigma^2)``: Langevin.
            **options: nodes, temperature, thinning, burn_in, accept_all, generator of
                :func:`sample_chains`.

        Returns:
            As :func:`sample_chains`.
        """
        drift = blend * self.sigma**2
        return sample_chains(
            self.score, x0, n, step=step, drift=drift, hessian=self.hessian, **options
        )

    def loss(self, batch: PointBatch) -> Losses:
        """The objective of the config.

        DAE: mean over copies of ``|r(noisy) - x|^2``. RCAE: mean over points of
        ``|r(x) - x|^2 + sigma^2 |dr/dx|_F^2``. Without points both are 0.

        Raises:
            ValueError: if the batch lacks what the objective reads.
        """
        x = batch.tokens.data  # [N, d]
        if self.config.objective == "dae":
            if batch.noisy is None:
                raise ValueError("the loss of objective 'dae' needs batch.noisy, which is None")
            error = _mean((self.reconstruct(batch.noisy) - x).square().sum(-1))  # of [R, N]
            return Losses(error, error)
        if self.config.contraction == "hutchinson" and batch.probes is None:
            raise ValueError(
                "the loss of contraction 'hutchinson' needs batch.probes, which is None"
            )
        error = _mean((self.reconstruct(x) - x).square().sum(-1))  # of [N]
        contraction = _mean(self.contraction(x, batch.probes))
        return Losses(error + self.sigma**2 * contraction, error, contraction)

    def corrupt(
        self, points: PackedBatch, *, generator: torch.Generator | None = None
    ) -> PointBatch:
        """Draws what the objective needs beside the points: noisy copies, or directions."""
        c, x = self.config, points.data
        if c.objective == "dae":
            noisy = corrupted(
                x,
                c.replicas,
                c.sigma,
                far_share=c.far_share,
                far_factor=c.far_factor,
                generator=generator,
            )
            return PointBatch(points, noisy=noisy)
        if c.contraction == "exact":
            return PointBatch(points)
        options = {"generator": generator, "dtype": x.dtype, "device": x.device}
        return PointBatch(points, probes=torch.randn((c.probes, *x.shape), **options))

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> PointBatch:
        """Points of the config's toy data, corrupted, on the CPU in the dtype of the parameters.

        Args:
            generator: of all random numbers.
            lengths: of the sequences the points stand in; three, one of them empty, if None.

        Returns:
            What ``loss`` takes.

        Raises:
            ValueError: if the model's points are not of the plane.
        """
        c = self.config
        if c.dim != 2:
            raise ValueError(f"the toy data has points of dim 2, the model takes dim {c.dim}")
        lengths = [40, 0, 24] if lengths is None else lengths
        points = DATA[c.data](sum(lengths), generator=generator).to(self.encoder[0].weight.dtype)
        return self.corrupt(PackedBatch.from_lengths(points, lengths), generator=generator)


class _Transposed(nn.Module):
    """The bias of a decoder layer whose weight is an encoder layer's, transposed."""

    def __init__(self, out_features: int, **factory: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(out_features, **factory))


_ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": torch.positive}


def _slope(activation: Activation, value: Tensor) -> Tensor:
    """The derivative of an activation where it took ``value``."""
    if activation == "tanh":
        return 1.0 - value.square()
    if activation == "sigmoid":
        return value * (1.0 - value)
    return torch.ones_like(value)


def _mean(terms: Tensor) -> Tensor:
    """The mean, and 0 of nothing."""
    return terms.sum() / max(terms.numel(), 1)


VARIANTS = {
    "spiral-250": RegularizedAutoencoderConfig(),
    "spiral-500": RegularizedAutoencoderConfig(hidden=(500,)),
    "spiral-1000": RegularizedAutoencoderConfig(hidden=(1000,)),
    "two-bumps-250": RegularizedAutoencoderConfig(sigma=1.0, output_scale=40.0, data="two-bumps"),
    "tiny": RegularizedAutoencoderConfig(
        hidden=(16,), sigma=0.1, objective="rcae", learn_scale=True
    ),
    "tiny-dae": RegularizedAutoencoderConfig(
        hidden=(16,), sigma=0.1, replicas=3, far_share=0.05, tied=True
    ),
    "tiny-deep": RegularizedAutoencoderConfig(
        hidden=(16, 8), sigma=0.1, objective="rcae", contraction="hutchinson", probes=2
    ),
}

register(
    "regularized_autoencoder",
    RegularizedAutoencoder,
    VARIANTS,
    ModelInfo(
        title="What Regularized Auto-Encoders Learn from the Data-Generating Distribution",
        year=2014,
        paper="arXiv 1211.4246",
        tasks=("reconstruction", "score-estimation", "sampling"),
        inputs="tokens: PackedBatch of points [N, d]",
        ops=(),
        fidelity=(
            "linear networks reach the closed form of a Gaussian, the Jacobian equals autograd's, "
            "scores of grid solutions converge at the paper's order, chains reach the covariance "
            "of a known density"
        ),
        deviations=(
            "L-BFGS in place of BFGS",
            "Langevin chains start at the image of x0 rather than with a preimage that is not one",
        ),
    ),
)
