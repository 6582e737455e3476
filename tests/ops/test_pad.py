"""The row moves of encfast.ops.pad: exact results, adjoint gradients, bad rows refused."""

import mmap

import pytest
import torch

from encfast import ops, ref
from encfast.ops import Unpadded

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ANY = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.bool)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def rows_of(shape, dtype):
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(-100, 100, shape, dtype=dtype)


def laid_out(x, layout):
    """The same values, in another memory layout."""
    if layout == "transposed":  # the last dimension is not contiguous
        return x.mT.contiguous().mT
    if layout == "strided":  # rows further apart than they are long, from an odd element on
        wide = torch.zeros(x.shape[0], x[0].numel() + 5, dtype=x.dtype)
        view = wide[:, 3 : 3 + x[0].numel()]
        view.copy_(x.flatten(1))
        return view.unflatten(1, x.shape[1:])
    if layout == "expanded":  # one row for all
        return x[:1].expand_as(x)
    return x


LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ANY, ids=name)
def test_gather_rows_is_exact(dtype):
    index = torch.tensor([3, -1, 0, 3, 6, -1, 1])
    for layout in LAYOUTS:
        for tail in ((5, 3), (1, 64), (33, 1)):
            x = laid_out(rows_of((7, *tail), dtype), layout)
            got = ops.gather_rows(x, index)
            assert got.is_contiguous() and torch.equal(got, ref.gather_rows(x, index))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ANY, ids=name)
def test_scatter_rows_is_exact(dtype):
    rows = torch.tensor([5, 0, 2, 8])
    for layout in LAYOUTS:
        x = laid_out(rows_of((4, 5, 3), dtype), layout)
        got = ops.scatter_rows(x, rows, 9)
        want = torch.zeros(9, 5, 3, dtype=dtype)
        want[rows] = x
        assert got.is_contiguous() and torch.equal(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=name)
def test_rows_that_share_a_place_are_added_in_order(dtype):
    rows = torch.tensor([4, 1, 4, 4, 0, 1, 4])
    for layout in LAYOUTS:
        for size in (1, 16, 37):
            x = laid_out(rows_of((7, size, 2), dtype), layout)
            got = ops.scatter_rows(x, rows, 6)
            assert torch.equal(got, ref.scatter_rows(x, rows, 6))


@pytest.mark.quick
def test_shared_places_round_once():
    """256 + 1 + 1 is 258 in bfloat16 only if the sum is rounded at its end."""
    x = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)[:, None]
    assert ops.scatter_rows(x, torch.zeros(3, dtype=torch.int64), 1).item() == 258


@pytest.mark.quick
def test_rows_that_cannot_be_added_may_not_share_a_place():
    x = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises((RuntimeError, TypeError), match="index holds a row twice"):
        ops.scatter_rows(x, torch.tensor([1, 1]), 4)


@pytest.mark.quick
def test_gather_and_scatter_are_each_others_gradient():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, -1, 1, 5, 0])
    assert torch.autograd.gradcheck(ops.gather_rows, (x, index))
    assert torch.autograd.gradgradcheck(ops.gather_rows, (x, index))
    y = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 3, 1, 5, 0])
    assert torch.autograd.gradcheck(lambda y: ops.scatter_rows(y, rows, 7), (y,))
    assert torch.autograd.gradgradcheck(lambda y: ops.scatter_rows(y, rows, 7), (y,))


MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 0, 0]])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=name)
def test_unpad_keeps_what_the_mask_keeps(dtype):
    x = torch.randn(4, 4, 5)
    got = ops.unpad(x, MASK.to(dtype))
    assert isinstance(got, Unpadded)
    data, indices, cu_seqlens, max_seqlen = got
    assert torch.equal(data, x[MASK.bool()])
    assert indices.dtype == torch.int64 and indices.tolist() == [0, 1, 8, 10, 11, 13]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 2, 2, 5, 6]
    assert max_seqlen == 3 and isinstance(max_seqlen, int)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=name)
@pytest.mark.parametrize("shape", [(4, 4), (1, 1), (7, 1), (300, 700), (0, 3), (3, 0)], ids=str)
def test_find_rows_is_exact(shape, dtype):
    for share in (0.0, 0.4, 1.0):
        mask = (torch.rand(shape) < share).to(dtype)
        for layout in (mask, mask.t().contiguous().t(), mask[:1].expand(shape)):
            indices, cu_seqlens = ops.find_rows(layout)
            want, want_cu = ref.find_rows(layout)
            assert torch.equal(indices, want) and indices.dtype == torch.int64
            assert torch.equal(cu_seqlens, want_cu) and cu_seqlens.dtype == torch.int32


@pytest.mark.quick
def test_find_rows_is_what_torch_finds():
    indices, cu_seqlens = ops.find_rows(MASK)
    assert indices.tolist() == [0, 1, 8, 10, 11, 13] + [-1] * 10
    assert cu_seqlens.tolist() == [0, 2, 2, 5, 6]


@pytest.mark.quick
def test_rows_move_without_knowing_how_many():
    """What find_rows leaves over gathers zeros and scatters nothing; no host reads a size."""
    x = torch.randn(4, 4, 5)
    indices, _ = ops.find_rows(MASK)
    rows = ops.gather_rows(x.flatten(0, 1), indices)
    assert torch.equal(rows[:6], x[MASK.bool()]) and (rows[6:] == 0).all()
    grid = torch.ops.encfast.scatter_rows(rows, indices, 16).unflatten(0, (4, 4))
    assert torch.equal(grid, x * MASK[..., None])


@pytest.mark.quick
def test_indices_hold_no_more_memory_than_their_rows():
    rows = ops.unpad(torch.randn(4, 4, 5), MASK)
    assert rows.indices.untyped_storage().nbytes() == 6 * 8


@pytest.mark.quick
@pytest.mark.parametrize("tail", [(), (5,), (3, 4), (0,)], ids=str)
def test_pad_inverts_unpad(tail):
    x = torch.randn(4, 4, *tail, requires_grad=True)
    rows = ops.unpad(x, MASK)
    grid = ops.pad(rows.data, rows.indices, 4, 4)
    keep = MASK.bool().reshape(4, 4, *[1] * len(tail))
    assert torch.equal(grid, x * keep)
    (grad,) = torch.autograd.grad((grid * grid).sum(), x)
    assert torch.equal(grad, 2 * x * keep)


@pytest.mark.quick
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_never_propagates(poison):
    x = torch.randn(4, 4, 5)
    clean = ops.unpad(x, MASK)
    x[~MASK.bool()] = poison
    rows = ops.unpad(x, MASK)
    assert torch.equal(rows.data, clean.data)
    grid = ops.pad(rows.data, rows.indices, 4, 4)
    assert (grid[~MASK.bool()] == 0).all()


@pytest.mark.quick
def test_a_nan_row_stays_one_row():
    x = torch.randn(4, 5)
    x[2] = float("nan")
    for rows in (torch.tensor([3, 2, 0, 1]), torch.tensor([3, 2, 0, 0])):
        y = ops.scatter_rows(x, rows, 6)
        assert y.isnan().any(1).nonzero().flatten().tolist() == [rows[2].item()]


@pytest.mark.quick
def test_pad_fills():
    x = torch.randn(2, 3, requires_grad=True)
    grid = ops.pad(x, torch.tensor([1, 2]), 2, 2, fill=-5.0)
    assert (grid[[0, 1], [0, 1]] == -5).all()
    assert torch.equal(grid[[0, 1], [1, 0]], x)
    assert torch.equal(torch.autograd.grad(grid.sum(), x)[0], torch.ones(2, 3))
    labels = ops.pad(torch.tensor([7, 8]), torch.tensor([1, 2]), 2, 2, fill=-100)
    assert labels.tolist() == [[-100, 7], [8, -100]]


@pytest.mark.quick
def test_select_rows_adds_the_gradients_of_repeated_rows():
    x = torch.randn(5, 4, requires_grad=True)
    rows = torch.tensor([4, 0, 4])
    picked = ops.select_rows(x, rows)
    assert torch.equal(picked, x[rows])
    (grad,) = torch.autograd.grad(picked.sum(), x)
    assert grad[:, 0].tolist() == [1, 0, 0, 0, 2]


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 0, 3), (1, 1, 1)], ids=str)
def test_smallest_grids(shape):
    x = torch.randn(shape, requires_grad=True)
    rows = ops.unpad(x, torch.ones(shape[:2], dtype=torch.bool))
    assert rows.cu_seqlens.tolist() == [shape[1] * b for b in range(shape[0] + 1)]
    assert rows.max_seqlen == (shape[1] if shape[0] else 0)
    grid = ops.pad(rows.data, rows.indices, *shape[:2])
    assert grid.shape == shape and torch.equal(grid, x)
    assert torch.autograd.grad(grid.sum(), x)[0].shape == shape


@pytest.mark.quick
def test_nothing_to_gather_from_or_to_scatter():
    none = torch.empty(0, dtype=torch.int64)
    assert ops.select_rows(torch.randn(0, 3), none).shape == (0, 3)
    assert (ops.gather_rows(torch.randn(0, 3), torch.tensor([-1, -1])) == torch.zeros(2, 3)).all()
    assert (ops.scatter_rows(torch.randn(0, 3), none, 4) == torch.zeros(4, 3)).all()
    assert ops.scatter_rows(torch.randn(0, 3), none, 0).shape == (0, 3)


@pytest.mark.quick
def test_results_do_not_alias_their_input():
    x = torch.randn(3, 4)
    for y in (
        ops.select_rows(x, torch.arange(3)),
        ops.scatter_rows(x, torch.arange(3), 3),
        ops.unpad(x[None], torch.ones(1, 3)[:].bool()).data,
    ):
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


@pytest.mark.quick
def test_bit_equal_for_any_thread_count():
    x = torch.randn(500, 65).bfloat16()
    rows = torch.randint(0, 300, (500,))
    mask = torch.rand(400, 1000) < 0.5
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append((ops.scatter_rows(x, rows, 300), ops.select_rows(x, rows)))
            assert torch.equal(ops.find_rows(mask)[0], ref.find_rows(mask)[0])
    finally:
        torch.set_num_threads(threads)
    for scattered, selected in results[1:]:
        assert torch.equal(scattered, results[0][0]) and torch.equal(selected, results[0][1])


def test_rows_more_than_two_gibi_elements_apart():
    """Row offsets beyond 32 bits; the mapping reserves address space, three rows are touched."""
    stride, size = 2**31 + 5, 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * (2 * stride + size), flags=flags)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, size), (stride, 1))
    x.copy_(torch.randn(3, size))
    small = x.clone()
    index = torch.tensor([2, 0, -1, 1])
    assert torch.equal(ops.gather_rows(x, index), ops.gather_rows(small, index))
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([2, 0, 2])):
        assert torch.equal(ops.scatter_rows(x, rows, 3), ops.scatter_rows(small, rows, 3))


X, LONG = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
ERRORS = {
    "select_rows: rows is list": (lambda: ops.select_rows(X, [0, 1]), TypeError),
    "select_rows: rows is int32, expected int64": (
        lambda: ops.select_rows(X, LONG.int()),
        TypeError,
    ),
    "select_rows: rows holds 4, expected 0 <= row < 4": (
        lambda: ops.select_rows(X, LONG + 1),
        ValueError,
    ),
    "select_rows: rows holds -1": (lambda: ops.select_rows(X, LONG - 1), ValueError),
    r"select_rows: rows has shape \(1, 4\)": (lambda: ops.select_rows(X, LONG[None]), ValueError),
    r"select_rows: x has shape \(\)": (lambda: ops.select_rows(X[0, 0], LONG), ValueError),
    "select_rows: rows is on meta, x is on cpu": (
        lambda: ops.select_rows(X, LONG.to("meta")),
        ValueError,
    ),
    "gather_rows: index holds -2": (lambda: ops.gather_rows(X, LONG - 2), ValueError),
    "gather_rows: index holds 4": (lambda: ops.gather_rows(X, LONG + 1), ValueError),
    "gather_rows: x has layout torch.sparse_coo": (
        lambda: ops.gather_rows(X.to_sparse(), LONG),
        TypeError,
    ),
    "scatter_rows: rows holds 3, expected 0 <= row < 3": (
        lambda: ops.scatter_rows(X, LONG, 3),
        ValueError,
    ),
    "scatter_rows: rows holds -1": (lambda: ops.scatter_rows(X, LONG - 1, 9), ValueError),
    "scatter_rows: rows has 3 entries, x has 4 rows": (
        lambda: ops.scatter_rows(X, LONG[:3], 9),
        ValueError,
    ),
    "scatter_rows: n is -1": (lambda: ops.scatter_rows(X, LONG, -1), ValueError),
    "scatter_rows: n is float": (lambda: ops.scatter_rows(X, LONG, 4.0), TypeError),
    "pad: indices holds 4, expected 0 <= row < 4": (
        lambda: ops.pad(X, LONG + 1, 2, 2),
        ValueError,
    ),
    "pad: indices holds a row twice": (lambda: ops.pad(X, LONG * 0, 2, 2), ValueError),
    "pad: seqlen is -2": (lambda: ops.pad(X, LONG, 2, -2), ValueError),
    "pad: batch is bool": (lambda: ops.pad(X, LONG, True, 4), TypeError),
    r"unpad: mask has shape \(4, 2\)": (
        lambda: ops.unpad(X, torch.ones(4, 2, dtype=torch.bool)),
        ValueError,
    ),
    "unpad: mask is torch.float32": (lambda: ops.unpad(X, torch.ones(4, 3)), TypeError),
    "unpad: mask holds 2, expected 0": (
        lambda: ops.unpad(X, torch.full((4, 3), 2)),
        ValueError,
    ),
    r"find_rows: mask has shape \(4,\)": (lambda: ops.find_rows(LONG), ValueError),
    "find_rows: mask is torch.float32": (lambda: ops.find_rows(X), TypeError),
    "find_rows: mask holds -1": (lambda: ops.find_rows(-torch.ones(2, 2).long()), ValueError),
    "unpad: mask is list": (lambda: ops.unpad(X, [[1]]), TypeError),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.parametrize("value", [-2, 4, 2**40, -(2**62)])
def test_direct_calls_never_read_out_of_bounds(value):
    """What Python checks, the kernels check again: compiled graphs skip the Python check."""
    index = torch.tensor([0, value, 1, 2])
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.encfast.gather_rows(X, index)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.encfast.scatter_rows(X, index, 4)
