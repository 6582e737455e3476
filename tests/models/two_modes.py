"""A density on the line with everything known: two Gaussians of width 0.5 around -1.2 and 1.2."""

import math

import torch
from torch import Tensor

MODE, WIDTH = 1.2, 0.5


def log_density(x: Tensor) -> Tensor:
    """log p, any shape."""
    near, far = (-(x - m).square() / (2 * WIDTH**2) for m in (MODE, -MODE))
    return torch.logaddexp(near, far) - math.log(2 * WIDTH * math.sqrt(2 * math.pi))


def density(x: Tensor) -> Tensor:
    """p, any shape."""
    return log_density(x).exp()


def score(x: Tensor, blur: float = 0.0) -> Tensor:
    """d log p / dx, any shape, of the density blurred by noise of that standard deviation."""
    variance = WIDTH**2 + blur**2
    return (MODE * torch.tanh(MODE * x / variance) - x) / variance


def second_derivative(x: Tensor) -> Tensor:
    """d2 log p / dx2, ``[N, 1]`` -> ``[N, 1, 1]``."""
    slope = (MODE / WIDTH) ** 2 / torch.cosh(MODE * x / WIDTH**2).square()
    return ((slope - 1) / WIDTH**2)[..., None]
