"""Experts on 2 and 4 processes against one process that holds them all.

Run as a script, this file is the processes: their results lie in the folder that it is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from encfast.config import BlockConfig
from encfast.layers import (
    MLP,
    AllToAllCost,
    ExpertParallel,
    Experts,
    MoE,
    MoEConfig,
    ResidualMoE,
    average_gradients,
    expert_parameters,
    parallelise_experts,
)
from encfast.routing import Routing

DIM = 16
PLAIN = BlockConfig(DIM, 2, 20, activation="gelu")
GATED = BlockConfig(DIM, 2, 24, activation="silu", glu=True, up_bias=False, down_bias=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and on how many tokens of each process."""

    name: str
    dtype: torch.dtype
    tokens: tuple[int, ...] = (13, 6, 9, 17)
    steps: int = 20
    one_process: bool = False  # all tokens to the experts of process 0


CASES = (
    Case("fp64", torch.float64),
    Case("fp32", torch.float32),
    Case("bf16", torch.bfloat16, steps=1),
    Case("no-tokens", torch.float32, tokens=(13, 0, 9, 17), steps=3),
    Case("no-rows", torch.float64, steps=3, one_process=True),
    Case("nothing", torch.float32, tokens=(0, 0, 0, 0), steps=1),
)


class Net(nn.Module):
    """Two mixtures with weights outside of them, before, between and behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(DIM, DIM)
        self.moe = MoE(GATED, MoEConfig(8, 2, capacity_factor=1.5, renormalise=True))
        self.residual = ResidualMoE(PLAIN, MoEConfig(4))
        self.last = nn.Linear(DIM, 3)
        with torch.no_grad():  # routers that read one channel per expert
            self.first.weight.mul_(0.1).add_(torch.eye(DIM))
            self.moe.router.weight.copy_(5 * torch.eye(8, DIM))
            self.residual.moe.router.weight.copy_(5 * torch.eye(4, DIM).roll(8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Rows [N, 3], the routers' loss, and their logits."""
        x = self.first(x)
        one = self.moe(x)
        x = x + one.data
        two = self.residual(x)
        terms = [one.losses(), two.losses()]
        extra = sum(0.01 * t.balance for t in terms)
        return self.last(x + two.data), extra, [one.logits, two.logits]


def batch(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Rows whose experts are plain to see, and targets."""
    make = torch.Generator().manual_seed(rank)
    n = case.tokens[rank]
    first = torch.rand(n, 8, generator=make).argsort(1)[:, :2]
    second = torch.randint(4, (n, 1), generator=make)
    if case.one_process:
        first, second = torch.tensor([[1, 0]]).expand(n, 2), torch.zeros_like(second)
    x = 0.1 * torch.randn(n, DIM, generator=make)
    x.scatter_(1, first, torch.tensor([[3.0, 2.0]]).expand(n, 2))
    x.scatter_(1, 8 + second, 3.0)
    return x.to(case.dtype).requires_grad_(), torch.randn(n, 3, generator=make).to(case.dtype)


def loss_of(net: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rows, loss, and by how much the routers prefer what they chose."""
    out, extra, logits = net(x)
    margin = float("inf")
    for scores, k in zip(logits, (2, 1), strict=True):
        top = scores.detach().topk(k + 1, 1).values
        margin = min([margin, *(top[:, -2] - top[:, -1]).tolist()])
    return out, (out - y).square().sum() / 16 + extra, margin


@contextlib.contextmanager
def computing(dtype: torch.dtype):
    """In float64, which the ops do not take, by their references; the router too."""
    if dtype != torch.float64:
        yield
        return

    def route(logits: Tensor, k: int, *, mask, renormalise, **rest) -> Routing:
        rule = "chosen" if renormalise else "none"
        return Routing(*ref.moe_route(logits, mask, k, renormalise=rule, **rest))

    swapped = {
        "route_tokens": route,
        "sort_choices": lambda i, gates, e: Routing(gates, i, *ref.sort_choices(i, e)),
        "permute_rows": lambda x, r: ref.moe_permute(x, r.rows, r.top_k),
        "unpermute_rows": lambda y, r: ref.moe_unpermute(y, r.gates, r.slots),
        "grouped_mm": ref.grouped_mm,
    }
    with (
        mock.patch.multiple(ops, **swapped),
        mock.patch.object(MoE, "_logits", lambda self, rows: F.linear(rows, self.router.weight)),
    ):
        yield


def optimizer_of(net: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)


@functools.cache
def train_alone(case: Case, world: int) -> dict:
    """One process, each batch routed on its own, on the mean of the losses."""
    net = Net().to(case.dtype)
    optimizer = optimizer_of(net)
    batches = [batch(case, rank) for rank in range(world)]
    found: dict = {"losses": [], "margins": []}
    with computing(case.dtype):
        for step in range(case.steps):
            optimizer.zero_grad()
            out, losses, margins = zip(*(loss_of(net, *b) for b in batches), strict=True)
            torch.stack(losses).mean().backward()
            if step == 0:
                found |= {"out": out, "dx": [world * x.grad.clone() for x, _ in batches]}
                found["grads"] = {n: p.grad.clone() for n, p in net.named_parameters()}
            optimizer.step()
            found["losses"].append(torch.stack(losses).tolist())
            found["margins"].append(min(margins))
    return found | {"weights": net.state_dict()}


def train_together(case: Case, rank: int) -> dict:
    """This process's part."""
    net = Net().to(case.dtype)
    parallelise_experts(net)
    optimizer = optimizer_of(net)
    x, y = batch(case, rank)
    found: dict = {"losses": []}
    with computing(case.dtype):
        for step in range(case.steps):
            optimizer.zero_grad()
            out, loss, _ = loss_of(net, x, y)
            loss.backward()
            average_gradients(net)
            if step == 0:
                found |= {"out": out.detach(), "dx": x.grad.clone()}
                found["grads"] = {n: p.grad.clone() for n, p in net.named_parameters()}
            optimizer.step()
            found["losses"].append(loss.item())
    return found | {"weights": net.state_dict()}


# ---- what a process checks by itself ----


def check_errors(rank: int, world: int) -> None:
    """Named, and nothing is replaced."""
    uneven = nn.ModuleList([MoE(PLAIN, MoEConfig(world)), MoE(PLAIN, MoEConfig(world + 1))])
    with pytest.raises(
        ValueError, match=f"{world} processes, .* the {world + 1} experts of layer '1'"
    ):
        parallelise_experts(uneven)
    assert all(isinstance(m.experts, Experts) for m in uneven)
    with pytest.raises(ValueError, match="no MoE layer"):
        parallelise_experts(nn.Linear(2, 2))
    done = MoE(PLAIN, MoEConfig(world))
    parallelise_experts(done)
    with pytest.raises(ValueError, match="the experts of layer '' are parallel already"):
        parallelise_experts(done)
    with pytest.raises(ValueError, match="expected stacks of one number"):
        ExpertParallel(MLP(PLAIN))
    with pytest.raises(ValueError, match=f"group has {world} processes, .* experts$"):
        ExpertParallel(Experts(PLAIN, world + 1))


def check_checkpoints(rank: int, world: int) -> None:
    """Whole stacks load as slices and slices as they are; other numbers of experts are refused."""
    whole, net = Net(), Net()
    with torch.no_grad():
        for p in whole.parameters():
            p.uniform_(-1, 1)
        for p in whole.parameters():
            dist.broadcast(p, 0)
    parallelise_experts(net)
    net.load_state_dict(whole.state_dict())
    mine = net.state_dict()
    for name, p in whole.state_dict().items():
        if ".experts." in name:
            name = name.replace(".experts.", ".experts.local.")
            p = p.chunk(world)[rank]
        assert torch.equal(mine.pop(name), p), name
    assert not mine
    other = Net()
    parallelise_experts(other)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.moe.experts.local.up, net.moe.experts.local.up)
    broken = whole.state_dict() | {"moe.experts.up": whole.moe.experts.up[1:]}
    with pytest.raises(RuntimeError, match=r"moe\.experts\.up has 7 experts, expected 8"):
        net.load_state_dict(broken)


def check_parameters(rank: int, world: int) -> None:
    """Which are whose, also where they have no storage yet, and frozen stays frozen."""
    with torch.device("meta"):
        net = Net.__new__(Net)
        nn.Module.__init__(net)
        net.moe = MoE(GATED, MoEConfig(8))
    net.moe.experts.up.requires_grad_(False)
    parallelise_experts(net)
    found = expert_parameters(net)
    assert list(found) == ["moe.experts.local.up", "moe.experts.local.down"]
    assert all(p.is_meta and p.shape[0] == 8 // world for p in found.values())
    assert [p.requires_grad for p in found.values()] == [False, True]
    assert f"experts {rank * 8 // world}.." in repr(net)


def check_gradients_of_some(rank: int, world: int) -> None:
    """A parameter used by one process averages with zeros; one used by none keeps None."""
    net = nn.ParameterDict({n: torch.ones(2) for n in ("all", "first", "none")})
    used = net["all"] * (rank + 1) + (net["first"] if rank == 0 else 0)
    used.sum().backward()
    average_gradients(net)
    assert torch.equal(net["all"].grad, torch.full((2,), (world + 1) / 2))
    assert torch.equal(net["first"].grad, torch.full((2,), 1 / world))
    assert net["none"].grad is None


def check_rows_beyond(rank: int, world: int) -> None:
    """They are not sent: NaN in them reaches nobody, forward or backward."""
    experts = ExpertParallel(Experts(PLAIN, 4))
    rows = torch.randn(9, DIM)
    rows[6:] = torch.nan
    rows.requires_grad_()
    out = experts(rows, torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32))
    assert out.isfinite().all() and (out[:6] != 0).any(1).all() and not out[6:].any()
    out.sum().backward()
    assert rows.grad.isfinite().all() and not rows.grad[6:].any()
    assert all(p.grad.isfinite().all() for p in experts.parameters())


WORLDS = (2, 4)


def process(rank: int, world: int, folder: Path) -> None:
    """One of them."""
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for check in (
        check_errors,
        check_checkpoints,
        check_parameters,
        check_gradients_of_some,
        check_rows_beyond,
    ):
        check(rank, world)
    results = {case.name: train_together(case, rank) for case in CASES}
    torch.save(results, folder / f"{rank}-of-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """The processes, whose uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    fork(process, WORLDS, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the processes left what they found."""
    return run_script(__file__, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module", params=WORLDS)
def together(request, folder) -> list[dict]:
    """By process what it found, case by case."""
    world = request.param
    return [torch.load(folder / f"{rank}-of-{world}.pt") for rank in range(world)]


def whole(name: str, parts: list[dict]) -> tuple[str, Tensor]:
    """A parameter or gradient put together: one name of those that the processes have."""
    tensors = [part[name] for part in parts]
    if ".local." in name:
        return name.replace(".local.", "."), torch.cat(tensors)
    assert all(torch.equal(t, tensors[0]) for t in tensors), f"{name} differs between processes"
    return name, tensors[0]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(together, case):
    """Forward, every gradient, and the weights after the optimizer's last step."""
    found = [part[case.name] for part in together]
    expected = train_alone(case, len(found))
    near = {"rtol": TOLERANCE[case.dtype], "atol": TOLERANCE[case.dtype]}
    for rank, part in enumerate(found):
        torch.testing.assert_close(part["out"], expected["out"][rank], **near)
        torch.testing.assert_close(part["dx"], expected["dx"][rank], **near)
    for kind in ("grads", "weights"):
        got = dict(whole(name, [part[kind] for part in found]) for name in found[0][kind])
        assert got.keys() == expected[kind].keys()
        for name, wanted in expected[kind].items():
            told = f"{kind} {name}: "
            torch.testing.assert_close(got[name], wanted, **near, msg=told.__add__)
    if sum(case.tokens):
        assert all(g.any() for n, g in expected["grads"].items()), "a gradient of zeros"


@pytest.mark.parametrize("name", ["fp64", "fp32"])
def test_loss_curves_are_equal(together, name):
    case = next(c for c in CASES if c.name == name)
    expected = train_alone(case, len(together))
    assert min(expected["margins"]) > 0.1  # nothing is near to another expert
    wanted = torch.tensor(expected["losses"], dtype=torch.float64)  # [steps, world]
    found = torch.tensor([part[name]["losses"] for part in together], dtype=torch.float64).T
    assert len(found) == 20 and wanted[-1].sum() < 0.7 * wanted[0].sum()
    if name == "fp64":
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_cases_are_what_they_say():
    """Tokens find no room in some, and in `no-rows` the experts of all but process 0 are idle."""
    for case, idle in ((CASES[0], False), (CASES[4], True)):
        with computing(case.dtype):
            out = Net().to(case.dtype).moe(batch(case, 0)[0])
        assert bool(out.routing.loads()[2:].any()) is not idle
        assert out.routing.dropped().any()


# ---- the cost model ----


def test_cost_of_one_node_and_of_many():
    one = AllToAllCost(8, 8, 100, 10, 2, intra_bandwidth=1e6, intra_latency=0.001, element_bytes=4)
    assert one.exchanged_bytes == 8000
    assert one.token_bytes() == 320 and one.token_bytes(backward=False) == 160
    assert one.exchange_seconds() == pytest.approx(7 * 0.001 + 8000 * 7 / 8 / 1e6)
    assert one.exchange_seconds(hierarchical=True) == one.exchange_seconds()
    many = dataclasses.replace(one, processes=32, inter_bandwidth=1e5, inter_latency=0.01)
    between = 8000 * 24 / 32 / 1e5
    flat, levels = many.exchange_seconds(), many.exchange_seconds(hierarchical=True)
    assert flat == pytest.approx(0.007 + 24 * 0.01 + 8000 * 7 / 32 / 1e6 + between)
    assert levels == pytest.approx(0.007 + 3 * 0.01 + 8000 * 7 / 8 / 1e6 + between)
    assert many.layer_seconds() == pytest.approx(4 * flat + 7 * 0.001 + 24 * 0.01)
    assert many.layer_seconds(backward=False, hierarchical=True) == pytest.approx(
        2 * levels + 7 * 0.001 + 3 * 0.01
    )


def test_cost_of_a_process_alone_is_nothing_and_levels_pay_where_messages_are_small():
    assert AllToAllCost(1, 8, 512, 768).layer_seconds() == 0
    small, large = (AllToAllCost(256, 8, tokens, 768) for tokens in (64, 2**20))
    for cost, ratio in ((small, 4), (large, 1)):
        flat, levels = cost.exchange_seconds(), cost.exchange_seconds(hierarchical=True)
        assert (flat > ratio * levels) is (cost is small)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processes": 0}, "processes is 0, expected >= 1"),
        ({"processes": 12}, "processes is 12, expected at most per_node, 8, or a multiple"),
        ({"tokens": -1}, "tokens is -1, expected >= 0"),
        ({"inter_bandwidth": 0.0}, r"inter_bandwidth is 0\.0"),
        ({"intra_latency": -1.0}, r"intra_latency is -1\.0"),
    ],
)
def test_cost_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        AllToAllCost(**({"processes": 16, "per_node": 8, "tokens": 1, "dim": 8} | fields))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
