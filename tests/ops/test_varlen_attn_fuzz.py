"""Random geometries, strides, dtypes and corruptions: the right number or an exception."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from attn_cases import Case, assert_matches_reference, make_biases, make_qkv
from hypothesis import HealthCheck, assume, given, settings

from encfast import ops


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors this small cost more in waking threads than in work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
LAYOUTS = st.sampled_from(("contiguous", "qkv", "transposed", "expanded", "offset"))
LENGTHS = st.lists(
    st.one_of(st.integers(0, 4), st.sampled_from((15, 16, 17, 31, 32, 33, 64, 65, 100, 130))),
    min_size=1,
    max_size=4,
)
BOUNDS = st.one_of(st.just(-1), st.integers(0, 140))
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # a failure seen once is seen by everyone
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def cases(draw):
    lens = draw(LENGTHS)
    lens_k = None
    if draw(st.booleans()):
        lens_k = tuple(draw(st.lists(st.integers(0, 70), min_size=len(lens), max_size=len(lens))))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layout = draw(LAYOUTS)
    assume(layout != "qkv" or (lens_k is None and group == 1))
    return Case(
        tuple(lens),
        lens_k,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_size=draw(st.one_of(st.integers(1, 130), st.sampled_from((32, 64, 128, 256)))),
        causal=draw(st.booleans()),
        window=(draw(BOUNDS), draw(BOUNDS)),
        alibi=draw(st.sampled_from(("", "H", "BH"))),
        softcap=draw(st.sampled_from((None, 0.5, 30.0))),
        scale=draw(st.sampled_from((None, 0.05, -0.3, 1.0))),
        rel=draw(st.sampled_from(("", "", "H", "NH"))),
        rel_size=2 * draw(st.one_of(st.integers(0, 3), st.integers(0, 150))) + 1,
        bias=draw(st.sampled_from(("", "", "T", "HT", "bool T", "bool HT"))),
        bias_dtype=draw(st.one_of(st.none(), DTYPES)),
        dropout=draw(st.sampled_from((None, None, 0.0, 0.1, 0.7))),
        layout=layout,
        degenerate=True,  # tiny draws often are
    )


@FUZZ
@given(case=cases(), dtype=DTYPES)
def test_random_calls_match_the_reference(case, dtype):
    assert_matches_reference(case, dtype, few_elements=True)


@FUZZ
@given(case=cases(), dtypes=st.tuples(DTYPES, DTYPES, DTYPES))
def test_random_mixed_dtypes_match_the_reference(case, dtypes):
    assume(case.layout != "qkv")
    assert_matches_reference(case, *dtypes, few_elements=True)


INT32 = st.one_of(
    st.integers(-3, 20), st.integers(-(2**31), 2**31 - 1), st.sampled_from((2**31 - 1, -(2**31)))
)


@pytest.mark.host
@settings(FUZZ, max_examples=400)
@given(
    ends=st.lists(INT32, max_size=6),
    max_seqlen=st.one_of(st.none(), INT32),
    rows=st.integers(0, 12),
)
def test_corrupted_lengths_are_refused(ends, max_seqlen, rows):
    """Through the public function and directly, as a compiled graph would call."""
    q = torch.randn(rows, 2, 8)
    cu = torch.tensor(ends, dtype=torch.int32)
    steps = [b - a for a, b in itertools.pairwise(ends)]
    valid = bool(ends) and ends[0] == 0 and ends[-1] == rows and min(steps, default=0) >= 0
    valid = valid and (max_seqlen is None or max_seqlen >= max(steps, default=0))

    def public():
        return ops.varlen_attn(q, q, q, cu, max_seqlen_q=max_seqlen)

    def direct():
        nones = (None,) * 7
        return torch.ops.encfast.varlen_attn(
            q, q, q, cu, None, max_seqlen, None, None, False, [-1, -1], *nones
        )[0]

    for call in (public, direct):
        if valid:
            assert torch.isfinite(call()).all()
        else:
            with pytest.raises((ValueError, RuntimeError), match="varlen_attn"):
                call()


@pytest.mark.host
@settings(FUZZ, max_examples=200)
@given(
    offsets=st.one_of(
        st.just([0, 4, 4, 13]),
        st.lists(
            st.one_of(st.integers(-2, 20), st.integers(-(2**63), 2**63 - 1)),
            min_size=3,
            max_size=5,
        ),
    ),
    count=st.one_of(st.just(13), st.integers(0, 20)),
    heads=st.sampled_from(((), (2,), (1,))),
    boolean=st.booleans(),
)
def test_corrupted_bias_offsets_are_refused(offsets, count, heads, boolean):
    """Through the public function and directly, as a compiled graph would call."""
    q = torch.randn(5, 2, 8)
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    bias = torch.ones(*heads, count)
    bias, given = bias > 0 if boolean else bias, torch.tensor(offsets, dtype=torch.int64)
    valid = offsets == [0, 4, 4, 13] and count == 13 and heads != (1,)

    def public():
        return ops.varlen_attn(q, q, q, cu, bias=bias, bias_offsets=given)

    def direct():
        nones = (None,) * 4
        return torch.ops.encfast.varlen_attn(
            q, q, q, cu, *nones, False, [-1, -1], None, None, bias, given, None, None, None
        )[0]

    for call in (public, direct):
        if valid:
            assert torch.isfinite(call()).all()
        else:
            with pytest.raises((ValueError, RuntimeError), match=r"varlen_attn: .*bias"):
                call()


@settings(FUZZ, max_examples=200)
@given(
    name=st.sampled_from(("rel_bias", "bias")),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.int32)),
    dropout_p=st.one_of(st.none(), st.floats(), st.integers(-1, 1)),
)
def test_random_biases_are_served_or_refused(name, shape, dtype, dropout_p):
    q = torch.randn(3, 2, 8)
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    value = torch.ones(shape).to(dtype)
    try:
        out = ops.varlen_attn(q, q, q, cu, dropout_p=dropout_p, **{name: value})
    except (TypeError, ValueError) as error:
        assert "varlen_attn: " in str(error)
    else:
        assert out.shape == q.shape and torch.isfinite(out).all()


@settings(FUZZ, max_examples=150)
@given(
    shapes=st.tuples(*[st.lists(st.integers(0, 5), max_size=4).map(tuple)] * 3),
    dtypes=st.tuples(
        *[st.sampled_from((torch.float32, torch.bfloat16, torch.float64, torch.int32))] * 3
    ),
    lens=st.lists(st.integers(0, 3), max_size=3),
)
def test_random_shapes_and_dtypes_are_served_or_refused(shapes, dtypes, lens):
    tensors = [torch.ones(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    cu = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    try:
        out = ops.varlen_attn(*tensors, cu)
    except (TypeError, ValueError) as error:
        assert "varlen_attn: " in str(error)
    else:
        assert out.shape == shapes[0] and torch.isfinite(out).all()


@FUZZ
@given(case=cases(), at=st.integers(0, 10**6))
def test_a_nan_stays_in_its_sequence(case, at):
    assume(case.lens_k is None and sum(case.lens) and case.layout != "expanded")
    qkv = make_qkv(case, torch.bfloat16)
    row = at % sum(case.lens)
    for x in qkv:
        x[row] = float("nan")
    ends = torch.tensor([0, *case.lens]).cumsum(0).to(torch.int32)
    out = ops.varlen_attn(*qkv, ends, **case.options, **make_biases(case, torch.bfloat16))
    owner = int(torch.searchsorted(ends[1:].long(), row, right=True))
    clean = torch.ones(len(out), dtype=torch.bool)
    clean[ends[owner] : ends[owner + 1]] = False
    assert torch.isfinite(out[clean]).all()


@pytest.mark.host
@settings(FUZZ, max_examples=200)
@given(
    rows=st.integers(0, 9),
    n=st.integers(0, 9),
    index=st.lists(st.one_of(st.integers(-3, 12), st.integers(-(2**63), 2**63 - 1)), max_size=9),
)
def test_random_row_numbers_are_served_or_refused(rows, n, index):
    x = torch.randn(rows, 3)
    numbers = torch.tensor(index, dtype=torch.int64)
    inside = all(-1 <= i < rows for i in index)
    for gather in (ops.gather_rows, torch.ops.encfast.gather_rows):
        if inside:
            want = torch.stack(
                [x[i] if i >= 0 else torch.zeros(3) for i in index] or [x[:0].sum(0)]
            )
            assert torch.equal(gather(x, numbers), want[: len(index)])
        else:
            with pytest.raises((ValueError, RuntimeError), match="index holds"):
                gather(x, numbers)
    if len(index) == rows and all(-1 <= i < n for i in index):
        want = torch.zeros(n, 3)
        for i, row in zip(index, x, strict=True):
            want[i] += row if i >= 0 else 0
        assert torch.equal(torch.ops.encfast.scatter_rows(x, numbers, n), want)
    else:
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.encfast.scatter_rows(x, numbers, n)
