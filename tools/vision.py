"""Loads timm, open_clip and lightly where PyPI's torchvision, which they import, does not load.

Its compiled operators are for one build of PyTorch: beside another (one for the CPU alone, or the
next version) ``import torchvision`` fails, as it registers fakes for operators that then do not
exist. Nothing that is used here calls operators of torchvision, so declaring those is enough.

In a site-packages a torchvision that does not load takes transformers and Lightning with it: where
they find one, they import it. The Makefile therefore puts these packages into a folder beside.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(sys.prefix) / "vision"
# Those that get a fake while torchvision is imported.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a library lasts as long as its object


def load(name: str) -> ModuleType:
    """A module of timm, open_clip or lightly.

    Raises:
        ImportError: if it is neither installed nor in the folder that the Makefile fills.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # behind what is installed
    _torchvision()
    return importlib.import_module(name)


def _torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in _OPERATORS:
            _declared[-1].define(name + _SCHEMA)
        # What the failed import left behind knows nothing of the new one.
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")


def importorskip(name: str) -> ModuleType:
    """:func:`load`, and a skip of the test where there is nothing to load."""
    import pytest

    try:
        return load(name)
    except ImportError as error:
        pytest.skip(f"{error}; `make test` installs it", allow_module_level=True)
