"""Sentence embeddings without padding, in sentence-transformers' own model.

    from encfast.integrations.sentence_transformers import enable

    model = enable(SentenceTransformer(folder))

sentence-transformers can hand over flattened texts, without a grid from the tokenizer on, but only
to attention implementations with "flash" in their name. This makes the same switch for "encfast":
its collator packs ids, the attention knows where texts start, its pooling reads the same lengths.

    from encfast.integrations.sentence_transformers import MultipleNegativesRankingLoss

is sentence-transformers' class of that name without the matrices of scores between all texts.

Source: `Transformer._can_flatten_inputs` of sentence-transformers 6.2.
"""

from __future__ import annotations

from typing import Any, TypeVar

from encfast.integrations import transformers as hook
from encfast.integrations._library import Library

__all__ = ["MultipleNegativesRankingLoss", "enable"]  # noqa: F822, the first by __getattr__

_LIBRARY = Library(
    "sentence_transformers",
    "6.2",
    "6.2",
    "encfast.integrations.transformers.accelerate(model) does without its internals",
)
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What the switch is made of; a version without one of them has another.
_PARTS = ("can_flatten_inputs", "model_forward_params", "_infer_flatten_position_offset")

ModelT = TypeVar("ModelT")


def enable(model: ModelT) -> ModelT:
    """Makes a SentenceTransformer run on flattened texts, with encfast's attention.

    An encoder that transformers does not route (MPNet) is accelerated instead, see
    :func:`encfast.integrations.transformers.accelerate`: the tokenizer pads, blocks do not see it.

    Args:
        model: a ``SentenceTransformer`` whose first module holds a text encoder. Changed in place.

    Returns:
        The model; ``encode`` and training give what they gave, up to rounding.

    Raises:
        ImportError: for a version of sentence-transformers or transformers that is not known.
        NotImplementedError: for a first module that is no encoder of texts, or one that can neither
            be flattened nor accelerated; nothing is changed then.
    """
    version = _LIBRARY.load().__version__
    first: Any = model[0]  # type: ignore[index]
    encoder = getattr(first, "model", None)
    name = f"{type(model).__name__} with sentence-transformers {version}"
    if not all(hasattr(first, part) for part in _PARTS) or encoder is None:
        raise NotImplementedError(
            f"enable: {name} starts with a {type(first).__name__}, expected a Transformer as "
            f"sentence-transformers {_LIBRARY.newest} has it; the model stays as it is"
        )
    if not _flat(first):
        return _accelerated(model, name)
    from transformers import DataCollatorWithFlattening

    hook.register()
    encoder.set_attn_implementation(hook.NAME)
    first.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if first.model_forward_params is not None:  # None lets everything pass
        first.model_forward_params |= set(_LENGTHS)
    first._flatten_position_offset = first._infer_flatten_position_offset()
    first.can_flatten_inputs = True
    return model


def __getattr__(name: str) -> Any:
    """The loss inherits from sentence-transformers, which this module does without until asked."""
    if name != "MultipleNegativesRankingLoss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _LIBRARY.load()
    from encfast.integrations import _sentence_transformers_loss

    return _sentence_transformers_loss.MultipleNegativesRankingLoss


def _flat(first: Any) -> bool:
    """Whether the module's encoder may see flattened texts, by the rules upstream has for flash."""
    return (
        first.transformer_task in ("feature-extraction", "fill-mask")
        and first.backend == "torch"
        and "text" in first.modality_config
        and all(modality["method"] == "forward" for modality in first.modality_config.values())
        and first.model._can_set_attn_implementation()
    )


def _accelerated(model: Any, name: str) -> Any:
    try:
        return hook.accelerate(model)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"enable: {name} cannot run on flattened texts; {error}"
        ) from error
