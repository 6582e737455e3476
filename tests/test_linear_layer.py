"""layers.Linear: an nn.Linear everywhere, by ops.linear where that is faster."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encfast
from encfast import ops
from encfast.layers import Linear
from encfast.layers import linear as linear_layer

ROWS = linear_layer.MIN_ROWS
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(ops.backends("linear")["cpu"] != "native", reason="no compiled library"),
]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """As on a CPU that profits, whatever this one is; the calls of the op."""
    found = []
    monkeypatch.setattr(linear_layer, "_torch_is_below_peak", lambda: True)
    monkeypatch.setattr(
        linear_layer.ops, "linear", lambda *a, op=ops.linear: found.append(a) or op(*a)
    )
    return found


def pair(**factory):
    plain = nn.Linear(24, 40, **factory)
    ours = Linear(24, 40, **factory)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return y, x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("shape", [(ROWS, 24), (2, ROWS // 2, 24)])
def test_equals_nn_linear(shape, calls):
    plain, ours = pair()
    x = torch.randn(shape)
    for got, want in zip(gradients(ours, x), gradients(plain, x), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.detach().abs().max()))
    assert len(calls) == 1


def test_what_stays_with_pytorch(calls):
    _, ours = pair()
    x = torch.randn(ROWS, 24)
    ours(x[1:])
    for dtype in (torch.float64, torch.bfloat16):
        copy.deepcopy(ours).to(dtype)(x.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    copy.deepcopy(ours).to("meta")(x.to("meta"))
    torch.func.vmap(ours)(x[None])
    torch.func.grad(lambda v: ours(v).sum())(x)
    torch.func.jvp(ours, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
    assert torch.allclose(tangent, torch.ones_like(x) @ ours.weight.T, atol=1e-5)
    torch.compile(ours, backend="eager", fullgraph=True)(x)
    assert not calls


def test_a_mixture_of_dtypes_fails_as_in_pytorch():
    _, ours = pair()
    with pytest.raises(RuntimeError, match="dtype"):
        ours(torch.randn(ROWS, 24).bfloat16())


def test_exports_as_pytorchs_operator():
    _, ours = pair()
    with encfast.exportable():
        program = torch.export.export(ours, (torch.randn(ROWS, 24),))
        assert torch.equal(
            ops.linear(torch.ones(2, 24), ours.weight), F.linear(torch.ones(2, 24), ours.weight)
        )
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.linear.default" in targets and not any("encfast" in t for t in targets)


def test_is_chosen_by_the_maker_of_the_cpu(monkeypatch):
    monkeypatch.undo()
    amd = torch.ops.encfast.cpu_vendor() == "AuthenticAMD"
    fast = torch.ops.encfast.cpu_isa() != "base"
    assert linear_layer._torch_is_below_peak() == (amd and fast)
