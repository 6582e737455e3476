"""Masks of whole words: what an encoder reads, and what each row of a decoder sees."""

import pytest
import torch

from encfast import PackedBatch
from encfast.data.whole_words import draw_words, mask_words, visible_pairs

WORDS = torch.tensor([-1, 0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, -1])


@pytest.mark.quick
def test_each_row_of_the_decoder_sees_its_own_half_of_the_words():
    """DupMAE's sheet, check 2: half of the words, whole; never the row itself; always [CLS]."""
    count, size = 40, len(WORDS)
    tokens = PackedBatch.from_lengths(torch.zeros(count * size).long(), [size] * count)
    draw = {"generator": torch.Generator().manual_seed(0)}
    grids = visible_pairs(tokens, WORDS.repeat(count), **draw).view(count, size, size)
    own = torch.eye(size, dtype=torch.bool)
    assert grids[:, :, 0].all() and not grids[:, 1:][:, own[1:]].any()
    assert grids[:, :-1, -1].all(), "[SEP] is no word"
    others = ~own & (WORDS >= 0)
    share = grids[:, 1:-1][:, others[1:-1]].float().mean()
    assert abs(share - 0.5) < 0.05
    for word in range(14):
        columns = (word == WORDS).nonzero().flatten()
        apart = word != WORDS
        assert (grids[:, apart][..., columns].sum(-1) % len(columns) == 0).all(), word
    distinct = [len(g[1:-1].unique(dim=0)) for g in grids]
    assert min(distinct) > 10


@pytest.mark.quick
def test_rows_share_at_most_the_masks_there_are():
    tokens = PackedBatch.from_lengths(torch.zeros(21).long(), [21])
    grid = visible_pairs(tokens, WORDS, num_masks=1).view(21, 21)
    for i in range(1, 20):
        same = torch.arange(21) != i
        same[1:20] &= torch.arange(1, 20) != 1
        assert torch.equal(grid[i, same], grid[1, same])


@pytest.mark.quick
def test_encoder_masks_whole_words():
    count = 200
    tokens = PackedBatch.from_lengths(torch.arange(21).repeat(count) + 10, [21] * count)
    options = {"vocab_size": 50, "mask_id": 3, "prob": 0.3}
    draw = {"generator": torch.Generator().manual_seed(0)}
    masked = mask_words(tokens, WORDS.repeat(count), **options, **draw)
    chosen = torch.zeros(count * 21).index_fill(0, masked.rows, 1.0).view(count, 21)
    assert not chosen[:, [0, 20]].any()
    for word in range(14):
        of_word = chosen[:, word == WORDS]
        assert torch.equal(of_word.amin(1), of_word.amax(1)), word
    budget = round(0.3 * 19)
    assert chosen.sum(1).max() == budget and chosen.sum(1).mean() > budget - 0.5
    assert torch.equal(masked.targets, tokens.data[masked.rows])
    shown = masked.tokens.data[masked.rows]
    assert abs((shown == 3).float().mean() - 0.8) < 0.05
    assert abs((shown == masked.targets).float().mean() - 0.1) < 0.05


@pytest.mark.quick
def test_masks_of_texts_without_words():
    none = PackedBatch.from_list([[], [5], [5, 6]], dtype=torch.int64)
    words = torch.full((3,), -1)
    assert not len(mask_words(none, words, vocab_size=9, mask_id=3, prob=1.0).rows)
    assert visible_pairs(none, words).tolist() == [True, True, True, True, False]
    assert draw_words(words[:0], 0.5, 3).shape == (3, 0)


@pytest.mark.quick
def test_errors_name_what_is_wrong():
    tokens = PackedBatch.from_lengths(WORDS.clamp(min=0), [21])
    with pytest.raises(ValueError, match="prob must be in"):
        visible_pairs(tokens, WORDS, prob=1.5)
    with pytest.raises(ValueError, match="num_masks must be >= 1, got 0"):
        visible_pairs(tokens, WORDS, num_masks=0)
    with pytest.raises(ValueError, match=r"word_ids is torch.int64 of shape \(3,\), expected"):
        mask_words(tokens, torch.zeros(3).long(), vocab_size=512, mask_id=3)
