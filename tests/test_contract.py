"""What every op promises to PyTorch: opcheck, compile, export, checkpointing, honest backends."""

import ast
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from encfast import ops

ROOT = Path(__file__).resolve().parents[1]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ATTN, ATTN_BWD = torch.ops.encfast.varlen_attn.default, torch.ops.encfast.varlen_attn_bwd.default


def cu_seqlens(*lens):
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def attn_args(q, k, v, cu_q, cu_k=None, max_q=None, max_k=None, **options):
    """The full argument list of encfast::varlen_attn."""
    options = {
        "scale": None,
        "causal": False,
        "window": (-1, -1),
        "alibi_slopes": None,
        "rel_bias": None,
        "bias": None,
        "bias_offsets": None,
        "softcap": None,
        "dropout_p": None,
        "rng": None,
        **options,
    }
    return (q, k, v, cu_q, cu_k, max_q, max_k, *options.values())


def contiguous(n, heads, size, dtypes):
    return [torch.randn(n, heads, size).to(d) for d in dtypes]


def transposed(n, heads, size, dtypes):
    return [torch.randn(heads, n, size).to(d).transpose(0, 1) for d in dtypes]


def expanded(n, heads, size, dtypes):
    return [torch.randn(1, heads, size).to(d).expand(n, -1, -1) for d in dtypes]


def fused(n, heads, size, dtypes):
    return list(torch.randn(n, 3, heads, size).to(dtypes[0]).unbind(1))


ATTN_CASES = {
    "float32-contiguous": (contiguous, (1, 5, 0, 3), FP32),
    "bfloat16-contiguous": (contiguous, (1, 5, 0, 3), BF16),
    "float16-contiguous": (contiguous, (1, 5, 0, 3), FP16),
    "float32-transposed": (transposed, (1, 5, 0, 3), FP32),
    "bfloat16-expanded": (expanded, (1, 5, 0, 3), BF16),
    "float32-fused": (fused, (1, 5, 0, 3), FP32),
    "bfloat16-bfloat16-float32": (contiguous, (1, 5, 0, 3), (BF16, BF16, FP32)),
    "float32-bfloat16-bfloat16": (transposed, (1, 5, 0, 3), (FP32, BF16, BF16)),
    "float16-bfloat16-float16": (contiguous, (1, 5, 0, 3), (FP16, BF16, FP16)),
    "float32-N0": (contiguous, (0, 0), FP32),
    "bfloat16-B0": (contiguous, (), BF16),
}


def make_attn(make, lens, dtypes, heads=2, size=9):
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 3
    return make(sum(lens), heads, size, dtypes), cu_seqlens(*lens)


@pytest.mark.quick
@pytest.mark.parametrize("case", ATTN_CASES)
def test_opcheck_varlen_attn(case):
    qkv, cu = make_attn(*ATTN_CASES[case])
    leaves = [x.requires_grad_() for x in qkv]
    torch.library.opcheck(ATTN, attn_args(*leaves, cu))


@pytest.mark.parametrize("case", ATTN_CASES)
def test_opcheck_varlen_attn_bwd(case):
    qkv, cu = make_attn(*ATTN_CASES[case])
    out, lse = ATTN(*attn_args(*qkv, cu))
    rule = (None, None, None, None, False, [-1, -1], *(None,) * 7, False, False)
    torch.library.opcheck(ATTN_BWD, (torch.randn_like(out), None, *qkv, out, lse, cu, *rule))
    torch.library.opcheck(
        ATTN_BWD, (torch.randn_like(out), torch.randn_like(lse), *qkv, out, lse, cu, *rule)
    )


def test_opcheck_varlen_attn_with_every_option():
    q, k, v = torch.randn(9, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8)
    args = attn_args(
        *(x.requires_grad_() for x in (q, k, v)),
        cu_seqlens(1, 5, 0, 3),
        cu_seqlens(4, 0, 2, 5),
        5,
        5,
        scale=0.3,
        causal=True,
        window=(2, 1),
        alibi_slopes=torch.rand(4, 4),
        softcap=3.0,
    )
    torch.library.opcheck(ATTN, args)


BIASES = {
    "rel_bias table": {"rel_bias": torch.randn(4, 5)},
    "rel_bias rows": {"rel_bias": torch.randn(9, 4, 3).bfloat16()},
    "bias shared": {"bias": torch.randn(24)},
    "bias per head": {"bias": torch.randn(24, 4).half().mT},
    "bias expanded": {"bias": torch.randn(24).expand(4, -1), "rel_bias": torch.randn(4, 1)},
    "bias bool": {"bias": torch.rand(24) < 0.7},
    "dropout": {"dropout_p": 0.3, "rng": torch.tensor([5, 6])},
    "all": {
        "rel_bias": torch.randn(4, 5),
        "bias": torch.randn(4, 24),
        "dropout_p": 0.3,
        "rng": torch.tensor([5, 6]),
        "alibi_slopes": torch.rand(4),
        "softcap": 3.0,
        "window": (3, 2),
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_opcheck_varlen_attn_with_biases(name, dtype):
    """Lengths (1, 3, 0, 5) and (4, 0, 3, 4): matrices of 4, 0, 0 and 20 entries."""
    options = {n: x.detach() if isinstance(x, Tensor) else x for n, x in BIASES[name].items()}
    if "bias" in options:
        options["bias_offsets"] = torch.tensor([0, 4, 4, 4, 24])
    wanted = [n in options and options[n].is_floating_point() for n in ("rel_bias", "bias")]
    for n in itertools.compress(("rel_bias", "bias"), wanted):
        options[n].requires_grad_()
    q, k, v = (torch.randn(n, h, 8).to(dtype) for n, h in ((9, 4), (11, 2), (11, 2)))
    lengths = (cu_seqlens(1, 3, 0, 5), cu_seqlens(4, 0, 3, 4))
    args = attn_args(*(x.requires_grad_() for x in (q, k, v)), *lengths, **options)
    torch.library.opcheck(ATTN, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    out, lse = ATTN(*detached)
    torch.library.opcheck(
        ATTN_BWD,
        (torch.randn_like(out), None, *detached[:3], out, lse, *detached[3:], *wanted),
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "empty", "D1"])
def test_opcheck_pad(dtype, layout):
    shape = {"empty": (0, 3), "D1": (1, 1)}.get(layout, (6, 4))
    x = torch.randn(shape, dtype=dtype)
    if layout == "transposed":
        x = x.mT.contiguous().mT
    if layout == "expanded":
        x = x[:1].expand_as(x)
    n = shape[0]
    index = torch.arange(n).flip(0)
    torch.library.opcheck(
        torch.ops.encfast.gather_rows.default, (x.detach().requires_grad_(), index)
    )
    torch.library.opcheck(
        torch.ops.encfast.scatter_rows.default, (x.detach().requires_grad_(), index, n + 2)
    )
    torch.library.opcheck(torch.ops.encfast.find_rows.default, (x > 0,))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "fused", "empty"])
def test_opcheck_rotary(dtype, layout):
    n = 0 if layout == "empty" else 6
    make = {"transposed": transposed, "expanded": expanded, "fused": fused}.get(layout, contiguous)
    q, k, _ = make(n, 2, 9, (dtype,) * 3)
    table, positions = torch.rand(7, 3), torch.arange(n)
    op = torch.ops.encfast.rotary.default
    q, k = (x.detach().requires_grad_() for x in (q, k))
    torch.library.opcheck(op, (q, k, table, table, positions, True, False))
    torch.library.opcheck(op, (q, None, table[:n], table[:n], None, False, True))


class Graphs:
    """A torch.compile backend that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, example_inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(module, example_inputs)


SIX_RAGGED = [(3, 0, 9), (1, 17, 0, 5), (0, 2, 2), (30, 4, 0, 0, 1), (8, 0, 8), (2, 0, 40, 7, 3, 3)]


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.quick
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_varlen_attn_compiles_once_for_ragged_shapes(graphs, checkpointed):
    """max_seqlen is a SymInt: as an int argument it made one graph per batch."""
    weight, slopes, table = torch.randn(16, 48), torch.rand(2), torch.randn(2, 7)

    def block(x, cu, max_seqlen):
        q, k, v = (x @ weight).view(-1, 3, 2, 8).unbind(1)
        out = ops.varlen_attn(
            q,
            k,
            v,
            cu,
            max_seqlen_q=max_seqlen,
            window=(4, -1),
            alibi_slopes=slopes,
            rel_bias=table * x.mean(),
            dropout_p=0.2,
        )
        return x + out.flatten(1)

    def step(x, cu, max_seqlen):
        for _ in range(2):
            if checkpointed:
                x = checkpoint(block, x, cu, max_seqlen, use_reentrant=False)
            else:
                x = block(x, cu, max_seqlen)
        return x

    compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
    for lens in SIX_RAGGED:
        x, cu = torch.randn(sum(lens), 16), cu_seqlens(*lens)
        results = []
        for f in (compiled, step):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(0)
            out = f(leaf, cu, max(lens))
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert graphs.count <= 2


@pytest.mark.quick
def test_pad_compiles_once_for_ragged_shapes(graphs):
    def step(x, rows, n):
        y = ops.scatter_rows(ops.select_rows(x, rows), rows, n)
        return ops.pad(y, torch.arange(n), 2, n, fill=1.0)

    compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
    for lens in SIX_RAGGED:
        x = torch.randn(sum(lens), 3, requires_grad=True)
        rows = torch.randperm(sum(lens))[: max(lens)]
        torch.testing.assert_close(compiled(x, rows, sum(lens)), step(x, rows, sum(lens)))
    assert graphs.count <= 2


@pytest.mark.quick
def test_rotary_compiles_once_for_ragged_shapes(graphs):
    def step(qkv, cos, sin, positions):
        q, k, v = qkv.split(2, dim=1)
        q, k = ops.rotary_qk(q, k, cos, sin, positions=positions)
        return torch.cat((q, ops.rotary(k, cos[positions], sin[positions]), v))

    compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
    angles = torch.rand(40, 4)
    for lens in SIX_RAGGED:
        qkv = torch.randn(sum(lens), 6, 8)
        args = (angles.cos(), angles.sin(), torch.randint(40, (sum(lens),)))
        results = []
        for f in (compiled, step):
            leaf = qkv.clone().requires_grad_()
            out = f(leaf, *args)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert graphs.count <= 2


def test_varlen_attn_under_inductor(graphs):
    def f(qkv, cu):
        return ops.varlen_attn(*qkv.unbind(1), cu, return_lse=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for lens in SIX_RAGGED[:2]:
        qkv = torch.randn(sum(lens), 3, 2, 8)
        cu = cu_seqlens(*lens)
        for got, want in zip(compiled(qkv, cu), f(qkv, cu), strict=True):
            assert torch.equal(got, want)


@pytest.mark.quick
def test_compiled_code_never_reads_out_of_bounds(graphs):
    """A graph skips the Python checks of values; the kernel must not."""
    compiled = torch.compile(
        lambda q, cu: ops.varlen_attn(q, q, q, cu), backend=graphs, fullgraph=True, dynamic=True
    )
    q = torch.randn(6, 2, 8)
    assert torch.equal(compiled(q, cu_seqlens(2, 4)), ops.varlen_attn(q, q, q, cu_seqlens(2, 4)))
    for bad in ([0, 2, 600], [0, -4, 6], [1, 2, 6], [0, 9, 6]):
        with pytest.raises((RuntimeError, ValueError), match="cu_seqlens_q"):
            compiled(q, torch.tensor(bad, dtype=torch.int32))


@pytest.mark.quick
def test_a_packed_bias_compiles_and_is_never_read_out_of_bounds(graphs):
    """Its offsets are computed in the graph; those of another batch end in an exception."""

    def f(q, bias, cu, offsets=None):
        return ops.varlen_attn(q, q, q, cu, bias=bias, bias_offsets=offsets)

    compiled = torch.compile(f, backend=graphs, fullgraph=True, dynamic=True)
    for lens in SIX_RAGGED:
        q, bias = torch.randn(sum(lens), 2, 8), torch.randn(sum(n * n for n in lens))
        results = []
        for g in (compiled, f):
            leaves = [x.clone().requires_grad_() for x in (q, bias)]
            out = g(*leaves, cu_seqlens(*lens))
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert graphs.count <= 2
    for bad in ((0, 4, 19), (0, -4, 20), (1, 5, 20), (0, 16, 20)):
        with pytest.raises((RuntimeError, ValueError), match="bias"):
            compiled(torch.randn(6, 2, 8), torch.randn(20), cu_seqlens(2, 4), torch.tensor(bad))
    with pytest.raises((RuntimeError, ValueError), match="bias"):
        compiled(torch.randn(6, 2, 8), torch.randn(19), cu_seqlens(2, 4))


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    cu = cu_seqlens(3, 0, 6)

    def block(x):
        q, k, v = x.view(9, 3, 2, 4).unbind(1)
        return ops.varlen_attn(q, k, v, cu).flatten(1).repeat(1, 3)

    x = torch.randn(9, 24, requires_grad=True)
    (want,) = torch.autograd.grad(block(x).sin().sum(), x)
    checkpoint(block, x, use_reentrant=reentrant).sin().sum().backward()
    assert torch.equal(x.grad, want)


class Attention(torch.nn.Module):
    def forward(self, qkv, cu):
        out = ops.varlen_attn(*qkv.unbind(1), cu, window=(3, 3))
        return ops.select_rows(out.flatten(1), cu[:-1].long())


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    rows, batch = torch.export.Dim("rows", min=2), torch.export.Dim("batch", min=3)
    program = torch.export.export(
        Attention(),
        (torch.randn(9, 3, 2, 8), cu_seqlens(3, 1, 5)),
        dynamic_shapes=({0: rows}, {0: batch}),
        strict=strict,
    )
    args = (torch.randn(20, 3, 2, 8), cu_seqlens(10, 1, 7, 2))
    assert torch.equal(program.module()(*args), Attention()(*args))


@pytest.mark.quick
@pytest.mark.parametrize("op", ["varlen_attn", "gather_rows", "scatter_rows", "find_rows"])
def test_meta_tensors_give_shapes(op):
    x = torch.empty(7, 2, 8, device="meta", dtype=BF16)
    if op == "varlen_attn":
        cu = torch.empty(3, device="meta", dtype=torch.int32)
        out, lse = ops.varlen_attn(x, x, x, cu, return_lse=True)
        assert out.shape == x.shape and out.dtype == BF16
        assert lse.shape == (2, 7) and lse.dtype == FP32
    elif op == "find_rows":
        indices, cu_seqlens = ops.find_rows(torch.empty(2, 5, device="meta", dtype=torch.int64))
        assert indices.shape == (10,) and indices.dtype == torch.int64
        assert cu_seqlens.shape == (3,) and cu_seqlens.dtype == torch.int32
    else:
        index = torch.empty(7, device="meta", dtype=torch.int64)
        got = ops.gather_rows(x, index) if op == "gather_rows" else ops.scatter_rows(x, index, 9)
        assert got.shape == (7 if op == "gather_rows" else 9, 2, 8) and got.dtype == BF16


@pytest.mark.quick
def test_no_device_sync_on_a_gpu():
    """Fake CUDA tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        q = torch.empty(7, 2, 8, device="cuda", dtype=BF16)
        cu = torch.empty(3, device="cuda", dtype=torch.int32)
        rows = torch.empty(4, device="cuda", dtype=torch.int64)
        slopes = torch.empty(2, device="cuda")
        out = ops.varlen_attn(q, q, q, cu, max_seqlen_q=7, alibi_slopes=slopes)
        assert out.shape == q.shape and out.device.type == "cuda"
        table, bias = torch.empty(2, 5, device="cuda"), torch.empty(2, 9, device="cuda")
        options = {"rel_bias": table, "bias": bias}
        assert ops.varlen_attn(q, q, q, cu, max_seqlen_q=7, **options).shape == q.shape
        assert ops.select_rows(q, rows).shape == (4, 2, 8)
        indices, cu_seqlens = ops.find_rows(torch.empty(3, 5, device="cuda", dtype=torch.bool))
        assert indices.shape == (15,) and cu_seqlens.shape == (4,)
        assert ops.scatter_rows(ops.select_rows(q, rows), rows, 9).shape == (9, 2, 8)
        table = torch.empty(9, 4, device="cuda")
        positions = torch.empty(7, device="cuda", dtype=torch.int64)
        assert ops.rotary(q, table, table, positions).shape == (7, 2, 8)
        with pytest.raises(ValueError, match="max_seqlen_q is None; pass it as an int"):
            ops.varlen_attn(q, q, q, cu)
        with pytest.raises(ValueError, match="max_seqlen_k is None"):
            ops.varlen_attn(q, q, q, cu, cu_seqlens_k=cu, max_seqlen_q=7)


@pytest.mark.quick
def test_every_op_has_its_files_and_answers_for_its_backends():
    for stem in ops.OPS:
        module = importlib.import_module(f"encfast.ops.{stem}")
        assert set(ops.backends(stem)) == {"cpu", "cuda"}
        for text in ops.backends(stem).values():
            assert text in ("native", "triton") or text.startswith("reference: ")
        assert module.__doc__ and hasattr(ops, stem)
        core = ops.LENT_CORES.get(stem, stem)
        for path in (f"ref/{stem}.py", f"../csrc/cpu/{core}.cpp", f"../csrc/bind/{core}.cpp"):
            assert (ROOT / "encfast" / path).is_file(), path
    with pytest.raises(ValueError, match="'attn' is not an op"):
        ops.backends("attn")


@pytest.mark.quick
def test_references_import_nothing_of_encfast():
    allowed = {"torch", "typing", "collections", "itertools", "math"}
    for path in (ROOT / "encfast/ref").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                inside = node.level == 1
                assert inside or node.module.split(".")[0] in allowed, f"{path.name}: {node.module}"
            if isinstance(node, ast.Import):
                assert all(n.name.split(".")[0] in allowed for n in node.names), path.name


WITHOUT_LIBRARY = """
import sys, warnings, torch
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("no library today"))
warnings.simplefilter("ignore")
from encfast import ops
assert ops.backends("varlen_attn")["cpu"].startswith("reference"), ops.backends("varlen_attn")
q = torch.randn(5, 2, 4, requires_grad=True)
cu = torch.tensor([0, 2, 5], dtype=torch.int32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ops.varlen_attn(q, q, q, cu).sum().backward()
        ops.select_rows(q, torch.tensor([0, 0]))
        ops.rotary(q, torch.ones(5, 2), torch.zeros(5, 2)).sum().backward()
said = [str(w.message) for w in caught if "no native kernel" in str(w.message)]
named = ("ops.varlen_attn", "ops.pad", "ops.rotary")
assert len(said) == 3 and all(n in s for n, s in zip(named, said)), said
for bad in ([0, 9, 5], [0, 2, 6]):
    try:
        torch.ops.encfast.varlen_attn(
            q, q, q, torch.tensor(bad, dtype=torch.int32), None, None, None, None, False, [-1, -1],
            None, None, None, None, None, None, None)
    except ValueError as e:
        assert "cu_seqlens_q" in str(e)
    else:
        raise AssertionError(bad)
import os
os.environ["ENCFAST_REQUIRE_NATIVE"] = "1"
try:
    ops.varlen_attn(q, q, q, cu)
except RuntimeError as e:
    assert "ENCFAST_REQUIRE_NATIVE" in str(e)
else:
    raise AssertionError("the reference served under ENCFAST_REQUIRE_NATIVE=1")
"""


@pytest.mark.quick
def test_reference_serves_without_the_library_and_says_so_once():
    subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], check=True, cwd=ROOT)


EXAMPLES_WITHOUT_LIBRARY = """
import doctest, warnings, torch
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("no library today"))
warnings.simplefilter("ignore")
import encfast
from encfast import ops
globs = {"torch": torch, "encfast": encfast, "ops": ops, "PackedBatch": encfast.PackedBatch}
runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
finder = doctest.DocTestFinder(recurse=False)
for name in ops.__all__:
    for test in finder.find(getattr(ops, name), name, globs=dict(globs)):
        torch.manual_seed(0)
        runner.run(test)
assert runner.tries > 50 and not runner.failures, runner.tries
"""


def test_the_examples_of_all_ops_run_without_the_library():
    subprocess.run([sys.executable, "-c", EXAMPLES_WITHOUT_LIBRARY], check=True, cwd=ROOT)
