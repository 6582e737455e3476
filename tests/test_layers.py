"""Layers: what each computes, in plain PyTorch beside it; packed equals padded; checkpointing."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from encfast import PackedBatch, ops
from encfast.config import BlockConfig, RopeScaling, replace_fields
from encfast.layers import (
    MLP,
    Attention,
    Block,
    ClassificationHead,
    Embeddings,
    KVCache,
    MaskedLMHead,
    Norm,
    Rotary,
    SpanHead,
    Stack,
    pool,
)

pytestmark = pytest.mark.quick

LENGTHS = [5, 0, 1, 9, 3]
SMALL = BlockConfig(dim=24, num_heads=3, ffn_dim=40)
KINDS = {
    "pre": SMALL,
    "post-gelu_tanh": dataclasses.replace(SMALL, norm_position="post", activation="gelu_tanh"),
    "glu-rms": dataclasses.replace(SMALL, glu=True, norm="rmsnorm", activation="silu"),
    "alibi": dataclasses.replace(SMALL, position="alibi"),
    "rope-window": dataclasses.replace(SMALL, position="rope", window=(2, 1)),
    "causal-gqa-softcap": dataclasses.replace(
        SMALL, num_heads=6, num_kv_heads=2, causal=True, softcap=5.0
    ),
    "head_dim": dataclasses.replace(SMALL, num_heads=2, head_dim=7),
    "sandwich": dataclasses.replace(SMALL, norm_position="sandwich"),
}


def batch(lengths=LENGTHS, dim: int = 24) -> PackedBatch:
    return PackedBatch.from_lengths(torch.randn(sum(lengths), dim), lengths)


def dense_attention(layer: Attention, config: BlockConfig, x: torch.Tensor) -> torch.Tensor:
    """One sequence [L, C] through the layer's weights, with the whole score matrix in view."""
    length, size = x.shape[0], config.head_size
    q, k, v = layer.qkv(x).split([n * size for n in (config.num_heads, *[config.kv_heads] * 2)], -1)
    q, k, v = (t.view(length, -1, size).transpose(0, 1) for t in (q, k, v))
    if config.position == "rope":
        q, k = (rotate(t, config.rope_theta) for t in (q, k))
    group = config.num_heads // config.kv_heads
    k, v = (t.repeat_interleave(group, 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / size**0.5
    if config.softcap is not None:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    if layer.slopes is not None:
        scores = scores - layer.slopes[:, None, None] * offset.abs()
    left, right = config.window[0], 0 if config.causal else config.window[1]
    hidden = torch.zeros(length, length, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    heads = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return layer.out(heads.transpose(0, 1).reshape(length, -1))


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """[H, L, D]: the pair (x[i], x[i + D/2]) as a complex number times e^(i angle)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_equals_dense_one_sequence_at_a_time(kind):
    config, packed = KINDS[kind], batch()
    layer = Attention(config)
    expected = torch.cat([dense_attention(layer, config, s) for s in packed.split() if len(s)])
    rope = None
    if config.position == "rope":
        rope = Rotary(config.head_size, config.rope_theta)(packed.positions())
    torch.testing.assert_close(layer(packed, rope), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stack_does_not_depend_on_the_batch_around_a_sequence(kind):
    stack, packed = Stack([KINDS[kind]] * 2), batch()
    together = stack(packed).split()
    for sequence, out in zip(packed.split(), together, strict=True):
        alone = stack(PackedBatch.from_lengths(sequence, [len(sequence)]))
        torch.testing.assert_close(out, alone.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_last_block_on_chosen_rows_equals_the_full_block(kind):
    stack, packed = Stack([KINDS[kind]] * 2), batch()
    rows = torch.tensor([0, 6, 17, 6])
    torch.testing.assert_close(stack(packed, rows=rows), stack(packed).select(rows))


def test_pre_and_post_norm_order():
    x = batch([4])
    for config in (KINDS["pre"], KINDS["post-gelu_tanh"]):
        block = Block(config)
        if config.norm_position == "pre":
            mid = x.data + block.attn(x.with_data(block.norm1(x.data)))
            expected = mid + block.mlp(block.norm2(mid))
        else:
            mid = block.norm1(x.data + block.attn(x))
            expected = block.norm2(mid + block.mlp(mid))
        torch.testing.assert_close(block(x).data, expected)


def test_a_sandwich_norms_each_branch_before_it_is_added():
    x, config = batch([4]), dataclasses.replace(KINDS["pre"], norm_position="sandwich")
    block = Block(config)
    for name, p in block.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 2)
    mid = x.data + block.branch_norm1(block.attn(x.with_data(block.norm1(x.data))))
    expected = mid + block.branch_norm2(block.mlp(block.norm2(mid)))
    torch.testing.assert_close(block(x).data, expected)


def test_norms_over_heads_come_before_the_rotation():
    """Of one head's length nothing is left: scaled queries and keys attend as they did."""
    config = dataclasses.replace(
        KINDS["pre"], norm="rmsnorm", norm_eps=1e-12, qk_norm=True, position="rope", qkv_bias=False
    )
    layer, packed = Attention(config), batch()
    rope = Rotary(config.head_size, config.rope_theta)(packed.positions())
    before = layer(packed, rope)
    with torch.no_grad():
        layer.qkv.weight[: 2 * config.dim] *= 3
    torch.testing.assert_close(layer(packed, rope), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.q_norm.weight.uniform_(0.5, 2)
    assert not torch.allclose(layer(packed, rope), before, rtol=1e-2)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("size", [5, 2**14], ids=["plain", "fused"])
def test_a_norm_of_unit_offset_is_one_whose_weight_is_larger_by_1(kind, size):
    ours, plain = (Norm(24, kind=kind, unit_offset=offset) for offset in (True, False))
    assert not ours.weight.any()
    with torch.no_grad():
        ours.weight.uniform_(-0.5, 1)
        plain.weight.copy_(1 + ours.weight)
    x, residual = torch.randn(2, size, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, residual), plain(x, residual))
        torch.testing.assert_close(ours(x), plain(x))


def test_glu_activates_the_first_half():
    mlp, x = MLP(KINDS["glu-rms"]), torch.randn(6, 24)
    a, b = (x @ mlp.up.weight.t() + mlp.up.bias).split(40, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.down(F.silu(a) * b))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_formula(kind):
    norm, x = Norm(24, kind=kind, eps=1e-3), torch.randn(5, 24) * 3 + 1
    norm.weight.data.uniform_(0.5, 2)
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    ("precision", "autocast", "expected"),
    [
        ("default", True, torch.bfloat16),  # the CPU's autocast leaves layer_norm alone
        ("fp32", True, torch.bfloat16),
        ("low", True, torch.bfloat16),
        ("low", False, torch.float32),
    ],
)
def test_norm_precision_under_autocast(precision, autocast, expected):
    norm = Norm(24, precision=precision)
    x = torch.randn(5, 24, dtype=torch.bfloat16 if autocast else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = norm(x)
    assert out.dtype == expected
    reference = F.layer_norm(x.float(), (24,), norm.weight, norm.bias)
    torch.testing.assert_close(out.float(), reference, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("precision", ["default", "fp32", "low"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "mixed"],
)
def test_the_fused_norm_of_a_sum_is_the_plain_one(precision, autocast, dtypes, monkeypatch):
    norm = Norm(24, precision=precision)
    norm.weight.data.uniform_(0.5, 2)
    found = []
    for threshold in (0, 2**60):
        torch.manual_seed(0)
        monkeypatch.setattr("encfast.layers.norm._FUSED_ELEMENTS_TRAINING", threshold)
        x, residual = (torch.randn(7, 24).to(d).requires_grad_() for d in dtypes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, total = norm(x, residual, return_sum=True)
        grads = torch.autograd.grad(y.float().sin().sum() + total.float().sum(), (x, residual))
        found.append((y, total, *grads))
    tolerance = 2**-6 if torch.bfloat16 in (*dtypes, found[0][0].dtype) else 1e-5
    for fused, plain in zip(*found, strict=True):
        assert fused.dtype == plain.dtype
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_fused_ops_is_the_plain_one(kind, monkeypatch):
    stack, rows, found = Stack([KINDS[kind]] * 2), batch(), []
    for threshold in (0, 2**60):
        for name in (
            "norm._FUSED_ELEMENTS",
            "norm._FUSED_ELEMENTS_TRAINING",
            "mlp._FUSED_ELEMENTS",
        ):
            monkeypatch.setattr(f"encfast.layers.{name}", threshold)
        out = stack(rows).data
        found.append((out, *torch.autograd.grad(out.sin().sum(), list(stack.parameters()))))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=2e-5)


def test_rotary_tables_stay_exact_at_large_positions():
    """model.to(torch.bfloat16) rounded the frequencies: angles at position 8000 were off by 0.8."""
    rotary = Rotary(8, 10_000.0).to(torch.bfloat16)
    cos, sin = rotary(torch.tensor([8000, 8001]))
    angle = torch.tensor([[8000.0], [8001.0]], dtype=torch.float64) * 10_000.0 ** (
        -torch.arange(4, dtype=torch.float64) / 4
    )
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=1e-3)


def test_scaled_rotary_wavelengths():
    """Short ones stay, long ones grow by the factor, and between them the frequencies blend."""
    scaling = RopeScaling(factor=8.0, low=1.0, high=4.0, original=64)
    plain, scaled = (Rotary(32, 1e4, scaling=s).inv_freq.double() for s in (None, scaling))
    wave = 2 * torch.pi / plain
    ratio = scaled / plain
    assert (ratio[wave < 16] - 1).abs().max() < 1e-6 and (wave < 16).any()
    assert (ratio[wave > 64] - 1 / 8).abs().max() < 1e-6 and (wave > 64).any()
    between = ratio[(wave > 16) & (wave < 64)]
    assert len(between) and ((between > 1 / 8) & (between < 1)).all()
    with pytest.raises(ValueError, match="0 < low < high"):
        RopeScaling(low=4.0, high=1.0)


def test_rotary_scores_depend_on_the_distance_only():
    rotary, q, k = Rotary(8, 100.0), torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        turned = [ops.rotary(x, *rotary(torch.tensor([p]))) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
    assert (score(9, 4) - score(4, 9)).abs() > 1e-3


@pytest.mark.parametrize("kind", ["pre", "causal-gqa-softcap"])
def test_kv_cache_decoding_equals_the_full_forward(kind):
    config = dataclasses.replace(KINDS[kind], causal=True, position="rope", window=(3, -1))
    stack, packed = Stack([config] * 2).eval(), batch([6, 2, 9])
    expected = stack(packed).split()
    caches, sequences = stack.new_caches(), packed.split()
    prompt = PackedBatch.from_list([s[: len(s) // 2] for s in sequences])
    got = [[part] for part in stack(prompt, caches=caches).split()]
    position = [len(s) // 2 for s in sequences]
    while any(p < len(s) for p, s in zip(position, sequences, strict=True)):
        step = [s[p : p + 1] for p, s in zip(position, sequences, strict=True)]
        for parts, new in zip(
            got, stack(PackedBatch.from_list(step), caches=caches).split(), strict=True
        ):
            parts.append(new)
        position = [min(p + 1, len(s)) for p, s in zip(position, sequences, strict=True)]
        assert all(cache.keys.max_seqlen <= 3 for cache in caches)
    for parts, whole in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_kv_cache_refuses_another_batch_size():
    cache = KVCache()
    cache.append(torch.randn(2, 1, 4), torch.randn(2, 1, 4), batch([1, 1], 4))
    with pytest.raises(ValueError, match=r"batch has 1 sequences, the cache holds 2"):
        cache.append(torch.randn(1, 1, 4), torch.randn(1, 1, 4), batch([1], 4))


def test_embeddings_add_word_position_and_segment():
    layer = Embeddings(11, 6, max_positions=9, num_segments=2, norm_eps=1e-3)
    tokens = PackedBatch.from_lengths(torch.randint(11, (7,)), [4, 0, 3])
    segments = torch.tensor([0, 0, 1, 1, 0, 1, 1])
    summed = (
        layer.word.weight[tokens.data]
        + layer.position.weight[torch.tensor([0, 1, 2, 3, 0, 1, 2])]
        + layer.segment.weight[segments]
    )
    torch.testing.assert_close(layer(tokens, segments).data, layer.norm(summed))


def test_embeddings_refuse_a_sequence_longer_than_the_table():
    layer = Embeddings(11, 6, max_positions=3)
    with pytest.raises(ValueError, match="4 tokens, the position table 3"):
        layer(PackedBatch.from_lengths(torch.zeros(4, dtype=torch.int64), [4]))


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pool_matches_each_sequence_and_zeroes_empty_ones(how):
    packed = batch()
    pick = {"mean": lambda s: s.mean(0), "first": lambda s: s[0], "last": lambda s: s[-1]}[how]
    expected = [pick(s) if len(s) else torch.zeros(24) for s in packed.split()]
    torch.testing.assert_close(pool(packed, how), torch.stack(expected))


def test_pool_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="'median'"):
        pool(batch(), "median")


def test_heads():
    x = torch.randn(5, 24)
    table = torch.nn.Parameter(torch.randn(11, 24))
    head = MaskedLMHead(24, 11, tied=table)
    assert head.decoder.weight is table
    expected = head.norm(F.gelu(head.dense(x))) @ table.t() + head.decoder.bias
    torch.testing.assert_close(head(x), expected)
    classify = ClassificationHead(24, 3)
    torch.testing.assert_close(classify(x), classify.out(torch.tanh(classify.dense(x))))
    start, end = SpanHead(24)(x)
    assert start.shape == end.shape == (5,)


def test_attention_drops_weights_in_training_only():
    config = dataclasses.replace(SMALL, attn_dropout=0.4)
    layer, packed = Attention(config), batch()
    q, k, v = layer.qkv(packed.data).view(-1, 3, 3, 8).unbind(1)
    torch.manual_seed(1)
    dropped = ops.varlen_attn(q, k, v, packed.cu_seqlens, dropout_p=0.4).flatten(1)
    torch.manual_seed(1)
    assert torch.equal(layer.train().heads(packed), dropped)
    whole = ops.varlen_attn(q, k, v, packed.cu_seqlens).flatten(1)
    assert torch.equal(layer.eval().heads(packed), whole)
    assert not torch.equal(dropped, whole)


@pytest.mark.parametrize("kind", ["post-gelu_tanh", "rope-window", "alibi"])
def test_checkpointing_changes_memory_not_results(kind):
    drops = {"mlp_dropout": 0.2, "attn_out_dropout": 0.1, "attn_dropout": 0.3}
    config = dataclasses.replace(KINDS[kind], **drops)
    stack, packed = Stack([config] * 2).train(), batch()
    grads = []
    for checkpointing in (False, True):
        stack.gradient_checkpointing = checkpointing
        stack.zero_grad()
        torch.manual_seed(3)  # the same dropout masks in both runs
        stack(packed).data.square().sum().backward()
        grads.append([p.grad.clone() for p in stack.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "shared"])
def test_two_checkpointed_blocks_compile_with_dynamic_shapes(share):
    """A float two checkpointed blocks read from one shared config cannot be lifted by dynamo."""
    torch._dynamo.reset()
    configs = [dataclasses.replace(KINDS["rope-window"], softcap=7.5, attn_dropout=0.2)] * 2
    stack = Stack(configs, share=share).train()
    stack.gradient_checkpointing = True
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(packed: PackedBatch) -> torch.Tensor:
        return stack(packed).data.square().sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([5, 0, 3], [2, 7, 0, 4], [3, 0]):
        packed = batch(lengths)
        results = []
        for f in (compiled, step):
            stack.zero_grad()
            torch.manual_seed(0)
            out = f(packed)
            out.backward()
            results.append((out, *[p.grad for p in stack.parameters()]))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_meta_construction_then_reset_fills_buffers():
    for kind in ("alibi", "rope-window"):
        stack = Stack([KINDS[kind]] * 2, device="meta").to_empty(device="cpu")
        for module in stack.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, value in [*stack.named_parameters(), *stack.named_buffers()]:
            assert value.isfinite().all(), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, ["num_heads=5", "dim=24"]),
        ({"num_kv_heads": 2}, ["num_kv_heads=2", "num_heads=3"]),
        ({"head_dim": 300}, ["head_dim", "300"]),
        ({"window": (-2, 0)}, ["window", "-2"]),
        ({"position": "rope", "head_dim": 7}, ["rope", "7"]),
        ({"mlp_dropout": 1.0}, ["mlp_dropout", "1.0"]),
        ({"attn_dropout": -0.1}, ["attn_dropout", "-0.1"]),
        ({"ffn_dim": 0}, ["ffn_dim", "0"]),
    ],
)
def test_block_config_refuses(changes, words):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(SMALL, **changes)
    for word in words:
        assert word in str(caught.value)


def test_unknown_config_field_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'num_heads'"):
        replace_fields(SMALL, {"num_head": 2})
