"""What transformers hands to "encfast" as a mask.

Padding stays ``[B, S]``, where transformers builds ``[B, 1, S, S]`` for other implementations. A
pattern of pairs that is neither padding nor what the attention is told besides (causal, a window)
comes as the bool 4-D mask of its "sdpa".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WINDOWS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What ``AttentionMaskInterface`` calls.

    Args:
        batch_size: B.
        q_length: queries of a sequence.
        kv_length: keys of a sequence.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: says which pairs see each other, padding aside; causal by default.
        attention_mask: bool ``[B, Sk]`` of the keys to see, or None.
        kwargs: what transformers' own function for "sdpa" takes besides.

    Returns:
        None if every key can be seen, bool ``[B, Sk]``, or bool 4-D.
    """
    from transformers import masking_utils as hf

    mask_function = mask_function or hf.causal_mask_function
    kind = "other" if kwargs.get("use_vmap") else _kind(mask_function, hf)
    # A rule about positions aligns queries and keys at their ends.
    ends = [x for x in (q_offset, kv_offset) if isinstance(x, int)]
    aligned = len(ends) == 2 and q_offset + q_length == kv_offset + kv_length
    if not aligned and mask_function is not hf.bidirectional_mask_function:
        kind = "other"
    if attention_mask is not None and kind != "other":
        if attention_mask.shape[1] != kv_length:
            kind = "other"
        elif not torch.compiler.is_compiling() and attention_mask.all():
            return None
        elif kind == "window" and has_gaps(attention_mask):
            kind = "other"  # without the hidden keys the others would stand closer
    if kind != "other":
        return attention_mask
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return hf.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _kind(mask_function: Callable, hf: Any) -> str:
    """ "plain", "window" or "other"; a window also reaches the attention as ``sliding_window``."""
    plain = (hf.bidirectional_mask_function, hf.causal_mask_function)
    if mask_function in plain:
        return "plain"
    if torch.compiler.is_compiling():  # gaps could not be looked for
        return "other"
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    windows = [f.__qualname__.split(".")[0] in _WINDOWS for f in parts]
    both = all(w or f in plain for w, f in zip(windows, parts, strict=True))
    return "window" if any(windows) and both else "other"


def has_gaps(mask: Tensor) -> bool:
    """Whether a hidden key lies between keys that can be seen."""
    begins = mask[:, 1:] & ~mask[:, :-1]
    return bool((begins.sum(1) + mask[:, 0] > 1).any())
