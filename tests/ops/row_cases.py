"""What the tests of the row-wise ops share: layouts, gradients, any threads."""

import torch

from encfast.testing import assert_close_to_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "permuted")
ADD_NORM_PARTS = {  # which optional tensors of add_norm are there
    "x": (),
    "weight": ("weight",),
    "affine": ("weight", "bias"),
    "residual": ("residual", "weight", "bias"),
    "residual-plain": ("residual",),
    "scaled": ("residual", "weight", "bias", "branch_scale"),
    "scaled-alone": ("branch_scale", "bias"),
}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def rows(shape, dtype=FP32, layout="contiguous"):
    """Random rows [..., C] in one of LAYOUTS."""
    if layout == "transposed":  # channels are not contiguous
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).mT
    if layout == "strided":  # rows further apart than they are long, from an odd element on
        return torch.randn(*shape[:-1], shape[-1] + 7).to(dtype)[..., 3 : 3 + shape[-1]]
    if layout == "expanded":  # one row for all
        return torch.randn(shape[-1]).to(dtype).expand(shape)
    if layout == "permuted":  # contiguous channels, rows in no even order
        return torch.randn(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    return torch.randn(shape).to(dtype)


def results(f, inputs, grads):
    """Outputs of f and the gradients of all its inputs that are there, in order."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None}
    outs = f(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    found = torch.autograd.grad(
        outs, list(leaves.values()), [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    )
    return {f"out{i}": o.detach() for i, o in enumerate(outs)} | {
        f"d{k}": g for k, g in zip(leaves, found, strict=True)
    }


def assert_same(f, reference, plain, inputs, grads, terms=None, eps_factor=1.0, **options):
    """Outputs and gradients of f by the tolerance rule against the float64 reference.

    terms: largest term of the sum that a gradient is, where all may cancel but a rounding of them:
    eps is then granted at the scale of the terms, not of what is left.
    """
    wide = {k: None if v is None else v.double() for k, v in inputs.items()}
    ours = results(f, inputs, grads)
    exact = results(reference, wide, [g.double() for g in grads])
    low = results(plain, inputs, grads)
    for key, value in ours.items():
        factor = 2.0 if key.startswith("out") else 3.0
        largest = max(exact[key].abs().flatten().tolist(), default=0.0)
        above = max(1.0, (terms or {}).get(key, 0.0) / max(largest, 1e-300))
        assert_close_to_reference(
            key,
            value,
            exact[key],
            low[key],
            factor,
            eps_factor=eps_factor * above,
            **options,
        )


def assert_near(got, want, dtype):
    """Results too few for the tolerance rule: within a few roundings of the largest."""
    limit = 2e-2 if dtype == BF16 else 1e-5
    for key, value in got.items():
        scale = max(1.0, *want[key].abs().flatten().tolist(), 1.0)
        assert (value - want[key]).abs().max() <= limit * scale if value.numel() else True, key


def for_thread_counts(f):
    """f's results under 1, 2 and 3 threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(f())
    finally:
        torch.set_num_threads(before)
    return found
