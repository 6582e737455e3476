"""encfast.compat.flash_attn.bert_padding: round trips with gradients."""

import pytest
import torch

from encfast.compat.flash_attn import flash_attn_func, flash_attn_varlen_qkvpacked_func
from encfast.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

pytestmark = pytest.mark.quick

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("tail", [(5,), (2, 3)], ids=str)
def test_round_trip_with_gradients(tail, dtype):
    x = torch.randn(3, 4, *tail, requires_grad=True)
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, MASK.to(dtype))
    assert torch.equal(rows, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 8, 10, 11] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 2, 2, 5] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 3 and isinstance(max_seqlen, int)
    assert seqused.tolist() == [2, 0, 3] and seqused.dtype == torch.int32
    grid = pad_input(rows, indices, 3, 4)
    keep = MASK.bool().reshape(3, 4, *[1] * len(tail))
    assert torch.equal(grid, x * keep)
    weight = torch.randn_like(grid)
    (grad,) = torch.autograd.grad((grid * weight).sum(), x)
    assert torch.equal(grad, weight * keep)


def test_unused_rows_are_kept_but_not_counted_as_used():
    x, unused = torch.randn(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64)
    unused[0, 2] = unused[1, 0] = 1
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, MASK, unused)
    assert indices.tolist() == [0, 1, 2, 4, 8, 10, 11]
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 3, 4, 7] and max_seqlen == 3
    assert seqused.tolist() == [2, 0, 3]


def test_rows_by_index():
    x = torch.randn(5, 3, requires_grad=True)
    indices = torch.tensor([4, 0, 4])
    picked = index_first_axis(x, indices)
    assert torch.equal(picked, x[indices])
    (grad,) = torch.autograd.grad(picked.sum(), x)
    assert grad[:, 0].tolist() == [1, 0, 0, 0, 2]
    values = torch.randn(2, 3, requires_grad=True)
    put = index_put_first_axis(values, torch.tensor([3, 1]), 5)
    assert torch.equal(put[[3, 1]], values) and (put[[0, 2, 4]] == 0).all()
    (grad,) = torch.autograd.grad((put * x.detach()).sum(), values)
    assert torch.equal(grad, x.detach()[[3, 1]])


def test_residual():
    x = torch.randn(5, 3, requires_grad=True)
    picked, residual = index_first_axis_residual(x, torch.tensor([4, 0]))
    assert torch.equal(residual, x)
    (grad,) = torch.autograd.grad((2 * picked).sum() + residual.sum(), x)
    assert grad[:, 0].tolist() == [3, 1, 1, 1, 3]


def test_concatenated_sequences_do_not_see_each_other():
    """The example of flash-attn: two and three, three and two, and one of six tokens."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    qkv = torch.randn(3, 6, 3, 2, 8)
    rows, indices, cu, max_seqlen = unpad_input_for_concatenated_sequences(qkv, lengths)
    assert cu.tolist() == [0, 2, 5, 8, 10, 16] and max_seqlen == 6
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    out = flash_attn_varlen_qkvpacked_func(rows, cu, max_seqlen, causal=True)
    grid = pad_input(out, indices, 3, 6)
    q, k, v = qkv[1:2, 3:5].unbind(2)  # the second sequence of the second row
    torch.testing.assert_close(grid[1:2, 3:5], flash_attn_func(q, k, v, causal=True))
    assert (grid[:2, 5] == 0).all()


X = torch.randn(3, 4, 2)
ERRORS = {
    "unpad_input: attention_mask is torch.float32": (
        lambda: unpad_input(X, MASK.float()),
        TypeError,
    ),
    r"unpad_input: attention_mask has shape \(3, 3\)": (
        lambda: unpad_input(X, MASK[:, :3]),
        ValueError,
    ),
    "unpad_input: unused_mask is list": (lambda: unpad_input(X, MASK, [1]), TypeError),
    "unpad_input: hidden_states is int": (lambda: unpad_input(1, MASK), TypeError),
    "attention_mask_in_length has lengths of 7 in a row of 4": (
        lambda: unpad_input_for_concatenated_sequences(X, MASK * 2 + torch.eye(3, 4).int()),
        ValueError,
    ),
    "pad: indices holds 8": (
        lambda: pad_input(X.flatten(0, 1)[:2], torch.tensor([1, 8]), 2, 4),
        ValueError,
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()
