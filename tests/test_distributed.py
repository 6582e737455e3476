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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from encfast import distributed, ops, ref
from encfast.distributed import gather_features, ring_info_nce, ring_siglip
from encfast.integrations.open_clip import ClipLoss, SigLipLoss
from encfast.testing import assert_close_to_reference

B, D, RAW = 5, 8, 6
WORLDS = (2, 3)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-5}
CLIP = {
    "clip-global": {"gather_with_grad": True},
    "clip-local": {"gather_with_grad": True, "local_loss": True},
}
SIGLIP = ("bidir", "shift", "reduce", "gather")
DIRECTIONS = ("mean", "sum", "rows")
# Of ring_info_nce: dtype of the features, and the scale of their products.
RINGS = {
    "fp64": (torch.float64, 4.0),
    "fp32": (torch.float32, 4.0),
    "bf16": (torch.bfloat16, 4.0),
    "fp32, logits to 1e4": (torch.float32, 1e4),
}


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


def _log_sums(a, b, scale, both):
    same = torch.arange(len(a))
    _, _, positive, *sums = ref.rank_loss.info_nce_parts(a, b, scale, same, None, both)
    return positive, *sums


def _info_nce_bwd(*args):
    return ref.rank_loss.info_nce_bwd(*args[:-2])


@contextlib.contextmanager
def computing(name: str):
    """In float64 with the references: the ops do not take it."""
    if name != "fp64":
        yield
        return
    with (
        mock.patch.multiple(ops, info_nce=_info_nce, siglip=_siglip),
        mock.patch.object(distributed, "_log_sums", _log_sums),
        mock.patch.object(torch.ops.encfast, "info_nce_bwd", _info_nce_bwd),
    ):
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


# ---- the ring's InfoNCE, of losses that count differently ----


def features(rank: int, dtype: torch.dtype) -> list[Tensor]:
    make = torch.Generator().manual_seed(10 + rank)
    found = (torch.randn(B, D, generator=make, dtype=torch.float64) for _ in "ab")
    return [F.normalize(x, dim=1).to(dtype) for x in found]


def ring(name: str, directions: str, rank: int) -> dict[str, Tensor]:
    dtype, size = RINGS[name]
    a, b = (x.requires_grad_() for x in features(rank, dtype))
    scale = torch.tensor(size, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    with computing(name):
        loss = ring_info_nce(a, b, logit_scale=scale, directions=directions)
        ((rank + 0.5) * loss).backward()
    return {"loss": loss.detach()[None], "a": a.grad, "b": b.grad, "scale": scale.grad[None]}


def without_a_ring(name: str, directions: str, world: int, compute: torch.dtype) -> dict:
    """What the processes find together, of all their features on one in plain PyTorch."""
    dtype, size = RINGS[name]
    every = zip(*(features(r, dtype) for r in range(world)), strict=True)
    a, b = (torch.cat(x).to(compute).requires_grad_() for x in every)
    scale = torch.tensor(size, dtype=compute, requires_grad=True)
    logits, right = scale * a @ b.T, torch.arange(len(a))
    loss = F.cross_entropy(logits, right, reduction="none")
    if directions != "rows":
        loss = loss + F.cross_entropy(logits.T, right, reduction="none")
    loss = loss.view(world, B).mean(1) / (2 if directions == "mean" else 1)
    (loss * (torch.arange(world) + 0.5)).sum().backward()
    return {"loss": loss.detach(), "a": a.grad, "b": b.grad, "scale": scale.grad[None]}


class Held(TorchDispatchMode):
    """The most memory at once, in tensors of at least `least` bytes that appeared meanwhile."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.least:
                weak = StorageWeakRef(x.untyped_storage())
                self.alive[weak.cdata] = weak, x.untyped_storage().nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def held() -> dict[str, list[float]]:
    """By each loss, forward and with backward: how often the bytes of one tower's own features."""
    rows, channels = 64, 32

    def gathered(a, b):
        offset, every = dist.get_rank() * rows, gather_features(b)
        return ops.info_nce(a, every, logit_scale=4.0, offset=offset, directions="rows")

    four, two = torch.tensor(4.0), torch.tensor(-2.0)
    found = {}
    for name, loss in {
        "info_nce": lambda a, b: ring_info_nce(a, b, logit_scale=four),
        "siglip": lambda a, b: ring_siglip(a, b, logit_scale=four, logit_bias=two),
        "gathered": gathered,
    }.items():
        a, b = (torch.randn(rows, channels).requires_grad_() for _ in "ab")
        with Held(least=a.nbytes) as memory:
            value = loss(a, b)
            forward = memory.most
            value.backward()
        found[name] = [forward / a.nbytes, memory.most / a.nbytes]
    return found


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


def check_the_ring_is_the_gathered_loss(rank: int, world: int) -> None:
    scale = torch.tensor(7.0)
    found = []
    for loss in (
        lambda a, b: ring_info_nce(a, b, logit_scale=scale),
        lambda a, b: ops.info_nce(gather_features(a), gather_features(b), logit_scale=scale),
    ):
        a, b = (x.requires_grad_() for x in features(rank, torch.float32))
        value = loss(a, b)
        value.backward()
        mean = value.detach().clone()
        dist.all_reduce(mean)
        found.append([mean / world, a.grad, b.grad])
    for of_ring, gathered in zip(*found, strict=True):
        torch.testing.assert_close(of_ring, gathered)


def check_a_frozen_tower_costs_no_gradient(rank: int, world: int) -> None:
    for trained in (0, 1):
        found = []
        for frozen in (False, True):
            towers = features(rank, torch.float32)
            for i, x in enumerate(towers):
                x.requires_grad_(i == trained or not frozen)
            ring_info_nce(*towers, logit_scale=torch.tensor(7.0)).backward()
            assert (towers[1 - trained].grad is None) == frozen
            found.append(towers[trained].grad)
        assert torch.equal(*found)


def check_errors(rank: int, world: int) -> None:
    """On every process, before one of them waits for another."""
    one = torch.tensor(1.0)
    x = torch.zeros(3 if rank == 0 else 2, 4)
    last = r"float32 \(2, 4\) on process 1, float32 \(3, 4\) on process 0; expected the same"
    with pytest.raises(ValueError, match=f"ring_info_nce: b is {last}"):
        ring_info_nce(x, x, logit_scale=one)
    with pytest.raises(ValueError, match=f"ring_siglip: b is {last}"):
        ring_siglip(x, x, logit_scale=one, logit_bias=one)
    with pytest.raises(ValueError, match=f"gather_features: x is {last}"):
        gather_features(x)
    y = torch.zeros(3, 4, dtype=torch.float32 if rank else torch.bfloat16)
    with pytest.raises(ValueError, match=r"x is float32 \(3, 4\) on process 1, bfloat16"):
        gather_features(y)
    z = torch.zeros(3, 4)
    for scale, error, message in (
        (-one, ValueError, r"ring_info_nce: logit_scale holds -1.0, expected a positive finite"),
        (torch.tensor(float("nan")), ValueError, "ring_info_nce: logit_scale holds nan"),
        (2.0, TypeError, "ring_info_nce: logit_scale is float, expected a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            ring_info_nce(z, z, logit_scale=scale)
    with pytest.raises(TypeError, match="ring_info_nce: b is bfloat16, expected float32"):
        ring_info_nce(z, z.bfloat16(), logit_scale=one)
    with pytest.raises(TypeError, match="ring_info_nce: a is float64"):
        ring_info_nce(z.double(), z.double(), logit_scale=one)
    with pytest.raises(ValueError, match=r"a has shape \(0, 4\), expected at least one row"):
        ring_info_nce(z[:0], z[:0], logit_scale=one)
    expected = f"rank is {rank} and world_size 7, expected {rank} and {world} as the process group"
    for loss in (ClipLoss, SigLipLoss):
        with pytest.raises(ValueError, match=expected):
            loss(rank=rank, world_size=7)(z, z, one, one)


def check_double_backward_is_refused(rank: int, world: int) -> None:
    a, b = (x.requires_grad_() for x in features(rank, torch.float32))
    one = torch.tensor(1.0)
    for loss in (
        ring_info_nce(a, b, logit_scale=one),
        ring_siglip(a, b, logit_scale=one, logit_bias=one),
        gather_features(a).square().sum(),
    ):
        (da,) = torch.autograd.grad(loss.square(), [a], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            da.sum().backward()


def process(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for check in (
        check_gather,
        check_own_place,
        check_half,
        check_the_ring_is_the_gathered_loss,
        check_a_frozen_tower_costs_no_gradient,
        check_errors,
        check_double_backward_is_refused,
    ):
        check(rank, world)
    results = {dtype: train_together(dtype, rank, world) for dtype in DTYPES}
    results["ring"] = {(name, how): ring(name, how, rank) for name in RINGS for how in DIRECTIONS}
    results["held"] = held()
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


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_ring_holds_the_whole_batch(folder, world, name, directions):
    """Every process's loss, and the gradients of their sum, each with a weight of its own."""
    case = name, directions
    parts = [torch.load(folder / f"{r}-of-{world}.pt")["ring"][case] for r in range(world)]
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    found["scale"] = found["scale"].sum(0, keepdim=True)  # of all processes' products
    expected = without_a_ring(*case, world, torch.float64)
    if name == "fp64":
        for key, wanted in expected.items():
            torch.testing.assert_close(found[key], wanted, rtol=1e-12, atol=1e-12, msg=key)
        return
    plain = without_a_ring(*case, world, RINGS[name][0])
    for key, wanted in expected.items():
        few = 4.0 if key in ("loss", "scale") else 1.0
        factor = 2.0 if key == "loss" else 3.0
        assert_close_to_reference(key, found[key], wanted, plain[key], factor, eps_factor=few)


def test_the_ring_holds_one_other_process(folder):
    """Memory beside a process's own features and their gradients, for 2 processes and for 3.

    Forward the visiting rows alone; with backward as much for any number of processes, where
    gathered features grow with it.
    """
    for rank, world in ((r, w) for w in WORLDS for r in range(w)):
        found = torch.load(folder / f"{rank}-of-{world}.pt")["held"]
        for name in ("info_nce", "siglip"):
            assert found[name][0] == 1
            assert found[name] == torch.load(folder / "0-of-2.pt")["held"][name]
        assert found["gathered"][0] == world


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
    with pytest.raises(ValueError, match="ring_info_nce: a has 3 rows, b 2, expected as many"):
        ring_info_nce(torch.zeros(3, 2), torch.zeros(2, 2), logit_scale=one)
    with pytest.raises(ValueError, match="ring_info_nce: directions is 'columns', expected one of"):
        ring_info_nce(torch.eye(2), torch.eye(2), logit_scale=one, directions="columns")
    with pytest.raises(ValueError, match="logit_scale"):
        ClipLoss()(torch.zeros(3, 2), torch.zeros(3, 2), -one)


if __name__ == "__main__":
    fork(process, WORLDS, Path(sys.argv[1]))
