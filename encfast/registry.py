"""Models by name: ``create("mosaicbert/base")``, ``list_models("*bert*")``, ``describe(name)``.

A model file ``encfast/models/<system>.py`` ends with one :func:`register` call. Nothing is imported
before it is asked for: ``import encfast`` imports no model, ``create`` imports one file.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from encfast.config import nearest, replace_fields

_SYSTEMS: dict[str, System] = {}


@dataclass(frozen=True)
class ModelInfo:
    """What :func:`describe` and the README's table say about a system."""

    title: str  # of the paper
    year: int
    paper: str  # arXiv id, DOI or venue
    tasks: tuple[str, ...]  # e.g. ("masked-lm", "classification")
    inputs: str  # what forward takes, with shapes
    ops: tuple[str, ...]  # encfast ops on its hot path, if any
    fidelity: str  # what it was checked against
    deviations: tuple[str, ...] = ()  # where it knowingly differs from the paper


@dataclass(frozen=True)
class System:
    """A registered model file."""

    name: str
    model: type[nn.Module]
    variants: Mapping[str, Any]  # variant name -> frozen config dataclass
    info: ModelInfo


@dataclass(frozen=True)
class Description:
    """One variant of a system, described."""

    name: str
    info: ModelInfo
    config: Any
    parameters: int  # trainable, shared ones counted once


def register(
    name: str, model: type[nn.Module], variants: Mapping[str, Any], info: ModelInfo
) -> None:
    """Adds a system under ``name``, which is also the name of its file in ``encfast/models``.

    Args:
        name: e.g. ``"mosaicbert"``.
        model: class built as ``model(config, device=..., dtype=...)``.
        variants: published sizes plus ``"tiny"``, each a frozen config dataclass.
        info: what is said about it.

    Raises:
        ValueError: if the name is taken or there is no ``"tiny"``.
    """
    taken = _SYSTEMS.get(name)
    if taken is not None and taken.model.__module__ != model.__module__:
        raise ValueError(f"model name {name!r} is already registered by {taken.model.__module__}")
    if (
        taken is not None
        and taken.model is not model
        and taken.model.__qualname__ != model.__qualname__
    ):
        raise ValueError(f"model name {name!r} is registered twice in {model.__module__}")
    if "tiny" not in variants:
        raise ValueError(f"model {name!r} needs a 'tiny' variant, has {sorted(variants)}")
    _SYSTEMS[name] = System(name, model, dict(variants), info)


def list_models(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """Names ``system/variant`` that match a shell pattern, sorted.

    Args:
        pattern: matched against the whole name and against the system alone (``"*mae*"``).
        task: keep only systems that list this task.

    Returns:
        ``system/variant`` each.

    Examples:
        >>> encfast.list_models("mae/*")
        ['mae/base', 'mae/huge', 'mae/large', 'mae/tiny']
        >>> "ettin/tiny" in encfast.list_models(task="masked-lm")
        True
    """
    names = []
    for system in _all_systems().values():
        if task is not None and task not in system.info.tasks:
            continue
        for variant in system.variants:
            full = f"{system.name}/{variant}"
            if fnmatch.fnmatch(full, pattern) or fnmatch.fnmatch(system.name, pattern):
                names.append(full)
    return sorted(names)


def create(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Any:
    """Builds a model with random weights.

    Args:
        name: ``"system/variant"``.
        device: where to build it (``"meta"`` allocates nothing).
        dtype: of its parameters.
        **overrides: fields of its config to replace.

    Returns:
        The model, an instance of :class:`encfast.layers.base.Model`, in training mode.

    Raises:
        KeyError: for an unknown system or variant, naming the nearest.
        TypeError: for an unknown config field, naming the nearest.

    Examples:
        >>> model = encfast.create("mosaicbert/tiny", vocab_size=500)
        >>> model.config.vocab_size
        500
        >>> encfast.create("mosaicbert/tiny", vocab_sise=500)
        Traceback (most recent call last):
            ...
        TypeError: MosaicBertConfig has no field 'vocab_sise'; did you mean 'vocab_size'?
    """
    system, variant = _resolve(name)
    config = replace_fields(system.variants[variant], overrides)
    return system.model(config, device=device, dtype=dtype)  # type: ignore[call-arg]


def get_config(name: str, **overrides: Any) -> Any:
    """The config :func:`create` would build from, without building it."""
    system, variant = _resolve(name)
    return replace_fields(system.variants[variant], overrides)


def describe(name: str) -> Description:
    """What ``name`` is: paper, year, tasks, inputs, ops, parameters, deviations, fidelity."""
    system, variant = _resolve(name)
    model = create(name, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    return Description(name, system.info, system.variants[variant], parameters)


def _resolve(name: str) -> tuple[System, str]:
    system_name, _, variant = name.partition("/")
    system = _system(system_name)
    if variant not in system.variants:
        raise KeyError(
            f"model {system_name!r} has no variant {variant!r}; {nearest(variant, system.variants)}"
        )
    return system, variant


def _system(name: str) -> System:
    if name not in _SYSTEMS and name in _model_files():
        importlib.import_module(f"encfast.models.{name}")
    if name not in _SYSTEMS:
        known = {*_model_files(), *_SYSTEMS}
        raise KeyError(f"there is no model {name!r}; {nearest(name, known)}")
    return _SYSTEMS[name]


def _all_systems() -> dict[str, System]:
    for name in _model_files():
        _system(name)
    return _SYSTEMS


def _model_files() -> list[str]:
    import encfast.models

    files = (m.name for m in pkgutil.iter_modules(encfast.models.__path__))
    return [f for f in files if not f.startswith("_")]
