"""What every model offers to a trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """Base of the models: checkpointing switches, input embeddings, deferred initialisation.

    A subclass sets ``config``, implements ``reset_parameters`` (every parameter and buffer, so that
    a model built on ``meta`` works after ``to_empty``) and ``example_batch(generator)``.
    """

    # Read by accelerate and FSDP wrapping policies: never split a block over devices.
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    config: Any

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recomputes each block's activations in the backward instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: taken for transformers' Trainer, without effect.
        """
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self._set_checkpointing(False)

    def _set_checkpointing(self, on: bool) -> None:
        module: Any
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = on

    def reset_parameters(self) -> None:
        """Draws all parameters anew; a model that lacks it raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} does not define reset_parameters")

    def tie_weights(self) -> None:
        """Makes one parameter of those that are shared; nothing to do where none are."""

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Model:
        """``nn.Module.to_empty``, which splits shared parameters, and shares them again.

        Args:
            device: of the new storage, whose values are not set.
            recurse: its children's too.

        Returns:
            The model.
        """
        super().to_empty(device=device, recurse=recurse)
        self.tie_weights()
        return self

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())


def init_normal(module: nn.Module, std: float) -> None:
    """BERT's initialisation: Linear and Embedding weights from N(0, std), biases 0.

    Children of ``module`` other than Linear and Embedding that hold parameters or buffers reset
    themselves. A shared weight is drawn once.
    """
    _init(module, functools.partial(nn.init.normal_, std=std))


def init_xavier(module: nn.Module) -> None:
    """MAE's initialisation: Linear weights uniform after Glorot and Bengio, biases 0.

    ``module`` and its children as in :func:`init_normal`.
    """
    _init(module, nn.init.xavier_uniform_)


def _init(module: nn.Module, draw: Callable[[Tensor], Any]) -> None:
    drawn: set[int] = set()
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            if id(child.weight) not in drawn:
                draw(child.weight)
                _zero_row(child.weight, getattr(child, "padding_idx", None))
            drawn.add(id(child.weight))
            for name, parameter in child.named_parameters(recurse=False):
                if name != "weight":
                    nn.init.zeros_(parameter)
        elif (
            child is not module
            and not isinstance(child, Model)
            and hasattr(child, "reset_parameters")
        ):
            child.reset_parameters()


def _zero_row(weight: Tensor, row: int | None) -> None:
    if row is not None:
        with torch.no_grad():
            weight[row].zero_()
