"""Batches encoded chunk by chunk against the whole batch at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import encfast
from encfast import PackedBatch, ops
from encfast.gradient_cache import backward_in_chunks


def info_nce(scale: Tensor):
    return lambda a, b: ops.info_nce(
        F.normalize(a, dim=1), F.normalize(b, dim=1), logit_scale=scale
    )


def test_equals_the_whole_batch():
    """Two towers, one of them with uneven chunks, and a temperature."""
    torch.manual_seed(0)
    queries, documents = nn.Linear(6, 8), nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 8))
    scale = nn.Parameter(torch.tensor(5.0))
    parameters = [*queries.parameters(), *documents.parameters(), scale]
    x, y = torch.randn(12, 6), torch.randn(12, 5)
    whole = info_nce(scale)(queries(x), documents(y))
    wanted = torch.autograd.grad(whole, parameters)
    towers = [(queries, x.split(4)), (documents, y.split([7, 1, 4]))]
    for times in (1, 2):  # gradients accumulate
        loss = backward_in_chunks(towers, info_nce(scale))
        assert not loss.requires_grad
        torch.testing.assert_close(loss, whole.detach())
        for p, grad in zip(parameters, wanted, strict=True):
            assert grad.any()
            torch.testing.assert_close(p.grad, times * grad, rtol=1e-5, atol=1e-6)


def test_packed_texts_through_one_encoder_twice():
    torch.manual_seed(0)
    model = encfast.create("bert_family/tiny", dropout=0.0).eval()
    scale = torch.tensor(10.0)
    texts = [torch.randint(model.config.vocab_size, (n,)) for n in (5, 9, 3, 12, 7, 4)]
    chunks = [PackedBatch.from_list(texts[i : i + 2]) for i in (0, 2, 4)]
    others = [PackedBatch.from_list(texts[::-1][i : i + 3]) for i in (0, 3)]
    used = dict(model.named_parameters())
    a, b = (torch.cat([model.encode(c) for c in each]) for each in (chunks, others))
    wanted = torch.autograd.grad(info_nce(scale)(a, b), list(used.values()), allow_unused=True)
    backward_in_chunks([(model.encode, chunks), (model.encode, others)], info_nce(scale))
    assert any(w is not None and w.any() for w in wanted)
    for (name, p), grad in zip(used.items(), wanted, strict=True):
        if grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6, msg=f"{name}: ".__add__)


def test_both_passes_draw_the_same_numbers_and_later_ones_go_on():
    seen: list[Tensor] = []
    layer = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5))

    def encode(x: Tensor) -> Tensor:
        seen.append(layer(x))
        return seen[-1]

    x = torch.randn(6, 4)
    torch.manual_seed(1)
    backward_in_chunks([(encode, x.split(2))], lambda a: a.square().sum())
    after = torch.rand(3)
    first, second = seen[:3], seen[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] != 0, first[1] != 0)
    assert not any(f.requires_grad for f in first) and all(f.requires_grad for f in second)
    torch.manual_seed(1)
    with torch.no_grad():
        for chunk in x.split(2):
            layer(chunk)
    assert torch.equal(after, torch.rand(3))


def test_one_chunk_of_activations_at_a_time():
    """No chunk's graph is alive while another goes backward."""
    alive: set[int] = set()
    most = 0

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            nonlocal most
            ctx.number = number
            if x.requires_grad:
                alive.add(number)
                most = max(most, len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.discard(ctx.number)
            return grad, None

    layer, count = nn.Linear(3, 3), iter(range(100))
    chunks = torch.randn(8, 3).split(2)
    backward_in_chunks([(lambda x: Count.apply(layer(x), next(count)), chunks)], torch.sum)
    assert next(count) == 8 and most == 1


def test_a_frozen_tower_is_not_differentiated():
    frozen, trained = nn.Linear(3, 4).requires_grad_(False), nn.Linear(3, 4)
    x = torch.randn(4, 3)
    towers = [(frozen, x.split(2)), (trained, x.split(2))]
    backward_in_chunks(towers, info_nce(torch.tensor(2.0)))
    assert frozen.weight.grad is None and trained.weight.grad.any()


def test_errors():
    with pytest.raises(ValueError, match="at least one tower"):
        backward_in_chunks([], torch.sum)
    with pytest.raises(ValueError, match="at least one chunk"):
        backward_in_chunks([(nn.Identity(), [])], torch.sum)
    with pytest.raises(ValueError, match=r"features \(2, 3, 4\), expected \[rows, D\]"):
        backward_in_chunks([(nn.Identity(), [torch.zeros(2, 3, 4)])], torch.sum)
