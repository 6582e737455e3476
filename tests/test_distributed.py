"""Contrastive losses on 2 and 3 processes against the whole batch on one, and open_clip's classes.

Run as a script, this file is the processes: their results lie in the folder that it is given.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import fork, run_script
from torch import Tensor, nn

from encfast import ops, ref
from encfast.distributed import gather_features, ring_siglip
from encfast.integrations.open_clip import ClipLoss, SigLipLoss

B, D, RAW = 5, 8, 6
WORLDS = (2, 3)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-5}
CLIP = {
    "clip-global": {"gather_with_grad": True},
    "clip-local": {"gather_with_grad": True, "local_loss": True},
}
SIGLIP = ("bidir", "shift", "reduce", "gather")


class Towers(nn.Module):
    """Two projections and what scales their products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(RAW, D), nn.Linear(RAW, D)
        self.scale, self.bias = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)


def batch(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(B, RAW, generator=make, dtype=torch.float64).to(dtype) for _ in "ab")


def _info_nce(a, b, *, logit_scale, offset=0, directions="mean"):
    positives = torch.arange(len(a)) + offset
    return ref.info_nce(a, b, logit_scale=logit_scale, positives=positives, directions=directions)


def _siglip(a, b, *, logit_scale, logit_bias, offset=0, negative_only=False):
    positives = torch.full((len(a),), -1) if negative_only else torch.arange(len(a)) + offset
    return ref.siglip(a, b, logit_scale=logit_scale, logit_bias=logit_bias, positives=positives)


@contextlib.contextmanager
def computing(name: str):
    """In float64 with the references: the ops do not take it."""
    if name != "fp64":
        yield
        return
    with mock.patch.multiple(ops, info_nce=_info_nce, siglip=_siglip):
        yield


def losses(rank: int, world: int) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        name: ClipLoss(rank=rank, world_size=world, **options) for name, options in CLIP.items()
    }
    return found | {x: SigLipLoss(rank=rank, world_size=world, dist_impl=x) for x in SIGLIP}


def call(loss: nn.Module, net: Towers, images: Tensor, texts: Tensor) -> Tensor:
    scale_and_bias = (net.scale,) if isinstance(loss, ClipLoss) else (net.scale, net.bias)
    return loss(*net(images, texts), *scale_and_bias)


def grads_of(net: Towers) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}


def train_together(dtype: str, rank: int, world: int) -> dict:
    """Loss and gradients, averaged over the processes as DistributedDataParallel does it."""
    found = {}
    for name, loss in losses(rank, world).items():
        net = Towers().to(DTYPES[dtype])
        with computing(dtype):
            value = call(loss, net, *batch(rank, DTYPES[dtype]))
            value.backward()
        grads = grads_of(net)
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= world
        found[name] = {"loss": value.detach(), "grads": grads}
    return found


def alone(name: str, dtype: str, world: int) -> dict:
    """The whole batch on one process, in plain PyTorch."""
    net = Towers().to(DTYPES[dtype])
    images, texts = (
        torch.cat(x) for x in zip(*(batch(r, DTYPES[dtype]) for r in range(world)), strict=True)
    )
    a, b = net(images, texts)
    logits = net.scale * a @ b.T
    if name in CLIP:
        right = torch.arange(len(a))
        value = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    else:
        signs = 2 * torch.eye(len(a), dtype=logits.dtype) - 1
        value = -F.logsigmoid(signs * (logits + net.bias)).sum() / len(a)
    value.backward()
    return {"loss": value.detach(), "grads": grads_of(net)}


# ---- what a process checks by itself ----


def check_gather(rank: int, world: int) -> None:
    """Rows by rank; gradients are sums over processes, and their memory is not written to."""
    x = torch.full((2, 3), float(rank), requires_grad=True)
    every = gather_features(x)
    assert torch.equal(every, torch.arange(world).repeat_interleave(2)[:, None].expand(-1, 3))
    weight = torch.arange(1.0, 2 * world + 1)[:, None].expand(-1, 3) * (rank + 1)
    before = weight.clone()
    every.backward(weight)
    assert torch.equal(weight, before)
    total = world * (world + 1) / 2
    own = torch.tensor([2.0 * rank + 1, 2.0 * rank + 2])[:, None].expand(-1, 3)
    assert torch.equal(x.grad, total * own)
    assert not gather_features(x, gradient=False).requires_grad


def check_own_place(rank: int, world: int) -> None:
    """open_clip's defaults: the gradient of the own rows alone, of all rows against all."""
    a, b = (x.requires_grad_() for x in (torch.randn(4, D), torch.randn(4, D)))
    scale = torch.tensor(3.0)
    ClipLoss(rank=rank, world_size=world)(a, b, scale).backward()
    every = [gather_features(x, gradient=False).requires_grad_() for x in (a, b)]
    ops.info_nce(*every, logit_scale=scale).backward()
    for x, whole in zip((a, b), every, strict=True):
        torch.testing.assert_close(x.grad, whole.grad[4 * rank : 4 * rank + 4])
    local = ClipLoss(rank=rank, world_size=world, local_loss=True)(a, b, scale)
    assert local.requires_grad and local.isfinite()


def check_half(rank: int, world: int) -> None:
    """Features in bfloat16: gradients come back in it, summed over the ring in float32."""
    make = torch.Generator().manual_seed(rank)
    a, b = (F.normalize(torch.randn(6, D, generator=make), dim=1) for _ in "ab")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (a, b)]
        scale, bias = torch.tensor(4.0), torch.tensor(-2.0)
        loss = ring_siglip(*leaves, logit_scale=scale, logit_bias=bias)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
        assert all(x.grad.dtype == dtype for x in leaves)
    for wide, narrow in zip(*found, strict=True):
        torch.testing.assert_close(narrow.float(), wide, rtol=0.02, atol=2e-3)


def process(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for check in (check_gather, check_own_place, check_half):
        check(rank, world)
    results = {dtype: train_together(dtype, rank, world) for dtype in DTYPES}
    torch.save(results, folder / f"{rank}-of-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the processes left what they found."""
    return run_script(__file__, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", [*CLIP, *SIGLIP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_whole_batch(folder, world, dtype, name):
    """The mean of the losses, and the gradients that data parallelism averages."""
    parts = [torch.load(folder / f"{r}-of-{world}.pt")[dtype][name] for r in range(world)]
    expected = alone(name, dtype, world)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    mean = torch.stack([part["loss"] for part in parts]).mean()
    torch.testing.assert_close(mean, expected["loss"].to(mean.dtype), **near)
    for part in parts:
        for key, wanted in expected["grads"].items():
            torch.testing.assert_close(part["grads"][key], wanted, **near, msg=f"{key}: ".__add__)
    used = [n for n, g in expected["grads"].items() if g.any()]
    assert len(used) == (5 if name in CLIP else 6)  # a softmax does not see the bias


def test_one_process_needs_no_group():
    a, b = (F.normalize(torch.randn(7, D), dim=1) for _ in "ab")
    scale, bias = torch.tensor(5.0), torch.tensor(-1.0)
    logits, right = scale * a @ b.T, torch.arange(7)
    clip = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    signs = 2 * torch.eye(7) - 1
    siglip = -F.logsigmoid(signs * (logits + bias)).sum() / 7
    torch.testing.assert_close(ClipLoss()(a, b, scale), clip)
    torch.testing.assert_close(ClipLoss()(a, b, scale, bias), clip)
    found = SigLipLoss(cache_labels=True)(a, b, scale, bias, output_dict=True)
    torch.testing.assert_close(found["contrastive_loss"], siglip)
    assert list(ClipLoss(True, True, True, 0, 1)(a, b, scale, output_dict=True)) == [
        "contrastive_loss"
    ]


def test_errors():
    with pytest.raises(NotImplementedError, match="use_horovod=True is not served"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl is 'ring', expected one of bidir"):
        SigLipLoss(dist_impl="ring")
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="ring_siglip: a has 3 rows, b 2"):
        ring_siglip(torch.zeros(3, 2), torch.zeros(2, 2), logit_scale=one, logit_bias=one)
    with pytest.raises(ValueError, match="logit_scale"):
        ClipLoss()(torch.zeros(3, 2), torch.zeros(3, 2), -one)


if __name__ == "__main__":
    fork(process, WORLDS, Path(sys.argv[1]))
