"""Sphinx's roles in docstrings, :func:`encfast.ops.pad` and the like, as links of the site.

An extension of griffe, named in mkdocs.yml. What a role names is looked up as its docstring would:
in the class and the module around it, then among all public names; what is not on the site stays a
name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe

sys.path.insert(0, str(Path(__file__).parent))

import reference

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package."""

    def __init__(self) -> None:
        names = dict(reference.public())
        self.things = names | {reference.source_path(thing): thing for thing in names.values()}

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """When all of encfast has been read."""
        self._rewrite(pkg)

    def _rewrite(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(
                lambda role: self._link(role[1], obj), obj.docstring.value
            )
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member)

    def _link(self, name: str, obj: griffe.Object) -> str:
        shown = f"`{name.removeprefix('encfast.')}`"
        around = obj.path.split(".")
        for depth in range(len(around), -1, -1):
            place = self._place(".".join([*around[:depth], name]))
            if place:
                return f"[{shown}][{place}]"
        return shown

    def _place(self, path: str) -> str | None:
        """The anchor of a module, a public name, or a public member of a class."""
        if path in reference.surface():
            return path
        if path in self.things:
            return reference.source_path(self.things[path])
        owner, _, member = path.rpartition(".")
        thing = self.things.get(owner)
        if not isinstance(thing, type) or not hasattr(thing, member):
            return None
        return f"{reference.source_path(thing)}.{member}"
