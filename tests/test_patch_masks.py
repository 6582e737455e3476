"""Mask generators: exact counts, shapes of what they hide, seeds, and both backends alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from encfast.data import (
    block_hidden,
    group_hidden,
    group_mask,
    keep_count,
    mask_grids,
    random_hidden,
    random_mask,
    tube_hidden,
    tube_mask,
)
from encfast.patch_mask import PatchMask

pytestmark = pytest.mark.quick

PARTS = [0] * 5 + [1] * 4 + [2] * 2 + [3] * 2 + [4] * 2 + [5] * 2  # of 17 joints


@pytest.fixture(params=["compiled", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(mask_grids, "_host", None)
    elif mask_grids._host is None:
        pytest.skip("encfast._host was not compiled")


def on_numpy(draw, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_grids, "_host", None)
        return draw(*args, **kwargs)


def neighbours_alike(masks: np.ndarray) -> np.ndarray:
    """[n]: the share of adjacent pairs of cells [n, H, W] that are both hidden or both visible."""
    across, down = masks[:, :, 1:] == masks[:, :, :-1], masks[:, 1:] == masks[:, :-1]
    pairs = across[0].size + down[0].size
    return (across.sum((1, 2)) + down.sum((1, 2))) / pairs


# SplitMix64 of seed 1234567, as Vigna's splitmix64.c prints them.
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]


def test_random_numbers_are_those_of_splitmix64():
    random = mask_grids.SplitMix64(1234567)
    assert [random.next() for _ in PUBLISHED] == PUBLISHED


@pytest.mark.usefixtures("backend")
def test_block_masks_hide_exactly_so_many_patches_in_blocks():
    """98 of 196 patches in each of 1000 draws; a random mask has as many pairs alike as not."""
    masks = block_hidden((14, 14), 98, seeds=range(1000))
    assert masks.shape == (1000, 196) and masks.dtype == bool
    assert (masks.sum(1) == 98).all()
    alike = neighbours_alike(masks.reshape(-1, 14, 14))
    assert alike.mean() > 0.85
    assert alike.min() > 0.75
    scattered = neighbours_alike(random_hidden(196, 98, seeds=range(1000)).reshape(-1, 14, 14))
    assert scattered.mean() == pytest.approx(0.5, abs=0.02)
    # Rectangles lie in the grid: corners are hidden least often, but not never.
    often = masks.mean(0).reshape(14, 14)
    assert often.min() > 0.03 and often.min() == often[[0, 0, -1, -1], [0, -1, 0, -1]].min()
    assert len(np.unique(masks, axis=0)) > 990


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.data(),
    st.integers(1, 20),
    st.none() | st.integers(20, 40),
    st.floats(0.05, 1),
    st.integers(0, 2**64 - 1),
)
def test_block_backends_agree(height, width, data, least, most, aspect, seed):
    keep = data.draw(st.integers(1, height * width))
    options = {"min_patches": least, "max_patches": most, "min_aspect": aspect, "seeds": [seed, 7]}
    masks = block_hidden((height, width), keep, **options)
    assert np.array_equal(masks, on_numpy(block_hidden, (height, width), keep, **options))
    assert (masks.sum(1) == height * width - keep).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 80), st.data(), st.integers(0, 2**64 - 1))
def test_random_backends_agree(patches, data, seed):
    keep = data.draw(st.integers(1, patches))
    mask = random_hidden(patches, keep, seeds=seed)
    assert mask.shape == (patches,) and mask.sum() == patches - keep
    assert np.array_equal(mask, on_numpy(random_hidden, patches, keep, seeds=seed))


@pytest.mark.usefixtures("backend")
def test_random_masks_hide_every_patch_alike():
    masks = random_hidden(20, 5, seeds=np.arange(4000))
    assert (masks.sum(1) == 15).all()
    np.testing.assert_allclose(masks.mean(0), 0.75, atol=0.035)
    # Pairs too: 15 / 20 * 14 / 19 of the masks hide both.
    pairs = masks.astype(float).T @ masks / 4000
    np.testing.assert_allclose(pairs[~np.eye(20, dtype=bool)], 0.5526, atol=0.045)


@pytest.mark.usefixtures("backend")
def test_tubes_and_groups():
    tubes = tube_hidden((3, 4, 5), 6, seeds=[1, 2]).reshape(2, 3, 20)
    assert (tubes == tubes[:, :1]).all() and (tubes.sum(2) == 14).all()
    assert np.array_equal(tubes[0, 0], random_hidden(20, 6, seeds=1))
    assert not np.array_equal(tubes[0], tubes[1])
    groups = group_hidden(PARTS, 2, seeds=range(50))
    for mask in groups:
        hidden = {part for part, m in zip(PARTS, mask, strict=True) if m}
        assert len(hidden) == 2
        assert mask.tolist() == [part in hidden for part in PARTS]
    assert len(np.unique(groups, axis=0)) > 10, "of 15 pairs"
    assert group_hidden(PARTS, 6, seeds=0).all()


@pytest.mark.usefixtures("backend")
def test_a_mask_is_a_function_of_its_seed():
    many = block_hidden((6, 6), 10, seeds=[5, 3, 5], min_patches=4)
    assert np.array_equal(many[0], many[2]) and not np.array_equal(many[0], many[1])
    assert np.array_equal(many[1], block_hidden((6, 6), 10, seeds=3, min_patches=4))
    assert random_hidden(6, 2, seeds=[]).shape == (0, 6)
    assert np.array_equal(random_hidden(6, 2, seeds=np.uint64(9)), random_hidden(6, 2, seeds=9))
    # Written down: a change of the generator would break every recorded run.
    assert "".join("01"[int(c)] for c in many[1]) == FROZEN


FROZEN = "100011101111111111110111110111000110"


class Masks(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(block_hidden((8, 8), 32, seeds=i))


def test_from_a_worker_to_a_patch_mask():
    loader = DataLoader(Masks(), batch_size=2, num_workers=1, collate_fn=lambda m: torch.stack(m))
    masks = [PatchMask.from_hidden(hidden, 32) for hidden in loader]
    for b, mask in enumerate(masks):
        assert mask.visible_batch(mask.visible).lengths().tolist() == [32, 32]
        expected = block_hidden((8, 8), 32, seeds=[2 * b, 2 * b + 1]).flatten()
        assert mask.hidden_grid().tolist() == expected.tolist()


# On tensors.


def test_masks_on_tensors():
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(3, (2, 3, 4), 6, generator=generator)
    assert mask.cu_visible.tolist() == [0, 6, 12, 18] and mask.max_patches == 24
    again = random_mask(3, (2, 3, 4), 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask.visible, again.visible)
    assert not torch.equal(mask.visible, random_mask(3, (24,), 6, generator=generator).visible)
    tubes = tube_mask(3, (4, 2, 3), 2, generator=generator)
    grid = tubes.hidden_grid().view(3, 4, 6)
    assert (grid == grid[:, :1]).all() and (grid.sum(2) == 4).all()
    assert len(grid[:, 0].unique(dim=0)) > 1, "each clip has its own places"
    assert (tubes.max_visible, tubes.max_hidden) == (8, 16)
    for groups in (PARTS, torch.tensor(PARTS)):
        mask = group_mask(20, groups, 2, generator=generator)
        counts = set()
        for hidden in mask.hidden_grid().view(20, 17).tolist():
            parts = {part for part, h in zip(PARTS, hidden, strict=True) if h}
            assert len(parts) == 2
            assert hidden == [part in parts for part in PARTS]
            counts.add(sum(hidden))
        assert len(counts) > 1, "groups differ in size"


def test_random_tensors_hide_every_patch_alike():
    mask = random_mask(4000, (20,), 5, generator=torch.Generator().manual_seed(1))
    share = mask.hidden_grid().view(4000, 20).float().mean(0)
    torch.testing.assert_close(share, torch.full((20,), 0.75), atol=0.035, rtol=0)


def test_keep_count_rounds_down_as_mae():
    assert keep_count(196, 0.75) == 49
    assert keep_count(256, 0.9) == 25
    for ratio in (0, 1, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="mask_ratio"):
            keep_count(196, ratio)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.9: leaves none of 4 patches visible"):
        keep_count(4, 0.9)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: random_hidden(9, 10, seeds=0), ValueError, "keep=10: expected between 1 and 9"),
        (lambda: random_hidden(9, 0, seeds=0), ValueError, "keep=0"),
        (lambda: random_hidden(9, 2.0, seeds=0), TypeError, r"keep=2\.0 is float"),
        (lambda: random_hidden(0, 1, seeds=0), ValueError, "patches=0"),
        (lambda: random_hidden(9, 2, seeds=-1), ValueError, "seeds holds -1"),
        (lambda: random_hidden(9, 2, seeds=[0.5]), TypeError, r"seeds holds 0\.5"),
        (lambda: random_hidden(9, 2, seeds=[[1]]), ValueError, r"seeds has shape \(1, 1\)"),
        (lambda: random_hidden(9, 2, seeds=True), TypeError, "seeds"),
        (lambda: tube_hidden((3, 4), 2, seeds=0), ValueError, r"grid=\(3, 4\): expected 3 axes"),
        (lambda: tube_hidden((3, 2, 2), 5, seeds=0), ValueError, "keep=5: expected .* 4"),
        (lambda: block_hidden((4,), 2, seeds=0), ValueError, r"grid=\(4,\): expected 2 axes"),
        (lambda: block_hidden((4, 0), 2, seeds=0), ValueError, "grid=0"),
        (lambda: block_hidden((4, 4), 17, seeds=0), ValueError, "keep=17"),
        (lambda: block_hidden((4, 4), 8, seeds=0, min_aspect=0), ValueError, "min_aspect=0"),
        (lambda: block_hidden((4, 4), 8, seeds=0, min_patches=0), ValueError, "min_patches=0"),
        (lambda: block_hidden((4, 4), 8, seeds=0, max_patches=3), ValueError, "max_patches=3"),
        (lambda: group_hidden([0, 2], 1, seeds=0), ValueError, r"group 1 of 0\.\.2 has no patch"),
        (lambda: group_hidden([0, -1], 1, seeds=0), ValueError, "groups holds -1"),
        (lambda: group_hidden([0.0], 1, seeds=0), TypeError, "groups has dtype float64"),
        (lambda: group_hidden([[0]], 1, seeds=0), ValueError, r"shape \(1, 1\)"),
        (lambda: group_hidden([0, 1], 3, seeds=0), ValueError, "hide=3: expected .* 2"),
        (lambda: random_mask(2, (3, 3), 10), ValueError, "keep=10"),
        (lambda: tube_mask(2, (3, 3), 1), ValueError, r"grid=\(3, 3\): expected 3 axes"),
        (lambda: tube_mask(2, (2, 3, 3), 10), ValueError, "keep=10: expected between 1 and 9"),
        (lambda: group_mask(2, [0, 2], 1), ValueError, "group 1"),
        (lambda: group_mask(2, [0, 1], 0), ValueError, "hide=0"),
    ],
)
def test_errors(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
