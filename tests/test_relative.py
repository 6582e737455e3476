"""RelativeBias against transformers' T5 and MPNet, which gather a whole [H, Lq, Lk] matrix."""

import pytest
import torch
from transformers import MPNetConfig, T5Config
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention
from transformers.models.t5.modeling_t5 import T5Attention

from encfast import PackedBatch, ops
from encfast.config import BlockConfig
from encfast.layers import Attention, RelativeBias
from encfast.layers.base import init_normal

pytestmark = pytest.mark.quick


def matrix(table: torch.Tensor, lq: int, lk: int) -> torch.Tensor:
    """[H, Lq, Lk] of a table [H, R], both sequences from position 0."""
    r = table.shape[1] // 2
    offset = torch.arange(lk) - torch.arange(lq)[:, None]
    return table[:, offset.clamp(-r, r) + r]


def t5_attention(buckets: int, distance: int) -> T5Attention:
    config = T5Config(
        d_model=24,
        num_heads=3,
        d_kv=8,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        dropout_rate=0.0,
    )
    return T5Attention(config, has_relative_attention_bias=True).eval()


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (4, 3), (10, 20), (64, 500)])
def test_equals_t5_in_value_and_gradient(buckets, distance):
    theirs = t5_attention(buckets, distance).double()  # the sums of a bucket are long
    ours = RelativeBias(3, buckets, distance, dtype=torch.float64)
    table = theirs.relative_attention_bias.weight
    with torch.no_grad():
        table.copy_(ours.weight.T)
    want, got = theirs.compute_bias(700, 600)[0], matrix(ours(), 700, 600)
    assert torch.equal(got, want)
    weights = torch.randn(3, 700, 600).double()
    (want,) = torch.autograd.grad((want * weights).sum(), table)
    (got,) = torch.autograd.grad((got * weights).sum(), ours.weight)
    torch.testing.assert_close(got, want.T, rtol=1e-9, atol=1e-9)


def test_equals_mpnet():
    config = MPNetConfig(vocab_size=9, hidden_size=24, num_attention_heads=3, num_hidden_layers=1)
    theirs, ours = MPNetEncoder(config), RelativeBias(3)
    with torch.no_grad():
        theirs.relative_attention_bias.weight.copy_(ours.weight.T)
    want = theirs.compute_position_bias(torch.zeros(1, 300, 24))[0]
    assert torch.equal(matrix(ours(), 300, 300), want)


def test_attention_with_the_bias_equals_mpnet_in_every_gradient():
    """One sequence at a time there, packed here."""
    config = MPNetConfig(
        vocab_size=9, hidden_size=24, num_attention_heads=3, attention_probs_dropout_prob=0.0
    )
    encoder, theirs = MPNetEncoder(config), MPNetSelfAttention(config)
    ours = Attention(BlockConfig(dim=24, num_heads=3, ffn_dim=8))
    bias = RelativeBias(3)
    linears = (theirs.q, theirs.k, theirs.v)
    with torch.no_grad():
        bias.weight.normal_()
        encoder.relative_attention_bias.weight.copy_(bias.weight.T)
        ours.qkv.weight.copy_(torch.cat([x.weight for x in linears]))
        ours.qkv.bias.copy_(torch.cat([x.bias for x in linears]))
        ours.out.load_state_dict(theirs.o.state_dict())
    packed = PackedBatch.from_lengths(torch.randn(190, 24), [3, 150, 0, 37])
    want = torch.cat(
        [
            theirs(x[None], position_bias=encoder.compute_position_bias(x[None]))[0][0]
            for x in packed.split()
            if len(x)
        ]
    )
    got = ours(packed, rel_bias=bias())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want.sin().sum().backward()
    got.sin().sum().backward()
    torch.testing.assert_close(
        bias.weight.grad, encoder.relative_attention_bias.weight.grad.T, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        ours.qkv.weight.grad, torch.cat([x.weight.grad for x in linears]), rtol=1e-4, atol=1e-5
    )


def test_t5_attention_is_the_op_without_a_scale():
    theirs, bias = t5_attention(32, 128), RelativeBias(3)
    with torch.no_grad():
        theirs.relative_attention_bias.weight.copy_(bias.weight.T)
    x = torch.randn(90, 24)
    q, k, v = (f(x).view(90, 3, 8) for f in (theirs.q, theirs.k, theirs.v))
    ends = torch.tensor([0, 90], dtype=torch.int32)
    got = theirs.o(ops.varlen_attn(q, k, v, ends, scale=1.0, rel_bias=bias()).flatten(1))
    torch.testing.assert_close(got, theirs(x[None])[0][0], rtol=1e-5, atol=1e-5)


def test_is_filled_after_meta_and_by_a_models_initialisation():
    bias = RelativeBias(2, device="meta").to_empty(device="cpu")
    bias.reset_parameters()
    assert torch.equal(bias.buckets, RelativeBias(2).buckets)
    assert "buckets" not in bias.state_dict()
    outer = torch.nn.Sequential(bias)
    with torch.no_grad():
        bias.weight.fill_(7.0)
    init_normal(outer, 0.02)
    assert bias.weight.abs().max() < 1


@pytest.mark.parametrize("buckets", [0, 3, 2])
def test_refuses_buckets_that_cannot_be_halved(buckets):
    with pytest.raises(ValueError, match=f"num_buckets must be even and >= 4, got {buckets}"):
        RelativeBias(2, buckets)


def test_refuses_a_distance_within_the_exact_buckets():
    with pytest.raises(ValueError, match="max_distance must be > num_buckets / 4, got 8"):
        RelativeBias(2, 32, 8)
