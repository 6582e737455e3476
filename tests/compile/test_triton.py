"""Every Triton kernel compiles for every architecture, fits its shared memory and does not spill.

Nothing runs: `cross.compiling` takes the place of the GPU, `report` reads the machine code.
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

import golden  # noqa: E402
import triton.language as tl  # noqa: E402
from calls import CALLS  # noqa: E402
from cross import TARGETS, compiling, fake_gpu  # noqa: E402
from pipe_bound import tensor_use_bound  # noqa: E402
from static_report import MACHINES, _occupancy, report  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from encfast import kernels  # noqa: E402
from encfast.kernels import _attn_grad, _config, grouped_mm, varlen_attn  # noqa: E402
from encfast.kernels._attn_tile import PLAIN  # noqa: E402

QUICK = ("sm_80", "sm_90")


@triton.jit
def _dot_kernel(p_x, p_out, N: tl.constexpr, STEPS: tl.constexpr):
    o_rows = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_sum = tl.zeros((N, N), tl.float32)
    for step in range(STEPS):
        b_x = tl.load(p_x + step * N * N + o_rows)
        b_sum = tl.dot(b_x, tl.trans(b_x), b_sum, input_precision="ieee")
    tl.store(p_out + o_rows, b_sum)


def _dot(n=64, steps=4, dtype=torch.bfloat16, **options):
    x, out = torch.zeros(steps, n, n, dtype=dtype), torch.zeros(n, n)
    _dot_kernel[(1,)](x, out, n, steps, **options)


def _report_dot(arch, **kwargs):
    with compiling(arch) as launches:
        _dot(**kwargs)
    (launch,) = launches
    assert (launch.name, launch.grid) == ("_dot_kernel", (1,))
    return report(launch.kernel)


def test_each_architecture_gets_its_own_kernel():
    assert _report_dot("sm_80").tensor_instructions == {"mma"}
    assert _report_dot("sm_90").tensor_instructions == {"wgmma"}
    assert _report_dot("sm_100").tensor_instructions == {"tcgen05"}
    assert _report_dot("gfx942").tensor_instructions == {"mfma"}


def test_the_cache_would_hand_out_the_wrong_kernel():
    """What `compiling` clears the caches against: if this fails, it need not any more."""
    args = (torch.bfloat16, torch.float32, 64, 4)
    try:
        with fake_gpu("sm_80"):
            _dot_kernel.warmup(*args, grid=(1,))
        with fake_gpu("sm_90"):
            stale = _dot_kernel.warmup(*args, grid=(1,))
    finally:
        _dot_kernel.device_caches.clear()
    assert report(stale).arch == "sm_80"


def test_the_driver_is_what_it_was_also_after_an_error():
    before, run = driver._active, triton.JITFunction.run
    with pytest.raises(ZeroDivisionError), compiling("sm_80"):
        assert driver.active.get_current_target().arch == 80
        _ = 1 / 0
    assert driver._active is before
    assert triton.JITFunction.run is run


@pytest.mark.parametrize("arch", TARGETS)
def test_launchers_see_the_architecture(arch):
    with compiling(arch):
        assert _config.target() == arch


def test_a_launch_leaves_its_output_alone():
    out = torch.ones(64, 64)
    with compiling("sm_80"):
        _dot_kernel[(1,)](torch.zeros(1, 64, 64, dtype=torch.bfloat16), out, 64, 1)
    assert (out == 1).all()


def test_too_much_shared_memory_is_reported():
    """128 x 128 bf16 tiles are 32 KiB; five stages of them fit sm_90 and not sm_86."""
    assert not _report_dot("sm_90", n=128, steps=8, num_stages=5, num_warps=8).problems
    found = _report_dot("sm_86", n=128, steps=8, num_stages=5, num_warps=8)
    assert found.blocks == 0
    assert any("shared memory" in problem for problem in found.problems)


def test_spills_are_reported():
    """Options that leave fewer registers than the sum alone takes."""
    found = _report_dot("sm_80", maxnreg=32)
    assert any("spilt" in problem for problem in found.problems)
    assert any("local memory" in problem for problem in found.problems) == bool(found.loop)
    assert found.registers <= 32
    found = _report_dot("gfx942", num_warps=1, waves_per_eu=8)
    assert any("spilt" in problem for problem in found.problems)


def test_the_main_loop_is_the_one_with_the_dots():
    found = _report_dot("sm_80", steps=64)
    assert 0 < found.loop["mma"] <= found.instructions["mma"]
    assert sum(found.loop.values()) < sum(found.instructions.values())
    assert not _report_dot("sm_80", steps=1).loop
    # 64 steps of a wgmma are unrolled to the end.
    assert _report_dot("sm_90", steps=1000).loop["wgmma"]
    assert _report_dot("gfx942", steps=64).loop["mfma"]


@pytest.mark.parametrize(
    ("arch", "warps", "shared", "warp_limit", "expected"),
    [
        ("sm_80", 4, 0, 64, (16, "warps")),
        ("sm_80", 1, 0, 64, (32, "blocks")),
        ("sm_80", 4, 0, 8, (2, "registers")),
        ("sm_80", 4, 81 * 1024, 64, (2, "shared memory")),
        ("sm_90", 8, 114 * 1024, 64, (1, "shared memory")),
        ("sm_86", 4, 100 * 1024, 64, (0, "shared memory")),
        ("gfx942", 4, 32 * 1024, 32, (2, "shared memory")),
    ],
)
def test_occupancy(arch, warps, shared, warp_limit, expected):
    assert _occupancy(MACHINES[arch], warps, shared, warp_limit) == expected


@pytest.mark.parametrize(
    ("arch", "opcodes", "bound"),
    [
        ("sm_80", ["HMMA.16816.F32.BF16"] * 2, 1.0),  # 8 cycles each
        ("sm_80", ["HMMA.16816.F32.BF16", "MUFU.EX2", "MUFU.EX2"], 0.5),
        ("sm_80", ["HMMA.16816.F32.BF16"] * 2 + ["LDSM.16.M88.4"] * 2, 0.5),
        ("sm_90", ["HGMMA.64x64x16.F32.BF16"], 1.0),
        ("sm_90", ["HGMMA.64x64x16.F32.BF16"] + ["FFMA"] * 64, 0.492),  # 65 issued in 32 cycles
        ("sm_80", ["FFMA"], None),
        ("sm_100", ["UTCHMMA"], None),
    ],
)
def test_tensor_use_bound(arch, opcodes, bound):
    assert tensor_use_bound(opcodes, arch) == bound


def test_every_kernel_file_has_a_quick_call():
    files = [p.stem for p in Path(kernels.__file__).parent.glob("[!_]*.py")]
    missing = [f for f in files if not any(n.startswith(f) and CALLS[n].quick for n in CALLS)]
    assert not missing, f"no call in calls.py whose name begins with one of {missing}"


def test_golden_figures_tell_better_from_worse(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    then = _report_dot("sm_80", steps=64)
    assert "knows nothing" in golden.regressions("dot", "sm_80", [then])[0]
    golden.update("dot", "sm_80", [then])
    assert golden.regressions("dot", "sm_80", [then]) == []
    assert golden.regressions("dot", "sm_90", [then])
    assert golden.regressions("dot", "sm_80", [then, then])
    worse = {
        "registers": then.registers + 9,
        "spill_bytes": then.spill_bytes + 4,
        "shared": then.shared + 1,
        "occupancy": then.occupancy / 2,
        "loop": {"mma": sum(then.loop.values()) * 2},
    }
    for figure, value in worse.items():
        now = dataclasses.replace(then, **{figure: value})
        assert len(golden.regressions("dot", "sm_80", [now])) == 1, figure
    better = dataclasses.replace(then, registers=16, shared=0, occupancy=1.0)
    assert golden.regressions("dot", "sm_80", [better]) == []


def _case(name, arch):
    marks = () if CALLS[name].quick and arch in QUICK else pytest.mark.slow
    return pytest.param(name, arch, id=f"{name}-{arch}", marks=marks)


@pytest.mark.parametrize(
    ("name", "arch"), [_case(name, arch) for name in CALLS for arch in TARGETS]
)
def test_compiles_fits_and_does_not_spill(name, arch, request):
    with compiling(arch) as launches:
        CALLS[name].launch()
    assert launches
    reports = [report(launch.kernel) for launch in launches]
    assert not [problem for found in reports for problem in found.problems]
    for launch in launches:  # a GPU's limits of a grid's y and z
        assert all(size <= 65535 for size in launch.grid[1:]), launch
    with_tensor_cores = {found.name for found in reports if found.tensor_instructions}
    assert with_tensor_cores >= set(CALLS[name].tensor_kernels)
    if CALLS[name].quick:
        if request.config.getoption("--update-static"):
            golden.update(name, arch, reports)
        assert not golden.regressions(name, arch, reports)


# By kernel: its tiles, and how many products of BLOCK_M x BLOCK_N x D its loop makes per step.
ATTENTION_LOOPS = {
    "varlen_attn_kernel": (varlen_attn._TILES, 2),
    "varlen_attn_dq_kernel": (_attn_grad._DQ_TILES, 3),
    "varlen_attn_dkv_kernel": (_attn_grad._DKV_TILES, 4),
}
# One predicate more than the bar: ptxas makes one of each asynchronous copy's condition.
MANY_SELECTS = ("varlen_attn_dkv_kernel", 128)


@pytest.mark.parametrize(("arch", "least"), [("sm_80", 0.70), ("sm_90", 0.65)])
@pytest.mark.parametrize("head_size", (64, 128))
def test_the_main_loop_of_attention_leaves_the_tensor_cores_busy(head_size, arch, least):
    """A loop with masks, or one that waits for its own index arithmetic, fails; so does one whose
    warps compute the same products, which a tile with too few rows makes them do."""
    with compiling(arch) as launches:
        CALLS[f"varlen_attn_{head_size}"].launch()
        tiles = {
            name: _config.for_head(table, torch.bfloat16, head_size, PLAIN)[1]
            for name, (table, _) in ATTENTION_LOOPS.items()
        }
    found = {x.name: report(x.kernel) for x in launches if x.name in ATTENTION_LOOPS}
    for name, (_, products) in ATTENTION_LOOPS.items():
        assert found[name].tensor_use_bound >= least, name
        if arch != "sm_80":  # a wgmma of sm_90 stands for many of these instructions
            continue
        loop, (block_m, block_n, warps, _) = found[name].loop, tiles[name]
        assert loop["mma"] * warps * 16 * 8 * 16 == products * block_m * block_n * head_size, name
        if (name, head_size) != MANY_SELECTS:
            assert loop["select"] < 0.1 * loop["mma"], name


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_the_main_loops_of_grouped_mm_multiply_and_load(arch):
    """Whole tiles have no masks in them, and no warp computes what another one does."""
    with compiling(arch) as launches:
        CALLS["grouped_mm_768"].launch()
        tile = _config.nearest(grouped_mm._TILES, arch)[2][grouped_mm.MANY]
    found = [report(x.kernel) for x in launches if x.name != "grouped_mm_dbias_kernel"]
    assert len(found) == 3
    block_m, block_n, block_k, warps, _ = tile
    for kernel in found:
        assert kernel.tensor_use_bound >= 0.9
        if arch == "sm_80":
            assert kernel.loop["mma"] * warps * 16 * 8 * 16 == block_m * block_n * block_k
            assert kernel.loop["select"] < 0.25 * kernel.loop["mma"]


def test_grouped_mm_in_float32_adds_the_sums_of_its_steps():
    """One chain of 1536 terms would have three times the largest error of plain PyTorch."""
    with compiling("sm_80") as launches:
        grouped_mm.grouped_mm(
            torch.zeros(1024, 64), torch.zeros(2, 64, 64), torch.zeros(3, dtype=torch.int32), None
        )
        rows, columns, terms, warps, _ = grouped_mm._TILES["sm_80"][4][grouped_mm.MANY]
    (found,) = [report(x.kernel) for x in launches]
    sums = rows * columns // (32 * warps)  # of a thread
    assert found.loop["float"] >= sums * terms + sums
