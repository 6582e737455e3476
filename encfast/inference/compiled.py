"""CompiledEncoder: embeddings, blocks and final norm of a model as a short list of op calls."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import _load, ops
from encfast.inference._modules import (
    FORMATS,
    LINEARS,
    BlockCall,
    EmbedCall,
    LinearCall,
    RotaryCall,
    expect,
    optional_norm,
)
from encfast.layers import Stack, pool
from encfast.packed import PackedBatch

Pooling = Literal["mean", "first", "last"]


class _Parts(NamedTuple):
    """What a model's encoding is made of, in the order in which it runs."""

    embed: nn.Module
    stack: nn.Module
    project: nn.Module = nn.Identity()  # between embeddings and stack
    final_norm: nn.Module = nn.Identity()
    pooling: Pooling = "mean"


def _parts(model: nn.Module) -> _Parts:
    # Here, not above: importing the engine imports no model.
    from encfast.models.bert_family import BertFamily
    from encfast.models.ettin import Ettin
    from encfast.models.mosaicbert import MosaicBert

    # Exact types: what a subclass computes is not known.
    if type(model) is BertFamily:
        return _Parts(model.embed, model.stack, model.project, model.final_norm)
    if type(model) is MosaicBert:
        return _Parts(model.embed, model.stack)
    if type(model) is Ettin:
        pooling: Pooling = "last" if model.config.causal else "mean"
        return _Parts(model.embed, model.stack, final_norm=model.norm, pooling=pooling)
    raise NotImplementedError(
        f"compile_encoder: model is a {type(model).__module__}.{type(model).__qualname__}, served "
        "are BertFamily, Ettin and MosaicBert; unwrap compiled or distributed modules first"
    )


class CompiledEncoder:
    """A model's encoding, for inference on the CPU. Made by :func:`compile_encoder`.

    Holds copies of the weights: training the model further does not change it, :meth:`refresh`
    does. Calls keep no state and may run in several threads at once. Results are inference tensors:
    clone one before using it in what autograd records.

    Attributes:
        dtype: of the linear layers' weights: float32, bfloat16 or int8.
        compute_dtype: of hidden rows: float32, or bfloat16 for both others.
        in_bf16: linear layers that stay in bfloat16 where ``dtype`` is int8.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, in_bf16: Collection[str]) -> None:
        self.dtype = dtype
        self.compute_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self.in_bf16 = tuple(name for name in LINEARS if name in in_bf16)
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Packs the weights that ``model`` has now.

        Args:
            model: as :func:`compile_encoder` takes it; usually the one compiled before.

        Raises:
            NotImplementedError: for a model that is not served; nothing is changed then.
        """
        parts = _parts(model)
        _check_device(model)
        stack = expect("stack", parts.stack, Stack)
        if stack.relative is not None:
            raise NotImplementedError(
                "compile_encoder: stack has a bias of relative positions, which packed blocks do "
                "not add; call the model itself"
            )
        formats = dict.fromkeys(LINEARS, FORMATS[self.dtype])
        formats |= dict.fromkeys(self.in_bf16, "bf16")
        embed = EmbedCall.read("embed", parts.embed, self.compute_dtype)
        project = None
        if type(parts.project) is not nn.Identity:
            project = LinearCall.read("project", parts.project, formats["qkv"])
        blocks = [
            BlockCall.read(f"stack.blocks.{i}", block, formats)
            for i, block in enumerate(stack.blocks)
        ]
        final_norm = optional_norm("final norm", parts.final_norm)
        rotaries = [
            RotaryCall.read(f"stack.rotaries.{i}", rotary)
            for i, rotary in enumerate(stack.rotaries)
        ]
        # Everything is read: only now may anything change.
        self._name, self._pooling = type(model).__name__, parts.pooling
        self._embed, self._project, self._final_norm = embed, project, final_norm
        self._rotaries = rotaries
        # A stack that shares its weights runs its one block many times.
        self._blocks = [(blocks[i % len(blocks)], stack.rotary_of[i]) for i in range(stack.depth)]

    @torch.inference_mode()
    def __call__(
        self, tokens: PackedBatch, segments: Tensor | None = None, *, rows: Tensor | None = None
    ) -> PackedBatch | Tensor:
        """Last hidden rows, behind the final norm if there is one: what the model's own call gives.

        Args:
            tokens: int64 or int32 ids ``[N]`` in [0, V), on the CPU.
            segments: int64 ``[N]``: token types; all 0 if None.
            rows: int64 ``[M]`` in [-1, N): compute only these rows of the last block; -1 stands
                for a row of zeros there.

        Returns:
            The batch with rows ``[N, C]``, or with ``rows`` given ``[M, C]``, in ``compute_dtype``.

        Raises:
            TypeError, ValueError: for ids, segments or rows of another type, shape or device, and
                for a sequence longer than the position table.
            IndexError: for an id outside of the vocabulary.
        """
        self._check(tokens, segments, rows)
        x = self._run(tokens, segments, rows)
        return tokens.with_data(x) if rows is None else x

    @torch.inference_mode()
    def encode(
        self,
        tokens: PackedBatch,
        segments: Tensor | None = None,
        *,
        how: Pooling | None = None,
        normalize: bool = True,
    ) -> Tensor:
        """fp32 ``[B, C]``: one embedding per sequence, zeros for an empty one.

        Args:
            tokens, segments: as in a call.
            how: ``"mean"``, ``"first"`` or ``"last"``; by default what the model's own ``encode``
                does. All but the mean compute one row per sequence of the last block.
            normalize: whether embeddings get length 1.

        Returns:
            fp32 ``[B, C]``.

        Raises:
            TypeError, ValueError, IndexError: as in a call; for another ``how``.
        """
        how = self._pooling if how is None else how
        if how not in ("mean", "first", "last"):
            raise ValueError(f"how must be 'mean', 'first' or 'last', got {how!r}")
        self._check(tokens, segments, None)
        if how == "mean":
            x = self._run(tokens, segments, None)
            pooled = pool(tokens.with_data(x.float()), how)
        else:
            pooled = self._one_row_each(tokens, segments, how)
        return F.normalize(pooled, dim=-1) if normalize else pooled

    def _one_row_each(self, tokens: PackedBatch, segments: Tensor | None, how: Pooling) -> Tensor:
        ends = tokens.cu_seqlens.long()
        empty = ends[1:] == ends[:-1]
        rows = (ends[:-1] if how == "first" else ends[1:] - 1).masked_fill(empty, -1)
        x = self._run(tokens, segments, rows).float()
        return x.masked_fill_(empty[:, None], 0.0)

    def _run(self, tokens: PackedBatch, segments: Tensor | None, rows: Tensor | None) -> Tensor:
        x = self._embed(tokens, segments)  # [N, E]
        if self._project is not None:
            x = self._project(x)  # [N, C]
        ropes: list[Any] = []
        if self._rotaries:
            positions = tokens.positions()
            ropes = [rotary(positions) for rotary in self._rotaries]
        last = len(self._blocks) - 1
        for i, (block, which) in enumerate(self._blocks):
            rope = None if which is None else ropes[which]
            x = block(x, tokens, rope, rows if i == last else None)
        return x if self._final_norm is None else self._final_norm(x)

    def _check(self, tokens: PackedBatch, segments: Tensor | None, rows: Tensor | None) -> None:
        if not isinstance(tokens, PackedBatch):
            raise TypeError(f"tokens is {type(tokens).__name__}, expected a PackedBatch of ids")
        _check_ids("tokens.data", tokens.data, (torch.int64, torch.int32))
        if segments is not None:
            _check_ids("segments", segments, (torch.int64, torch.int32))
            if segments.shape != tokens.data.shape:
                raise ValueError(
                    f"segments has shape {tuple(segments.shape)}, expected one per token, "
                    f"{tuple(tokens.data.shape)}"
                )
        if rows is not None:
            _check_ids("rows", rows, (torch.int64,))
            _check_rows(rows, tokens.total)
        longest = None if self._embed.position is None else self._embed.position.shape[0]
        if longest is not None and tokens.max_seqlen > longest:
            raise ValueError(
                f"a sequence has {tokens.max_seqlen} tokens, the position table {longest}; "
                "truncate, or build the model with more positions"
            )

    def describe(self) -> str:
        """What runs: the kernels and their ISA, formats and sizes of weights, ops of each block."""
        blocks = {id(block): block for block, _ in self._blocks}.values()
        mib = sum(linear.nbytes for block in blocks for linear in block.linears) / 2**20
        last, which = self._blocks[-1]  # the first may lack a norm
        formats = ", ".join(
            f"{name} {linear.weight[2]}" for name, linear in zip(LINEARS, last.linears, strict=True)
        )
        norms = sum(norm is not None for norm in last.norms)
        steps = ["4 packed_linear", "1 varlen_attn"]
        steps += [f"{norms} norms"] * bool(norms) + ["rotary"] * (which is not None)
        isa = torch.ops.encfast.cpu_isa() if _load.error is None else "none"
        lines = [repr(self)]
        lines += [f"{op}: {ops.backends(op)['cpu']}" for op in ("packed_linear", "varlen_attn")]
        lines += [
            f"ISA: {isa}",
            f"hidden rows: {self.compute_dtype}",
            f"linear layers: {formats}; {mib:.1f} MiB packed",
            f"ops of a block: {', '.join(steps)}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"CompiledEncoder({self._name}, {FORMATS[self.dtype]}, {len(self._blocks)} blocks)"


def _check_ids(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dim() != 1 or x.dtype not in dtypes:
        raise TypeError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected integers [N]: "
            + " or ".join(str(d) for d in dtypes)
        )
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}; a compiled encoder runs on the CPU, move it")


def _check_rows(rows: Tensor, total: int) -> None:
    for value in (rows.min().item(), rows.max().item()) if rows.numel() else ():
        if not -1 <= value < total:
            raise ValueError(f"rows holds {value}, expected -1 <= row < {total}")


def _check_device(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "cpu":
            raise NotImplementedError(
                f"compile_encoder: {name} is on {tensor.device}, weights are packed for the CPU; "
                "elsewhere call the model itself, or compile model.cpu()"
            )


def compile_encoder(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.bfloat16,
    in_bf16: Collection[str] = (),
) -> CompiledEncoder:
    """Packs a model's weights for inference on this CPU.

    Serves the encoding of BertFamily (BERT, RoBERTa, ALBERT, MiniLM, GPT; any task, heads are left
    out), MosaicBert and Ettin: pre- and post-norm, gated or not, rotary, ALiBi, windows, shared
    weights. Dropout is off, norms run in fp32.

    All linear layers are packed. In float32 short batches gain by it; of large ones the products
    of qkv and down take longer than ``F.linear``'s where MKL is at its best. They stay packed so
    that what a sequence gets does not depend on its company, to the bit.

    Args:
        model: with its weights on the CPU, in any floating dtype.
        dtype: of the linear layers. float32: everything in float32. bfloat16: weights and
            hidden rows, sums in float32. int8: weights with a scale per output channel, their
            inputs per token and call; hidden rows and attention in bfloat16.
        in_bf16: with int8, linear layers of every block to keep in bfloat16: of "qkv", "out",
            "up", "down". "qkv" buys the most accuracy: its rounding moves the attention.

    Returns:
        An encoder with ``encoder(tokens)`` for hidden rows and ``encoder.encode(tokens)`` for
        embeddings.

    Raises:
        NotImplementedError: for a model or one of its modules that is not served, naming it.
        TypeError, ValueError: for another dtype or an unknown linear layer.

    Examples:
        >>> from encfast.inference import compile_encoder
        >>> model = encfast.create("bert_family/tiny").eval()
        >>> fast = compile_encoder(model, dtype=torch.float32)
        >>> tokens = PackedBatch.from_list([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
        >>> torch.allclose(fast.encode(tokens), model.encode(tokens), atol=1e-5)
        True
    """
    if dtype not in FORMATS:
        raise TypeError(
            f"compile_encoder: dtype is {dtype}, expected one of {', '.join(map(str, FORMATS))}"
        )
    unknown = sorted(set(in_bf16) - set(LINEARS))
    if unknown or isinstance(in_bf16, str):
        raise ValueError(
            f"compile_encoder: in_bf16 is {in_bf16!r}, expected some of {', '.join(LINEARS)}"
        )
    if in_bf16 and dtype != torch.int8:
        raise ValueError(f"compile_encoder: in_bf16 needs dtype=torch.int8, dtype is {dtype}")
    return CompiledEncoder(model, dtype, in_bf16)
