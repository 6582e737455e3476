"""What moe_route promises to PyTorch: opcheck, shapes without data, one graph, named errors."""

import pytest
import torch
from fresh_python import run_under_isa
from row_cases import BF16, FP16, FP32, rows
from torch._subclasses.fake_tensor import FakeTensorMode

from encfast import ops, ref
from encfast.routing import Routing

NATIVE = ops.backends("moe_route")["cpu"] == "native"
OPS = torch.ops.encfast
RNG = torch.tensor([3, 4])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_opcheck_moe_route(dtype):
    for layout in ("contiguous", "transposed") if dtype == FP32 else ("contiguous",):
        logits = rows((9, 5), dtype, layout).detach().requires_grad_()
        mask = torch.arange(9) % 4 != 1
        rule = "sigmoid", "kept", 1.0, 2, "random", "gumbel_rest", RNG
        torch.library.opcheck(OPS.moe_route.default, (logits, mask, 2, *rule))
    none = torch.randn(0, 5, dtype=dtype, requires_grad=True)
    rule = "softmax", "none", None, 0, "position", None, None
    torch.library.opcheck(OPS.moe_route.default, (none, None, 1, *rule))
    logits = logits.detach()
    out = OPS.moe_route(logits, None, 2, *rule)
    for grads in ((torch.randn(9, 2), None), (None, torch.randn(9, 5))):
        args = (*grads, out[5], out[1], out[3], "softmax", "none", dtype)
        torch.library.opcheck(OPS.moe_route_bwd.default, args)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_opcheck_moved_rows(dtype):
    routing = ops.route_tokens(torch.randn(6, 3), 2, capacity_factor=1.2)
    places = routing.rows, routing.slots
    torch.library.opcheck(OPS.moe_sort.default, (routing.expert_ids, 3))
    x, y = rows((6, 5), dtype, "transposed"), rows((12, 5), dtype, "strided")
    gates = routing.gates.detach().requires_grad_()
    leaf = [t.detach().requires_grad_() for t in (x, y)]
    torch.library.opcheck(OPS.moe_permute.default, (leaf[0], *places))
    torch.library.opcheck(OPS.moe_unpermute.default, (leaf[1], gates, *places))
    torch.library.opcheck(OPS.moe_unpermute.default, (leaf[1], None, *places))
    torch.library.opcheck(OPS.moe_unpermute_bwd.default, (x, y, gates.detach(), *places))
    torch.library.opcheck(OPS.moe_jitter.default, (leaf[0], RNG, 0.5))


def whole_family(device):
    """The results of every op on tensors of a device that may have no data."""
    logits = torch.empty(7, 4, device=device, dtype=BF16)
    mask = torch.empty(7, device=device, dtype=torch.bool)
    options = {"capacity_factor": 1.0, "priority": "random", "noise": "gumbel"}
    routing = ops.route_tokens(logits, 2, mask=mask, **options)
    x = torch.empty(7, 10, device=device, dtype=BF16)
    y = ops.permute_rows(ops.jitter_rows(x, 0.01), routing)
    out = ops.unpermute_rows(y, routing)
    again = ops.sort_choices(routing.expert_ids, routing.gates, 4)
    return routing, y, out, again


SHAPES = {
    "gates": (7, 2),
    "expert_ids": (7, 2),
    "rows": (14,),
    "slots": (7, 2),
    "cu_seqlens": (5,),
    "probabilities": (7, 4),
}


def assert_family(device):
    routing, y, out, again = whole_family(device)
    for field, shape in SHAPES.items():
        x = getattr(routing, field)
        floats = field in ("gates", "probabilities")
        assert x.shape == shape and x.dtype == (FP32 if floats else torch.int32), field
        assert x.device.type == device
        if not floats:
            assert getattr(again, field).shape == shape
    assert y.shape == (14, 10) and out.shape == (7, 10) and out.dtype == BF16


@pytest.mark.quick
def test_meta_tensors_give_shapes():
    assert_family("meta")


@pytest.mark.quick
def test_no_device_sync_on_a_gpu():
    """Fake CUDA tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        assert_family("cuda")


@pytest.mark.quick
def test_compiles_once_for_ragged_shapes():
    """In and out of a graph, with gradients to the router, the rows and the gates."""
    graphs = []

    def backend(module, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(module)
        return aot_eager(module, inputs)

    def step(x, weight, rng):
        routing = ops.route_tokens(
            ops.jitter_rows(x, 0.1, rng=rng) @ weight,
            2,
            capacity_factor=1.25,
            priority="random",
            noise="gumbel_rest",
            renormalise=True,
            rng=rng,
        )
        return ops.unpermute_rows(ops.permute_rows(x, routing) * 2, routing), routing

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    weight = torch.randn(6, 4)
    for n in (9, 30, 17, 5):
        x, found = torch.randn(n, 6), []
        for f in (compiled, step):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            out, routing = f(*leaves, RNG)
            assert isinstance(routing, Routing)
            loss = out.square().sum() + routing.probabilities.square().sum()
            found.append((out, routing.rows, *torch.autograd.grad(loss, leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
    assert len(graphs) <= 2
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    def forward(self, x):
        routing = ops.route_tokens(x[:, :4], 2, renormalise=True)
        return ops.unpermute_rows(ops.permute_rows(x, routing), routing), routing


def test_export_returns_a_routing():
    rows_dim = torch.export.Dim("rows", min=2)
    x = torch.randn(9, 6)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: rows_dim},))
    x = torch.randn(20, 6)
    for got, want in zip(program.module()(x), Layer()(x), strict=True):
        if isinstance(got, Routing):
            got, want = got.rows, want.rows
        assert torch.equal(got, want)


LOGITS = torch.randn(6, 4)
ROUTING = ref.moe_route(LOGITS, None, 2)
BAD_ROUTES = {
    "top_k is 5, expected 1..4": {"top_k": 5},
    "top_k is 0": {"top_k": 0},
    "top_k is float": {"top_k": 2.0},
    "scoring is 'relu', expected one of 'softmax', 'sigmoid'": {"scoring": "relu"},
    "renormalise is 'all'": {"renormalise": "all"},
    "priority is 'last'": {"priority": "last"},
    "noise is 'normal'": {"noise": "normal"},
    "capacity_factor is 0, expected more than 0": {"capacity_factor": 0},
    "capacity_factor is -1.0": {"capacity_factor": -1.0},
    "capacity_factor is nan": {"capacity_factor": float("nan")},
    "min_capacity is -1": {"min_capacity": -1},
    "mask is float32, expected bool, True for tokens": {"mask": torch.ones(6)},
    "mask has 5 entries, logits has 6 rows": {"mask": torch.ones(5, dtype=torch.bool)},
    "logits has shape (4,), expected 2-D": {"logits": LOGITS[0]},
    "logits has shape (6, 0)": {"logits": LOGITS[:, :0]},
    "logits is float64": {"logits": LOGITS.double()},
    "logits holds NaN in row 2": {
        "logits": LOGITS.clone().index_fill(0, torch.tensor(2), torch.nan)
    },
    "rng is int32": {"rng": RNG.int(), "noise": "gumbel"},
    "rng has shape (3,)": {"rng": torch.zeros(3, dtype=torch.int64), "noise": "gumbel"},
    "mask is on meta": {"mask": torch.ones(6, dtype=torch.bool, device="meta")},
}


@pytest.mark.quick
@pytest.mark.parametrize("message", BAD_ROUTES)
def test_route_tokens_names_what_is_wrong(message):
    args = {"logits": LOGITS, "top_k": 2} | BAD_ROUTES[message]
    with pytest.raises((TypeError, ValueError), match="route_tokens: ") as caught:
        ops.route_tokens(args.pop("logits"), args.pop("top_k"), **args)
    assert message in str(caught.value)


def replaced(**values):
    names = "gates", "expert_ids", "rows", "slots", "cu_seqlens", "probabilities"
    return Routing(**(dict(zip(names, ROUTING, strict=True)) | values))


IDS = ROUTING[1]
BAD_MOVES = {
    "permute_rows: x has 5 rows, expected 6": lambda: ops.permute_rows(LOGITS[:5], replaced()),
    "permute_rows: x is int64": lambda: ops.permute_rows(LOGITS.long(), replaced()),
    "permute_rows: x has shape (6,), expected 2-D": lambda: ops.permute_rows(
        LOGITS[:, 0], replaced()
    ),
    "permute_rows: rows holds 12, expected -1 <= place < 12": lambda: ops.permute_rows(
        LOGITS, replaced(rows=ROUTING[2] + 1)
    ),
    "permute_rows: slots holds -2": lambda: ops.permute_rows(
        LOGITS, replaced(slots=ROUTING[3] - 2)
    ),
    "permute_rows: rows has 11 entries, expected 12": lambda: ops.permute_rows(
        LOGITS, replaced(rows=ROUTING[2][1:])
    ),
    "permute_rows: rows is int64, expected int32": lambda: ops.permute_rows(
        LOGITS, replaced(rows=ROUTING[2].long())
    ),
    "unpermute_rows: y has 6 rows, expected 12": lambda: ops.unpermute_rows(LOGITS, replaced()),
    "unpermute_rows: gates has shape (6, 1), expected (6, 2)": lambda: ops.unpermute_rows(
        torch.randn(12, 4), replaced(), gates=torch.rand(6, 1)
    ),
    "unpermute_rows: gates is bfloat16, expected float32": lambda: ops.unpermute_rows(
        torch.randn(12, 4), replaced(), gates=torch.rand(6, 2).bfloat16()
    ),
    "sort_choices: expert_ids holds 4, expected -1 <= id < 4": lambda: ops.sort_choices(
        torch.full_like(IDS, 4), ROUTING[0], 4
    ),
    "sort_choices: expert_ids holds -2": lambda: ops.sort_choices(IDS - 4, ROUTING[0], 4),
    "sort_choices: expert_ids is int64": lambda: ops.sort_choices(IDS.long(), ROUTING[0], 4),
    "sort_choices: num_experts is 0": lambda: ops.sort_choices(IDS, ROUTING[0], 0),
    "jitter_rows: amount is 1.0": lambda: ops.jitter_rows(LOGITS, 1.0),
    "jitter_rows: amount is -0.1": lambda: ops.jitter_rows(LOGITS, -0.1),
    "jitter_rows: x is float64": lambda: ops.jitter_rows(LOGITS.double(), 0.1),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", BAD_MOVES)
def test_moves_name_what_is_wrong(message):
    if message == "sort_choices: expert_ids holds -2":
        assert (IDS - 4 < -1).any()
    with pytest.raises((TypeError, ValueError)) as caught:
        BAD_MOVES[message]()
    assert message.split(" holds -")[0] in str(caught.value)


@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """The kernels check by themselves: compiled code has passed no check of values."""
    places, gates = (ROUTING[2], ROUTING[3]), ROUTING[0]
    y, far = torch.randn(12, 4), torch.full((12,), 12, dtype=torch.int32)
    for call in (
        lambda: OPS.moe_permute(LOGITS, far, places[1]),
        lambda: OPS.moe_unpermute(y, gates, places[0], far.view(6, 2)),
        lambda: OPS.moe_unpermute(y, gates[:5], *places),
        lambda: OPS.moe_unpermute_bwd(LOGITS, y, gates, far, places[1]),
        lambda: OPS.moe_unpermute_bwd(LOGITS[:, :3], y, gates, *places),
        lambda: OPS.moe_sort(torch.full_like(IDS, 4), 4),
        lambda: OPS.moe_sort(torch.full_like(IDS, -2), 4),
        lambda: OPS.moe_route(LOGITS, None, 5, "softmax", "none", None, 0, "position", None, None),
        lambda: OPS.moe_route(LOGITS, None, 2, "softmax", "none", 0.0, 0, "position", None, None),
        lambda: OPS.moe_route(
            LOGITS, None, 2, "softmax", "none", None, 0, "position", "gumbel", None
        ),
        lambda: OPS.moe_route(LOGITS, None, 2, "relu", "none", None, 0, "position", None, None),
        lambda: OPS.moe_route_bwd(
            gates, None, ROUTING[5], IDS + 4, ROUTING[3], "softmax", "none", FP32
        ),
        lambda: OPS.moe_jitter(LOGITS, RNG[:1], 0.1),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"expected|need|differ"):
            call()


def other_isas():
    isas = OPS.cpu_isas().split(",") if NATIVE else []
    return [isa for isa in isas if isa != OPS.cpu_isa()]


@pytest.mark.host
@pytest.mark.parametrize("isa", other_isas())
def test_every_isa_of_this_machine_matches_the_reference(isa):
    """The same integers from each, however it would round a product and a sum at once."""
    cases = "exact or match_the_reference or references_numbers or number_of_choices"
    files = ("moe_route", "moe_route_rows")
    run_under_isa(isa, cases, *(f"tests/ops/test_{name}.py" for name in files))
