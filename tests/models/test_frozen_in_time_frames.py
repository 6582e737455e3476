"""Frozen in Time: which frames are read, and curricula over their number."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast.models._frozen_in_time_training import grow_times
from encfast.models.frozen_in_time import TRAINING, Curriculum, sample_frames

from .frozen_in_time_nets import batch_of, tiny


@pytest.mark.quick
@pytest.mark.parametrize(("frames", "length"), [(4, 40), (4, 41), (8, 9), (1, 7), (3, 3)], ids=str)
def test_sampled_frames_come_from_equal_intervals(frames, length):
    edges = [length * i // frames for i in range(frames + 1)]
    middles = [(a + b - 1) // 2 for a, b in itertools.pairwise(edges)]
    assert sample_frames(frames, length, how="middle").tolist() == middles
    generator = torch.Generator().manual_seed(0)
    seen = torch.stack([sample_frames(frames, length, generator=generator) for _ in range(300)])
    for column, a, b in zip(seen.t(), edges[:-1], edges[1:], strict=True):
        assert set(column.tolist()) == set(range(a, b)), "every frame of an interval, no other"
    starts = sample_frames(frames, length, start=1).tolist()
    assert starts == [min(a + 1, b - 1) for a, b in itertools.pairwise(edges)]


@pytest.mark.quick
def test_sampled_frames_of_short_videos():
    for how in ("random", "middle"):
        assert sample_frames(8, 3, how=how).tolist() == [0, 1, 2]
        assert sample_frames(8, 0, how=how).tolist() == []
    with pytest.raises(ValueError, match="frames is 0, length 3 and start None"):
        sample_frames(0, 3)
    with pytest.raises(ValueError, match="how is 'mean', expected 'random' or 'middle'"):
        sample_frames(2, 3, how="mean")


@pytest.mark.quick
def test_tables_of_times_grow():
    table = torch.randn(3, 5)
    zeros, near, linear = (grow_times(table, 6, how) for how in ("zeros", "nearest", "bilinear"))
    assert torch.equal(zeros[:3], table) and not zeros[3:].any()
    assert torch.equal(near, table.repeat_interleave(2, 0))
    expected = F.interpolate(table[None, None], size=(6, 5), mode="bilinear")[0, 0]
    torch.testing.assert_close(linear, expected)
    for how in ("zeros", "nearest", "bilinear"):
        assert torch.equal(grow_times(table, 2, how), table[:2])
    with pytest.raises(ValueError, match="growth 'zero' is unknown; did you mean 'zeros'"):
        grow_times(table, 4, "zero")


@pytest.mark.quick
def test_a_curriculum_starts_where_the_last_stage_ended():
    """Grown to 4 frames, the first step on one frame is that of the model before."""
    first = tiny(frames=1)
    batch = batch_of(first, (1, 1, 1))
    grown = first.with_frames(4)
    assert grown.config.frames == 4 and grown.clips.times.shape[0] == 4
    assert torch.equal(grown.loss(batch).total, first.loss(batch).total)
    assert grown.clips.times.data_ptr() != first.clips.times.data_ptr()
    assert torch.equal(grown.with_frames(1).clips.times, first.clips.times)
    four = batch_of(first, (4, 4))
    assert grown.loss(four).total > 0
    with pytest.raises(ValueError, match="up to 4 frames, the table of times has 1"):
        first.loss(four)


@pytest.mark.quick
def test_curricula_and_their_cost():
    published = Curriculum()
    config = encfast.registry.get_config("frozen_in_time/base")
    one, four = config.attention_scores(1), config.attention_scores(4)
    cost = published.cost(config.attention_scores)
    assert cost == pytest.approx((one + 0.1 * four) / (1.1 * four))
    assert 0.30 < cost < 0.33
    assert [published.frames_at(s, 100) for s in (0, 99, 100, 109, 500)] == [1, 1, 4, 4, 4]
    three = Curriculum((1, 4, 8), (1.0, 0.1, 0.05))
    assert [three.frames_at(s, 100) for s in (99, 109, 110, 114)] == [1, 4, 8, 8]
    with pytest.raises(ValueError, match="frames has 2 stages and shares 1"):
        Curriculum((1, 4), (1.0,))
    (group,) = TRAINING.optimizer(tiny()).param_groups
    assert group["lr"] == 3e-5
