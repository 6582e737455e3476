"""Other people's libraries: imported in a version that encfast's hooks know, or refused."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Library:
    """A library whose internals an integration reads.

    Attributes:
        module: what is imported.
        oldest: version that the integration takes, and was checked with.
        newest: version that it was checked with. Later ones of that major version are taken too.
        instead: what does without it: the end of the message about another version.
    """

    module: str
    oldest: str
    newest: str
    instead: str

    @property
    def name(self) -> str:
        """As its users write it."""
        return self.module.replace("_", "-")

    @property
    def checked_with(self) -> str:
        """Its versions, for messages."""
        same = self.oldest == self.newest
        return self.oldest if same else f"{self.oldest} to {self.newest}"

    def load(self) -> Any:
        """The module.

        Raises:
            ImportError: if it is missing, does not load, or is of a version that encfast does not
                know; the message names the versions that it does.
        """
        try:
            module = importlib.import_module(self.module)
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                f"encfast.integrations.{self.module} needs {self.name}, which could not be "
                f"imported: {error}; it was checked with {self.name} {self.checked_with}, here "
                f"with PyTorch {torch.__version__}"
            ) from error
        oldest, found = _numbers(self.oldest), _numbers(module.__version__)
        if found[0] != oldest[0] or found < oldest:
            raise ImportError(
                f"{self.name} {module.__version__} is not one that encfast's hooks know: they were "
                f"checked with {self.checked_with}, and take {self.oldest} and later ones of "
                f"version {oldest[0]}; {self.instead}"
            )
        return module


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
