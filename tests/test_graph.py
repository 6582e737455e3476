"""Graph layers against loops over neighbours and against PyTorch Geometric; batch normalisation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encfast.layers import BatchNorm, GATLayer, GCNLayer, GINLayer, Graph, checkpointed
from encfast.testing import assert_close_to_reference

from .models.common import assert_compiles, assert_parity

pytestmark = pytest.mark.quick

# Seven nodes: a triangle with a tail, a separate pair, and a node on its own.
GRAPH = Graph(7, ((0, 1), (2, 1), (2, 0), (3, 2), (5, 4)))
KINDS = {"gin": GINLayer, "gcn": GCNLayer, "gat": GATLayer}
kinds = pytest.mark.parametrize("kind", KINDS)


def neighbours(graph: Graph, node: int) -> list[int]:
    return sorted({j for edge in graph.edges for j in edge if node in edge} - {node})


def gin_loop(layer: GINLayer, x: torch.Tensor) -> torch.Tensor:
    """Node by node; the MLP sees the nodes of all graphs at once."""
    nodes = []
    for i in range(layer.graph.num_nodes):
        own = (1 + layer.eps) * x[..., i, :]
        nodes.append(own + sum(x[..., j, :] for j in neighbours(layer.graph, i)))
    return layer.mlp(torch.stack(nodes, -2))


def gcn_loop(layer: GCNLayer, x: torch.Tensor) -> torch.Tensor:
    seen = [[i, *neighbours(layer.graph, i)] for i in range(layer.graph.num_nodes)]
    nodes = [
        sum(x[..., j, :] / (len(seen[i]) * len(seen[j])) ** 0.5 for j in seen[i])
        for i in range(layer.graph.num_nodes)
    ]
    return layer.linear(torch.stack(nodes, -2))


def gat_loop(layer: GATLayer, x: torch.Tensor) -> torch.Tensor:
    z = layer.linear(x)
    size = z.shape[-1] // layer.num_heads
    nodes = []
    for i in range(layer.graph.num_nodes):
        heads = []
        for h in range(layer.num_heads):
            part = z[..., h * size : (h + 1) * size]
            seen = [i, *neighbours(layer.graph, i)]
            scores = [
                F.leaky_relu(
                    part[..., i, :] @ layer.target[h] + part[..., j, :] @ layer.source[h], 0.2
                )
                for j in seen
            ]
            probs = torch.stack(scores, -1).softmax(-1)
            heads.append(sum(probs[..., n, None] * part[..., j, :] for n, j in enumerate(seen)))
        nodes.append(torch.cat(heads, -1))
    return torch.stack(nodes, -2) + layer.bias


LOOPS = {"gin": gin_loop, "gcn": gcn_loop, "gat": gat_loop}


def drawn(layer: nn.Module) -> nn.Module:
    """Every parameter away from its initial constant."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@kinds
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (1,)], ids=str)
def test_is_the_loop_over_neighbours(kind, leading):
    """Forward and every gradient, from a view that is not contiguous."""
    layer = drawn(KINDS[kind](GRAPH, 12, 20))
    wide = torch.randn(*leading, 12, 7, dtype=torch.float64)
    weight = torch.randn(*leading, 7, 20, dtype=torch.float64)

    def run(module, function, dtype):
        x = wide.to(dtype).clone().requires_grad_()
        y = function(module, x.transpose(-1, -2))
        y.backward(weight.to(dtype))
        return {"output": y, "x": x.grad} | {n: p.grad for n, p in module.named_parameters()}

    actual = run(layer, lambda module, x: module(x), torch.float32)
    exact = run(copy.deepcopy(layer).double(), LOOPS[kind], torch.float64)
    plain = run(copy.deepcopy(layer), LOOPS[kind], torch.float32)
    largest = max(grad.abs().max() for name, grad in exact.items() if name != "output")
    for name, reference in exact.items():
        if kind == "gin" and name == "mlp.0.bias":
            continue  # batch normalisation takes every constant away: the gradient is 0
        if reference.numel() == 1:  # one sum over everything, which may cancel
            assert (actual[name] - reference).abs() <= 1e-6 * largest, name
            continue
        factor = 2 if name == "output" else 3
        assert_close_to_reference(name, actual[name], reference, plain[name], factor)


@kinds
def test_relabelled_nodes_give_relabelled_outputs(kind):
    layer = drawn(KINDS[kind](GRAPH, 8, 8)).eval()
    order = torch.randperm(7)  # new node n is old node order[n]
    place = order.argsort().tolist()
    relabelled = Graph(7, tuple((place[i], place[j]) for i, j in GRAPH.edges))
    other = KINDS[kind](relabelled, 8, 8).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7, 8)
    assert_parity("output", other(x[:, order]), layer(x)[:, order])


@kinds
def test_an_edge_carries_features_and_nothing_else_does(kind):
    layer = drawn(KINDS[kind](GRAPH, 8, 8)).eval()
    x = torch.randn(1, 7, 8)
    other = x.clone()
    other[:, 3] += 1
    moved = ((layer(other) - layer(x)).abs() > 1e-6).any(-1)[0]
    assert moved.tolist() == [False, False, True, True, False, False, False]
    less = KINDS[kind](Graph(7, GRAPH.edges[:-1]), 8, 8).eval()
    less.load_state_dict(layer.state_dict())
    changed = ((less(x) - layer(x)).abs() > 1e-6).any(-1)[0]
    assert changed.tolist() == [False] * 4 + [True, True, False]


@kinds
def test_no_graphs_at_all(kind):
    layer = KINDS[kind](GRAPH, 8, 12)
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.zeros(0, 7, 8, requires_grad=True))
    assert y.shape == (0, 7, 12)
    y.sum().backward()
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@kinds
def test_compiles(kind):
    layer = drawn(KINDS[kind](GRAPH, 8, 8))
    batches = [torch.randn(n, 7, 8) for n in (4, 9, 5)]
    assert_compiles(layer, batches, call=lambda module, x: module(x).square().sum())


@kinds
def test_a_layer_built_on_meta_works_after_to_empty(kind):
    built = KINDS[kind](GRAPH, 8, 8)
    layer = KINDS[kind](GRAPH, 8, 8, device="meta").to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, a), (_, b) in zip(layer.named_buffers(), built.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert layer(torch.randn(2, 7, 8)).isfinite().all()
    assert "matrix" not in layer.state_dict()


def geometric():
    """The layers of PyTorch Geometric and the edges of GRAPH for `graphs` copies of it."""
    return pytest.importorskip("torch_geometric.nn")


def edge_index(graphs: int) -> torch.Tensor:
    """int64 [2, 2 * graphs * edges]: both directions, copy g at nodes 7g to 7g + 6."""
    one = torch.tensor([*GRAPH.edges, *((j, i) for i, j in GRAPH.edges)]).T
    return torch.cat([one + 7 * g for g in range(graphs)], 1)


@kinds
def test_is_that_of_pytorch_geometric(kind):
    theirs_of = geometric()
    layer = drawn(KINDS[kind](GRAPH, 12, 20))
    if kind == "gin":
        theirs = theirs_of.GINConv(copy.deepcopy(layer.mlp), train_eps=True)
        names = {"eps": "eps"} | {f"nn.{n}": f"mlp.{n}" for n, _ in layer.mlp.named_parameters()}
    elif kind == "gcn":
        theirs = theirs_of.GCNConv(12, 20)
        names = {"lin.weight": "linear.weight", "bias": "linear.bias"}
    else:
        theirs = theirs_of.GATConv(12, 5, heads=4)
        names = {"lin.weight": "linear.weight", "att_src": "source", "att_dst": "target"}
        names["bias"] = "bias"
    ours = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(ours[names[name]].view(parameter.shape))
    x = torch.randn(32, 7, 12)
    expected = theirs(x.flatten(0, 1), edge_index(32)).unflatten(0, (32, 7))
    assert_parity(kind, layer(x), expected, tolerance=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_batch_norm_is_pytorchs(momentum, affine):
    options = {"momentum": momentum, "affine": affine}
    ours, theirs = BatchNorm(6, **options), nn.BatchNorm1d(6, **options)
    drawn(ours)
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        x = 3 + 2 * torch.randn(5, 4, 6)
        assert_parity("training", ours(x), theirs(x.flatten(0, 1)).view(x.shape), 1e-6)
    for name in ("running_mean", "running_var"):
        assert_parity(name, getattr(ours, name), getattr(theirs, name), 1e-6)
    ours.eval(), theirs.eval()
    assert_parity("evaluation", ours(x), theirs(x.flatten(0, 1)).view(x.shape), 1e-6)


def test_batch_norm_without_rows_keeps_its_averages():
    norm = BatchNorm(6)
    assert norm(torch.zeros(0, 3, 6)).shape == (0, 3, 6)
    assert torch.equal(norm.running_mean, torch.zeros(6))
    assert torch.equal(norm.running_var, torch.ones(6))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 6))


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_moves_running_averages_once(compiled):
    """PyTorch's own checkpoint moves them in the forward and again in the recomputation."""
    plain = drawn(nn.Sequential(nn.Linear(6, 6), BatchNorm(6), nn.PReLU()))
    kept = copy.deepcopy(plain)
    x = torch.randn(9, 6)
    plain(x).square().sum().backward()

    def step(x):
        return checkpointed(kept, x).square().sum()

    run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    run(x).backward()
    for name, buffer in plain.named_buffers():
        assert_parity(name, dict(kept.named_buffers())[name], buffer, 1e-6)
    for (name, p), q in zip(plain.named_parameters(), kept.parameters(), strict=True):
        if name != "0.bias":  # its gradient is 0 but for rounding
            assert_parity(name, q.grad, p.grad)
    assert not kept[1].held


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="num_nodes must be >= 1, got 0"):
        Graph(0, ())
    with pytest.raises(ValueError, match=r"edges holds \(0, 7\), expected two nodes in \[0, 7\)"):
        Graph(7, ((0, 7),))
    with pytest.raises(ValueError, match=r"edges holds \(2, 2\), a self-loop"):
        Graph(7, ((2, 2),))
    with pytest.raises(ValueError, match="an edge twice"):
        Graph(7, ((0, 1), (1, 0)))
    with pytest.raises(ValueError, match="norm 'bacth' is unknown; did you mean 'batch'"):
        GINLayer(GRAPH, 8, 8, norm="bacth")
    with pytest.raises(ValueError, match="num_heads=3 must divide out_dim=8"):
        GATLayer(GRAPH, 8, 8, num_heads=3)
    for kind in KINDS.values():
        layer = kind(GRAPH, 8, 8)
        for shape in [(2, 6, 8), (2, 7, 9), (8,)]:
            with pytest.raises(ValueError, match=r"expected \[\.\.\., 7, 8\]: the adjacency has 7"):
                layer(torch.randn(shape))
