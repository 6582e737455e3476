"""What softmax and its kin are made of: running sums, softplus and tanh to the last digits."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Below any logit, and finite: a row may begin with entries of -inf alone.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def tanh(x):
    """By a polynomial below 0.625, where 1 - 2 / (e^2x + 1) would lose its relative accuracy.

    Coefficients of the Cephes library (S. Moshier), single precision.
    """
    a = tl.abs(x)
    z = a * a
    poly = z * -5.70498872745e-3 + 2.06390887954e-2
    poly = poly * z - 5.37397155531e-2
    poly = poly * z + 1.33314422036e-1
    poly = poly * z - 3.33332819422e-1
    small = poly * z * a + a
    large = 1 - 2 / (tl.exp2(tl.minimum(a, 10.0) * (2 * LOG2E)) + 1)
    t = tl.where(a < 0.625, small, large)
    return tl.where(x < 0, -t, t)


@triton.jit
def softplus(x):
    """log(1 + e^x), also where e^x vanishes beside 1.

    log1p(e) = 2 artanh(s) with s = e / (2 + e) <= 1/3; the series' next term is below eps.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    z = s * s
    series = z * 0.07692307692307693 + 0.09090909090909091  # 1/13, 1/11, ..
    series = series * z + 0.1111111111111111
    series = series * z + 0.14285714285714285
    series = series * z + 0.2
    series = series * z + 0.3333333333333333
    return tl.maximum(x, 0.0) + 2 * (series * z * s + s)


@triton.jit
def add_exponentials(b_z, b_most, b_exps):
    """Running maximum and sum of e^(z - maximum) of rows, with b_z [rows, columns] in them."""
    most = tl.maximum(b_most, tl.max(b_z, 1))
    e = tl.exp2((b_z - most[:, None]) * LOG2E)
    return most, b_exps * tl.exp2((b_most - most) * LOG2E) + tl.sum(e, 1)
