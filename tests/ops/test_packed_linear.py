"""packed_linear against its float64 reference: formats, shapes, epilogues, independence of rows."""

import pytest
import torch
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st

from encfast import ops
from encfast.ref import pack_linear as ref_pack
from encfast.ref import packed_linear as ref_linear
from encfast.testing import assert_close_to_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = ("fp32", "bf16", "int8")
NATIVE = ops.backends("packed_linear")["cpu"] == "native"
PACK = torch.ops.encfast.pack_linear.default
LINEAR = torch.ops.encfast.packed_linear.default

# (N, C, F): no rows, one row, odd sizes, more than one block of C and of rows, tails of all three;
# C of whole vectors, whose rows are read where they lie.
SHAPES = [(0, 8, 6), (1, 1, 2), (7, 50, 70), (33, 131, 34), (130, 300, 66), (1000, 65, 38)]
SHAPES += [(50, 1601, 66), (100, 832, 70), (300, 64, 38)]
EPILOGUES = {
    "plain": {},
    "gelu": {"bias": True, "activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh", "residual": True},
    "silu": {"bias": True, "activation": "silu"},
    "relu": {"bias": True, "activation": "relu", "residual": True},
    "gated": {"bias": True, "activation": "gelu", "gated": True},
    "gated-residual": {"activation": "silu", "gated": True, "residual": True},
    "layernorm": {"bias": True, "residual": True, "norm": "layernorm", "affine": True},
    "rmsnorm": {"norm": "rmsnorm", "norm_eps": 1e-3},
    "gated-norm": {"bias": True, "activation": "relu", "gated": True, "norm": "layernorm"},
}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def operands(n, c, f, dtype=FP32, *, bias=False, residual=False, affine=False, **options):
    """x, weight and the keyword arguments of an epilogue; operands in unlike dtypes and layouts."""
    width = f // 2 if options.get("gated") else f
    x = torch.randn(n, c).to(dtype)
    weight = torch.randn(f, c) / max(c, 1) ** 0.5
    if bias:
        options["bias"] = torch.randn(f)
    if residual:
        options["residual"] = torch.randn(n, 2 * width)[:, width:].to(dtype)
    if affine:
        options["norm_weight"] = torch.rand(width) + 0.5
        options["norm_bias"] = torch.randn(width).to(dtype)
    return x, weight, options


def run(x, weight, format, **options):
    packed = ops.pack_linear(weight, format=format)
    return ops.packed_linear(x, packed, weight.shape[0], format=format, **options)


def reference64(x, weight, format, **options):
    """float64 behind the products; the operands of these as the format defines them."""
    packed = ref_pack(weight, format)
    if format == "bf16":
        x = x.to(BF16)
    return ref_linear(x.double(), packed, weight.shape[0], format=format, **options)


def plain(x, weight, format, **options):
    return ref_linear(x, ref_pack(weight, format), weight.shape[0], format=format, **options)


def assert_matches(x, weight, format, **options):
    got = run(x, weight, format, **options)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert_close_to_reference(
        format,
        got,
        reference64(x, weight, format, **options),
        plain(x, weight, format, **options),
        allow_degenerate=x.shape[0] < 2 or options.get("activation") == "relu",
        eps_factor=4.0 if got.numel() < 1000 else 1.0,
    )


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match_reference(shape, format):
    x, weight, options = operands(*shape, bias=True, activation="gelu")
    assert_matches(x, weight, format, **options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=name)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_match_reference(epilogue, format, dtype):
    for n, c, f in ((37, 96, 140), (65, 40, 64)):
        x, weight, options = operands(n, c, f, dtype, **EPILOGUES[epilogue])
        assert_matches(x, weight, format, **options)


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
def test_strides_match_reference(format):
    wide = torch.randn(40, 200)
    views = {
        "rows apart": wide[:, 3:133],
        "every other row": wide[::2, :130],
        "transposed": torch.randn(130, 40).mT,
        "expanded": wide[:1, :130].expand(40, 130),
    }
    weight = torch.randn(130, 48).mT / 11
    for x in views.values():
        assert torch.equal(run(x, weight, format), run(x.contiguous(), weight.contiguous(), format))
    assert_matches(views["rows apart"], weight, format)


@pytest.mark.quick
@pytest.mark.parametrize("epilogue", ["gelu", "gated", "layernorm"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_rows_have_the_same_bits_wherever_they_lie(dtype, format, epilogue):
    """Read in place or packed first: contiguous, amid NaN, at odd addresses, 4096 bytes apart."""
    for n, c in ((1, 64), (4, 64), (51, 448), (100, 832)):
        x, weight, options = operands(n, c, 70, dtype, **EPILOGUES[epilogue])
        expected = run(x, weight, format, **options)
        for stride, first in ((c + 64, 64), (c + 3, 1), (4096 // x.itemsize, 0)):
            wide = torch.full((n, stride), float("nan"), dtype=dtype)
            wide[:, first : first + c] = x
            found = run(wide[:, first : first + c], weight, format, **options)
            assert torch.equal(found, expected), (n, c, stride)
        row = x[:1].expand(n, c)  # one row for all, 0 bytes apart
        again = run(row, weight, format, **options)
        assert torch.equal(again, run(row.contiguous(), weight, format, **options))


@pytest.mark.parametrize("format", FORMATS)
def test_weight_dtypes(format):
    x, weight, _ = operands(20, 70, 40)
    for dtype in (BF16, FP16):
        low = weight.to(dtype)
        assert torch.equal(run(x, low, format), run(x, low.float(), format))


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_the_others(format):
    x, weight, options = operands(300, 530, 96, BF16, bias=True, norm="layernorm")
    for option in ({}, options, {"activation": "silu", "gated": True}):
        whole = run(x, weight, format, **option)
        for rows in (slice(0, 1), slice(5, 12), slice(31, 64), slice(0, 257)):
            assert torch.equal(run(x[rows], weight, format, **option), whole[rows])


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
def test_bit_equal_for_any_thread_count(format):
    """Two chunks of a gate once both added to the panel they share: F / 2 inside of a panel."""
    threads = torch.get_num_threads()
    cases = [(8, 600, 200), (8, 2000, 1000), (100, 300, 200), (700, 64, 100)]
    try:
        for shape in cases:
            for epilogue in ("gelu", "layernorm", "gated-norm"):
                x, weight, options = operands(*shape, BF16, **EPILOGUES[epilogue])
                results = []
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    results.append(run(x, weight, format, **options))
                assert all(torch.equal(r, results[0]) for r in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.quick
def test_int8_products_are_exact():
    """Integers that int8 holds exactly: extremes that saturate a 16-bit sum, and full ranges."""
    c, f = 300, 70
    x = torch.randint(0, 2, (40, c)).float() * 255
    x[:, 0], x[:, 1] = 0, 255
    weight = torch.full((f, c), 127.0)
    weight[1::2] = -127
    assert torch.equal(run(x, weight, "int8"), (x.double() @ weight.double().mT).float())
    x = torch.randint(-100, 156, (40, c)).float()
    x[:, 0], x[:, 1] = -100, 155
    weight = torch.randint(-127, 128, (f, c)).float()
    weight[:, 0] = 127
    assert torch.equal(run(x, weight, "int8"), (x.double() @ weight.double().mT).float())


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_stays_in_its_row(format, poison):
    x, weight, _ = operands(40, 70, 50)
    clean = run(x, weight, format)
    x[17, 33] = poison
    got = run(x, weight, format)
    assert not got[17].isfinite().any()
    rest = torch.arange(40) != 17
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.quick
def test_rows_of_zeros_and_tiny_rows():
    x, weight, _ = operands(3, 20, 40)
    x[0] = 0
    x[1] *= 1e-36
    for format in FORMATS:
        got = run(x, weight, format)
        assert (got[0] == 0).all() and got[1].abs().max() < 1e-34 and got[2].abs().max() > 0.01


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
def test_no_columns(format):
    """C = 0: the product is 0, the epilogue stays."""
    bias = torch.randn(5)
    assert torch.equal(
        run(torch.empty(3, 0), torch.empty(5, 0), format, bias=bias), bias.expand(3, 5)
    )
    assert run(torch.empty(3, 4), torch.empty(0, 4), format).shape == (3, 0)


@pytest.mark.quick
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    x, weight, _ = operands(5, 18, 12)
    packed = ops.pack_linear(weight, format=format)
    torch.library.opcheck(PACK, (weight, format))
    torch.library.opcheck(LINEAR, (x, packed, 12, format, *[None] * 2, False, *[None] * 5))
    for dtype in (BF16, FP16):
        rest = (
            torch.randn(12),
            "gelu",
            True,
            torch.randn(5, 6),
            "rmsnorm",
            torch.rand(6),
            None,
            1e-6,
        )
        torch.library.opcheck(LINEAR, (x.to(dtype).mT.contiguous().mT, packed, 12, format, *rest))


@pytest.mark.quick
def test_direct_call_refuses_gradients_when_they_are_asked_for():
    x, weight, _ = operands(5, 18, 12)
    packed = ops.pack_linear(weight, format="fp32")
    y = LINEAR(x.requires_grad_(), packed, 12, "fp32", *[None] * 2, False, *[None] * 5)
    with pytest.raises(NotImplementedError, match="there is no gradient"):
        y.sum().backward()


def test_compiles_without_a_break():
    x, weight, options = operands(20, 40, 24, bias=True, norm="layernorm", activation="gelu")
    packed = ops.pack_linear(weight, format="bf16")

    def layer(x):
        return ops.packed_linear(x, packed, 24, format="bf16", **options) * 2

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (20, 7):
            assert torch.equal(compiled(x[:n]), layer(x[:n]))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70),
    c=st.integers(1, 300),
    half=st.integers(1, 60),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([FP32, BF16]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    seed=st.integers(0, 2**31),
)
def test_fuzz(n, c, half, format, dtype, epilogue, seed):
    torch.manual_seed(seed)
    x, weight, options = operands(n, c, 2 * half, dtype, **EPILOGUES[epilogue])
    got = run(x, weight, format, **options)
    want = reference64(x, weight, format, **options)
    scale = want.abs().max().clamp(min=1) if want.numel() else 1
    # Errors of a norm grow with the inverse deviation of its row, which may be small by chance.
    if "norm" not in options:
        limit = 2e-2 if dtype == BF16 else 1e-5
        assert want.numel() == 0 or (got - want).abs().max() <= limit * scale
    assert got.shape == want.shape and got.isfinite().all()


X, W = torch.randn(4, 6), torch.randn(8, 6)
P = ops.pack_linear(W, format="bf16")


def linear(x=X, packed=P, out_features=8, format="bf16", **options):
    return ops.packed_linear(x, packed, out_features, format=format, **options)


ERRORS = {
    "pack_linear: weight is list": (lambda: ops.pack_linear([1], format="fp32"), TypeError),
    r"pack_linear: weight has shape \(6,\)": (
        lambda: ops.pack_linear(W[0], format="fp32"),
        ValueError,
    ),
    "pack_linear: weight is float64": (
        lambda: ops.pack_linear(W.double(), format="fp32"),
        TypeError,
    ),
    "pack_linear: format is 'int4', expected one of 'fp32', 'bf16', 'int8'": (
        lambda: ops.pack_linear(W, format="int4"),
        ValueError,
    ),
    "pack_linear: weight holds nan, int8 needs finite": (
        lambda: ops.pack_linear(W * float("nan"), format="int8"),
        ValueError,
    ),
    "pack_linear: weight requires grad": (
        lambda: ops.pack_linear(W.clone().requires_grad_(), format="fp32"),
        ValueError,
    ),
    r"packed_linear: x has shape \(6,\)": (lambda: linear(X[0]), ValueError),
    "packed_linear: x is int64": (lambda: linear(X.long()), TypeError),
    "packed_linear: x requires grad": (lambda: linear(X.clone().requires_grad_()), ValueError),
    "packed_linear: packed is float32, expected uint8": (lambda: linear(packed=X[0]), TypeError),
    "packed_linear: packed is on meta": (lambda: linear(packed=P.to("meta")), ValueError),
    r"packed_linear: packed has 2112 bytes, expected .* weight \(8, 40\)": (
        lambda: linear(torch.randn(4, 40)),
        ValueError,
    ),
    "packed_linear: out_features is float": (lambda: linear(out_features=8.0), TypeError),
    "packed_linear: out_features is -1": (lambda: linear(out_features=-1), ValueError),
    "packed_linear: format is 'fp16'": (lambda: linear(format="fp16"), ValueError),
    "packed_linear: activation is 'tanh'": (lambda: linear(activation="tanh"), ValueError),
    "packed_linear: gated is int": (lambda: linear(gated=1), TypeError),
    "packed_linear: out_features is 7, expected an even": (
        lambda: linear(out_features=7, gated=True),
        ValueError,
    ),
    r"packed_linear: bias has shape \(7,\), expected \(8,\)": (
        lambda: linear(bias=torch.zeros(7)),
        ValueError,
    ),
    "packed_linear: bias is int64": (lambda: linear(bias=torch.zeros(8).long()), TypeError),
    r"packed_linear: residual has shape \(4, 8\), expected \(4, 4\)": (
        lambda: linear(gated=True, residual=torch.zeros(4, 8)),
        ValueError,
    ),
    "packed_linear: norm is 'batchnorm'": (lambda: linear(norm="batchnorm"), ValueError),
    "packed_linear: norm is None, but a norm_weight": (
        lambda: linear(norm_weight=torch.ones(8)),
        ValueError,
    ),
    "packed_linear: norm_eps is -1": (lambda: linear(norm="rmsnorm", norm_eps=-1.0), ValueError),
    "packed_linear: norm_eps is str": (lambda: linear(norm="rmsnorm", norm_eps="x"), TypeError),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What Python checks, the kernel checks again: compiled graphs skip the Python check."""

    def direct(x=X, packed=P, f=8, bias=None, gated=False, residual=None, norm=None, weight=None):
        return LINEAR(x, packed, f, "bf16", bias, None, gated, residual, norm, weight, None, None)

    kinds = (RuntimeError, ValueError, TypeError)
    same_size = ops.pack_linear(torch.randn(9, 6), format="bf16")
    for bad in (
        {"packed": P[:-64]},
        {"packed": P.float()},
        {"packed": same_size},
        {"packed": torch.zeros_like(P)},
        {"f": 7, "gated": True},
        {"f": -8},
        {"bias": torch.zeros(7)},
        {"residual": torch.zeros(3, 8)},
        {"norm": "rmsnorm", "weight": torch.zeros(7)},
        {"norm": "none"},
        {"weight": torch.zeros(8)},
        {"x": X.double()},
    ):
        with pytest.raises(kinds, match="packed_linear"):
            direct(**bad)


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    cases = "shapes_match or exact or no_columns or epilogues and (gated or layernorm)"
    run_under_isa(isa, f"({cases}) and not every_isa", __file__)
