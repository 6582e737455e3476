"""DeepSpeed-MoE whole: its dense base against transformers' GPT-2, mixtures against DeepSpeed's
einsum formulation. The layers alone stand in tests/test_moe.py and tests/test_moe_parity.py."""

import math

import pytest
import torch
import transformers

from encfast import create, describe
from encfast.data.text import TextBatch
from encfast.layers import MoE
from encfast.models.deepspeed_moe import DeepSpeedMoE, DeepSpeedMoEConfig
from encfast.registry import get_config
from encfast.weights import Tied, both, load

from ..test_moe import einsum_moe
from .common import assert_gradient_parity, assert_parity, ragged_lengths, random_tokens

DENSE = DeepSpeedMoEConfig(
    dim=48, depth=3, num_heads=3, vocab_size=97, eos_id=0, dropout=0.0, attn_dropout=0.0
)


def gpt2_config(config: DeepSpeedMoEConfig) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_positions,
        n_embd=config.dim,
        n_layer=config.depth,
        n_head=config.num_heads,
        layer_norm_epsilon=config.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


def gpt2_entries(depth: int) -> list[Tied]:
    """Ours and GPT-2's, whose Conv1D stores weights transposed."""
    entries = [
        Tied("embed.word.weight", ("transformer.wte.weight",)),
        Tied("embed.position.weight", ("transformer.wpe.weight",)),
        *both("norm", "transformer.ln_f"),
    ]
    linear = (
        ("attn.qkv", "attn.c_attn"),
        ("attn.out", "attn.c_proj"),
        ("mlp.up", "mlp.c_fc"),
        ("mlp.down", "mlp.c_proj"),
    )
    for i in range(depth):
        ours, theirs = f"stack.blocks.{i}", f"transformer.h.{i}"
        entries += both(f"{ours}.norm1", f"{theirs}.ln_1")
        entries += both(f"{ours}.norm2", f"{theirs}.ln_2")
        for a, b in linear:
            entries.append(Tied(f"{ours}.{a}.weight", (f"{theirs}.{b}.weight",), transpose=True))
            entries.append(Tied(f"{ours}.{a}.bias", (f"{theirs}.{b}.bias",)))
    return entries


@pytest.mark.quick
def test_dense_base_is_gpt2():
    """Logits, loss and every gradient over ragged documents, all weights random."""
    theirs = transformers.GPT2LMHeadModel(gpt2_config(DENSE)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model, entries = DeepSpeedMoE(DENSE), gpt2_entries(DENSE.depth)
    load(model, theirs.state_dict(), entries, ignore=("lm_head.weight",))
    lengths = ragged_lengths(7)
    batch = TextBatch(random_tokens(lengths, DENSE.vocab_size))
    docs = [doc[None] for doc in batch.tokens.split()]
    logits = torch.cat([theirs(doc).logits[0] for doc in docs])
    losses = [theirs(doc, labels=doc).loss * (doc.shape[1] - 1) for doc in docs if doc.numel() > 1]
    reference = sum(losses) / (sum(lengths) - len(lengths))
    loss = model.loss(batch).total
    assert_parity("logits", model.logits(model(batch.tokens).data), logits)
    assert_parity("loss", loss, reference)
    loss.backward()
    reference.backward()
    assert_gradient_parity(model, theirs, entries)


@pytest.mark.quick
@pytest.mark.parametrize("size", ["125m", "350m", "1.3b", "6.7b"])
def test_dense_sizes_are_those_of_gpt2(size):
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(gpt2_config(get_config(f"deepspeed_moe/{size}")))
    own = sum(p.numel() for p in theirs.parameters())
    assert describe(f"deepspeed_moe/{size}").parameters == own


def by_einsum(moe: MoE, factor: float | None) -> None:
    """Puts DeepSpeed's one-hot dispatch and combine in the place of the layer's rows."""
    own = moe.forward

    def forward(x, *, mask=None):
        room = None
        if factor is not None:
            room = max(math.ceil(x.shape[0] / moe.num_experts * factor), 4)
        return own(x)._replace(data=einsum_moe(moe, x, room))

    moe.forward = forward


@pytest.mark.parametrize("residual", [False, True], ids=["moe", "residual"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, None])
@pytest.mark.parametrize("experts", [(1, 4), (32, 64)], ids=str)
def test_equals_the_einsum_formulation(experts, factor, residual):
    """Sheet, check 1, of the whole model: loss and all gradients, room for four, empty experts."""
    torch.manual_seed(0)
    model = create(
        "deepspeed_moe/tiny",
        experts=experts,
        residual=residual,
        capacity_factor=factor,
        init_std=0.1,
        dropout=0.0,
        attn_dropout=0.0,
    ).train()
    batch = TextBatch(random_tokens([30, 0, 1, 44], 512))
    found = []
    for einsum in (False, True):
        if einsum:
            for module in model.modules():
                if isinstance(module, MoE):
                    by_einsum(module, factor)
        model.zero_grad()
        losses = model.loss(batch)
        losses.total.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append({"total": losses.total, "lm": losses.lm} | grads)
    own, reference = found
    branch = "mlp.moe" if residual else "mlp"
    if experts == (32, 64):
        idle = reference[f"stack.blocks.3.{branch}.experts.up"] == 0
        assert idle.flatten(1).all(1).any(), "every expert has a token"
    for name, expected in reference.items():
        if experts[0] == 1 and name == f"stack.blocks.1.{branch}.router.weight":
            assert not own[name].any() and not expected.any(), "one expert leaves no choice"
        else:
            assert_parity(name, own[name], expected)
