"""What only a GPU can show: streams, graphs, waits, devices, sizes beyond 32 bits, assertions.

Results and gradients of every op are compared by `pytest tests/ops --on-gpu`; `make gpu-check` runs
both.
"""

import os
import subprocess
import sys

import pytest
import torch

from encfast import ops
from gpu_check import CPU_ALONE

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no usable GPU"),
]

BF16 = torch.bfloat16
LENS = (1, 63, 0, 129, 300)
N = sum(LENS)


def cu_seqlens(lens=LENS, device="cuda"):
    return torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)


def attend(q, k, v, cu, **options):
    return ops.varlen_attn(q, k, v, cu, max_seqlen_q=max(LENS), max_seqlen_k=max(LENS), **options)


def rotate(q, k, v, cu):
    angles = torch.linspace(0, 6, N * 32, device=q.device).reshape(N, 32)
    return ops.rotary(q, angles.cos(), angles.sin())


def mask_and_restore(q, k, v, cu, keep=10, **added):
    """17 signals of 29 patches: `keep` of each are seen, k's first row fills the gaps."""
    signals = q.view(17, 29, 4, 64).transpose(1, 2).flatten(2)  # [17, 4, 29 * 64]
    noise = q.detach().float().sum((1, 2)).view(17, 29)
    chosen = ops.select_patches(noise, keep)
    seen = ops.gather_patches(signals, chosen.visible, (64,))
    return ops.restore_rows(seen, chosen.restore, k[0].flatten(), **added)


def route_and_return(q, k, v, cu):
    """Rows of k to 8 experts chosen by q and back, some of them dropped at random."""
    options = {"capacity_factor": 1.5, "priority": "random", "noise": "gumbel_rest"}
    logits = ops.jitter_rows(q.flatten(1)[:, :8], 0.01)
    routing = ops.route_tokens(logits, 2, renormalise="kept", **options)
    return ops.unpermute_rows(ops.permute_rows(k.flatten(1), routing).sin(), routing)


def multiply_groups(q, k, v, cu):
    """Rows of q by a weight for each sequence, made of k; the last rows belong to none."""
    E = len(LENS)
    weight, bias = k[: E * 64].reshape(E, 256, 64), v[:E].flatten(1)
    return ops.grouped_mm(q[:, 0], weight, cu.clamp(max=N - 7), bias=bias)


def pool_segments(q, k, v, cu):
    """Rows of q by attention, scored by k, and the largest of v."""
    scores = k.float().sum((1, 2))
    pooled = ops.seg_pool(q.flatten(1), cu, "attention", weights=scores, normalize=True)
    return pooled + ops.seg_pool(v.flatten(1), cu, "max")


def predict_entries(q, k, v, cu):
    """Every other row of q by a vocabulary of 300 made of k, a few of them twice or ignored."""
    weight, bias = k.flatten(1)[:300], v.flatten(1)[:300, 0]
    rows = torch.arange(0, N, 2, device=q.device) // 4
    targets = (rows * 7) % 300
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "ignore_index": 21, "reduction": "none"}
    return ops.linear_cross_entropy(q.flatten(1), weight, targets, bias, rows=rows, **options)


def diverge_from_teacher(q, k, v, cu):
    """q by a vocabulary made of k, from v by one made of v."""
    x, weight, teacher = q.flatten(1), k.flatten(1)[:300], v.detach().flatten(1)
    return ops.linear_kl(x, weight, teacher, teacher[:300], temperature=2.0, reduction="none")


def compare_pairs(q, k, v, cu):
    """Rows of q with those of k, some of which they share or may not have, and with v."""
    rows = torch.arange(N, device=q.device)
    options = {"positives": rows // 2, "logit_scale": 0.1, "reduction": "none"}
    a = q.flatten(1)
    loss = ops.info_nce(a, k.flatten(1), excluded=(rows + 9) % N, **options)
    return loss + ops.siglip(a, v.flatten(1), logit_bias=-3.0, **options)


# Functions of q, k, v [N, 4, 64] and cu_seqlens; all are differentiable.
CALLS = {
    "varlen_attn": attend,
    "varlen_attn with all": lambda q, k, v, cu: attend(
        q,
        k,
        v,
        cu,
        window=(64, 64),
        alibi_slopes=torch.rand(4, device=q.device),
        rel_bias=torch.randn(4, 33, device=q.device, requires_grad=True),
        dropout_p=0.1,
    ),
    "rotary": rotate,
    "add_norm": lambda q, k, v, cu: ops.add_norm(q, k, torch.ones(64, device=q.device)),
    "glu": lambda q, k, v, cu: ops.glu(torch.cat((q, k), -1)),
    "pad": lambda q, k, v, cu: ops.select_rows(q, torch.arange(0, N, 2, device=q.device)),
    "patch_gather": lambda q, k, v, cu: mask_and_restore(q, k, v, cu, add=v[:29].flatten(1)),
    "patch_gather with add_index": lambda q, k, v, cu: mask_and_restore(
        q, k, v, cu, add=v.flatten(1), add_index=torch.arange(N, device=q.device) // 29
    ),
    "moe_route": route_and_return,
    "grouped_mm": multiply_groups,
    "seg_pool": pool_segments,
    "linear_cross_entropy": predict_entries,
    "linear_kl": diverge_from_teacher,
    "rank_loss": compare_pairs,
}


def qkv(device="cuda", dtype=BF16):
    return [torch.randn(N, 4, 64, device=device).to(dtype).requires_grad_() for _ in range(3)]


def both_ways(name, inputs, cu):
    torch.manual_seed(1)
    out = CALLS[name](*inputs, cu)
    grads = torch.autograd.grad(out.float().square().sum(), inputs, allow_unused=True)
    return [out, *(g for g in grads if g is not None)]


def test_every_op_with_kernels_for_gpus_is_served_by_them():
    for stem in ops.OPS:
        if stem not in CPU_ALONE:
            assert ops.backends(stem)["cuda"] in ("triton", "native"), stem


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_in_every_run(name):
    inputs, cu = qkv(), cu_seqlens()
    first = both_ways(name, inputs, cu)
    for _ in range(5):
        for a, b in zip(first, both_ways(name, inputs, cu), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_no_op_waits_for_the_device(name):
    inputs, cu = qkv(), cu_seqlens()
    both_ways(name, inputs, cu)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(name, inputs, cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_work_goes_to_the_current_stream(name):
    """Inputs are written on a side stream, behind work that takes its time."""
    inputs, cu = qkv(), cu_seqlens()
    want = both_ways(name, inputs, cu)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = [torch.zeros_like(x) for x in inputs]
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y.detach())
        got = both_ways(name, [x.requires_grad_() for x in late], cu)
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_graph_replays_attention_on_new_values():
    q, k, v = (x.detach() for x in qkv())
    cu = cu_seqlens()
    attend(q, k, v, cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, cu)
    q.normal_()
    cu.copy_(cu_seqlens((300, 129, 0, 63, 1)))
    graph.replay()
    assert torch.equal(out, attend(q, k, v, cu))


def test_a_graph_replays_a_choice_of_patches_on_new_noise():
    """No length is read on the host: what a graph holds serves any values."""
    q, k, v = (x.detach() for x in qkv())
    mask_and_restore(q, k, v, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mask_and_restore(q, k, v, None)
    q.normal_()
    graph.replay()
    assert torch.equal(out, mask_and_restore(q, k, v, None))


def test_find_rows_leaves_the_count_on_the_device():
    mask = torch.rand(70, 3000, device="cuda") < 0.3
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices, cu = ops.find_rows(mask)
        rows = ops.gather_rows(mask.float().reshape(-1, 1), indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, want_cu = ops.find_rows(mask.cpu())
    assert torch.equal(indices.cpu(), want) and torch.equal(cu.cpu(), want_cu)
    assert rows.sum() == mask.sum()


def test_offsets_beyond_32_bits():
    """The last sequence of a batch of over 2^31 elements equals itself alone."""
    heads, size, tail = 8, 128, 100
    rows = 2**31 // (heads * size) + 1000
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * heads * size:
        pytest.skip("this GPU has not enough memory")
    x = torch.empty(rows, heads, size, device="cuda", dtype=BF16).normal_()
    starts = list(range(0, rows - tail, 64))
    cu = torch.tensor([*starts, rows - tail, rows], device="cuda", dtype=torch.int32)
    out = ops.varlen_attn(x, x, x, cu, max_seqlen_q=tail)
    alone = x[-tail:].clone()
    want = ops.varlen_attn(alone, alone, alone, cu_seqlens((tail,)), max_seqlen_q=tail)
    assert torch.equal(out[-tail:], want)
    assert torch.equal(ops.add_norm(x)[-1], ops.add_norm(x[-1:].clone())[0])
    last = torch.tensor([rows - 1], device="cuda")
    assert torch.equal(ops.select_rows(x, last)[0], x[-1])
    assert torch.equal(ops.gather_patches(x, last, (size,))[0], x[-1].flatten())
    assert torch.equal(ops.restore_rows(x.flatten(1), last)[0], x[-1].flatten())
    groups, weight = cu[[0, -2, -1]], torch.randn(2, 16, heads * size, device="cuda").to(BF16)
    product = ops.grouped_mm(x.flatten(1), weight, groups)
    own = ops.grouped_mm(alone.flatten(1), weight[1:], cu_seqlens((tail,)))
    assert torch.equal(product[-tail:], own)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    for name in CALLS:
        here = qkv("cuda:0")
        there = [x.detach().to("cuda:1").requires_grad_() for x in here]
        want = both_ways(name, here, cu_seqlens(device="cuda:0"))
        got = both_ways(name, there, cu_seqlens(device="cuda:1"))
        for a, b in zip(want, got, strict=True):
            assert a.device != b.device and torch.equal(a.cpu(), b.cpu())


BAD_INDEX = """
import torch
from encfast import ops
x = torch.ones(4, 8, device="cuda")
ops.select_rows(x, torch.tensor([0, 4], device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("check", ["0", "1"])
def test_a_wrong_index_is_an_error_with_a_sentence(check):
    """Found by the kernel's own assertion, and by name under ENCFAST_CHECK=1."""
    environment = os.environ | {"ENCFAST_CHECK": check}
    done = subprocess.run(
        [sys.executable, "-c", BAD_INDEX], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    said = "rows holds a wrong value" if check == "1" else "index out of range"
    assert said in done.stdout + done.stderr
