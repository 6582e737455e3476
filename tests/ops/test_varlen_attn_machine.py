"""varlen_attn on the machine: every ISA it has, its threads, its memory, offsets beyond 32 bits."""

import mmap

import pytest
import torch
from attn_cases import cu_seqlens
from fresh_python import python, run_under_isa

from encfast import ops

NATIVE = ops.backends("varlen_attn")["cpu"] == "native"
needs_native = pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")


def other_isas():
    if not NATIVE:
        return []
    isas = torch.ops.encfast.cpu_isas().split(",")
    return [isa for isa in isas if isa != torch.ops.encfast.cpu_isa()]


@pytest.mark.host
@needs_native
@pytest.mark.parametrize("isa", other_isas())
def test_every_isa_of_this_machine_matches_the_reference(isa):
    """The ISA is chosen once per process, so each but ours runs the cases in its own."""
    cases = (
        "(match_reference or matches_reference or mixed or visible_key or hidden or far_from or "
        "the_mask_is or another_dtype or short or is_exact or share_a_place) "
        "and not match_reference_more"
    )
    files = ("varlen_attn", "varlen_attn_short", "varlen_attn_bias", "varlen_attn_dropout", "pad")
    run_under_isa(isa, cases, *(f"tests/ops/test_{name}.py" for name in files))


THREADS = """
import os, time, torch
from encfast import ops

def cpu_seconds():
    tick = os.sysconf("SC_CLK_TCK")
    times = {}
    for task in os.listdir("/proc/self/task"):
        fields = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
        times[task] = (int(fields[11]) + int(fields[12])) / tick
    return times

torch.set_num_threads(2)
q = torch.randn(2048, 4, 64, requires_grad=True)
cu = torch.arange(0, 2049, 256, dtype=torch.int32)
before, end = cpu_seconds(), time.monotonic() + 60
while sum(cpu_seconds().values()) - sum(before.values()) < 2 and time.monotonic() < end:
    ops.varlen_attn(q, q, q, cu).sum().backward()
used = sorted(t - before.get(task, 0) for task, t in cpu_seconds().items())
print(used)
assert used[-2] > 0.25 * sum(used), f"CPU seconds per thread: {used}"
"""


@pytest.mark.host
@needs_native
def test_two_threads_serve():
    """An extension without OpenMP runs on one thread and says nothing; CPU time per thread does."""
    python("-c", THREADS, OMP_NUM_THREADS="2")


PEAK = """
import sys, torch
from encfast import ops

def peak_kib():  # ru_maxrss would start at what the parent process held
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

n = int(sys.argv[1])
torch.set_num_threads(2)
q, k, v = (torch.randn(n, 1, 32).bfloat16().requires_grad_() for _ in range(3))
lengths = [torch.tensor([0, m], dtype=torch.int32) for m in (64, n)]
ops.varlen_attn(q[:64], k[:64], v[:64], lengths[0]).sum().backward()  # what a first call loads
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak starts again from here
before = peak_kib()
ops.varlen_attn(q, k, v, lengths[1]).sum().backward()
print(peak_kib() - before)
"""


@pytest.mark.host
@needs_native
def test_peak_memory_is_linear_in_the_length():
    """One sequence of 32,768 tokens, forward and backward; its score matrix would take 4 GiB."""
    kib = {n: int(python("-c", PEAK, str(n))) for n in (16384, 32768)}
    inputs = 32768 * 32 * 2 / 1024  # KiB of one of q, k, v in bfloat16
    print(f"peak over the inputs: {kib} KiB; one input is {inputs:.0f} KiB")
    assert kib[32768] < 24 * inputs
    assert kib[32768] < 3 * kib[16384]


def far_apart(shape, stride):
    """A tensor whose rows are `stride` elements apart: address space for all, memory for a few."""
    rows, heads, size = shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * ((rows - 1) * stride + heads * size), flags=flags)
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    return flat.as_strided(shape, (stride, size, 1)).copy_(torch.randn(shape))


@pytest.mark.quick
def test_rows_more_than_two_gibi_elements_apart():
    q, k, v = (far_apart((3, 2, 8), 2**31 + 11) for _ in range(3))
    results = []
    for tensors in ((q, k, v), [x.clone() for x in (q, k, v)]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = ops.varlen_attn(*leaves, cu_seqlens((1, 2)))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


@pytest.mark.host
@pytest.mark.quick
def test_a_fused_projection_is_read_in_place():
    """Views of [N, 3, H, D] go to the kernel as they are, strides and all."""
    qkv = torch.randn(4096, 3, 4, 64)
    q, k, v = qkv.unbind(1)
    cu = torch.arange(0, 4097, 64, dtype=torch.int32)
    ops.varlen_attn(q, k, v, cu)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.varlen_attn(q, k, v, cu)
    copies = [e.key for e in profile.key_averages() if e.key in ("aten::copy_", "aten::clone")]
    if NATIVE:
        assert not copies


@needs_native
def test_large_outputs_equal_those_of_small_calls():
    """Outputs that no private cache holds are stored past the caches; the values are the same."""
    lengths = [64] * 48
    inputs = [torch.randn(sum(lengths), 12, 64) for _ in range(4)]

    def attend(rows, count):
        q, k, v = (x[rows].clone().requires_grad_() for x in inputs[:3])
        out = ops.varlen_attn(q, k, v, cu_seqlens([64] * count))
        return (out, *torch.autograd.grad(out, (q, k, v), inputs[3][rows]))

    whole = attend(slice(None), len(lengths))
    parts = [attend(slice(i * 64, i * 64 + 256), 4) for i in range(0, len(lengths), 4)]
    for big, *small in zip(whole, *parts, strict=True):
        assert torch.equal(big, torch.cat(small))
