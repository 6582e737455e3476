"""ENCFAST_CHECK=1: values on a GPU are asserted there, and nobody waits for them.

Tensors of the CPU and fake ones stand in for a GPU's: on the CPU an assertion raises at once, and
a fake tensor has no values, so whatever waits for one raises.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from encfast import ops
from encfast.compat.flash_attn import flash_attn_with_kvcache
from encfast.compat.flash_attn.losses.cross_entropy import cross_entropy_loss
from encfast.ops import _checks
from encfast.ops.packed_linear import _check_header
from encfast.ops.pad import _check_grid

pytestmark = pytest.mark.quick

INT = torch.int32


@pytest.fixture
def on_gpu(monkeypatch):
    """What is checked counts as a GPU's; the fixture is the messages of the assertions made."""
    messages = []
    assert_async = torch._assert_async

    def recorded(condition, message):
        assert condition.shape == ()
        messages.append(message)
        assert_async(condition, message)

    monkeypatch.setattr(_checks, "_device_to_check", lambda x: "cuda")
    monkeypatch.setattr(torch, "_assert_async", recorded)
    monkeypatch.setenv("ENCFAST_CHECK", "1")
    return messages


def attend(cu_q=(0, 2, 6), cu_k=None, **options):
    """6 query rows, and 6 key rows."""
    q, k = torch.ones(6, 4, 8), torch.ones(6, 2, 8)
    cu = torch.tensor(cu_q, dtype=INT)
    if cu_k is not None:
        options |= {"cu_seqlens_k": torch.tensor(cu_k, dtype=INT), "max_seqlen_k": 4}
    return ops.varlen_attn(q, k, k, cu, max_seqlen_q=4, **options)


def attend_biased(entries, *offsets):
    return attend(bias=torch.ones(entries), bias_offsets=torch.tensor(offsets))


def attend_global(*group):
    shared = torch.ones(3, 2, 8)
    return attend(global_kv=(shared, shared, torch.tensor(group)))


def turn(*positions):
    table = torch.ones(5, 2)
    x = torch.ones(len(positions), 1, 4)
    return ops.rotary(x, table, table, torch.tensor(positions))


def move(how, *index):
    return how(torch.ones(3, 2), torch.tensor(index))


def scatter(x, index):
    return ops.scatter_rows(x, index, 3)


def to_grid(x, index):
    return ops.pad(x, index, 2, 2)


def keep(*mask):
    mask = torch.tensor([mask], dtype=INT)
    _check_grid(torch.ones(1, mask.shape[1], 2), mask)


def choose(cu=(0, 2, 6), keep=(1, 1)):
    return ops.select_patches(torch.ones(6), keep, cu_seqlens=torch.tensor(cu, dtype=INT))


def cut(*ids):
    return ops.gather_patches(torch.ones(2, 1, 4), torch.tensor(ids), (2,))


def restore(index=(0, -1, 2), places=(0, 1, 1)):
    added = {"add": torch.ones(2, 2), "add_index": torch.tensor(places)}
    return ops.restore_rows(torch.ones(3, 2), torch.tensor(index), **added)


def pack(value):
    return ops.pack_linear(torch.full((2, 3), value), format="int8")


def header(*fields):
    packed = torch.tensor(fields, dtype=torch.int64).view(torch.uint8)
    _check_header(packed, [1, 2, 3, 4])


def cached(seqlens, parts):
    cache, new = torch.ones(2, 4, 1, 8), torch.ones(2, 1, 1, 8)
    seqlens = torch.tensor(seqlens, dtype=INT)
    flash_attn_with_kvcache(
        new, cache, cache, new, new, cache_seqlens=seqlens, cache_batch_idx=torch.tensor(parts)
    )


def classify(*labels):
    return cross_entropy_loss(torch.ones(2, 5), torch.tensor(labels))


# A call as it should be, and the number of assertions it makes.
GOOD = {
    "varlen_attn": (attend, 4),
    "varlen_attn, own keys": (lambda: attend(cu_k=(0, 4, 6)), 8),
    "varlen_attn, slopes": (lambda: attend(alibi_slopes=torch.ones(4)), 5),
    "varlen_attn, bias": (lambda: attend_biased(20, 0, 4, 20), 7),
    "varlen_attn, global_kv": (lambda: attend_global(2, 0), 9),  # 4 of gather and scatter
    "rotary": (lambda: turn(0, 4, 2), 1),
    "gather_rows": (lambda: move(ops.gather_rows, -1, 2), 1),
    "select_rows": (lambda: move(ops.select_rows, 0, 2), 1),
    "scatter_rows": (lambda: move(scatter, 0, 2, 0), 1),
    "pad": (lambda: move(to_grid, 3, 0, 1), 2),
    "mask": (lambda: keep(1, 0), 1),
    "select_patches": (choose, 7),
    "gather_patches": (lambda: cut(0, 3, 0), 1),
    "restore_rows": (restore, 2),
    "pack_linear": (lambda: pack(1.0), 1),
    "packed_linear": (lambda: header(1, 2, 3, 4), 4),
    "cache": (lambda: cached((0, 3), (1, 0)), 11),  # 8 of varlen_attn
    "labels": (lambda: classify(4, -100), 1),
}

BAD = {
    "varlen_attn: cu_seqlens_q does not start at 0": lambda: attend((1, 2, 6)),
    "varlen_attn: cu_seqlens_q decreases": lambda: attend((0, 7, 6)),
    "varlen_attn: cu_seqlens_q does not end at the number of rows, 6": lambda: attend((0, 2, 5)),
    "max_seqlen_q is 4, but a sequence of cu_seqlens_q has more": lambda: attend((0, 1, 6)),
    "varlen_attn: cu_seqlens_k decreases": lambda: attend(cu_k=(0, 7, 6)),
    "alibi_slopes holds a wrong value, expected finite": (
        lambda: attend(alibi_slopes=torch.tensor([1.0, 1.0, float("nan"), 1.0]))
    ),
    "bias has 21 entries per head, expected the sum": lambda: attend_biased(21, 0, 4, 20),
    "bias_offsets does not start at 0": lambda: attend_biased(20, 1, 5, 21),
    "bias_offsets is not the running sum of Lq": lambda: attend_biased(20, 0, 5, 20),
    r"global_kv\[2\] holds a wrong value, expected 0 <= row < 3": lambda: attend_global(0, 3),
    "rotary: positions holds a wrong value, the tables have 5 rows": lambda: turn(0, 5, 1),
    "gather_rows: index holds a wrong value, expected -1 <= row < 3": (
        lambda: move(ops.gather_rows, -2, 0)
    ),
    "select_rows: rows holds a wrong value, expected 0 <= row < 3": (
        lambda: move(ops.select_rows, -1, 0)
    ),
    "scatter_rows: rows holds a wrong value, expected 0 <= row": lambda: move(scatter, 0, 1, 3),
    "pad: indices holds a wrong value, expected 0 <= row < 4": lambda: move(to_grid, 0, 1, 4),
    "pad: indices holds a row twice": lambda: move(to_grid, 0, 1, 1),
    "unpad: mask holds a wrong value, expected 0": lambda: keep(1, 2),
    "select_patches: cu_seqlens does not end at the number of": lambda: choose((0, 2, 5)),
    "select_patches: keep is more than a sequence has patches": lambda: choose(keep=(3, 1)),
    "gather_patches: ids holds a wrong value, expected 0 <= b": lambda: cut(0, 4),
    "restore_rows: index holds a wrong value, expected -1 <= row < 3": lambda: restore((0, 3, 1)),
    "restore_rows: add_index holds a wrong value, expected 0 <=": lambda: restore(places=(0, 2, 1)),
    "pack_linear: weight holds a wrong value, int8 needs finite": lambda: pack(float("inf")),
    "packed_linear: packed was not made by pack_linear on this": lambda: header(1, 2, 0, 4),
    "cache_seqlens holds a wrong value, the caches have 4 rows": lambda: cached((0, 5), (1, 0)),
    "cache_batch_idx holds a wrong value, the caches have 2": lambda: cached((0, 3), (0, 2)),
    "k_cache has 4 rows, those in use and 1 new ones do not fit": lambda: cached((0, 4), (1, 0)),
    "labels holds a wrong value, expected 0..4 or ignore_index": lambda: classify(5, 0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_fail_on_the_device(on_gpu, message):
    with pytest.raises(RuntimeError, match=message):
        BAD[message]()
    assert len(on_gpu[-1]) <= 254  # what CUDA has room for


@pytest.mark.parametrize("case", GOOD)
def test_good_values_pass_on_the_device(on_gpu, case):
    call, assertions = GOOD[case]
    call()
    assert len(on_gpu) == assertions


@pytest.mark.parametrize("case", GOOD)
def test_nobody_waits(on_gpu, case):
    call, assertions = GOOD[case]
    with FakeTensorMode():
        call()
    assert len(on_gpu) == assertions


def test_waiting_would_be_noticed(monkeypatch):
    monkeypatch.setattr(_checks, "_device_to_check", lambda x: "cpu")
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        move(ops.select_rows, 0, 1)


@pytest.mark.parametrize("setting", [None, "0"])
def test_nothing_is_asserted_unasked(on_gpu, monkeypatch, setting):
    if setting is None:
        monkeypatch.delenv("ENCFAST_CHECK")
    else:
        monkeypatch.setenv("ENCFAST_CHECK", setting)
    for call, _ in GOOD.values():
        call()
    assert on_gpu == []


def test_whose_values_are_looked_at(monkeypatch):
    class Other(torch.Tensor):
        pass

    x = torch.ones(2)
    with FakeTensorMode():
        fake = torch.ones(2, device="cuda")
    for setting in ("0", "1"):
        monkeypatch.setenv("ENCFAST_CHECK", setting)
        assert _checks.can_read_values(x) and _checks.can_read_values(torch.nn.Parameter(x))
        assert not _checks.can_assert_values(x)
        for without in (x.to("meta"), x.as_subclass(Other), fake):
            assert not _checks.can_read_values(without)
            assert not _checks.can_assert_values(without)


def test_compiled_graphs_hold_no_assertion(monkeypatch):
    monkeypatch.setenv("ENCFAST_CHECK", "1")
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(x, index, table):
        moved = ops.scatter_rows(ops.gather_rows(x, index), index, x.shape[0])
        return ops.rotary(moved, table, table, index)

    for n in (5, 7, 11):
        x, index, table = torch.randn(n, 1, 4), torch.randperm(n), torch.rand(n, 2)
        want = ops.rotary(x, table, table, index)
        assert torch.equal(f(x, index, table), want)
    assert sum("encfast.rotary" in t for t in targets) == 1  # one graph for all sizes
    assert not [t for t in targets if "assert" in t or t == "item"]
