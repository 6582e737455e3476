"""encfast.compat.flash_attn in compiled graphs: whole, and once for ragged shapes."""

import pytest
import torch

from encfast.compat import flash_attn as fa
from encfast.compat.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from encfast.compat.flash_attn.losses import CrossEntropyLoss

RAGGED = ((3, 4), (5, 6, 1), (7, 0, 2), (9, 9))


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(step):
    return torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)


def assert_same_with_gradient(step, graph, x, *args):
    results = []
    for f in (step, graph):
        leaf = x.clone().requires_grad_()
        out = f(leaf, *args)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_packed():
    def step(qkv, cos, sin, cu, max_seqlen):
        q, k, v = qkv.unbind(1)
        q, k = (apply_rotary_emb(x, cos, sin, cu_seqlens=cu, max_seqlen=max_seqlen) for x in (q, k))
        lengths = (cu, cu, max_seqlen, max_seqlen)
        return fa.flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=(3, 0))

    graph, angles = compiled(step), torch.rand(40, 4)
    for lengths in RAGGED:
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        qkv = torch.randn(sum(lengths), 3, 2, 8)
        args = (angles.cos(), angles.sin(), cu, max(lengths))
        assert_same_with_gradient(step, graph, qkv, *args)


def test_grid_and_loss():
    criterion = CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.01)

    def step(qkv, cos, sin, labels):
        q, k, v = qkv.unbind(2)
        q = apply_rotary_emb(q, cos, sin, interleaved=True, seqlen_offsets=2)
        out = fa.flash_attn_func(q, k, v, 0.0, None, True)
        return criterion(out.flatten(2).flatten(0, 1), labels)

    graph, angles = compiled(step), torch.rand(40, 4)
    for lengths in RAGGED:
        shape = (len(lengths), max(lengths))
        labels = torch.randint(16, (shape[0] * shape[1],))
        qkv = torch.randn(*shape, 3, 2, 8)
        assert_same_with_gradient(step, graph, qkv, angles.cos(), angles.sin(), labels)


def test_decoding():
    rotary = RotaryEmbedding(8)

    def step(qkv, k_cache, v_cache, used):
        q, k, v = rotary(qkv).unbind(2)
        return fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=used)

    qkv, caches = torch.randn(2, 1, 3, 2, 8), torch.randn(2, 2, 9, 2, 8)
    used = torch.tensor([4, 1], dtype=torch.int32)
    results = []
    for f in (step, compiled(step)):
        k_cache, v_cache = caches.clone()
        results.append((f(qkv.clone(), k_cache, v_cache, used), k_cache, v_cache))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
