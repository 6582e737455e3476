"""restore_rows and masked_norm: forward, every gradient, and what must not reach either."""

import functools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from row_cases import BF16, DTYPES, FP16, FP32, assert_same, for_thread_counts, name, results, rows

from encfast import ops, ref

CHANNELS = (1, 7, 16, 37, 64, 100)


def compare(x, index, fill=None, add=None, add_index=None, **bounds):
    """Against the reference, whose half types are summed in float32 and rounded once too."""
    ours, theirs = (
        functools.partial(f, index=index, add_index=add_index)
        for f in (ops.restore_rows, ref.restore_rows)
    )
    grad = torch.randn(len(index), x.shape[1]).to(x.dtype)
    assert_same(ours, theirs, theirs, {"x": x, "fill": fill, "add": add}, [grad], **bounds)


def gaps(m, n):
    """An index [m] into n rows: about half gaps, rows repeated and unused."""
    return torch.where(torch.rand(m) < 0.5, -1, torch.randint(0, n, (m,)))


@pytest.mark.quick
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_forward_and_gradients_match_the_reference(dtype, channels):
    x, fill, add = (
        torch.randn(30, channels).to(dtype),
        torch.randn(channels),
        torch.randn(8, channels),
    )
    index = torch.cat([gaps(10, 30), torch.randperm(30)])
    compare(x, index, fill.to(dtype))
    compare(x, index, fill.to(dtype), add.to(dtype))
    compare(x, index, None, add.to(dtype))
    compare(x, index, fill.to(dtype), add.to(dtype), torch.randint(0, 8, (40,)))


@pytest.mark.quick
@pytest.mark.parametrize("fill", DTYPES, ids=name)
@pytest.mark.parametrize("add", DTYPES, ids=name)
def test_mixed_dtypes_match_the_reference(fill, add):
    """Parameters in float32 beside half rows, as under autocast, and any other mix."""
    index = torch.cat([gaps(10, 30), torch.randperm(30)])
    for dtype in DTYPES:
        x, f, a = rows((30, 37), dtype), rows((37,), fill), rows((8, 37), add)
        compare(x, index, f, a)
        compare(x, index, f, a, torch.randint(0, 8, (40,)))
        compare(x, index, f)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_match_the_reference(layout):
    index = torch.cat([gaps(10, 30), torch.randperm(30)])
    for dtype in (FP32, BF16):
        x, add = rows((30, 21), dtype, layout), rows((8, 21), dtype, layout)
        fill = torch.randn(42).to(dtype)[::2]
        compare(x, index, fill, add)
        compare(x, index[::2], fill, add, torch.randint(0, 8, (40,))[::2])
        grad = rows((40, 21), dtype, layout)
        for added in (None, torch.randint(0, 8, (40,))):
            got = torch.ops.encfast.restore_rows_bwd(grad, index, added, 8, True, True)
            dense = torch.ops.encfast.restore_rows_bwd(
                grad.contiguous(), index, added, 8, True, True
            )
            assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rows_without_anything_added_are_exact(dtype):
    x, fill = torch.randn(9, 33).to(dtype), torch.randn(33)
    index = gaps(50, 9)
    got = ops.restore_rows(x, index, fill)
    assert torch.equal(got, torch.where(index[:, None] < 0, fill.to(dtype), x[index]))
    got = ops.restore_rows(x, index)
    assert torch.equal(got, torch.where(index[:, None] < 0, 0, x[index]))


@pytest.mark.quick
def test_half_types_round_once():
    """256 + 1.002 is 258 in bfloat16; with the addend rounded first it is 257, a tie: 256."""
    x = torch.full((1, 20), 256.0, dtype=BF16)
    add = torch.full((1, 20), 1.0 + 2**-9)
    index = torch.tensor([0])
    assert (ops.restore_rows(x, index, add=add) == 258).all()
    assert (ops.restore_rows(x, index, add=torch.ones(1, 20)) == 256).all()  # a tie, to even


@pytest.mark.quick
def test_parameters_gradients_are_summed_in_float32():
    """600 ones are 600 also where rows are bfloat16, in which 256 + 1 is 256."""
    x, index = torch.zeros(1, 16, dtype=BF16), torch.full((600,), -1)
    fill, add = torch.zeros(16, requires_grad=True), torch.zeros(2, 16, requires_grad=True)
    out = ops.restore_rows(x, index, fill, add=add)
    dfill, dadd = torch.autograd.grad(out.sum(), [fill, add])
    assert (dfill == 600).all() and (dadd == 300).all()


@pytest.mark.quick
def test_positions_repeat_for_each_sequence():
    x, add = torch.randn(6, 5), torch.randn(4, 5)
    index = torch.tensor([0, 1, -1, 2, -1, 3, 4, 5])
    each = torch.arange(8) % 4
    assert torch.equal(
        ops.restore_rows(x, index, add=add), ops.restore_rows(x, index, add=add, add_index=each)
    )


@pytest.mark.quick
def test_an_encoders_input_is_restored_too():
    """Class token and positions before the visible patches, by index alone."""
    batch, patches, keep, channels = 3, 16, 4, 24
    tokens = torch.randn(batch * patches, channels)
    cls, pos = torch.randn(channels), torch.randn(1 + patches, channels)
    visible = ops.select_patches(torch.rand(batch, patches), keep).visible
    first = torch.full((batch, 1), -1)
    index = torch.cat([first, visible.view(batch, keep)], 1).flatten()
    places = torch.cat([first + 1, 1 + visible.view(batch, keep) % patches], 1).flatten()
    got = ops.restore_rows(tokens, index, cls, add=pos, add_index=places)
    want = (tokens.view(batch, patches, channels) + pos[1:]).flatten(0, 1)[visible]
    want = torch.cat([(cls + pos[0]).expand(batch, 1, -1), want.view(batch, keep, -1)], 1)
    assert torch.equal(got, want.flatten(0, 1))


@pytest.mark.quick
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_nobody_restores_never_reach_output_or_gradient(poison):
    x, index = torch.randn(12, 9), torch.tensor([3, -1, 0, 3, -1, 7, -1, 3, 0])
    add, fill, grad = torch.randn(5, 9), torch.randn(9), torch.randn(9, 9)
    add_index = torch.tensor([0, 2, 0, 4, 2, 2, 4, 0, 0])
    call = functools.partial(ops.restore_rows, index=index, add_index=add_index)
    clean = results(call, {"x": x, "fill": fill, "add": add}, [grad])
    x, add = x.clone(), add.clone()
    x[[1, 2, 4, 5, 6, 8, 9, 10, 11]] = poison
    add[[1, 3]] = poison
    poisoned = results(call, {"x": x, "fill": fill, "add": add}, [grad])
    for key, value in clean.items():
        assert torch.equal(value, poisoned[key]), key
    assert (clean["dx"][[1, 2, 4]] == 0).all() and (clean["dadd"][[1, 3]] == 0).all()


@pytest.mark.quick
def test_a_gradient_of_hidden_rows_stays_out_of_the_visible():
    """NaN in dout of gaps makes dfill NaN and nothing else; of visible rows, dx alone."""
    x, fill = torch.randn(4, 6), torch.randn(6)
    index = torch.tensor([0, -1, 1, -1, 2, 3])
    for place, dead, alive in ((1, "dfill", "dx"), (2, "dx", "dfill")):
        grad = torch.randn(6, 6)
        grad[place] = float("nan")
        found = results(
            functools.partial(ops.restore_rows, index=index), {"x": x, "fill": fill}, [grad]
        )
        assert found[dead].isnan().any() and not found[alive].isnan().any()


@pytest.mark.quick
def test_only_what_is_wanted_is_computed():
    x, index = torch.randn(4, 6), torch.tensor([0, -1, 3, -1])
    for wanted in ("x", "fill", "add"):
        leaves = {"x": x, "fill": torch.randn(6), "add": torch.randn(2, 6)}
        leaves[wanted] = leaves[wanted].clone().requires_grad_()
        out = ops.restore_rows(leaves["x"], index, leaves["fill"], add=leaves["add"])
        (grad,) = torch.autograd.grad(out.sum(), leaves[wanted])
        assert grad.shape == leaves[wanted].shape
    dfill, dadd = torch.ops.encfast.restore_rows_bwd(x, index, None, 2, False, False)
    assert dfill.shape == dadd.shape == (0,)


@pytest.mark.quick
@pytest.mark.parametrize("n,m,channels", [(0, 0, 4), (3, 0, 4), (0, 5, 4), (3, 5, 0), (1, 1, 1)])
def test_smallest_batches(n, m, channels):
    x = torch.randn(n, channels, requires_grad=True)
    fill, add = torch.randn(channels, requires_grad=True), torch.randn(5, channels)
    index = torch.full((m,), -1)
    add_index = torch.arange(m) % 5
    out = ops.restore_rows(x, index, fill, add=add.requires_grad_(), add_index=add_index)
    assert torch.equal(out, (fill + add[add_index]).detach())
    found = torch.autograd.grad(out.sum(), [x, fill, add])
    assert all(g.shape == p.shape for g, p in zip(found, (x, fill, add), strict=True))
    assert (found[0] == 0).all() and (found[1] == m).all()
    assert ops.restore_rows(x, index, add=add[:0] if m == 0 else add[:1]).shape == (m, channels)


@pytest.mark.quick
@pytest.mark.parametrize("added", ["none", "cyclic", "indexed"])
def test_thread_count_changes_nothing(added):
    x, index = torch.randn(300, 100).to(BF16), gaps(1400, 300)
    add = None if added == "none" else torch.randn(140, 100)
    add_index = torch.randint(0, 140, (1400,)) if added == "indexed" else None
    call = functools.partial(ops.restore_rows, index=index, add_index=add_index)
    inputs = {"x": x, "fill": torch.randn(100), "add": add}
    grad = torch.randn(1400, 100)
    first, *others = for_thread_counts(lambda: results(call, inputs, [grad]))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.quick
def test_the_reference_has_every_derivative():
    x, fill, add = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (3,), (2, 3))
    )
    index = torch.tensor([0, -1, 3, 3, -1, 1])

    def call(x, fill, add):
        return ref.restore_rows(x, index, fill, add)

    assert torch.autograd.gradcheck(call, (x, fill, add))
    assert torch.autograd.gradgradcheck(call, (x, fill, add))


@pytest.mark.quick
def test_double_backward_is_refused_with_a_way_out():
    x, fill = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    out = ops.restore_rows(x, torch.tensor([0, -1]), fill)
    (grad,) = torch.autograd.grad(out.square().sum(), fill, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"encfast.ref.patch_gather"):
        grad.sum().backward()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_masked_norm_normalises_the_visible_rows_alone(dtype):
    """SparK's: NaN of masked positions reaches neither rows nor gradients; they are 0."""
    x, weight, bias = torch.randn(20, 32).to(dtype), torch.rand(32) + 0.5, torch.randn(32)
    seen = torch.randperm(20)[:12]
    x[[i for i in range(20) if i not in seen]] = float("nan")
    leaf = x.clone().requires_grad_()
    out = ops.masked_norm(leaf, seen, weight, bias)
    want = torch.zeros(20, 32, dtype=torch.float64)
    want[seen] = F.layer_norm(x[seen].double(), (32,), weight.double(), bias.double())
    near = 2e-2 if dtype == BF16 else 1e-5
    torch.testing.assert_close(out.double(), want, rtol=near, atol=near)
    (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
    hidden = torch.ones(20, dtype=torch.bool)
    hidden[seen] = False
    assert (grad[hidden] == 0).all() and torch.isfinite(grad).all() and grad[seen].abs().sum() > 0


@given(
    n=st.integers(1, 9),
    m=st.integers(0, 40),
    channels=st.integers(1, 70),
    dtypes=st.tuples(*[st.sampled_from((FP32, BF16, FP16))] * 3),
    filled=st.booleans(),
    added=st.sampled_from(("none", "cyclic", "indexed")),
    layout=st.sampled_from(["contiguous", "strided", "expanded"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fuzz_matches_reference(n, m, channels, dtypes, filled, added, layout, seed):
    torch.manual_seed(seed)
    fill = rows((channels,), dtypes[1]) if filled else None
    entries = 3
    m = m // entries * entries if added == "cyclic" else m
    add = None if added == "none" else rows((entries, channels), dtypes[2])
    add_index = torch.randint(0, entries, (m,)) if added == "indexed" else None
    # Of a few elements, the error of the reference may be small by luck.
    bounds = {"eps_factor": 4.0, "allow_degenerate": True}
    compare(rows((n, channels), dtypes[0], layout), gaps(m, n), fill, add, add_index, **bounds)
