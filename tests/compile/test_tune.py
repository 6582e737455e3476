"""Tiles by measuring: asked for, once per kind of call, and never more than a choice of tile."""

import functools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from cross import compiling
from triton.runtime.errors import OutOfResources

from encfast.kernels import _attn_tile, _tune, grouped_mm, varlen_attn

BF16, FP32 = torch.bfloat16, torch.float32
SMALL, LARGE, HUGE = (32, 32, 4, 1), (64, 64, 4, 2), (256, 256, 8, 4)
TABLE = {
    "sm_80": {
        (2, _attn_tile.BIASED): {64: SMALL, 128: LARGE, 256: HUGE},
        (4, _attn_tile.BIASED): {256: SMALL},
    },
    "gfx90a": {(2, _attn_tile.BIASED): {256: (1, 1, 1, 1)}},
}
SECONDS = {SMALL: 3.0, LARGE: 2.0}

pytestmark = pytest.mark.quick


def rule(**terms):
    given = dict.fromkeys(_attn_tile.Rule._fields) | {"scale": 1.0} | terms
    return _attn_tile.Rule(**given)


class Kernel:
    """Notes the tiles that it is launched with."""

    def __init__(self, name, tiles):
        self.__name__, self.tiles = name, tiles

    def __getitem__(self, grid):
        return functools.partial(self.run, grid)

    def run(self, grid, *args, D, BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages):
        assert args == ("q", "k") and D <= BLOCK_D < 2 * D
        assert grid({"BLOCK_M": BLOCK_M}) == (10 * BLOCK_M,)
        self.tiles.append((BLOCK_M, BLOCK_N, num_warps, num_stages))


@pytest.fixture(autouse=True)
def no_capture(monkeypatch):
    """PyTorch without CUDA has no answer to this question."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def launched(monkeypatch):
    """[tile, ...] of every launch, timed or not; timing is the table SECONDS above."""
    monkeypatch.setattr(_tune, "_fastest", {})
    tiles = []

    def seconds(run):
        run()
        if tiles[-1] == HUGE:
            raise OutOfResources(10, 1, "shared memory")
        return SECONDS[tiles[-1]]

    monkeypatch.setattr(_tune, "_seconds", seconds)

    def launch(dtype=BF16, head_size=40, kernel="kernel", **terms):
        before = len(tiles)
        with compiling("sm_90"):
            _tune.launch(
                Kernel(kernel, tiles), lambda tile: (10 * tile["BLOCK_M"],), ("q", "k"),
                TABLE, dtype, head_size, rule(**terms),
            )  # fmt: skip
        return tiles[before:]

    return launch


def test_the_table_serves_where_nobody_asks(launched, monkeypatch):
    monkeypatch.delenv("ENCFAST_AUTOTUNE", raising=False)
    assert launched() == [SMALL]


def test_the_fastest_serves_from_then_on(launched, monkeypatch):
    """Every tile of the vendor that is wide enough is tried; one that does not fit is left out."""
    monkeypatch.setenv("ENCFAST_AUTOTUNE", "1")
    assert launched() == [SMALL, LARGE, HUGE, LARGE]
    assert launched() == [LARGE]


def test_each_kind_of_call_is_measured_by_itself(launched, monkeypatch):
    monkeypatch.setenv("ENCFAST_AUTOTUNE", "1")
    launched()
    assert len(launched(head_size=33)) == 4  # as wide, but padded more
    assert launched(head_size=100) == [LARGE, HUGE, LARGE]
    assert launched(dtype=FP32) == [SMALL, SMALL]
    assert len(launched(softcap=2.0)) == 4 and len(launched(softcap=3.0)) == 1
    assert len(launched(kernel="another")) == 4


def test_the_table_serves_where_no_tile_fits(launched, monkeypatch):
    monkeypatch.setenv("ENCFAST_AUTOTUNE", "1")
    assert launched(head_size=200) == [HUGE, HUGE]


def test_the_table_serves_while_a_graph_is_captured(launched, monkeypatch):
    monkeypatch.setenv("ENCFAST_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launched() == [SMALL]


def test_the_kernels_of_attention_are_measured(monkeypatch):
    monkeypatch.setattr(_tune, "_fastest", {})
    monkeypatch.setenv("ENCFAST_AUTOTUNE", "1")
    monkeypatch.setattr(_tune, "_seconds", lambda run: 1.0)  # launches nothing: the first is chosen
    q, cu = torch.zeros(70, 2, 64, dtype=BF16), torch.tensor([0, 70], dtype=torch.int32)
    nones = (None,) * 7
    with compiling("sm_80") as launches:
        out, lse = varlen_attn.varlen_attn(
            q, q, q, cu, None, 70, None, None, False, (-1, -1), *nones
        )
        varlen_attn.varlen_attn_bwd(
            out, None, q, q, q, out, lse, cu, None, 70, None, None, False, (-1, -1), *nones,
            False, False,
        )  # fmt: skip
    names = ("varlen_attn_kernel", "varlen_attn_dq_kernel", "varlen_attn_dkv_kernel")
    assert tuple(key[0] for key in _tune._fastest) == names
    assert [launch.name for launch in launches if launch.name in names] == list(names)


def test_grouped_mm_is_measured_by_kind_of_call(monkeypatch):
    monkeypatch.setattr(_tune, "_fastest", {})
    monkeypatch.setenv("ENCFAST_AUTOTUNE", "1")
    timed = []
    monkeypatch.setattr(_tune, "_seconds", lambda run: timed.append(run) or len(timed))
    weight = torch.zeros(2, 64, 32, dtype=BF16)
    with compiling("sm_80") as launches:
        tiles = grouped_mm._candidates(BF16)
        for n in (64, 64, 60, 65, 128):  # few rows a group, then many
            x = torch.zeros(n, 32, dtype=BF16)
            cu = torch.tensor([0, 9, n], dtype=torch.int32)
            grouped_mm.grouped_mm(x, weight, cu, None)
    assert len(_tune._fastest) == 2 and len(timed) == 2 * len(tiles)
    assert set(_tune._fastest.values()) == {tiles[0]}
    assert len(launches) == 5
