"""Weights of the BERT family from and to transformers' folders.

A checkpoint saved for one task fills the parts it shares with a model for another: an encoder's
body goes under a new head.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from encfast import weights
from encfast.config import replace_fields
from encfast.layers.base import Model
from encfast.models import _bert_family_names as names

if TYPE_CHECKING:
    from typing_extensions import Self

    from encfast.models.bert_family import BertFamilyConfig


class Checkpoint:
    """A local transformers folder, read.

    Attributes:
        task: that of its architecture.
    """

    def __init__(self, folder: str | Path) -> None:
        self.config, tensors = weights.read_folder(folder)
        self.tensors = names.renamed(tensors)
        self.task = names.task_of(self.config)
        prefix = names.base_prefix(self.config["model_type"])
        # A base model's names have no prefix, or were saved from inside a model with a head.
        self.prefix = prefix if any(n.startswith(prefix) for n in self.tensors) else ""

    def fields(self) -> dict[str, Any]:
        """Fields of the config of the model that was saved, all but its task."""
        fields = names.config_fields(self.config)
        if self.task == "encode" and "pooler" not in fields:
            # Saved with add_pooling_layer=False it has none.
            fields["pooler"] = any(n.startswith(f"{self.prefix}pooler.") for n in self.tensors)
        return fields

    def load(self, model: nn.Module, source: BertFamilyConfig, config: BertFamilyConfig) -> None:
        """Fills the parts that ``source`` (as saved) and ``config`` (as built) share.

        Raises:
            ValueError: listing what does not fit; nothing is loaded then.
        """
        saved, built = (names.parts(c, prefix=self.prefix) for c in (source, config))
        entries = [e for part in built if part in saved for e in built[part]]
        new = {e.ours for part in built if part not in saved for e in built[part]}
        left_out = {n for part in saved if part not in built for e in saved[part] for n in e.theirs}
        ignore = left_out | {n for n in self.tensors if names.ignorable(n)}
        weights.load(model, self.tensors, entries, ignore=ignore, keep=new)


class TransformersModel(Model):
    """A model with weights from and to local transformers folders."""

    config_class: ClassVar[type]
    config: BertFamilyConfig

    @classmethod
    def from_transformers(
        cls,
        folder: str | Path,
        *,
        task: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> Self:
        """A model with the weights of a local folder (config.json and safetensors).

        For another task than the checkpoint's, the parts that both have are loaded, new heads are
        drawn, and the checkpoint's other heads are left out.

        Args:
            folder: of BERT, RoBERTa, ALBERT, GPT-2 or OpenAI GPT. Nothing is downloaded.
            task: by default that of the checkpoint's architecture.
            device, dtype: of the parameters.
            **overrides: config fields to replace, e.g. ``dropout=0.0``, ``num_labels=3``.

        Raises:
            FileNotFoundError: if the folder lacks a file.
            ValueError: listing missing, surplus and misshapen tensors, or naming what is not
                served.
        """
        checkpoint = Checkpoint(folder)
        fields = checkpoint.fields()
        source = cls.config_class(**fields, task=checkpoint.task)
        if task not in (None, checkpoint.task):
            fields["pooler"] = not source.causal
        config = cls.config_class(**fields, task=task or checkpoint.task)
        config = replace_fields(config, overrides)
        model = cls(config, device=device, dtype=dtype)
        checkpoint.load(model, source, config)
        return model

    def to_transformers(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json and tensors of the transformers model that computes the same.

        Raises:
            ValueError: if no transformers model has this combination of switches.
        """
        tensors = weights.export(self, self.transformers_names())
        return names.transformers_config(self.config), tensors

    def transformers_names(self) -> list[weights.Tied]:
        """Which tensors of transformers each of ours is made of."""
        return [entry for part in names.parts(self.config).values() for entry in part]

    def save_transformers(self, folder: str | Path) -> None:
        """Writes a folder that ``from_pretrained`` of transformers reads."""
        weights.write_folder(folder, *self.to_transformers())
