"""What patch_gather promises to PyTorch: opcheck over dtypes and layouts, shapes without data."""

import pytest
import torch
from row_cases import BF16, FP16, FP32, rows
from torch._subclasses.fake_tensor import FakeTensorMode

from encfast import ops

OPS = torch.ops.encfast


# opcheck costs a second a call: every layout in float32, one in each other dtype.
LAYOUTS = ("contiguous", "transposed", "expanded", "empty")
CASES = [*((FP32, layout) for layout in LAYOUTS), (BF16, "transposed"), (FP16, "contiguous")]


def ends(*lens):
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.quick
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "shuffled"])
def test_opcheck_select_patches(ordered):
    for lens, keeps in (((5, 0, 9), (2, 0, 9)), ((0, 0), (0, 0)), ((), ())):
        args = (torch.rand(sum(lens)), ends(*lens), ends(*keeps), sum(keeps), ordered)
        torch.library.opcheck(OPS.select_patches.default, args)
    strided = torch.rand(14, 2)[:, 0]
    args = (strided, ends(5, 9), ends(2, 3), 5, ordered)
    torch.library.opcheck(OPS.select_patches.default, args)


@pytest.mark.quick
@pytest.mark.parametrize("dtype,layout", [*CASES, (torch.uint8, "contiguous")])
def test_opcheck_gather_patches(dtype, layout):
    image = (torch.randn(2, 3, 4, 6) * 50 + 100).to(dtype)
    if layout == "transposed":
        image = image.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        image = image[:1].expand(2, -1, -1, -1)
    ids = torch.tensor([] if layout == "empty" else [3, 0, 3, 7], dtype=torch.int64)
    scale = torch.rand(3)
    image = image.detach().requires_grad_(dtype.is_floating_point)
    for out, factors in ((FP32, (None, None)), (BF16, (scale, scale))):
        args = (image, ids, [2, 3], layout == "expanded", *factors, out)
        torch.library.opcheck(OPS.gather_patches.default, args)


@pytest.mark.quick
@pytest.mark.parametrize("dtype,layout", CASES)
def test_opcheck_restore_rows(dtype, layout):
    n = 0 if layout == "empty" else 4
    x = rows((n, 5), dtype, "contiguous" if n == 0 else layout).detach().requires_grad_()
    fill = torch.randn(5, requires_grad=True)
    add = rows((2, 5), BF16).requires_grad_()
    index = torch.tensor([0, -1, 3, -1, 0, 2][: 6 if n else 0], dtype=torch.int64)
    for args in (
        (x, index, fill, add, None),
        (x, index, None, add, index % 2),
    ):
        torch.library.opcheck(OPS.restore_rows.default, args)
    dout = rows((len(index), 5), dtype)
    for added, *wanted in ((None, True, False), (index % 2, True, True), (None, False, True)):
        torch.library.opcheck(OPS.restore_rows_bwd.default, (dout, index, added, 2, *wanted))


def whole_family(device, batch=2, patches=6, channels=5):
    """The results of every op on tensors of a device that may have no data."""
    noise = torch.empty(batch, patches, device=device)
    chosen = ops.select_patches(noise, 2)
    image = torch.empty(batch, 3, 4, 6, device=device, dtype=torch.uint8)
    pixels = ops.gather_patches(image, chosen.visible, (2, 2), dtype=BF16)
    x = torch.empty(2 * batch, channels, device=device, dtype=BF16)
    fill, add = torch.empty(channels, device=device), torch.empty(patches, channels, device=device)
    return [*chosen, pixels, ops.restore_rows(x, chosen.restore, fill, add=add)]


SHAPES = [(4,), (8,), (12,), (3,), (4, 12), (12, 5)]
KINDS = [*[torch.int64] * 3, torch.int32, BF16, BF16]


@pytest.mark.quick
def test_meta_tensors_give_shapes():
    found = whole_family("meta")
    assert [tuple(x.shape) for x in found] == SHAPES and [x.dtype for x in found] == KINDS


@pytest.mark.quick
def test_no_device_sync_on_a_gpu():
    """Fake CUDA tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        found = whole_family("cuda")
        assert [tuple(x.shape) for x in found] == SHAPES and [x.dtype for x in found] == KINDS
        assert all(x.device.type == "cuda" for x in found)
        cu = torch.empty(3, device="cuda", dtype=torch.int32)
        ragged = ops.select_patches(torch.empty(9, device="cuda"), [2, 3], cu_seqlens=cu)
        assert ragged.visible.shape == (5,) and ragged.hidden.shape == (4,)
        normed = ops.masked_norm(torch.empty(9, 4, device="cuda"), ragged.visible)
        assert normed.shape == (9, 4)
