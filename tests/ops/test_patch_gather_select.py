"""select_patches: exact against a stable argsort, whatever the noise and the lengths."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from row_cases import for_thread_counts

from encfast import ops, ref

NAN, INF = float("nan"), float("inf")


def cu_seqlens(lens):
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def expected(noise, lens, keeps, ordered):
    """By a stable argsort of each sequence, as Python lists."""
    visible, hidden, start = [], [], 0
    for n, keep in zip(lens, keeps, strict=True):
        order = (noise[start : start + n].argsort(stable=True) + start).tolist()
        for rows, part in ((visible, order[:keep]), (hidden, order[keep:])):
            rows += sorted(part) if ordered else part
        start += n
    restore = [-1] * start
    for row, place in enumerate(visible):
        restore[place] = row
    return visible, hidden, restore


def assert_exact(noise, lens, keeps, ordered):
    got = ops.select_patches(noise, keeps, cu_seqlens=cu_seqlens(lens), ordered=ordered)
    want = expected(noise, lens, keeps, ordered)
    for name, found, right in zip(got._fields, got, want, strict=False):
        assert found.dtype == torch.int64 and found.tolist() == right, name
    assert got.cu_keep.dtype == torch.int32 and torch.equal(got.cu_keep, cu_seqlens(keeps))


ORDERS = pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "shuffled"])
LENGTHS = (0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 196, 0, 257, 1000)


@pytest.mark.quick
@ORDERS
def test_ragged_batches_are_exact(ordered):
    noise = torch.rand(sum(LENGTHS))
    for keeps in ([n // 4 for n in LENGTHS], [(n + 1) // 2 for n in LENGTHS], list(LENGTHS)):
        assert_exact(noise, LENGTHS, keeps, ordered)


@pytest.mark.quick
@ORDERS
def test_equal_sequences_keep_as_many_each(ordered):
    noise = torch.rand(7, 50)
    for keep in (0, 1, 12, 49, 50):
        visible, hidden, restore, cu_keep = ops.select_patches(noise, keep, ordered=ordered)
        assert cu_keep.tolist() == [keep * b for b in range(8)]
        rows = visible.view(7, keep)
        assert torch.equal(rows // 50, torch.arange(7)[:, None].expand(7, keep))
        order = noise.argsort(stable=True) + 50 * torch.arange(7)[:, None]
        for ids, want in ((rows, order[:, :keep]), (hidden.view(7, -1), order[:, keep:])):
            assert torch.equal(ids, want.sort().values if ordered else want)
        assert torch.equal(restore[visible], torch.arange(7 * keep))
        assert (restore[hidden] == -1).all()


@pytest.mark.quick
def test_shuffled_is_the_shuffle_of_the_published_code():
    """ids_shuffle = argsort(noise), ids_restore = argsort(ids_shuffle), the first `keep` stay."""
    noise, x = torch.rand(5, 40), torch.randn(5, 40, 3)
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    x_masked = x.gather(1, ids_shuffle[:, :10, None].expand(-1, -1, 3))
    got = ops.select_patches(noise, 10, ordered=False)
    assert torch.equal(ops.gather_rows(x.flatten(0, 1), got.visible), x_masked.flatten(0, 1))
    tokens = torch.cat([x_masked, torch.full((5, 30, 3), 9.0)], 1)
    full = tokens.gather(1, ids_restore[..., None].expand(-1, -1, 3))
    mask = torch.full((3,), 9.0)
    assert torch.equal(
        ops.restore_rows(x_masked.flatten(0, 1), got.restore, mask), full.flatten(0, 1)
    )


SPECIAL = {
    "ties": [0.5, 0.25, 0.5, 0.5, 0.25, 0.75, 0.5, 0.25] * 6,
    "all equal": [0.125] * 45,
    "zeros of both signs": [0.0, -0.0, 1e-45, -0.0, 0.0, -1e-45, 0.0] * 6,
    "NaN": [NAN, 0.5, -NAN, 0.1, INF, NAN, -INF, 3e38] * 5,
    "all NaN": [NAN, -NAN] * 20,
    "infinite": [INF, -INF, INF, 0.0, -INF] * 8,
    "negative": [-0.5, 0.25, -2.0, -1e30, 1e30, -0.25, -0.5] * 6,
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.0] * 11,
    "extremes": [3.4028234e38, -3.4028234e38, 1.1754944e-38, -1.1754944e-38, 0.0] * 8,
}


@pytest.mark.quick
@ORDERS
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_noise_is_exact(kind, ordered):
    """NaN counts as the largest, -0 equals 0, ties go by position: exactly `keep` in any case."""
    noise = torch.tensor(SPECIAL[kind])
    n = len(noise)
    for keep in (0, 1, 5, n // 2, n - 1, n):
        assert_exact(noise, [n], [keep], ordered)


@pytest.mark.quick
@ORDERS
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)], ids=str)
def test_smallest_batches(shape, ordered):
    got = ops.select_patches(torch.rand(shape), min(shape[1], 1), ordered=ordered)
    total = shape[0] * min(shape[1], 1)
    assert [len(x) for x in got] == [
        total,
        shape[0] * shape[1] - total,
        shape[0] * shape[1],
        shape[0] + 1,
    ]
    none = ops.select_patches(torch.rand(0), [], cu_seqlens=cu_seqlens([]), ordered=ordered)
    assert [x.tolist() for x in none] == [[], [], [], [0]]


@pytest.mark.quick
@ORDERS
def test_strided_noise_is_exact(ordered):
    wide = torch.rand(6, 40)
    for noise in (wide[:, ::2], wide.t(), wide[:1].expand(6, 40), wide[1:, 3:17]):
        got = ops.select_patches(noise, 5, ordered=ordered)
        want = ops.select_patches(noise.contiguous(), 5, ordered=ordered)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        n = noise.shape[1]
        assert (
            got.visible.tolist()
            == expected(noise.flatten(), [n] * len(noise), [5] * len(noise), ordered)[0]
        )


@pytest.mark.quick
@ORDERS
def test_thread_count_changes_nothing(ordered):
    lens = [3, 900, 0, 50, 1, 1568, 196]
    noise, keeps = torch.rand(sum(lens)), [n // 4 for n in lens]
    cu = cu_seqlens(lens)
    first, *others = for_thread_counts(
        lambda: ops.select_patches(noise, keeps, cu_seqlens=cu, ordered=ordered)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.quick
@ORDERS
def test_a_long_sequence_is_exact(ordered):
    """Enough patches that float32 noise has ties; every count is still exact."""
    n = 50_000
    noise = (torch.rand(n) * 4096).floor() / 4096
    for keep in (1, n // 4, n - 1):
        assert_exact(noise, [n], [keep], ordered)


@pytest.mark.quick
def test_noise_gets_no_gradient():
    got = ops.select_patches(torch.rand(2, 8, requires_grad=True), 3)
    assert not any(x.requires_grad for x in got)


@pytest.mark.quick
def test_choices_are_uniform():
    """Each patch is kept about as often: 4000 draws of 5 in 20, 6 standard deviations."""
    kept = ops.select_patches(torch.rand(4000, 20), 5).visible % 20
    share = kept.bincount(minlength=20) / 4000
    assert (share - 0.25).abs().max() < 6 * (0.25 * 0.75 / 4000) ** 0.5


@given(
    lens=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 150)), max_size=5),
    kind=st.sampled_from(("bits", "few", "rand")),
    ordered=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fuzz_is_exact(lens, kind, ordered, data):
    """`bits` are any 32: all NaNs, subnormals and infinities among them."""
    torch.manual_seed(sum(lens))
    n = sum(lens)
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)
    noise = {
        "bits": bits.view(torch.float32),
        "few": torch.randint(-2, 3, (n,)).float(),
        "rand": torch.rand(n),
    }[kind]
    keeps = [data.draw(st.integers(0, k)) for k in lens]
    assert_exact(noise, lens, keeps, ordered)
    want = ref.select_patches(noise, cu_seqlens(lens), cu_seqlens(keeps), ordered)
    got = ops.select_patches(noise, keeps, cu_seqlens=cu_seqlens(lens), ordered=ordered)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False))
