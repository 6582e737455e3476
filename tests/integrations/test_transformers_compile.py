"""torch.compile of encoders that `accelerate` has made run on packed rows."""

from __future__ import annotations

import pytest
import torch
from encoders import mask_of, model_of, text
from torch import Tensor, nn

from encfast.integrations import transformers as hook

PACKED = (
    "bert", "roberta", "distilbert", "electra", "albert", "mpnet", "modernbert", "clip", "siglip",
)  # fmt: skip
SHAPES = (
    ((17, 11, 1, 5), 17),
    ((9, 3, 2), 9),
    ((13, 12, 4, 4, 1), 13),
    ((7, 6), 8),
    ((15, 2, 9), 16),
    ((4, 11, 6), 12),
)
LAYERS = 2


@pytest.fixture
def graphs():
    """A backend for `torch.compile`, and how many attentions each graph holds that it was given."""
    attentions: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        attentions.append(sum("varlen_attn" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    yield backend, attentions
    torch._dynamo.reset()


def encoder_of(system: str) -> nn.Module:
    model = hook.accelerate(model_of(system))
    return model.text_model if system in ("clip", "siglip") else model


@pytest.mark.parametrize("system", PACKED)
def test_blocks_are_one_graph(system, graphs):
    """It breaks where rows are counted alone; two graphs, the first and one of any size.

    ModernBERT raised: in a graph the window's mask was built besides the lengths of packed rows.
    """
    backend, attentions = graphs
    model = encoder_of(system)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for lengths, size in SHAPES:
            inputs = text(mask_of(lengths, size))
            found = compiled(**inputs).last_hidden_state
            assert torch.equal(found, model(**inputs).last_hidden_state)
    blocks = [n for n in attentions if n]
    assert blocks == [LAYERS] * 2


@pytest.mark.parametrize("system", ["bert", "modernbert", "siglip"])
@pytest.mark.filterwarnings("ignore:output_attentions")
def test_attentions(system):
    """Also of SigLIP, whose attention is not told that they are wanted; then none again."""
    model, inputs, valid = encoder_of(system), text(), mask_of().bool()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for wanted in (False, True, False, True):
            runs = [f(**inputs, output_attentions=wanted) for f in (model, compiled)]
            matrices = [[w.transpose(1, 2) for w in x.attentions or ()] for x in runs]
            assert [len(x) for x in matrices] == [LAYERS * wanted] * 2
            for expected, found in zip(
                *([x.last_hidden_state, *m] for x, m in zip(runs, matrices, strict=True)),
                strict=True,
            ):
                torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("system", ["bert", "modernbert", "siglip"])
def test_gradients(system):
    model = encoder_of(system)
    runs = []
    torch._dynamo.reset()
    for forward in (model, torch.compile(model, backend="aot_eager")):
        grads = []
        for lengths, size in SHAPES[:3]:
            mask = mask_of(lengths, size)
            model.zero_grad()
            output = forward(**text(mask))
            loss = (output.last_hidden_state[mask.bool()] * torch.arange(1.0, 33.0)).mean()
            if "pooler_output" in output:
                loss = loss + output.pooler_output.square().mean()
            loss.backward()
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        runs.append(grads)
    assert len(runs[0]) == len(runs[1]) > 3 * 10
    for expected, found in zip(*runs, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
