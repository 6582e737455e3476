"""How transformers calls the tensors and config fields of the BERT family.

A model is made of parts (``body``, ``pooler``, heads); :func:`parts` has the name map of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from encfast.config import nearest
from encfast.weights import Tied

if TYPE_CHECKING:
    from encfast.models.bert_family import BertFamilyConfig

Parts = dict[str, list[Tied]]

# model_type of transformers -> what sets it apart here.
_ENCODER = {"causal": False, "norm_position": "post", "embedding_norm": True, "final_norm": False}
_DECODER = {"causal": True, "embedding_norm": False, "num_segments": 0, "position_offset": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**_ENCODER, "share_layers": False, "embedding_dim": None, "position_offset": 0},
    "roberta": {**_ENCODER, "share_layers": False, "embedding_dim": None, "position_offset": 2},
    "albert": {**_ENCODER, "share_layers": True, "position_offset": 0},
    "gpt2": {**_DECODER, "norm_position": "pre", "final_norm": True, "share_layers": False},
    "openai-gpt": {**_DECODER, "norm_position": "post", "final_norm": False, "share_layers": False},
}
_CLASS_PREFIX = {
    "bert": "Bert",
    "roberta": "Roberta",
    "albert": "Albert",
    "gpt2": "GPT2",
    "openai-gpt": "OpenAIGPT",
}
_BASE_PREFIX = {"gpt2": "transformer.", "openai-gpt": "transformer."}
_CLASS_SUFFIX = {
    "encode": "Model",
    "pretrain": "ForPreTraining",
    "masked-lm": "ForMaskedLM",
    "causal-lm": "LMHeadModel",
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
# Theirs -> ours. OpenAI GPT calls the tanh approximation plain "gelu".
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS |= {"relu": "relu", "silu": "silu"}

# Their field -> ours, by name of the field family.
_ENCODER_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "type_vocab_size": "num_segments",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attn_dropout",
    "initializer_range": "init_std",
    "pad_token_id": "pad_id",
}
_DECODER_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "dim",
    "n_layer": "depth",
    "n_head": "num_heads",
    "n_positions": "max_positions",
    "layer_norm_epsilon": "norm_eps",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attn_dropout",
    "initializer_range": "init_std",
}
_DECODER_TYPES = ("gpt2", "openai-gpt")
# Fields that change the maths, with the only value served.
_ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "num_hidden_groups": 1,
    "inner_group_num": 1,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def model_type(config: BertFamilyConfig) -> str:
    """The transformers model that computes what ``config`` describes.

    Raises:
        ValueError: if there is none.
    """
    for name, fields in FAMILIES.items():
        fits = all(getattr(config, field) == value for field, value in fields.items())
        if fits and (name != "albert" or config.embedding_dim is not None):
            return name
    raise ValueError(
        "no transformers model has this combination of switches: "
        + ", ".join(f"{f}={getattr(config, f)!r}" for f in FAMILIES["bert"])
    )


def task_of(theirs: Mapping[str, Any]) -> str:
    """The task of a config.json's architecture.

    Raises:
        ValueError: if it names none that is served.
    """
    architecture = (theirs.get("architectures") or ["(none)"])[0]
    stem = architecture.removeprefix(_CLASS_PREFIX[_known_type(theirs)])
    for task, suffix in _CLASS_SUFFIX.items():
        if stem == suffix:
            return task
    raise ValueError(
        f"config.json names the architecture {architecture!r}; expected a model name and one of "
        + ", ".join(_CLASS_SUFFIX.values())
    )


def _known_type(theirs: Mapping[str, Any]) -> str:
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json has model_type {kind!r}; {nearest(str(kind), FAMILIES)}")
    return kind


def config_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a BertFamilyConfig from a parsed config.json, all but the task's.

    Raises:
        ValueError: for a model type, activation or switch that is not served.
    """
    kind = _known_type(theirs)
    for name, only in _ONLY.items():
        if theirs.get(name, only) != only:
            raise ValueError(f"config.json has {name}={theirs[name]!r}, served is only {only!r}")
    decoder = kind in _DECODER_TYPES
    names = _DECODER_FIELDS if decoder else _ENCODER_FIELDS
    missing = sorted(n for n in names if n not in theirs and n not in _DEFAULTS)
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    fields = FAMILIES[kind] | {ours: theirs.get(n, _DEFAULTS.get(n)) for n, ours in names.items()}
    fields["activation"] = _activation(theirs, kind)
    fields["num_labels"] = theirs.get("num_labels", len(theirs.get("id2label", "01")))
    if decoder:
        fields |= {"ffn_dim": theirs.get("n_inner") or 4 * theirs["n_embd"], "pad_id": None}
        fields |= {"pooler": False, "scale_residual_init": kind == "gpt2"}
        return fields
    fields["max_positions"] = theirs["max_position_embeddings"] - fields["position_offset"]
    if kind == "roberta" and fields["pad_id"] != 1:
        raise ValueError(f"config.json has pad_token_id={fields['pad_id']}; RoBERTa counts from 1")
    if kind == "albert":
        fields["embedding_dim"] = theirs["embedding_size"]
    own = theirs.get("classifier_dropout_prob" if kind == "albert" else "classifier_dropout")
    fields["head_dropout"] = fields["dropout"] if own is None else own
    return fields


# What transformers assumes where an old config.json is silent.
_DEFAULTS = {
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "layer_norm_epsilon": 1e-5,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


def _activation(theirs: Mapping[str, Any], kind: str) -> str:
    if kind == "openai-gpt":
        name = {"gelu": "gelu_new"}.get(theirs.get("afn", "gelu"), theirs.get("afn"))
    else:
        name = theirs.get("activation_function" if kind == "gpt2" else "hidden_act")
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: activation {name!r} is unknown; {nearest(str(name), _ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def transformers_config(config: BertFamilyConfig) -> dict[str, Any]:
    """The config.json of a model for transformers."""
    kind = model_type(config)
    decoder = kind in _DECODER_TYPES
    names = _DECODER_FIELDS if decoder else _ENCODER_FIELDS
    # transformers' span and sentence-order heads take their two outputs from the number of labels.
    labels = 2 if config.task in ("span", "pretrain") else config.num_labels
    theirs = {name: getattr(config, ours) for name, ours in names.items()}
    theirs |= {
        "model_type": kind,
        "architectures": [_CLASS_PREFIX[kind] + _CLASS_SUFFIX[config.task]],
        "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
        "label2id": {f"LABEL_{i}": i for i in range(labels)},
        "tie_word_embeddings": True,
    }
    act = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    if decoder:
        field = "activation_function" if kind == "gpt2" else "afn"
        theirs[field] = "gelu" if kind == "openai-gpt" and act == "gelu_new" else act
        # transformers' default, 50256, need not be in the vocabulary.
        theirs |= {"bos_token_id": None, "eos_token_id": None, "n_inner": config.ffn_dim}
        return theirs | {"embd_pdrop": config.dropout}
    theirs |= {
        "hidden_act": act,
        "max_position_embeddings": config.max_positions + config.position_offset,
    }
    if kind == "albert":
        theirs["embedding_size"] = config.embedding_dim
        return theirs | {"classifier_dropout_prob": config.head_dropout}
    return theirs | {"classifier_dropout": config.head_dropout}


def parts(config: BertFamilyConfig, *, prefix: str | None = None) -> Parts:
    """The name map of each part of a model for ``config.task``.

    Args:
        config: as built.
        prefix: what stands before the body's names; by default what transformers puts there.
    """
    kind = model_type(config)
    if prefix is None:
        prefix = "" if config.task == "encode" else base_prefix(kind)
    body: Callable[[BertFamilyConfig], Iterable[Tied]] = {
        "gpt2": _gpt_body,
        "openai-gpt": _gpt_body,
        "albert": _albert_body,
    }.get(kind, _bert_body)
    found = {"body": [_prefixed(entry, prefix) for entry in body(config)]}
    if config.has_pooler and not (kind == "roberta" and config.task == "classification"):
        theirs = "pooler." if kind == "albert" else "pooler.dense."
        found["pooler"] = _linear("pooler", prefix + theirs)
    return found | _heads(config, kind)


def base_prefix(kind: str) -> str:
    """What stands before the body's names in a model with a head."""
    return _BASE_PREFIX.get(kind, f"{kind}.")


def _heads(config: BertFamilyConfig, kind: str) -> Parts:
    task = config.task
    if task in ("masked-lm", "pretrain"):
        found = {"lm_head": _lm_head(kind)}
        if task == "pretrain":
            pair = "sop_classifier.classifier." if kind == "albert" else "cls.seq_relationship."
            found["pair"] = _linear("head", pair)
        return found
    if task == "span":
        return {"span": _linear("head.out", "qa_outputs.")}
    if task == "classification" and kind in _DECODER_TYPES:
        return {task: [Tied("head.weight", ("score.weight",))]}
    if task == "classification" and kind == "roberta":
        dense = _linear("pooler", "classifier.dense.")
        return {task: dense + _linear("head", "classifier.out_proj.")}
    if task in ("classification", "token-classification"):
        return {task: _linear("head", "classifier.")}
    return {}


def ignorable(name: str) -> bool:
    """Buffers of old checkpoints and second names of tied tensors: nothing is lost with them."""
    tied = ("cls.predictions.decoder", "lm_head.decoder", "predictions.decoder", "lm_head.weight")
    buffers = (".position_ids", ".attn.bias", ".attn.masked_bias")
    return name.endswith(buffers) or name.startswith(tied)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the gamma and beta of checkpoints converted from TensorFlow."""
    modern = {".gamma": ".weight", ".beta": ".bias"}
    out = {}
    for name, tensor in tensors.items():
        stem, dot, last = name.rpartition(".")
        out[stem + modern.get(dot + last, dot + last)] = tensor
    return out


def _prefixed(entry: Tied, prefix: str) -> Tied:
    return Tied(entry.ours, tuple(prefix + n for n in entry.theirs), entry.transpose, entry.sizes)


def _linear(ours: str, theirs: str) -> list[Tied]:
    """Weight and bias; ``theirs`` ends with a dot."""
    return [Tied(f"{ours}.{w}", (f"{theirs}{w}",)) for w in ("weight", "bias")]


def _fused(ours: str, theirs: Iterable[str]) -> list[Tied]:
    theirs = list(theirs)
    return [Tied(f"{ours}.{w}", tuple(f"{t}{w}" for t in theirs)) for w in ("weight", "bias")]


def _encoder_embeddings(config: BertFamilyConfig) -> list[Tied]:
    entries = [
        Tied("embed.word.weight", ("embeddings.word_embeddings.weight",)),
        Tied("embed.position.weight", ("embeddings.position_embeddings.weight",)),
        *_linear("embed.norm", "embeddings.LayerNorm."),
    ]
    if config.num_segments:
        entries.append(Tied("embed.segment.weight", ("embeddings.token_type_embeddings.weight",)))
    return entries


def _bert_body(config: BertFamilyConfig) -> list[Tied]:
    entries = _encoder_embeddings(config)
    for i in range(config.depth):
        ours, theirs = f"stack.blocks.{i}.", f"encoder.layer.{i}."
        entries += _fused(
            ours + "attn.qkv", (f"{theirs}attention.self.{n}." for n in ("query", "key", "value"))
        )
        entries += _linear(ours + "attn.out", theirs + "attention.output.dense.")
        entries += _linear(ours + "norm1", theirs + "attention.output.LayerNorm.")
        entries += _linear(ours + "mlp.up", theirs + "intermediate.dense.")
        entries += _linear(ours + "mlp.down", theirs + "output.dense.")
        entries += _linear(ours + "norm2", theirs + "output.LayerNorm.")
    return entries


def _albert_body(config: BertFamilyConfig) -> list[Tied]:
    ours, theirs = "stack.blocks.0.", "encoder.albert_layer_groups.0.albert_layers.0."
    entries = _encoder_embeddings(config)
    entries += _linear("project", "encoder.embedding_hidden_mapping_in.")
    entries += _fused(
        ours + "attn.qkv", (f"{theirs}attention.{n}." for n in ("query", "key", "value"))
    )
    entries += _linear(ours + "attn.out", theirs + "attention.dense.")
    entries += _linear(ours + "norm1", theirs + "attention.LayerNorm.")
    entries += _linear(ours + "mlp.up", theirs + "ffn.")
    entries += _linear(ours + "mlp.down", theirs + "ffn_output.")
    return entries + _linear(ours + "norm2", theirs + "full_layer_layer_norm.")


def _gpt_body(config: BertFamilyConfig) -> list[Tied]:
    second = config.norm_position == "pre"
    word, position = ("wte", "wpe") if second else ("tokens_embed", "positions_embed")
    entries = [
        Tied("embed.word.weight", (f"{word}.weight",)),
        Tied("embed.position.weight", (f"{position}.weight",)),
    ]
    for i in range(config.depth):
        ours, theirs = f"stack.blocks.{i}.", f"h.{i}."
        for own, name in (
            ("attn.qkv", "attn.c_attn"),
            ("attn.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            entries.append(Tied(f"{ours}{own}.weight", (f"{theirs}{name}.weight",), transpose=True))
            entries.append(Tied(f"{ours}{own}.bias", (f"{theirs}{name}.bias",)))
        entries += _linear(ours + "norm1", theirs + "ln_1.")
        entries += _linear(ours + "norm2", theirs + "ln_2.")
    return entries + (_linear("final_norm", "ln_f.") if config.final_norm else [])


def _lm_head(kind: str) -> list[Tied]:
    dense, norm, bias = {
        "bert": (
            "cls.predictions.transform.dense.",
            "cls.predictions.transform.LayerNorm.",
            "cls.predictions.bias",
        ),
        "roberta": ("lm_head.dense.", "lm_head.layer_norm.", "lm_head.bias"),
        "albert": ("predictions.dense.", "predictions.LayerNorm.", "predictions.bias"),
    }[kind]
    return [
        *_linear("lm_head.dense", dense),
        *_linear("lm_head.norm", norm),
        Tied("lm_head.decoder.bias", (bias,)),
    ]
