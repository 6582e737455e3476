"""What the tests of linear_cross_entropy share: operands, the plain maths, a comparison."""

import torch
import torch.nn.functional as F
from row_cases import FP32, assert_same, rows

from encfast import ops, ref

IGNORE = -100


def targets_of(m, v, ignored=IGNORE):
    """Random targets, every third row ignored."""
    targets = torch.randint(0, v, (m,))
    targets[torch.arange(m) % 3 == 1] = ignored
    return targets


def operands(m, v, c, dtype=FP32, layout="contiguous"):
    return {
        "x": rows((m, c), dtype, layout),
        "weight": rows((v, c), dtype, layout) * 2 / c**0.5,
        "bias": torch.randn(v),
    }


def ours(targets, **options):
    return lambda x, weight, bias: ops.linear_cross_entropy(
        x, weight, targets, bias, reduction="none", **options
    )


def exact(targets, **options):
    return lambda x, weight, bias: ref.linear_cross_entropy(x, weight, targets, bias, **options)[0]


def plain(targets, rows=None, z_loss=None, softcap=None, **options):
    """The same with logits in the dtype of x, as a model would hold them."""

    def loss(x, weight, bias):
        z = F.linear(x if rows is None else x[rows], weight, bias.to(x.dtype)).float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        active = targets != options.get("ignore_index", IGNORE)
        extra = (z_loss or 0.0) * z.logsumexp(1).square().where(active, 0)
        return F.cross_entropy(z, targets, reduction="none", **options) + extra

    return loss


def assert_matches(inputs, targets, **options):
    few = len(targets) < 3 or inputs["weight"].shape[0] < 3
    assert_same(
        ours(targets, **options),
        exact(targets, **options),
        plain(targets, **options),
        inputs,
        [torch.randn(len(targets))],
        eps_factor=4.0,
        allow_degenerate=few or "rows" in options,
    )
