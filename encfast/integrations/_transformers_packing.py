"""Encoders of transformers on packed rows: padding goes before the blocks and comes back behind.

Hooks do it, and no module is replaced (of MPNet, whose attention transformers does not route, two
classes are): all parameters stay where they were. Between the hooks the hidden states are
``[1, N, C]``, and the attention learns from ``cu_seq_lens_q`` where a text starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.integrations._transformers_attention import Lengths, collected, wants_attentions
from encfast.integrations._transformers_masks import has_gaps
from encfast.integrations._transformers_self_test import register_attention
from encfast.integrations._transformers_support import LIBRARY, NAME
from encfast.packed import PackedBatch

# By package of transformers.models: the module around all blocks, and its first argument.
_ENCODERS = {
    "bert": ("BertEncoder", "hidden_states"),
    "roberta": ("RobertaEncoder", "hidden_states"),
    "xlm_roberta": ("XLMRobertaEncoder", "hidden_states"),
    "electra": ("ElectraEncoder", "hidden_states"),
    "distilbert": ("Transformer", "hidden_states"),
    "albert": ("AlbertTransformer", "hidden_states"),
    "clip": ("CLIPEncoder", "inputs_embeds"),
    "siglip": ("SiglipEncoder", "inputs_embeds"),
}
# Blocks are called by the model itself, which has no pooling: ids are packed instead of states.
_MODELS = {"modernbert": "ModernBertModel"}
_REPLACED = {"mpnet": ("MPNetEncoder", "MPNetSelfAttention")}
# Texts, images or clips of one length each: their attention is all there is to change.
_UNIFORM = {"vit": "ViTModel", "whisper": "WhisperEncoder"}
SERVED = (*_ENCODERS, *_MODELS, *_REPLACED, *_UNIFORM)

_MARK, _ATTRIBUTE = "packed_from", "_encfast_undo"


class Grid(NamedTuple):
    """Where packed rows came from."""

    indices: Tensor  # int64 [N]
    shape: tuple[int, int]  # (B, S)

    @classmethod
    def of(cls, batch: PackedBatch) -> Grid:
        """That of a batch which ``PackedBatch.pack`` made."""
        assert batch.indices is not None and batch.padded_shape is not None
        return cls(batch.indices, batch.padded_shape)

    def pad(self, x: Any) -> Any:
        """Tensors ``[1, N, ...]`` to ``[B, S, ...]``, zeros in the padding, all else as it is."""
        if isinstance(x, tuple | list):
            return type(x)(self.pad(item) for item in x)
        if isinstance(x, Tensor) and x.shape[:2] == (1, self.indices.shape[0]):
            return ops.pad(x[0], self.indices, *self.shape)
        return x

    def pad_output(self, output: Any) -> Any:
        """The same for all fields of a ``ModelOutput``."""
        if not hasattr(output, "items"):
            return self.pad(output)
        for name, value in output.items():
            output[name] = self.pad(value)
        return output


@dataclass
class _Undo:
    """What :func:`restore` takes back."""

    handles: list[Any] = field(default_factory=list)
    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    attention: list[tuple[Any, Any]] = field(default_factory=list)  # config, implementation


def accelerate(model: nn.Module) -> nn.Module:
    """Makes the encoders in a model run without padding: once out, once in again.

    Serves BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA, ALBERT, MPNet and ModernBERT with any
    head, the text towers of CLIP and SigLIP, and, with no padding to drop, the attention of ViT, of
    CLIP's and SigLIP's image towers and of Whisper. Hidden states at padding are zeros. Batches
    that cannot be packed (4-D masks, caches, cross-attention; masks with gaps where distances
    count) and calls that ask for attentions keep their padding; batches without padding pass as
    they are.

    Args:
        model: of transformers, or a module that holds one, such as a PEFT model or a
            SentenceTransformer. Changed in place.

    Returns:
        The model. Its parameters, their names and its modules are what they were, but that two
        classes of MPNet become subclasses of themselves.

    Raises:
        ImportError: for a version of transformers that encfast does not know.
        NotImplementedError: for a model without an encoder that is served, and for decoders;
            nothing is changed then.
    """
    if any(_ATTRIBUTE in m.__dict__ for m in model.modules()):
        return model
    transformers = LIBRARY.load()
    parts = [(m, family) for m in model.modules() if (family := _family(m))]
    _check(model, parts, transformers)
    register_attention()
    undo = _Undo()
    for top in _outermost(model, transformers.PreTrainedModel):
        _use_attention(top, undo)
    for module, family in parts:
        _convert(module, family, undo)
    setattr(model, _ATTRIBUTE, undo)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Takes :func:`accelerate` back and returns ``model``, as it was, with the weights it has."""
    for top in [m for m in model.modules() if _ATTRIBUTE in m.__dict__]:
        undo: _Undo = top.__dict__.pop(_ATTRIBUTE)
        for handle in undo.handles:
            handle.remove()
        for module, kind in undo.classes:
            module.__class__ = kind
        for config, name in undo.attention:
            config._attn_implementation_internal = name
    return model


def _family(module: nn.Module) -> str | None:
    """The family if the module is one that is converted, or that shows a uniform one."""
    path = type(module).__module__.split(".")
    family, name = path[2] if path[:2] == ["transformers", "models"] else "", type(module).__name__
    names = {
        *_ENCODERS.get(family, ())[:1],
        *_REPLACED.get(family, ()),
        _MODELS.get(family),
        _UNIFORM.get(family),
    }
    return family if name in names else None


def _check(model: nn.Module, parts: list[tuple[nn.Module, str]], transformers: Any) -> None:
    models = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    name = f"{type(model).__name__} with transformers {transformers.__version__}"
    backend = 'attn_implementation="encfast" after register() serves its attention'
    if not parts:
        routed = any(m._can_set_attn_implementation() for m in models)
        rest = backend if routed else "it stays as it is, with its own attention"
        raise NotImplementedError(
            f"accelerate: {name} has no encoder that encfast unpads ({', '.join(SERVED)}); {rest}"
        )
    if any(getattr(m.config, "is_decoder", False) for m in models):
        raise NotImplementedError(
            f"accelerate: {name} is a decoder (config.is_decoder), whose cache is not packed; "
            f"{backend}"
        )


def _outermost(model: nn.Module, kind: type) -> list[Any]:
    if isinstance(model, kind):
        return [model]
    return [found for child in model.children() for found in _outermost(child, kind)]


def _use_attention(model: Any, undo: _Undo) -> None:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    known = [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
    undo.attention += [(c, c._attn_implementation_internal) for c in known]
    for config in known:
        config._attn_implementation_internal = NAME


def _convert(module: nn.Module, family: str, undo: _Undo) -> None:
    if family in _REPLACED:
        from encfast.integrations import _transformers_mpnet as mpnet

        undo.classes.append((module, type(module)))
        module.__class__ = mpnet.PACKED[type(module).__name__]
    elif family in _ENCODERS or family in _MODELS:
        before, behind = (_pack_states, _pad_states) if family in _ENCODERS else (_pack_ids, _pad)
        undo.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        undo.handles.append(module.register_forward_hook(behind, with_kwargs=True))


# ---- hooks ----


def _packed(states: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Rows ``[1, N, ...]``, and the arguments that say where they come from."""
    batch = PackedBatch.pack(states, mask)
    lengths, longest = batch.cu_seqlens, batch.max_seqlen
    return batch.data[None], {
        "attention_mask": None,
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
        _MARK: Grid.of(batch),
    }


def _packed_for_siglip(states: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The same for texts whose last place is pooled, padding or not: it stays, and is no key."""
    kept = mask.clone()
    kept[:, -1] = True
    batch = PackedBatch.pack(states, kept)
    grid, seen = Grid.of(batch), mask.sum(1)
    keys = mask.flatten()[grid.indices].nonzero()[:, 0]
    lengths = Lengths(
        batch.cu_seqlens,
        F.pad(seen.cumsum(0), (1, 0)).int(),
        batch.max_seqlen,
        int(seen.max()),
        None if keys.shape[0] == batch.total else keys,
    )
    return batch.data[None], {"attention_mask": lengths, _MARK: grid}


def _pack_states(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Hidden states and the 2-D mask that encfast's mask function made."""
    family = _family(module) or "bert"
    names = (_ENCODERS[family][1], "attention_mask")
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    elsewhere = ("encoder_hidden_states", "cache", "past_key_values", "cu_seq_lens_q")
    if mask is None or mask.dim() != 2 or any(given.get(n) is not None for n in elsewhere):
        return None
    if wants_attentions(module, given):
        return None
    pack = _packed_for_siglip if family == "siglip" else _packed
    rows, lengths = pack(given[names[0]], mask)
    return args[2:], given | lengths | {names[0]: rows}


def _pad_states(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """The output, and the hidden states that transformers collected on the way."""
    grid = kwargs.get(_MARK)
    if grid is None:
        return None
    states = collected().get("hidden_states", [])
    states[:] = [grid.pad(x) for x in states]
    return grid.pad_output(output)


def _pack_ids(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or given.get("cu_seq_lens_q") is not None:
        return None
    if given.get("output_attentions", module.config.output_attentions):
        return None
    mask = mask.bool()
    if mask.all() or has_gaps(mask):  # without what is hidden, windows would reach farther
        return None
    name = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
    rows, lengths = _packed(given[name], mask)
    places = torch.arange(mask.shape[1], device=mask.device)
    positions = places if given.get("position_ids") is None else given["position_ids"]
    positions = positions.expand(mask.shape).flatten()[lengths[_MARK].indices][None]
    # One for each kind of layer, so that none is built: in a graph that of a window is dense.
    lengths["attention_mask"] = dict.fromkeys(module.config.layer_types)
    return (), given | lengths | {name: rows, "position_ids": positions}


def _pad(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    grid = kwargs.get(_MARK)
    return None if grid is None else grid.pad_output(output)
