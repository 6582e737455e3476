"""VL-JEPA on streams: clustering along time against scikit-learn, windows, the online variant."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import encfast
from encfast.models.vl_jepa import (
    OnlineSegmenter,
    pooled_segments,
    smooth,
    ward_segments,
    windows,
)

pytestmark = pytest.mark.quick


def steps(lengths, noise: float = 0.1, dim: int = 16, seed: int = 0) -> torch.Tensor:
    """Unit vectors that stay near one direction for each of `lengths`."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(len(lengths), dim, generator=generator), dim=1)
    x = centres.repeat_interleave(torch.tensor(lengths), 0)
    return F.normalize(x + noise * torch.randn(x.shape, generator=generator), dim=1)


def oracle(x: torch.Tensor, count: int) -> torch.Tensor:
    """scikit-learn's labels, numbered as they appear."""
    cluster = pytest.importorskip("sklearn.cluster")
    sparse = pytest.importorskip("scipy.sparse")
    chain = sparse.diags([1.0, 1.0], [-1, 1], shape=(len(x), len(x)), dtype=float)
    model = cluster.AgglomerativeClustering(count, linkage="ward", connectivity=chain)
    labels = model.fit(x.double().numpy()).labels_
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return torch.from_numpy(np.argsort(np.argsort(first))[inverse])


@pytest.mark.parametrize("count", [1, 2, 7, 40, 119, 120])
@pytest.mark.parametrize("kind", ["noise", "steps", "walk"])
def test_segments_are_scikit_learns(kind, count):
    """Acceptance 6: the same labels; each segment is one stretch of time."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(120, 8, generator=generator)
    if kind == "walk":
        x = x.cumsum(0)
    elif kind == "steps":
        x = steps([7, 30, 1, 22, 40, 20], dim=8, seed=count)
    labels = ward_segments(x, count)
    assert torch.equal(labels, oracle(x, count))
    assert labels[0] == 0 and labels[-1] == count - 1
    assert set(labels.diff().tolist()) <= {0, 1}


def test_true_segments_are_found():
    lengths = [9, 4, 17, 6, 12]
    expected = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    assert torch.equal(ward_segments(steps(lengths, noise=0.05), 5), expected)


def test_equal_embeddings_are_joined_first():
    x = steps([3, 5, 2], noise=0.0)
    assert ward_segments(x, 3).tolist() == [0] * 3 + [1] * 5 + [2] * 2


def test_the_number_of_joins_grows_almost_linearly():
    """Each join pushes two entries at most: the heap never holds more than 3 S."""
    from encfast.models._vl_jepa_stream import _Chain

    chain = _Chain(torch.randn(2000, 4).double().numpy())
    largest = 0
    for _ in range(1999):
        chain.join_nearest()
        largest = max(largest, len(chain.heap))
    assert largest <= 3 * 2000 and chain.starts() == [0]


def test_a_segment_is_decoded_at_its_mean():
    x = steps([4, 6, 5])
    labels = ward_segments(x, 3)
    expected = torch.stack([F.normalize(x[labels == k].mean(0), dim=0) for k in range(3)])
    torch.testing.assert_close(pooled_segments(x, labels), expected)


def test_smoothing_takes_fewer_at_the_ends():
    x = torch.randn(6, 3)
    expected = torch.stack([x[max(i - 2, 0) : i + 3].mean(0) for i in range(6)])
    torch.testing.assert_close(smooth(x, 5), expected)
    assert smooth(x, 1) is x and smooth(x[:0], 3).shape == (0, 3)
    with pytest.raises(ValueError, match="width must be odd and >= 1, got 4"):
        smooth(x, 4)


def test_windows_of_a_stream():
    frames = torch.arange(11)
    clips = windows(frames, 4, 3)
    assert [c.tolist() for c in clips.split()] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(frames, 12, 1).batch_size == 0
    with pytest.raises(ValueError, match="size and stride must be >= 1, got 4 and 0"):
        windows(frames, 4, 0)


def test_a_stream_is_watched_window_by_window():
    model = encfast.create("vl_jepa/tiny").eval()
    frames = torch.randn(14, 3, 16, 16)
    found = model.watch(frames, 4, 2, chunk=4)
    torch.testing.assert_close(found, model(windows(frames, 4, 2)))
    assert model.watch(frames[:3], 4, 2).shape == (0, model.config.embed_dim)


def test_narration_decodes_once_a_segment():
    model = encfast.create("vl_jepa/tiny").eval()
    x = steps([5, 9, 6], dim=model.config.embed_dim, noise=0.02)
    narration = model.narrate(x, 3, width=1, max_new_tokens=4)
    assert model.decoder.calls == 3 == len(narration.texts)
    assert narration.labels.tolist() == [0] * 5 + [1] * 9 + [2] * 6
    expected = model.generate(pooled_segments(x, narration.labels), max_new_tokens=4)
    for a, b in zip(narration.texts, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [0, 21])
def test_refuses_another_number_of_segments(count):
    with pytest.raises(ValueError, match=rf"count must be in 1..20, .*: {count}"):
        ward_segments(torch.randn(20, 3), count)


# As it runs.


def decoded(x: torch.Tensor, width: int = 3, threshold: float = 0.1) -> list[tuple[int, int]]:
    """When something was decoded, and which embedding of the stream was nearest to it."""
    online = OnlineSegmenter(width, threshold)
    found = [(i, online.push(e)) for i, e in enumerate(x)]
    return [(i, int((x @ e).argmax())) for i, e in found if e is not None]


def test_online_decodes_each_segment_once_when_it_has_settled():
    lengths = [9, 5, 12, 4]
    starts = [0, 9, 14, 26]
    found = decoded(steps(lengths, noise=0.03))
    assert [at for at, _ in found] == [start + 2 for start in starts]
    for (_, nearest), start, length in zip(found, starts, lengths, strict=True):
        assert start <= nearest < start + length


def test_online_follows_a_slow_turn():
    """No window varies more than the threshold, but the stream goes from one end to another."""
    angle = torch.linspace(0, torch.pi, 60)
    x = torch.stack((angle.cos(), angle.sin()), 1)
    found = [at for at, _ in decoded(x)]
    assert found[0] == 2 and 4 <= len(found) <= 8


def test_online_says_nothing_while_it_changes():
    """A scene shorter than the window is never settled."""
    assert [at for at, _ in decoded(steps([8, 1, 1, 1, 8], noise=0.0))] == [2, 13]
    with pytest.raises(ValueError, match="width must be >= 2 and threshold positive, got 1 and 0"):
        OnlineSegmenter(1, 0.5)
    with pytest.raises(ValueError, match="got 3 and nan"):
        OnlineSegmenter(3, float("nan"))
