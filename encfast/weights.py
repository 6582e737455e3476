"""Weights from and to other libraries: local folders and name maps that work in both directions.

A model file lists how its tensors are called elsewhere as :class:`Tied` entries; :func:`load` and
:func:`export` walk that list. Loading is all or nothing: a missing, surplus or misshapen tensor is
an error that lists every offender, and the model stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tied:
    """One tensor of ours and the tensor, or tensors, it is elsewhere.

    Attributes:
        ours: name in our state dict.
        theirs: names elsewhere; several are concatenated along the first dimension (fused
        projections). transpose: theirs is stored transposed (GPT-2's Conv1D).
        sizes: rows of each of ``theirs``, where they are not equal parts.
        shapes: of ours and of theirs, part by part, where they hold the same numbers in different
            shapes (a convolution over patches and its flattened form).
    """

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False
    sizes: tuple[int, ...] | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor from theirs."""
        parts = [tensors[name] for name in self.theirs]
        if self.shapes is not None and all(p.shape == self.shapes[1] for p in parts):
            parts = [p.reshape(self.shapes[0]) for p in parts]
        parts = [p.t() if self.transpose else p for p in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, ours: Tensor) -> dict[str, Tensor]:
        """Their tensors from ours."""
        parts = ours.split(self.sizes) if self.sizes else ours.chunk(len(self.theirs))
        if self.shapes is not None:
            parts = tuple(p.reshape(self.shapes[1]) for p in parts)
        return {
            name: (p.t() if self.transpose else p).contiguous()
            for name, p in zip(self.theirs, parts, strict=True)
        }


def both(ours: str, *theirs: str) -> list[Tied]:
    """Weight and bias of the layer called ``ours``; of several of ``theirs``, a fused one."""
    return [
        Tied(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs))
        for kind in ("weight", "bias")
    ]


def tied_token(ours: str, theirs: str, dim: int) -> Tied:
    """A class or mask token: ``ours`` ``[dim]``, ``theirs`` ``[1, 1, dim]``."""
    return Tied(ours, (theirs,), shapes=((dim,), (1, 1, dim)))


def tied_table(ours: str, theirs: str, rows: int, dim: int) -> Tied:
    """A table of positions: ``ours`` ``[rows, dim]``, ``theirs`` ``[1, rows, dim]``."""
    return Tied(ours, (theirs,), shapes=((rows, dim), (1, rows, dim)))


def vit_block(ours: str, theirs: str) -> list[Tied]:
    """A pre-norm :class:`~encfast.layers.Block`, as transformers names the parts of a ViT's.

    Args:
        ours: the block's prefix here.
        theirs: its prefix there.

    Returns:
        An entry for each of its parameters.
    """
    return [
        *both(f"{ours}.norm1", f"{theirs}.layernorm_before"),
        *both(f"{ours}.attn.qkv", *(f"{theirs}.attention.{x}_proj" for x in "qkv")),
        *both(f"{ours}.attn.out", f"{theirs}.attention.o_proj"),
        *both(f"{ours}.norm2", f"{theirs}.layernorm_after"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
    ]


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and all tensors of ``*.safetensors`` in a local folder.

    Raises:
        FileNotFoundError: if either is missing; nothing is ever downloaded.
        ImportError: without the package safetensors.
    """
    folder = Path(folder)
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise ImportError("reading weights needs safetensors: pip install 'encfast[hf]'") from e
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} does not exist; expected a folder with a model")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return json.loads(config_file.read_text()), tensors


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes ``config`` and ``tensors`` to config.json and model.safetensors in ``folder``."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    own = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


def load(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    entries: Sequence[Tied],
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> None:
    """Fills ``model`` from another library's tensors, or changes nothing and says why.

    Args:
        model: every parameter and persistent buffer of it must be covered by ``entries`` or share
            memory with one that is.
        tensors: theirs, by name.
        entries: the name map.
        ignore: names among ``tensors`` that have no counterpart on purpose (e.g. position id
            buffers, the second name of a tied tensor).
        keep: names of ours that stay as they are on purpose (a head to be trained anew).

    Raises:
        ValueError: listing missing, surplus and misshapen tensors.
    """
    state = model.state_dict(keep_vars=True)
    wanted = {name for entry in entries for name in entry.theirs}
    problems = [f"missing: {n}" for n in sorted(wanted - set(tensors))]
    problems += [f"surplus: {n}" for n in sorted(set(tensors) - wanted - set(ignore))]
    loaded: dict[str, Tensor] = {}
    for entry in entries:
        if entry.ours not in state:
            problems.append(f"no such tensor in {type(model).__name__}: {entry.ours}")
        elif all(name in tensors for name in entry.theirs):
            value, own = entry.join(tensors), state[entry.ours]
            if value.shape != own.shape:
                problems.append(
                    f"shape of {' + '.join(entry.theirs)}: {tuple(value.shape)}, expected "
                    f"{tuple(own.shape)} as {entry.ours}"
                )
            loaded[entry.ours] = value
    covered = {state[entry.ours].data_ptr() for entry in entries if entry.ours in state}
    problems += [
        f"not covered: {name}"
        for name, own in state.items()
        if name not in {*keep, *(e.ours for e in entries)} and own.data_ptr() not in covered
    ]
    if problems:
        raise ValueError(
            f"these weights do not fit {type(model).__name__}, nothing was loaded:\n  "
            + "\n  ".join(problems)
        )
    with torch.no_grad():
        for name, value in loaded.items():
            state[name].copy_(value)


def export(model: nn.Module, entries: Sequence[Tied]) -> dict[str, Tensor]:
    """The model's tensors under another library's names, those of ``entries``."""
    state = model.state_dict()
    theirs: dict[str, Tensor] = {}
    for entry in entries:
        theirs |= entry.part(state[entry.ours].detach())
    return theirs
