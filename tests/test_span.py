"""Answers from span scores against brute force: ties, ragged rows, windows, the null threshold."""

import pytest
import torch

from encfast import PackedBatch
from encfast.data.windows import span_windows
from encfast.layers.span import (
    Spans,
    best_null_threshold,
    best_spans,
    merge_null,
    merge_windows,
    null_scores,
)

pytestmark = pytest.mark.quick

LENGTHS = [1, 0, 63, 2, 0, 40, 5]


def geometry(lengths=LENGTHS) -> PackedBatch:
    return PackedBatch.from_lengths(torch.zeros(sum(lengths)), lengths)


def brute_force(start, end, max_length: int, allowed) -> tuple[int, int, float]:
    """Of one sequence, over all pairs in order."""
    best = (-1, -1, float("-inf"))
    for i in range(len(start)):
        for j in range(i, min(i + max_length, len(start))):
            score = (start[i] + end[j]).item()
            if allowed[i] and allowed[j] and score > best[2]:
                best = (i, j, score)
    return best


@pytest.mark.parametrize("max_length", [1, 3, 30, 100])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_best_spans_equal_brute_force(max_length, ties):
    """Sheet, check 2: i <= j < i + max_length, on ragged rows, the first of equal spans."""
    generator = torch.Generator().manual_seed(max_length)
    batch = geometry()
    for _ in range(5):
        start, end = torch.randn(2, batch.total, generator=generator)
        if ties:
            start, end = start.round(), end.round()
        allowed = torch.rand(batch.total, generator=generator) < 0.7
        spans = best_spans(start, end, batch, max_length=max_length, allowed=allowed)
        pieces = (t.split(LENGTHS) for t in (start, end, allowed))
        expected = [brute_force(s, e, max_length, a) for s, e, a in zip(*pieces, strict=True)]
        found = list(zip(*(t.tolist() for t in spans), strict=True))
        assert found == expected


def test_best_spans_of_nothing():
    spans = best_spans(torch.zeros(0), torch.zeros(0), geometry([]))
    assert [t.shape for t in spans] == [(0,)] * 3
    spans = best_spans(torch.zeros(0), torch.zeros(0), geometry([0, 0]))
    assert spans.start.tolist() == [-1, -1] and spans.score.tolist() == [float("-inf")] * 2
    with pytest.raises(ValueError, match="max_length must be >= 1, got 0"):
        best_spans(torch.zeros(0), torch.zeros(0), geometry([]), max_length=0)


def test_null_scores_stand_at_the_first_row():
    start, end = torch.randn(2, sum(LENGTHS))
    scores = null_scores(start, end, geometry())
    firsts = [0, None, 1, 64, None, 66, 106]
    for score, row in zip(scores, firsts, strict=True):
        assert score == (float("-inf") if row is None else start[row] + end[row])


def test_windows_cover_a_passage_and_merge_to_its_best_span():
    """Sheet, check 2: with every window long enough for an answer, merging equals no windows."""
    generator = torch.Generator().manual_seed(0)
    question, passages = [7, 8, 9], [list(range(100, 100 + n)) for n in (150, 31, 0, 77)]
    windows, examples = [], []
    for e, passage in enumerate(passages):
        found = span_windows(question, passage, cls_id=1, sep_id=2, max_length=56, stride=20)
        windows += found
        examples += [e] * len(found)
    scores = [torch.randn(2, len(p), generator=generator) for p in passages]
    pieces, allowed = [], []
    for window, e in zip(windows, examples, strict=True):
        assert len(window.ids) == len(window.segments) <= 56
        shown = window.ids[window.passage_start : window.passage_start + window.length]
        assert shown == passages[e][window.offset : window.offset + window.length]
        piece = torch.full((2, len(window.ids)), 99.0)
        at = slice(window.passage_start, window.passage_start + window.length)
        piece[:, at] = scores[e][:, window.offset : window.offset + window.length]
        pieces.append(piece)
        allowed.append(torch.zeros(len(window.ids), dtype=torch.bool))
        allowed[-1][at] = True
    batch = geometry([len(w.ids) for w in windows])
    start, end = torch.cat(pieces, 1)
    # Neighbouring windows share 56 - 6 - 20 = 30 tokens: no span of 30 is cut.
    spans = best_spans(start, end, batch, max_length=30, allowed=torch.cat(allowed))
    offsets = torch.tensor([w.offset - w.passage_start for w in windows])
    merged = merge_windows(spans, torch.tensor(examples), offsets, len(passages))
    whole = best_spans(*torch.cat(scores, 1), geometry([len(p) for p in passages]), max_length=30)
    for a, b in zip(merged, whole, strict=True):
        assert torch.equal(a, b)


def test_merging_takes_the_first_of_equal_windows():
    scores = torch.tensor([1.0, 1.0, -torch.inf])
    spans = Spans(torch.tensor([3, 5, -1]), torch.tensor([4, 5, -1]), scores)
    merged = merge_windows(spans, torch.tensor([0, 0, 1]), torch.tensor([0, 100, 7]), 3)
    assert merged.start.tolist() == [3, -1, -1]
    assert merged.end.tolist() == [4, -1, -1]
    assert merge_null(torch.tensor([2.0, -1.0, 5.0]), torch.tensor([0, 0, 1]), 2).tolist() == [
        -1,
        5,
    ]


def test_places_of_an_answer_in_its_windows():
    windows = span_windows([7], range(10, 30), cls_id=1, sep_id=2, max_length=12, stride=4)
    places = [w.place(9, 10) for w in windows]
    for window, (start, end) in zip(windows, places, strict=True):
        if start >= 0:
            assert window.ids[start : end + 1] == [19, 20]
        else:
            assert not {19, 20} <= set(window.ids)
    assert any(start >= 0 for start, _ in places)
    with pytest.raises(ValueError, match="leave room"):
        span_windows(range(10), [1], cls_id=1, sep_id=2, max_length=13)
    with pytest.raises(ValueError, match="stride=0"):
        span_windows([5], [1], cls_id=1, sep_id=2, stride=0)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_the_null_threshold_equals_an_exhaustive_search(ties):
    """Sheet, check 2: no tau, at or between any two margins or beyond them, does better."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 9, 40):
        margins = torch.randn(size, generator=generator)
        margins = (2 * margins).round() if ties else margins
        answered, null = torch.rand(2, size, generator=generator)
        tau, mean = best_null_threshold(margins, answered, null)
        candidates = [float("-inf"), *margins.tolist(), *(margins - 1e-3).tolist()]

        def mean_at(t, margins=margins, answered=answered, null=null):
            return torch.where(margins > t, answered, null).double().mean().item()

        assert mean == pytest.approx(mean_at(tau))
        assert mean == pytest.approx(max(mean_at(t) for t in candidates))
    with pytest.raises(ValueError, match="margins is empty"):
        best_null_threshold(torch.zeros(0), torch.zeros(0), torch.zeros(0))
