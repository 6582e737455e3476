"""gather_patches and fold_patches: every layout, dtype and order of pixels, and the convolution."""

import functools
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from row_cases import BF16, DTYPES, FP16, FP32, assert_same, for_thread_counts, name

from encfast import ops, ref
from encfast.testing import assert_close_to_reference

CASES = {  # (B, C, *size), patch
    "signal": ((3, 2, 60), (5,)),
    "image": ((2, 3, 32, 48), (16, 16)),
    "odd": ((2, 3, 28, 42), (14, 7)),
    "pixels": ((2, 5, 3, 4), (1, 1)),
    "one patch": ((3, 1, 6, 5), (6, 5)),
    "clip": ((2, 3, 4, 16, 24), (2, 8, 8)),
    "volume": ((1, 2, 6, 9, 10), (3, 3, 5)),
}
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "channels last")


def image_of(shape, dtype, layout="contiguous"):
    """Random pixels in one of LAYOUTS."""
    wide = (*shape[:-1], 2 * shape[-1] + 3) if layout == "strided" else shape
    full = [*shape]
    if layout == "expanded":
        full[1] = 1
    x = torch.randn(full if layout == "expanded" else wide) * 40 + 100
    x = x.clamp(0, 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    if layout == "transposed":
        return x.transpose(2, -1).contiguous().transpose(2, -1)
    if layout == "strided":
        return x[..., 1 : 2 * shape[-1] : 2]
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.expand(shape)


def patches_of(shape, patch):
    return shape[0] * math.prod(n // p for n, p in zip(shape[2:], patch, strict=True))


def picked(shape, patch):
    """Ids in no order, some twice, most at least once."""
    n = patches_of(shape, patch)
    return torch.cat([torch.randperm(n), torch.randint(n, (3,))])


@pytest.mark.quick
@pytest.mark.parametrize("channels_last", [False, True], ids=["CP", "PC"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_moves_are_exact(case, layout, channels_last):
    """Without conversion the pixels are those of the image, bit by bit."""
    shape, patch = CASES[case]
    for dtype in DTYPES:
        image, ids = image_of(shape, dtype, layout), picked(shape, patch)
        got = ops.gather_patches(image, ids, patch, channels_last=channels_last)
        want = ref.unfold_patches(image, patch, channels_last)
        assert got.dtype == dtype and torch.equal(got, want[ids])
        whole = ops.gather_patches(image, None, patch, channels_last=channels_last)
        assert torch.equal(whole, want)


def wide(x):
    return None if x is None else x.double()


def reference(image, ids, patch, channels_last, scale, shift, dtype):
    if image.dtype == torch.float64:
        scale, shift, dtype = wide(scale), wide(shift), image.dtype
    return ref.gather_patches(image, ids, patch, channels_last, scale, shift, dtype)


def compare(image, patch, channels_last, scale, shift, dtype, **bounds):
    ids = picked(image.shape, patch)
    options = {"ids": ids, "patch": patch, "channels_last": channels_last}
    options |= {"scale": scale, "shift": shift, "dtype": dtype}
    ours, theirs = (functools.partial(f, **options) for f in (ops.gather_patches, reference))
    rows = (len(ids), image.shape[1] * math.prod(patch))
    if image.dtype != torch.uint8:
        grad = torch.randn(rows).to(dtype)
        assert_same(ours, theirs, theirs, {"image": image}, [grad], **bounds)
        return
    exact = theirs(image.double())
    assert_close_to_reference("rows", ours(image), exact, theirs(image), **bounds)


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_forward_and_gradient_match_the_reference(case, dtype):
    shape, patch = CASES[case]
    scale, shift = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    for layout in ("contiguous", "transposed", "channels last"):
        image = image_of(shape, dtype, layout) / 64
        for factors in ((None, None), (scale, None), (None, shift), (scale, shift.to(BF16))):
            compare(image, patch, layout == "transposed", *factors, dtype)


@pytest.mark.quick
@pytest.mark.parametrize("pixels", [FP32, BF16, FP16, torch.uint8], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_conversions_match_the_reference(pixels, dtype):
    for case, channels_last in (("image", False), ("odd", True), ("clip", True), ("volume", False)):
        shape, patch = CASES[case]
        scale, shift = torch.rand(shape[1]) / 50, torch.randn(shape[1])
        image = image_of(shape, pixels)
        compare(image, patch, channels_last, None, None, dtype)
        compare(image, patch, channels_last, scale, shift, dtype)


@pytest.mark.quick
def test_uint8_normalisation_is_that_of_torchvision():
    """(x / 255 - mean) / std of bytes, in one pass over those asked for."""
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ids = torch.tensor([5, 0, 2, 7])
    got = ops.gather_patches(image, ids, (16, 16), scale=1 / (255 * std), shift=-mean / std)
    want = (image.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    want = ref.unfold_patches(want, (16, 16), False)[ids]
    assert got.dtype == FP32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
def test_all_256_bytes_are_exact():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    for dtype in DTYPES:
        got = ops.gather_patches(image, None, (64,), dtype=dtype)
        assert torch.equal(got.flatten(), torch.arange(256).to(dtype))


@pytest.mark.quick
def test_a_product_with_the_weight_is_the_convolution():
    for shape, patch, conv in (
        ((2, 3, 60), (5,), F.conv1d),
        ((2, 3, 28, 42), (14, 7), F.conv2d),
        ((2, 3, 4, 8, 12), (2, 4, 4), F.conv3d),
    ):
        image, weight = torch.randn(shape).double(), torch.randn(9, shape[1], *patch).double()
        want = conv(image, weight, stride=patch).flatten(2).mT.flatten(0, 1)
        ids = picked(shape, patch)
        got = ops.gather_patches(image.float(), ids, patch).double() @ weight.flatten(1).T
        torch.testing.assert_close(got, want[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_ids_count_the_last_axis_fastest():
    """Each pixel holds its own index, on a grid whose axes all differ."""
    size, patch = (4, 6, 10), (2, 2, 2)  # a grid of 2 x 3 x 5
    axes = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    image = torch.stack(axes).float().expand(2, 3, *size) + 100 * torch.arange(2).view(
        2, 1, 1, 1, 1
    )
    for b in range(2):
        for z in range(2):
            for y in range(3):
                for x in range(5):
                    p = (z * 3 + y) * 5 + x
                    row = ops.gather_patches(image.float(), torch.tensor([b * 30 + p]), patch)
                    first = row.view(3, 8)[:, 0].tolist()
                    assert first == [100 * b + 2 * z, 100 * b + 2 * y, 100 * b + 2 * x]
                    last = ops.gather_patches(
                        image.float(), torch.tensor([b * 30 + p]), patch, channels_last=True
                    )
                    assert torch.equal(last.view(8, 3).T, row.view(3, 8))


@pytest.mark.quick
@pytest.mark.parametrize("channels_last", [False, True], ids=["CP", "PC"])
@pytest.mark.parametrize("case", CASES)
def test_fold_inverts_gather(case, channels_last):
    shape, patch = CASES[case]
    image = torch.randn(shape)
    rows = ops.gather_patches(image, None, patch, channels_last=channels_last)
    assert torch.equal(ops.fold_patches(rows, shape, patch, channels_last=channels_last), image)
    whole = torch.arange(rows.numel()).view_as(rows)  # any dtype
    folded = ops.fold_patches(whole, shape, patch, channels_last=channels_last)
    assert torch.equal(ref.unfold_patches(folded, patch, channels_last), whole)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_hidden_pixels_are_never_read(dtype):
    """NaN and Inf in hidden patches leave rows and gradients bit-equal."""
    shape, patch = CASES["image"]
    clean = image_of(shape, dtype)
    visible, hidden, _, _ = ops.select_patches(torch.rand(2, 6), 2)
    results = []
    for poison in (None, float("nan"), float("inf")):
        rows = ref.unfold_patches(clean, patch, False).clone()
        if poison is not None:
            rows[hidden] = poison
        image = ops.fold_patches(rows, shape, patch).requires_grad_()
        got = ops.gather_patches(image, visible, patch, scale=torch.rand(3).fill_(0.5))
        (grad,) = torch.autograd.grad(got.float().sin().sum(), image)
        assert (ref.unfold_patches(grad, patch, False)[hidden] == 0).all()
        results.append((got.detach(), grad))
    for got, grad in results[1:]:
        assert torch.equal(got, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.quick
def test_nothing_asked_for():
    none = torch.empty(0, dtype=torch.int64)
    image = torch.randn(2, 3, 8, 8, requires_grad=True)
    rows = ops.gather_patches(image, none, (4, 4))
    assert rows.shape == (0, 48)
    assert (torch.autograd.grad(rows.sum(), image)[0] == torch.zeros_like(image)).all()
    assert ops.gather_patches(image[:0], None, (4, 4)).shape == (0, 48)
    assert ops.gather_patches(image[..., :0, :], None, (4, 4)).shape == (0, 48)
    assert ops.gather_patches(image[:, :0], None, (4, 4)).shape == (8, 0)


@pytest.mark.quick
def test_thread_count_changes_nothing():
    image = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8)
    ids = torch.randint(0, 9 * 16, (400,))
    first, *others = for_thread_counts(
        lambda: ops.gather_patches(image, ids, (16, 16), scale=torch.full((3,), 0.01), dtype=BF16)
    )
    assert all(torch.equal(first, other) for other in others)


@given(
    size=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 18)), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    dtypes=st.tuples(st.sampled_from((*DTYPES, torch.uint8)), st.sampled_from(DTYPES)),
    layout=st.sampled_from(LAYOUTS),
    channels_last=st.booleans(),
    scaled=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fuzz_matches_reference(size, batch, channels, dtypes, layout, channels_last, scaled):
    torch.manual_seed(batch * channels)
    patch = tuple(p for _, p in size)
    shape = (batch, channels, *(g * p for g, p in size))
    scale, shift = (torch.rand(channels) if wanted else None for wanted in scaled)
    # Of a few elements, the error of the reference may be small by luck.
    bounds = {"eps_factor": 4.0, "allow_degenerate": True}
    image = image_of(shape, dtypes[0], layout)
    compare(image, patch, channels_last, scale, shift, dtypes[1], **bounds)
