"""Models for other runtimes: under :func:`exportable` every op is made of ATen operators.

``torch.export`` records an op of encfast as one call of it, which ONNX Runtime, AOTInductor
packages and ExecuTorch do not have. Inside the context the ops answer by what their references
compute, in forms without loops over sequences and without lengths read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from encfast.ops._backends import references
from encfast.ref import traced

# Their references have neither loops nor lengths read on the host.
_PLAIN = ("add_norm", "glu", "rotary", "gather_rows")
_TRACED: dict[str, Callable] = {
    "varlen_attn": traced.varlen_attn,
    "seg_pool": traced.seg_pool,
    "scatter_rows": traced.scatter_rows,
    "find_rows": traced.find_rows,
    "linear": F.linear,
}


def exportable() -> AbstractContextManager[Any]:
    """A context in which ``torch.export`` and ``torch.onnx.export`` see ATen operators alone.

    The module's forward may take a padded grid and pack it (``PackedBatch.pack``): in an exported
    graph all B * S rows stay, those the mask keeps first, the others behind the last sequence. So
    every size follows from the shape of the grid, B and S may be dynamic, lengths may be 0, and the
    graph costs what a padded model costs: encfast's speed does not travel with it. For ONNX use
    opset 18 or later::

        class Embedder(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model.encode(PackedBatch.pack(input_ids, attention_mask))

        sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
        with encfast.exportable():
            torch.onnx.export(
                Embedder(model.eval()), (ids, mask), "model.onnx", dynamo=True, opset_version=18,
                dynamic_shapes=(sizes, sizes),
            )

    There are forms of ``varlen_attn`` (without dropout), ``pad``, ``rotary``, ``add_norm``,
    ``glu``, ``linear`` and ``seg_pool``. Everything computes in float32 where the kernels do.

    Raises:
        NotImplementedError: inside the context, for an op that has no such form.

    Examples:
        >>> class Embedder(torch.nn.Module):
        ...     def forward(self, x, mask):
        ...         batch = PackedBatch.pack(x, mask)
        ...         return ops.seg_pool(batch.data, batch.cu_seqlens, "mean")
        >>> x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> with encfast.exportable():
        ...     program = torch.export.export(Embedder(), (x, mask))
        >>> any("encfast" in str(node.target) for node in program.graph.nodes)
        False
    """
    return _Exportable()


class _Exportable(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        form = _form_of(func)
        return (func if form is None else form)(*args, **(kwargs or {}))


def _form_of(func: Callable) -> Callable | None:
    if func in (torch.searchsorted, torch.bucketize):  # no runtime of ONNX knows it
        return _searchsorted if func is torch.searchsorted else _bucketize
    if isinstance(func, torch._ops.OpOverload):
        func = func.overloadpacket
    if not isinstance(func, torch._ops.OpOverloadPacket):
        return None
    namespace, _, op = func._qualified_op_name.partition("::")
    if namespace != "encfast":
        return None
    if op in _PLAIN:
        return references[op]
    if op in _TRACED:
        return _TRACED[op]
    raise NotImplementedError(
        f"exportable: encfast.{op} has no form made of ATen operators; there are forms of "
        f"{', '.join(sorted((*_PLAIN, *_TRACED)))}. Leave the part that calls it out of the "
        "exported module"
    )


def _searchsorted(ends, x, *, right=False):
    return traced.count_up_to(ends, x, right=right)


def _bucketize(x, ends, *, right=False):
    return traced.count_up_to(ends, x, right=right)
