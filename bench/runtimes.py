"""Inference runtimes besides PyTorch as peers: a folder of BERT weights in, hidden states out.

Each `*_build` function returns how to make an `Infer` for a number of threads. All run the same
weights; how each gets them stands in its docstring and, shortened, in its `*_WEIGHTS`.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import scratch_folder
from torch import Tensor, nn

# int64 grid of ids and mask [B, S] -> [B, S, C]; what stands in padded rows is of no meaning
Infer = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[int], Infer]

ONNXRUNTIME_FP32_WEIGHTS = "exported to ONNX"
ONNXRUNTIME_INT8_WEIGHTS = "exported to ONNX, quantize_dynamic per channel"
OPENVINO_WEIGHTS = "convert_model of the transformers model"
CTRANSLATE2_WEIGHTS = "TransformersConverter"


class Runtime:
    """An `Infer` on as many threads as :meth:`use` was told last."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self.use(1)

    def use(self, threads: int) -> None:
        """Makes the session anew: the threads of these libraries are fixed when one is made."""
        self._infer = self._build(threads)

    def __call__(self, grid: Tensor, mask: Tensor) -> Tensor:
        return self._infer(grid, mask)


class _HiddenStates(nn.Module):
    """What is exported: the last hidden states as the one output."""

    def __init__(self, folder: Path) -> None:
        from transformers import BertModel

        super().__init__()
        self.bert = BertModel.from_pretrained(folder, attn_implementation="sdpa").eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state


def _example() -> tuple[Tensor, Tensor]:
    return torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)


@contextmanager
def _quiet():
    """Without the warnings of exporters, which are about code that is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@functools.lru_cache
def _onnx_file(folder: Path) -> Path:
    """The model in ONNX, batch and length free.

    By the TorchScript exporter: ONNX Runtime fuses more of its graph and is faster.
    """
    file = scratch_folder() / "model.onnx"
    names = ["input_ids", "attention_mask"]
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _HiddenStates(folder),
            _example(),
            str(file),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["hidden"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in (*names, "hidden")},
        )
    return file


@functools.lru_cache
def _onnx_int8_file(folder: Path) -> Path:
    """Weights in int8 per output channel, activations quantised per tensor while running.

    Per channel is not the default; it is faster here and much closer to fp32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = _onnx_file(folder)
    target = source.with_name("int8.onnx")
    with _quiet():
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
    return target


def onnxruntime_build(folder: Path, dtype: torch.dtype) -> Build:
    """ONNX Runtime on the exported graph, for int8 after its own dynamic quantisation."""
    import onnxruntime

    file = _onnx_int8_file(folder) if dtype == torch.int8 else _onnx_file(folder)

    def build(threads: int) -> Infer:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Its threads must not spin while the next variant is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        def infer(grid: Tensor, mask: Tensor) -> Tensor:
            feed = {"input_ids": grid.numpy(), "attention_mask": mask.numpy()}
            return torch.from_numpy(session.run(None, feed)[0])

        return infer

    return build


@functools.lru_cache
def _openvino_model(folder: Path) -> Any:
    """Converted from PyTorch, not from ONNX: attention stays one operation, which is faster."""
    import openvino

    with _quiet(), torch.no_grad():
        return openvino.convert_model(_HiddenStates(folder), example_input=_example())


def openvino_build(folder: Path, dtype: torch.dtype) -> Build:
    """OpenVINO on the model converted from PyTorch, with `dtype` as its inference precision."""
    import openvino

    model = _openvino_model(folder)
    precision = "bf16" if dtype == torch.bfloat16 else "f32"

    def build(threads: int) -> Infer:
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pins the calling thread too, under all other variants
        }
        request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

        def infer(grid: Tensor, mask: Tensor) -> Tensor:
            feed = [grid.numpy(), mask.numpy()]
            # The output is read before the request runs again.
            found = request.infer(feed, share_inputs=True, share_outputs=True)
            return torch.from_numpy(found[0])

        return infer

    return build


@functools.lru_cache
def _ctranslate2_folder(folder: Path) -> Path:
    from ctranslate2.converters import TransformersConverter

    target = scratch_folder()
    with _quiet():
        TransformersConverter(str(folder)).convert(str(target), force=True)
    return target


def ctranslate2_build(folder: Path, dtype: torch.dtype) -> Build:
    """CTranslate2's encoder; weights converted in fp32 and quantised by it as they are loaded.

    It takes lists of ids, pads them itself, and skips padding in its linear layers.
    """
    import ctranslate2
    import numpy

    converted = _ctranslate2_folder(folder)
    compute_type = "int8_float32" if dtype == torch.int8 else "float32"

    def build(threads: int) -> Infer:
        encoder = ctranslate2.Encoder(
            str(converted), compute_type=compute_type, inter_threads=1, intra_threads=threads
        )

        def infer(grid: Tensor, mask: Tensor) -> Tensor:
            texts = [row[:n].tolist() for row, n in zip(grid, mask.sum(1).tolist(), strict=True)]
            hidden = encoder.forward_batch(texts).last_hidden_state
            return torch.from_numpy(numpy.asarray(hidden))

        return infer

    return build
