"""PackedBatch: constructors, moves, the border, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from encfast import PackedBatch

pytestmark = pytest.mark.quick

LENGTHS = [3, 0, 1, 5, 0]


def rows(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(n, *shape)


def batch(lengths=LENGTHS, *shape: int) -> PackedBatch:
    return PackedBatch.from_lengths(rows(sum(lengths), *(shape or (4,))), lengths)


def test_poisoned_memory_is_active():
    assert torch.empty(7).isnan().all()


def test_from_lengths_geometry():
    packed = batch()
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4, 9, 9]
    assert packed.cu_seqlens.dtype == torch.int32
    assert (packed.max_seqlen, packed.batch_size, packed.total) == (5, 5, 9)
    assert packed.lengths().tolist() == LENGTHS
    assert packed.segment_ids().tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3]
    assert packed.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def test_from_lengths_takes_tensors_and_numpy_integers():
    data = rows(9, 2)
    for lengths in (torch.tensor(LENGTHS), np.array(LENGTHS), tuple(LENGTHS)):
        assert PackedBatch.from_lengths(data, lengths).cu_seqlens.tolist() == [0, 3, 3, 4, 9, 9]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_rows_at_all(lengths):
    packed = PackedBatch.from_lengths(rows(0, 4), lengths)
    assert (packed.batch_size, packed.total, packed.max_seqlen) == (len(lengths), 0, 0)
    assert packed.positions().shape == packed.segment_ids().shape == (0,)
    assert packed.to_padded().shape == (len(lengths), 0, 4)
    assert [len(s) for s in packed.split()] == lengths


def test_from_list_of_tensors_lists_and_arrays():
    packed = PackedBatch.from_list([[1, 2, 3], [], np.array([7]), torch.tensor([4, 5])])
    assert packed.data.tolist() == [1, 2, 3, 7, 4, 5]
    assert packed.data.dtype == torch.int64
    assert packed.lengths().tolist() == [3, 0, 1, 2]


def test_from_list_of_nothing():
    packed = PackedBatch.from_list([], dtype=torch.int64)
    assert (packed.batch_size, packed.total, packed.data.dtype) == (0, 0, torch.int64)


def test_pack_and_back_with_gaps_in_the_mask():
    grid = rows(3, 6, 2)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6], dtype=torch.bool)
    packed = PackedBatch.pack(grid, mask)
    assert packed.lengths().tolist() == [3, 0, 6]
    assert torch.equal(packed.data, grid[mask])
    assert packed.indices.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert torch.equal(packed.to_padded(), grid * mask[..., None])


def test_padding_never_enters():
    grid = rows(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    poisoned = grid.masked_fill(~mask.bool()[..., None], float("nan"))
    packed = PackedBatch.pack(poisoned, mask)
    assert not packed.data.isnan().any()
    assert torch.equal(packed.to_padded(), grid * mask[..., None])
    assert packed.to_padded(fill=-7.0)[0, 2:].eq(-7).all()


def test_to_padded_of_a_batch_that_had_no_grid():
    packed = batch()
    padded = packed.to_padded()
    assert padded.shape == (5, 5, 4)
    for b, sequence in enumerate(packed.split()):
        assert torch.equal(padded[b, : len(sequence)], sequence)
        assert padded[b, len(sequence) :].eq(0).all()


def test_gradients_flow_through_pack_select_and_to_padded():
    grid = rows(2, 3, 2).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    packed = PackedBatch.pack(grid, mask)
    loss = packed.to_padded().square().sum() + packed.select(torch.tensor([0, 0, 4])).sum()
    loss.backward()
    expected = 2 * grid.detach() * mask[..., None]
    expected[0, 0] += 2
    expected[1, 2] += 1
    torch.testing.assert_close(grid.grad, expected)


def test_first_and_last_rows():
    packed = batch([2, 1, 4])
    assert packed.first_rows().tolist() == [0, 2, 3]
    assert packed.last_rows().tolist() == [1, 2, 6]


def test_nested_tensors_in_and_out():
    packed = batch([2, 1, 4])
    nested = packed.to_njt()
    assert nested.is_nested and nested.layout == torch.jagged
    back = PackedBatch.from_njt(nested)
    assert torch.equal(back.data, packed.data)
    assert torch.equal(back.cu_seqlens, packed.cu_seqlens)
    assert back.max_seqlen == packed.max_seqlen


def test_to_moves_rows_and_geometry():
    half = PackedBatch.pack(rows(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)).to(torch.bfloat16)
    assert half.data.dtype == torch.bfloat16
    assert half.cu_seqlens.dtype == torch.int32
    meta = half.to("meta")
    assert {meta.data.device.type, meta.cu_seqlens.device.type, meta.indices.device.type} == {
        "meta"
    }


def test_is_a_value_that_copies_and_pickles(tmp_path):
    packed = batch()
    torch.save(packed, tmp_path / "batch.pt")
    for other in (copy.deepcopy(packed), torch.load(tmp_path / "batch.pt", weights_only=False)):
        assert torch.equal(other.data, packed.data)
        assert torch.equal(other.cu_seqlens, packed.cu_seqlens)


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_any_lengths_survive_every_round_trip(lengths, extra_dims):
    packed = PackedBatch.from_lengths(rows(sum(lengths), *[2] * extra_dims), lengths)
    if lengths:  # an empty list does not know the shape of a row
        assert torch.equal(PackedBatch.from_list(packed.split()).data, packed.data)
    steps = torch.arange(max(lengths, default=0))
    mask = steps[None, :] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    again = PackedBatch.pack(packed.to_padded(), mask)
    assert torch.equal(again.data, packed.data)
    assert torch.equal(again.cu_seqlens, packed.cu_seqlens)
    assert torch.equal(again.positions(), packed.positions())


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: PackedBatch.from_lengths(rows(4), [1, 2]), ValueError, ["lengths", "3", "4"]),
        (lambda: PackedBatch.from_lengths(rows(1), [2, -1]), ValueError, ["lengths[1]", "-1"]),
        (lambda: PackedBatch.from_lengths(rows(1), [0.5]), TypeError, ["lengths[0]", "0.5"]),
        (
            lambda: PackedBatch.from_lengths(rows(1), torch.ones(1)),
            TypeError,
            ["lengths", "float32"],
        ),
        (lambda: PackedBatch.from_list([torch.tensor(3)]), ValueError, ["sequences[0]", "scalar"]),
        (
            lambda: PackedBatch.from_list([rows(2, 3), rows(1, 4)]),
            ValueError,
            ["sequences[1]", "(4,)", "(3,)"],
        ),
        (lambda: PackedBatch.pack(rows(2, 3), torch.ones(2, 4)), ValueError, ["mask", "(2, 4)"]),
        (lambda: PackedBatch.pack(rows(2, 3), torch.ones(2, 3)), TypeError, ["mask", "float32"]),
        (lambda: PackedBatch.from_njt(rows(3)), TypeError, ["nested", "Tensor"]),
        (lambda: batch().with_data(rows(8, 4)), ValueError, ["data", "8", "9"]),
        (lambda: batch().select(torch.tensor([9])), ValueError, ["rows", "9"]),
    ],
)
def test_refusals_name_the_argument_and_the_value(build, error, words):
    with pytest.raises(error) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


def moves(packed: PackedBatch, chosen: torch.Tensor) -> tuple[PackedBatch, torch.Tensor]:
    scaled = packed.with_data(
        packed.data * packed.positions()[:, None] + packed.segment_ids()[:, None]
    )
    return scaled, scaled.select(chosen) + scaled.to_padded().sum()


def test_moves_compile_without_breaks_and_once_for_all_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(moves, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([3, 0, 4], [2, 5, 0, 2], [0, 6, 2], [9, 3], [2, 2, 2, 0, 2]):
        packed, chosen = batch(lengths), torch.tensor([0, 2])
        for got, expected in zip(compiled(packed, chosen), moves(packed, chosen), strict=True):
            got, expected = getattr(got, "data", got), getattr(expected, "data", expected)
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


def test_moves_export():
    class Moves(torch.nn.Module):
        def forward(self, packed: PackedBatch, chosen: torch.Tensor) -> torch.Tensor:
            return moves(packed, chosen)[1]

    packed, chosen = batch([3, 0, 4]), torch.tensor([0, 2])
    program = torch.export.export(Moves(), (packed, chosen), strict=False)
    torch.testing.assert_close(program.module()(packed, chosen), moves(packed, chosen)[1])
