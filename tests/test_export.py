"""exportable(): every op as ATen operators, equal to the kernels; models in ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import encfast
from encfast import PackedBatch, ops
from encfast.layers import pool

LENGTHS = [4, 0, 1, 7]
CU_SEQLENS = torch.tensor([0, 4, 4, 5, 12], dtype=torch.int32)
N = 12


def both(call):
    """The result of the kernels and that of the traced form."""
    usual = call()
    with encfast.exportable():
        return usual, call()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (2, 0)},
        {"window": (0, 1)},
        {"softcap": 2.0, "scale": 0.7},
        {"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 1.0])},
        {"alibi_slopes": torch.rand(4, 4)},
        {"rel_bias": torch.randn(4, 5)},
        {"rel_bias": torch.randn(N, 4, 5)},
        {"bias": torch.randn(66)},
        {"bias": torch.randn(4, 66)},
        {"bias": torch.rand(66) < 0.5},
    ],
    ids=lambda options: "-".join(
        f"{name}{tuple(x.shape) if isinstance(x, torch.Tensor) else x}"
        for name, x in options.items()
    ),
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention(options, kv_heads):
    q, k, v = (torch.randn(N, heads, 8) for heads in (4, kv_heads, kv_heads))
    usual, traced = both(
        lambda: ops.varlen_attn(
            q, k, v, CU_SEQLENS, max_seqlen_q=7, max_seqlen_k=7, return_lse=True, **options
        )
    )
    for a, b in zip(usual, traced, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_attention_over_other_keys():
    q, k, v = torch.randn(N, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    keys = torch.tensor([0, 0, 3, 3, 9], dtype=torch.int32)  # the first sequence sees no key
    usual, traced = both(lambda: ops.varlen_attn(q, k, v, CU_SEQLENS, cu_seqlens_k=keys))
    torch.testing.assert_close(traced, usual, rtol=1e-5, atol=1e-5)
    assert not traced[:4].any()


def test_attention_does_not_see_another_sequence():
    q, k, v = (torch.randn(N, 2, 8) for _ in range(3))
    k[5:], v[5:] = torch.nan, torch.nan
    usual, traced = both(lambda: ops.varlen_attn(q, k, v, CU_SEQLENS, max_seqlen_q=7))
    torch.testing.assert_close(traced[:5], usual[:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "sum", "max", "first", "last", "attention"])
@pytest.mark.parametrize("normalize", [False, True])
def test_seg_pool(how, normalize):
    x, weights = torch.randn(N, 6), torch.randn(N)
    if how == "mean":
        weights = weights.abs()
    weights = weights if how in ("mean", "sum", "attention") else None
    usual, traced = both(
        lambda: ops.seg_pool(x, CU_SEQLENS, how=how, weights=weights, normalize=normalize)
    )
    torch.testing.assert_close(traced, usual, rtol=1e-5, atol=1e-6)


def test_moves_of_rows():
    x, index = torch.randn(5, 3), torch.tensor([4, 0, 2, 2])
    for call in (
        lambda: ops.gather_rows(x, torch.tensor([1, -1, 4])),
        lambda: ops.select_rows(x, index),
        lambda: ops.scatter_rows(x[:4], index, 6),
        lambda: ops.pad(x, torch.tensor([0, 1, 3, 7, 5]), 2, 4, fill=2.0),
    ):
        usual, traced = both(call)
        torch.testing.assert_close(traced, usual, rtol=0, atol=0)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    for a, b in zip(*both(lambda: ops.find_rows(mask)), strict=True):
        assert torch.equal(a, b)


def test_add_norm_glu_and_rotary():
    x, residual = torch.randn(N, 8), torch.randn(N, 8)
    angles = torch.randn(N, 4)
    for call in (
        lambda: ops.add_norm(x, residual, torch.ones(8), kind="rmsnorm"),
        lambda: ops.glu(x, activation="silu"),
        lambda: ops.rotary(x[:, None], angles.cos(), angles.sin()),
    ):
        usual, traced = both(call)
        torch.testing.assert_close(traced, usual, rtol=1e-5, atol=1e-6)


def test_what_has_no_form_is_named():
    with (
        encfast.exportable(),
        pytest.raises(NotImplementedError, match=r"encfast.grouped_mm has no form.*varlen_attn"),
    ):
        ops.grouped_mm(torch.randn(4, 8), torch.randn(2, 8, 8), torch.tensor([0, 2, 4]).int())


def test_dropout_is_refused():
    q = torch.randn(N, 2, 8)
    with encfast.exportable(), pytest.raises(NotImplementedError, match=r"dropout_p is 0.5.*eval"):
        ops.varlen_attn(q, q, q, CU_SEQLENS, dropout_p=0.5)


class Embedder(nn.Module):
    """A padded grid in; an embedding per sequence and the grid of hidden rows out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.hidden = getattr(model, "hidden", model)  # Ettin's forward has no scores

    def forward(self, input_ids, attention_mask):
        batch = PackedBatch.pack(input_ids, attention_mask)
        hidden = self.hidden(batch)
        return pool(hidden, "mean"), hidden.to_padded()


def grid(lengths: list[int], seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    return torch.randint(0, 90, (len(lengths), seqlen)), mask.long()


# ALiBi, learned positions, rotary with windows and GLU.
@pytest.mark.parametrize("name", ["bert_family/tiny", "mosaicbert/tiny", "ettin/tiny"])
def test_onnx_runtime_computes_the_same(name, tmp_path):
    module = Embedder(encfast.create(name)).eval()
    sizes = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("S", max=64)}
    with encfast.exportable():
        program = torch.export.export(module, grid([9, 0, 3], 9), dynamic_shapes=(sizes, sizes))
    assert not [node for node in program.graph.nodes if "encfast" in str(node.target)]
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), path, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]
    for lengths, seqlen in (([9, 0, 3], 9), ([0, 17], 17), ([5, 1, 0, 2], 5), ([30], 30)):
        inputs = grid(lengths, seqlen)
        with torch.no_grad():
            expected = module(*inputs)
        fed = {key: x.numpy() for key, x in zip(names, inputs, strict=True)}
        for a, b in zip(expected, session.run(None, fed), strict=True):
            np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5)
