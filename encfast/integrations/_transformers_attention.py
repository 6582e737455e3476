"""The attention function that transformers calls under the name "encfast".

No value of a tensor is read on the host, except of positions, and in a graph none.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import ops
from encfast.integrations._attention_weights import attend_with_weights
from encfast.integrations._grids import attend, attend_rows

# Arguments other attention functions honour and this one does not.
_REFUSED = {
    "head_mask": "single heads cannot be switched off",
    "layer_head_mask": "single heads cannot be switched off",
    "cross_attn_head_mask": "single heads cannot be switched off",
    "s_aux": "there are no attention sinks",
}


class Lengths(NamedTuple):
    """Of packed sequences, in the place of a mask where a model hands on nothing else."""

    cu_seqlens_q: Tensor  # int32 [B + 1]
    cu_seqlens_k: Tensor  # int32 [B + 1]
    max_seqlen_q: int
    max_seqlen_k: int
    keys: Tensor | None = None  # int64 [Nk]: the rows that are keys; None: all

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int) -> Lengths:
        """Of sequences whose rows are queries and keys."""
        return cls(cu_seqlens, cu_seqlens, longest, longest)

    def arguments(self) -> dict[str, Any]:
        """Those of :func:`encfast.ops.varlen_attn`."""
        return {name: x for name, x in self._asdict().items() if name != "keys"}


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Lengths | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What ``AttentionInterface`` calls.

    Args:
        module: the attention module; ``is_causal`` is read from it unless given.
        query: ``[B, H, Sq, D]``, any strides; float32, bfloat16 or float16.
        key: ``[B, Hk, Sk, D]``, H a multiple of Hk.
        value: ``[B, Hk, Sk, D]``.
        attention_mask: None, bool ``[B, Sk]`` of the keys to see, or ``[B, H, Sq, Sk]`` of which
            all but Sk may be 1: bool, or floating to be added to the scores. A 4-D mask says all:
            neither the window nor the causal rule are applied besides. Or :class:`Lengths`.
        scaling: of the scores, 1 / sqrt(D) by default.
        dropout: probability for a weight to be zeroed.
        is_causal: a query sees no later key; queries and keys are aligned at their ends.
        sliding_window: w: a query sees the w - 1 keys at each side and its own.
        softcap: of the scores.
        position_bias: floating, of the shapes of a 4-D mask, added to the scores; differentiable.
        position_ids: ``[1, S]`` of sequences one after another, all starting with one number.
        cu_seq_lens_q: int32 running sum of the lengths of packed sequences.
        cu_seq_lens_k: the same for the keys.
        max_length_q: the longest of them.
        max_length_k: the same for the keys.
        kwargs: what other functions need; those that would change the result are refused.
            ``output_attentions`` takes plain maths for this call.

    Returns:
        ``[B, Sq, H, D]``, and None or, where attentions are asked for, ``[B, H, Sq, Sk]``. A query
        that sees no key gets zeros.

    Raises:
        ValueError: for a mask or an argument that cannot be honoured, naming it.
    """
    _refuse(module, kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    rule: dict[str, Any] = {"causal": is_causal, "window": window}
    rule |= {"scale": scaling, "softcap": softcap, "dropout_p": dropout or None}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, D]
    lengths = None
    if isinstance(attention_mask, Lengths):
        lengths = attention_mask.arguments()
        if attention_mask.keys is not None:
            rows = (ops.gather_rows(x.flatten(0, 1), attention_mask.keys) for x in (k, v))
            k, v = (x[None] for x in rows)
        attention_mask = None
    elif cu_seq_lens_q is not None:
        _check_packed(attention_mask, position_bias)
        lengths = _packed_lengths(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    elif attention_mask is None and position_bias is None and k.shape[1] == q.shape[1]:
        lengths, position_bias = _restarts(q, position_ids)
    if wants_attentions(module, kwargs):
        if not torch.compiler.is_compiling():
            _warn_of_weights()
        return attend_with_weights(q, k, v, attention_mask, position_bias, lengths, **rule)
    if lengths is not None:
        return attend_rows(q, k, v, **lengths, **rule), None
    return attend(q, k, v, attention_mask, position_bias, **rule), None


def wants_attentions(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the weights are asked for: by argument, or collected by transformers' own hooks."""
    if kwargs.get("output_attentions"):
        return True
    # A graph breaks where the collector is read: with hooks, which read it, it does so anyway.
    if torch.compiler.is_compiling() and not getattr(module, "_forward_hooks", None):
        return False
    return any("attentions" in name for name in collected())


def collected() -> dict[str, list[Tensor]]:
    """Where transformers' own hooks keep the outputs of the running call that were asked for."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector.get() or {}


@functools.cache
def _warn_of_weights() -> None:
    warnings.warn(
        "output_attentions: encfast's attention builds no weights; calls that ask for them take "
        "plain maths over all pairs, which is slow",
        stacklevel=3,
    )


# ---- what cannot be honoured ----


def _refuse(module: Any, kwargs: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"{name} reached {type(module).__name__}, whose attention is encfast's: {why}; "
                'load the model with attn_implementation="eager" for it'
            )


def _check_packed(mask: Tensor | None, bias: Tensor | None) -> None:
    for name, given in (("attention_mask", mask), ("position_bias", bias)):
        if given is not None:
            raise ValueError(
                f"{name} {tuple(given.shape)} came together with cu_seq_lens_q, which says where "
                "packed sequences start; pass one of them"
            )


# ---- lengths, in the order of the arguments of varlen_attn ----


def _packed_lengths(cu_q: Tensor, cu_k: Tensor | None, max_q: Any, max_k: Any) -> dict[str, Any]:
    cu_q = cu_q.to(torch.int32)
    cu_k = cu_q if cu_k is None else cu_k.to(torch.int32)
    longest = (
        int(cu.diff().max()) if n is None else int(n) for n, cu in ((max_q, cu_q), (max_k, cu_k))
    )
    max_q, max_k = longest
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
    }


def _restarts(
    q: Tensor, position_ids: Tensor | None
) -> tuple[dict[str, Any] | None, Tensor | None]:
    """The lengths of the sequences in one row; in a graph, bool ``[1, 1, S, S]`` of their pairs.

    Positions that rise by one are within a sequence; the others must start as the first does. All
    else, constant positions included, says nothing of sequences.
    """
    if position_ids is None or q.shape[0] != 1 or position_ids.shape != q.shape[:2]:
        return None, None
    positions, rows = position_ids[0], q.shape[1]
    new = positions.diff() != 1
    known = (~new | (positions[1:] == positions[0])).all() & (positions != positions[0]).any()
    new = F.pad(new & known, (1, 0))
    if torch.compiler.is_compiling():  # their number is not known
        owner = new.cumsum(0)
        return None, (owner[:, None] == owner)[None, None]
    if not new.any():
        return None, None
    starts = F.pad(new.nonzero()[:, 0].int(), (1, 0))
    cu_seqlens = F.pad(starts, (0, 1), value=rows)
    return _packed_lengths(cu_seqlens, None, None, None), None
