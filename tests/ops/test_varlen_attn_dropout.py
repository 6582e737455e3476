"""Dropout of varlen_attn: the generator, its statistics, and the same mask wherever it is drawn."""

import pytest
import torch

from encfast.ref.philox import dropout_keep, philox4x32

# Random123's kat_vectors: counter, key and result of philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.quick
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_numbers(counter, key, result):
    assert philox4x32(words(counter), words(key)) == words(result)


@pytest.mark.quick
def test_draws_are_the_half_words_in_order_of_the_keys():
    rng = torch.tensor([7 - 2**32, 9 + 2**40])  # only the low words are the key
    b, h, i = 2, 1, 3
    draws = []
    for j in range(11):
        counter = (j >> 3, i, h, b)
        block = philox4x32(tuple(map(torch.tensor, counter)), words("7 9"))
        draws.append(int(block[(j & 7) >> 1]) >> 16 * (j & 1) & 0xFFFF)
    for threshold in sorted(draws):
        keep, multiplier = dropout_keep(threshold / 65536, rng, b, (h + 1, i + 1, 11))
        assert keep[h, i].tolist() == [draw >= threshold for draw in draws]
        assert multiplier == 65536 / (65536 - threshold)
