"""varlen_attn's shared global key: one more key per sequence, from a row that groups share."""

import functools

import pytest
import torch
from attn_cases import cu_seqlens

from encfast import ops, ref
from encfast.testing import assert_close_to_reference

LENS, GROUPS = (5, 0, 33, 70, 1), (1, 1, 0, 1, 2)
ENDS = [0, *torch.tensor(LENS).cumsum(0).tolist()]


def make(dtype, lens_k=LENS, groups=4):
    """q, k, v, k_g and v_g; the last group is nobody's."""
    shapes = [(sum(LENS), 4), *[(sum(lens_k), 2)] * 2, *[(groups, 2)] * 2]
    return [torch.randn(*shape, 16).to(dtype) for shape in shapes]


def by_hand(q, k, v, k_g, v_g, compute_dtype=None):
    """Each sequence's keys with its global row in front, by torch.cat."""
    k, v = (
        torch.cat(
            [
                torch.cat((rows[g : g + 1], x[a:b]))
                for g, a, b in zip(GROUPS, ENDS[:-1], ENDS[1:], strict=True)
            ]
        )
        for rows, x in ((k_g, k), (v_g, v))
    )
    lens_k = [n + 1 for n in LENS]
    return ref.varlen_attn(
        q,
        k,
        v,
        cu_seqlens(LENS),
        cu_seqlens_k=cu_seqlens(lens_k),
        compute_dtype=compute_dtype,
    )


def op(q, k, v, k_g, v_g, **options):
    shared = (k_g, v_g, torch.tensor(GROUPS))
    return ops.varlen_attn(q, k, v, cu_seqlens(LENS), global_kv=shared, return_lse=True, **options)


def results(attention, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = attention(*leaves)
    loss = out.double().sin().sum() + lse.double().cos().sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_matches_keys_put_together_by_hand(dtype):
    inputs = make(dtype)
    got = results(op, inputs)
    plain = results(functools.partial(by_hand, compute_dtype=dtype), inputs)
    want = results(by_hand, [x.double() for x in inputs])
    names = ("out", "lse", "dq", "dk", "dv", "dk_g", "dv_g")
    for name, *x in zip(names, got, want, plain, strict=True):
        factor = 3 if name.startswith("d") else 2
        assert_close_to_reference(name, *x, factor=factor)
    assert (got[-1][3] == 0).all() and (got[-2][3] == 0).all()


@pytest.mark.quick
def test_bounds_of_the_lengths_and_repeated_runs():
    inputs = make(torch.bfloat16)
    want = results(op, inputs)
    for _ in range(5):
        got = results(lambda *x: op(*x, max_seqlen_q=70, max_seqlen_k=70), inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.quick
def test_a_sequence_without_keys_of_its_own_sees_the_shared_one():
    q, k, v, k_g, v_g = make(torch.float32)
    none = torch.zeros(len(LENS) + 1, dtype=torch.int32)
    out = ops.varlen_attn(
        q,
        k[:0],
        v[:0],
        cu_seqlens(LENS),
        cu_seqlens_k=none,
        global_kv=(k_g, v_g, torch.tensor(GROUPS)),
    )
    rows = v_g[torch.tensor(GROUPS).repeat_interleave(torch.tensor(LENS))]
    torch.testing.assert_close(out, rows.repeat_interleave(2, dim=1))


@pytest.mark.quick
def test_an_empty_batch():
    q, k, v, k_g, v_g = (x[:0] for x in make(torch.float32))
    shared = (k_g, v_g, torch.zeros(0, dtype=torch.int64))
    assert ops.varlen_attn(q, k, v, cu_seqlens(()), global_kv=shared).shape == (0, 4, 16)


@pytest.mark.quick
def test_other_groups_never_leak():
    q, k, v, k_g, v_g = make(torch.float32)
    before = op(q, k, v, k_g, v_g)[0]
    k_g[0], v_g[0] = float("nan"), float("inf")
    after = op(q, k, v, k_g, v_g)[0]
    assert torch.equal(after[:5], before[:5]) and torch.equal(after[38:], before[38:])
    assert not torch.isfinite(after[5:38]).any()


@pytest.mark.quick
def test_compiles_for_ragged_shapes():
    torch._dynamo.reset()

    def f(q, k_g, cu, group, longest):
        return ops.varlen_attn(
            q, q, q, cu, max_seqlen_q=longest, global_kv=(k_g, k_g, group), dropout_p=None
        )

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for lens in ((3, 0, 9), (1, 17, 0, 5), (30, 4, 0, 0, 1)):
        q, k_g = torch.randn(sum(lens), 2, 8), torch.randn(3, 2, 8)
        group = torch.arange(len(lens)) % 3
        args = (q, k_g, cu_seqlens(lens), group, max(lens))
        assert torch.equal(compiled(*args), f(*args))
    torch._dynamo.reset()
