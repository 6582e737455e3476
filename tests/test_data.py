"""encfast.data: plans over lengths (compiled and NumPy), token-budget batches, collation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from encfast.data import (
    LengthBucketSampler,
    PackedCollator,
    TokenBudgetSampler,
    bucket_by_length,
    pack_ffd,
    packing,
)

pytestmark = pytest.mark.quick

CAPACITY = 40
lengths_lists = st.lists(st.integers(0, CAPACITY), max_size=60)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def backend(request, monkeypatch):
    """Every test runs on the compiled plans and on those of NumPy."""
    if request.param == "numpy":
        monkeypatch.setattr(packing, "_host", None)
    elif packing._host is None:
        pytest.skip("encfast._host was not compiled")


def on_numpy(plan, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_host", None)
        return plan(*args, **kwargs)


def assert_same_plan(a, b):
    assert [x.tolist() for x in a] == [x.tolist() for x in b]


def first_fit_decreasing(lengths, capacity):
    """The textbook: the longest first, into the first bin that has room."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for members in bins:
            if sum(lengths[j] for j in members) + lengths[i] <= capacity:
                members.append(i)
                break
        else:
            bins.append([i])
    return [sorted(members) for members in bins]


@settings(deadline=None)
@given(lengths_lists)
def test_pack_ffd_is_the_textbook_plan(lengths):
    plan = pack_ffd(lengths, CAPACITY)
    assert [members.tolist() for members in plan] == first_fit_decreasing(lengths, CAPACITY)
    assert all(members.dtype == np.int64 for members in plan)


@settings(deadline=None)
@given(lengths_lists, st.integers(CAPACITY, 200))
def test_pack_ffd_backends_agree(lengths, capacity):
    assert_same_plan(pack_ffd(lengths, capacity), on_numpy(pack_ffd, lengths, capacity))


def test_pack_ffd_ragged_corpus():
    lengths = np.random.default_rng(0).geometric(1 / 90, 3000).clip(max=512)
    plan = pack_ffd(lengths, 512)
    assert sorted(np.concatenate(plan).tolist()) == list(range(3000))
    assert max(lengths[members].sum() for members in plan) <= 512
    assert len(plan) <= 11 / 9 * np.ceil(lengths.sum() / 512) + 1


@settings(deadline=None)
@given(lengths_lists, st.integers(CAPACITY, 200), st.floats(0, 1), st.none() | st.integers(1, 9))
def test_bucket_by_length_keeps_its_bounds(lengths, max_tokens, max_padding, max_sequences):
    options = {"max_padding": max_padding, "max_sequences": max_sequences}
    batches = bucket_by_length(lengths, max_tokens, **options)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[i] for i in batch]
        grid = len(own) * max(own)
        assert grid <= max_tokens
        assert grid - sum(own) <= max_padding * grid
        assert max_sequences is None or len(own) <= max_sequences
    assert_same_plan(batches, on_numpy(bucket_by_length, lengths, max_tokens, **options))


def test_bucket_by_length_by_hand():
    lengths = [7, 2, 0, 2, 8]
    assert_same_plan(bucket_by_length(lengths, 16), [np.array([2, 1, 3]), np.array([0, 4])])
    assert_same_plan(
        bucket_by_length(lengths, 16, max_padding=0),
        [np.array([2]), np.array([1, 3]), np.array([0]), np.array([4])],
    )


@pytest.mark.parametrize(
    "plan", [pack_ffd, bucket_by_length, TokenBudgetSampler, LengthBucketSampler]
)
@pytest.mark.parametrize(
    ("lengths", "budget", "error", "message"),
    [
        ([3, -1], 8, ValueError, r"lengths\[1\] is -1"),
        ([3, 9], 8, ValueError, r"lengths\[1\] is 9, .*=8"),
        ([[1, 2]], 8, ValueError, r"shape \(1, 2\)"),
        (5, 8, ValueError, r"shape \(\)"),
        ([1.0, 2.0], 8, TypeError, "float64"),
        ([True], 8, TypeError, "bool"),
        (["a"], 8, TypeError, "lengths"),
        ([1], 0, ValueError, "=0"),
        ([1], 2**40, ValueError, "=1099511627776"),
        ([1], 8.0, TypeError, "=8.0"),
        ([1], True, TypeError, "=True"),
    ],
)
def test_bad_lengths_and_budgets(plan, lengths, budget, error, message):
    with pytest.raises(error, match=message):
        plan(lengths, budget)


def test_bucket_by_length_bad_options():
    with pytest.raises(ValueError, match=r"max_padding=1\.5"):
        bucket_by_length([1], 8, max_padding=1.5)
    with pytest.raises(ValueError, match="max_padding=nan"):
        bucket_by_length([1], 8, max_padding=float("nan"))
    with pytest.raises(ValueError, match="max_sequences=0"):
        bucket_by_length([1], 8, max_sequences=0)


@settings(deadline=None)
@given(lengths_lists, st.booleans(), st.integers(0, 5), st.integers(0, 5))
def test_token_budget_sampler(lengths, shuffle, seed, epoch):
    sampler = TokenBudgetSampler(lengths, CAPACITY, shuffle=shuffle, seed=seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(sampler) == len(batches) and all(batches)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= CAPACITY for batch in batches)
    assert batches == list(sampler), "one epoch, one order"


def test_token_budget_sampler_epochs():
    sampler = TokenBudgetSampler([3] * 50, 12, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TokenBudgetSampler([3] * 4, 6, shuffle=False)) == [[0, 1], [2, 3]]


SAMPLERS = [TokenBudgetSampler, LengthBucketSampler]


@settings(deadline=None)
@given(lengths_lists, st.integers(0, 5), st.floats(0, 1))
def test_length_bucket_sampler(lengths, epoch, max_padding):
    options = {"max_padding": max_padding, "max_sequences": 5}
    sampler = LengthBucketSampler(lengths, CAPACITY, seed=3, **options)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    in_order = LengthBucketSampler(lengths, CAPACITY, shuffle=False, **options)
    planned = bucket_by_length(lengths, CAPACITY, **options)
    assert list(in_order) == [batch.tolist() for batch in planned]
    # Sequences of one length change places, batches change theirs.
    shapes = [sorted(sorted(lengths[i] for i in b) for b in bs) for bs in (batches, planned)]
    assert shapes[0] == shapes[1]


def test_length_bucket_sampler_epochs():
    sampler = LengthBucketSampler([3, 4] * 30, 12, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    with pytest.raises(ValueError, match=r"max_padding=1\.5"):
        LengthBucketSampler([1], 8, max_padding=1.5)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_samplers_deal_to_processes(kind, world_size):
    lengths = [1 + i % 7 for i in range(40)]
    whole = list(kind(lengths, 16, seed=2))
    parts = [
        list(kind(lengths, 16, seed=2, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1, "every process does as many steps"
    dealt = [batch for step in zip(*parts, strict=True) for batch in step]
    assert dealt[: len(whole)] == whole
    assert dealt[len(whole) :] == whole[: len(dealt) - len(whole)]
    # Fewer batches than processes.
    assert [list(kind([4], 16, rank=r, world_size=3)) for r in range(3)] == [[[0]]] * 3
    assert list(kind([], 16, rank=1, world_size=2)) == []


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_resume(kind):
    lengths = [1 + i % 7 for i in range(40)]
    sampler = kind(lengths, 16, seed=5)
    sampler.set_epoch(4)
    whole = list(sampler)
    running = iter(sampler)
    done = [next(running) for _ in range(3)]
    state = sampler.state_dict()
    assert state == {"seed": 5, "epoch": 4, "given": 3}

    other = kind(lengths, 16)
    other.load_state_dict(state)
    other.set_epoch(4)  # a trainer says it again
    assert done + list(other) == whole
    assert list(other) == whole, "the next iteration is a whole epoch"
    other.load_state_dict(state)
    other.set_epoch(5)
    assert len(list(other)) == len(other)
    assert list(sampler) == whole, "an iteration that was left starts anew"
    with pytest.raises(ValueError, match=r"given=99 in the state, expected at most"):
        other.load_state_dict(state | {"given": 99})


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_refuse_ranks(kind):
    with pytest.raises(ValueError, match=r"rank=2: expected between 0 and world_size - 1 = 1"):
        kind([1], 8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="world_size=0"):
        kind([1], 8, world_size=0)
    with pytest.raises(TypeError, match=r"rank=0\.0 is float"):
        kind([1], 8, rank=0.0)


def test_loader_with_worker():
    """Sampler and collator through a worker process: all ids, once, packed."""
    texts = [list(range(n)) for n in (5, 0, 3, 9, 1)]
    sampler = TokenBudgetSampler([len(t) for t in texts], 9, shuffle=False)
    loader = DataLoader(texts, batch_sampler=sampler, collate_fn=PackedCollator(), num_workers=1)
    batches = list(loader)
    assert [b.cu_seqlens.tolist() for b in batches] == [[0, 5, 5, 8], [0, 9], [0, 1]]
    assert batches[0].data.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batches[0].data.dtype == torch.int64


def test_collator_examples():
    pack = PackedCollator(max_length=2)
    examples = [{"input_ids": [4, 5, 6]}, np.array([7], np.int32), torch.tensor([8, 9]), []]
    batch = pack(examples)
    assert batch.data.tolist() == [4, 5, 7, 8, 9]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5, 5]
    assert batch.max_seqlen == 2


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ({"ids": [1]}, KeyError, "input_ids"),
        ([[1, 2]], ValueError, r"examples\[0\] has ids of shape \(1, 2\)"),
        ([1.5], TypeError, r"examples\[0\] has ids of torch.float32"),
        ([True], TypeError, "torch.bool"),
    ],
)
def test_collator_bad_examples(example, error, message):
    with pytest.raises(error, match=message):
        PackedCollator()([example])


def test_collator_bad_max_length():
    with pytest.raises(ValueError, match="max_length=0"):
        PackedCollator(max_length=0)
