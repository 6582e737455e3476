"""Short sequences, which the CPU takes whole (csrc/cpu/varlen_attn_short.h), among longer ones."""

import dataclasses

import pytest
import torch
from attn_cases import (
    Case,
    assert_matches_reference,
    make_biases,
    make_douts,
    make_qkv,
    run_op,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MIXED = (1, 2, 15, 16, 17, 0, 31, 32, 33, 70)
OTHER = (16, 33, 1, 31, 0, 3, 17, 32, 2, 40)  # keys: a pair is short only if both lengths are

QUICK = [
    Case(MIXED, head_size=32, layout="qkv"),
    Case(MIXED, OTHER, head_size=64, causal=True, kv_heads=2),
    Case(MIXED, OTHER, heads=2, head_size=33, window=(4, 2), alibi="BH", softcap=5.0),
    Case(MIXED, heads=2, rel="H", rel_size=9, bias="T", dropout=0.2),
]
MORE = [
    Case(MIXED, head_size=1, heads=2),
    Case(MIXED, head_size=80, heads=2, causal=True, layout="transposed"),
    Case(MIXED, OTHER, head_size=128, heads=2, kv_heads=1),
    Case(MIXED, heads=2, softcap=2.0, layout="expanded"),
    Case(MIXED, head_size=255, heads=2, window=(0, 3), layout="offset"),
    Case(MIXED, head_size=16, scale=-0.7, alibi="H", causal=True),
    Case(MIXED, heads=2, head_size=24, rel="NH", rel_size=5, bias="HT", softcap=4.0),
    Case(MIXED, OTHER, kv_heads=2, head_size=64, bias="bool HT", dropout=0.4),
    Case(MIXED, OTHER, kv_heads=1, bias="T", rel="H", rel_size=63),
    Case(MIXED[:-1], head_size=32, heads=2, bias="HT", window=(20, 20)),
    Case(OTHER, (0,) * len(OTHER), heads=2, degenerate=True),
]


@pytest.mark.quick
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_short_sequences_match_the_reference(case):
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(case, dtype)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_short_sequences_with_every_option_match_the_reference(case):
    one_key = case.bias.startswith("bool")  # masks leave single keys here and there
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(case, dtype, cancels=one_key)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 9, 16, 17, 32])
def test_a_short_sequence_has_the_same_bits_in_any_company(dtype, length):
    """Alone, after a longer one, between short ones: workspaces and tasks differ."""
    lens = (5, 300, length, 31, 2)
    whole = Case(lens, head_size=48, kv_heads=2, causal=True)
    qkv, (dout, dlse) = make_qkv(whole, dtype), make_douts(whole, dtype)
    rows = torch.arange(sum(lens)).split(lens)
    want = None
    for company in ((2,), (1, 2), (0, 2, 3), (0, 1, 2, 3, 4)):
        case = dataclasses.replace(whole, lens=tuple(lens[b] for b in company))
        taken = torch.cat([rows[b] for b in company])
        got = run_op(case, [x[taken] for x in qkv], (dout[taken], dlse[:, taken]))
        mine = torch.isin(taken, rows[2])
        got = {name: x[:, mine] if name == "lse" else x[mine] for name, x in got.items()}
        want = want or got
        for name, x in got.items():
            assert torch.equal(x, want[name]), (name, company)


@pytest.mark.quick
@pytest.mark.parametrize("bias", ["", "T", "HT"])
def test_short_sequences_are_bit_equal_for_any_thread_count(bias):
    """Also where heads add to one gradient, beside longer sequences whose heads are tasks."""
    case = Case(MIXED * 2, head_size=32, kv_heads=2, bias=bias, rel="H", rel_size=5)
    qkv, douts, biases = make_qkv(case, BF16), make_douts(case, BF16), make_biases(case, BF16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run_op(case, qkv, douts, biases=biases)
        for n in (2, 3):
            torch.set_num_threads(n)
            for _ in range(10):
                got = run_op(case, qkv, douts, biases=biases)
                assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.quick
def test_nan_stays_in_its_short_sequence():
    case = Case((16, 7, 32), head_size=32)
    qkv = make_qkv(case, FP32)
    for x in qkv:
        x[18] = float("nan")
    got = run_op(case, qkv, make_douts(case, FP32))
    for name in ("out", "dq", "dk", "dv"):
        before, within, after = got[name].split(case.lens)
        assert torch.isfinite(before).all() and torch.isfinite(after).all(), name
        assert within.isnan().all(), name
