"""bfloat16 under the interpreter against PyTorch, and the proof that the interpreter needs help."""

import os
import subprocess
import sys
from pathlib import Path

import bf16
import numpy as np
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(x, y, out, sums, OP: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x, b_y = tl.load(x + o_n), tl.load(y + o_n)
    if OP == "add":
        b_out = b_x + b_y
    elif OP == "mul":
        b_out = b_x * b_y
    elif OP == "sub":
        b_out = b_x - b_y
    elif OP == "negative":
        b_out = -b_x
    elif OP == "maximum":
        b_out = tl.maximum(b_x, b_y)
    elif OP == "where":
        b_out = tl.where(b_x < b_y, b_x, 1.5)
    elif OP == "abs":
        b_out = tl.abs(b_x)
    elif OP == "wide":
        b_out = (b_x.to(tl.float32) * 1.001 + b_y.to(tl.float32)).to(tl.bfloat16)
    else:
        tl.static_assert(OP == "integer")
        b_out = b_x.to(tl.int32).to(tl.bfloat16)
    tl.store(out + o_n, b_out)
    tl.store(sums, tl.sum(b_x, 0))
    tl.store(sums + 1, tl.max(b_x, 0))


EXPECTED = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "sub": lambda x, y: x - y,
    "negative": lambda x, y: -x,
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x < y, x, 1.5),
    "abs": lambda x, y: x.abs(),
    "wide": lambda x, y: (x.float() * 1.001 + y.float()).bfloat16(),
    "integer": lambda x, y: x.int().bfloat16(),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_operations_are_those_of_pytorch(op):
    x, y = (4 * torch.randn(2, 64)).bfloat16()
    out, sums = torch.empty_like(x), torch.zeros(2, dtype=torch.bfloat16)
    _kernel[(1,)](x, y, out, sums, op, 64)
    assert torch.equal(out, EXPECTED[op](x, y))
    assert sums[1] == x.max()
    torch.testing.assert_close(sums[0], x.float().sum().bfloat16())


@triton.jit
def _dot_kernel(x, y, out, N: tl.constexpr):
    o_tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x, b_y = tl.load(x + o_tile), tl.load(y + o_tile)
    tl.store(out + o_tile, tl.dot(b_x, tl.trans(b_y), input_precision="ieee"))


def test_dot_multiplies_values_and_sums_in_float32():
    x, y = torch.randn(2, 16, 16).bfloat16()
    out = torch.zeros(16, 16)
    _dot_kernel[(1,)](x, y, out, 16)
    torch.testing.assert_close(out, x.float() @ y.float().T)


def test_rounding_is_to_nearest_even_and_keeps_what_is_special():
    x = torch.cat(
        (torch.randn(1000), torch.tensor([0.0, -0.0, 1e38, 3e38, 3.4e38, -3.4e38, 1e-40]))
    )
    x = torch.cat((x, torch.tensor([float("inf"), float("-inf"), float("nan")])))
    ties = (torch.arange(0x3F80, 0x3FA0, dtype=torch.int32) * 65536 + 0x8000).view(torch.float32)
    for values in (x, ties):
        expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        finite = ~values.isnan().numpy()
        got = bf16.from_float32(values.numpy())
        assert (got[finite] == expected[finite]).all()
        back = torch.from_numpy(bf16.to_float32(got))
        assert torch.equal(back.isnan(), values.isnan())


def test_the_stock_interpreter_is_wrong():
    """What all this is against: if this fails, Triton may have mended it."""
    program = (
        "import test_bf16, torch\n"
        "x, y = (4 * torch.randn(2, 64)).bfloat16()\n"
        "out, sums = torch.empty_like(x), torch.zeros(2, dtype=torch.bfloat16)\n"
        "test_bf16._kernel[(1,)](x, y, out, sums, 'add', 64)\n"
        "print(torch.equal(out, x + y))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False"], done.stderr
