"""The public names of encfast, and the pages of the site that are made from the code.

mkdocs.yml names this file as a hook: reference pages come from the modules while the site is
built, so that a new name needs no line anywhere, and so do the tables that the README shows too. A
page asks for a table by `<!-- table: NAME -->`, one of `TABLES`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tables

import encfast

# Packages whose `__all__` is all that they offer.
CLOSED = ("encfast.inference", "encfast.ops", "encfast.ref")
# Launchers of GPU kernels, which import Triton; the ops are their face.
INTERNAL = "encfast.kernels"
# One page per module below these, one per module of encfast elsewhere.
SPREAD = ("encfast.integrations", "encfast.models")
TABLES = {
    "bench": lambda: tables.figures().replace("docs/bench.png", "bench.png"),
    "ops": lambda: _op_table(),
    "models": tables.model_table,
}


@functools.cache
def surface() -> dict[str, tuple[str, ...]]:
    """Module -> its public functions and classes, each under the outermost module that has it."""
    found: dict[str, tuple[str, ...]] = {}
    seen: set[int] = set()
    for name in sorted(_modules(), key=lambda name: (name.count("."), name)):
        module = importlib.import_module(name)
        names = [n for n in _names(module) if id(getattr(module, n)) not in seen]
        seen |= {id(getattr(module, n)) for n in names}
        found[name] = tuple(sorted(names, key=str.lower))
    return found


def public() -> Iterator[tuple[str, Any]]:
    """Path, as a user imports it, and object of every public function and class."""
    for module, names in surface().items():
        for name in names:
            yield f"{module}.{name}", getattr(importlib.import_module(module), name)


def source_path(thing: Any) -> str:
    """Where the source defines it: what its place on a page is called."""
    return f"{thing.__module__}.{thing.__qualname__}"


def _modules() -> Iterator[str]:
    yield "encfast"
    for module in pkgutil.walk_packages(encfast.__path__, "encfast."):
        hidden = any(part.startswith("_") for part in module.name.split("."))
        rooms = tuple(f"{package}." for package in (*CLOSED, INTERNAL))
        if not hidden and module.name != INTERNAL and not module.name.startswith(rooms):
            yield module.name


def _names(module: ModuleType) -> list[str]:
    own = [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]
    kinds = (inspect.isclass, inspect.isfunction)
    names = getattr(module, "__all__", own)
    return [n for n in names if any(kind(getattr(module, n)) for kind in kinds)]


def pages() -> dict[str, str]:
    """Path of a reference page in the site -> its Markdown."""
    found: dict[str, str] = {}
    for module, names in surface().items():
        page = f"reference/{_page(module)}.md"
        found[page] = found.get(page, f"# {_page(module)}\n") + _section(module, names)
    return {page: text for page, text in found.items() if ":::" in text}


def _page(module: str) -> str:
    depth = 3 if module.startswith(SPREAD) else 2
    return ".".join(module.split(".")[:depth])


def _section(module: str, names: tuple[str, ...]) -> str:
    """What a module says of itself, and its names; those of an op under its module's words."""
    if not names:
        return ""
    heading = f"\n## {module}\n" if module != _page(module) else ""
    parts = [heading, _words(module)]
    if module == "encfast.ops":
        names = tuple(sorted(names, key=lambda name: _stem(getattr(encfast.ops, name))))
    told = {module}
    for name in names:
        thing = getattr(importlib.import_module(module), name)
        if module == "encfast.ops" and thing.__module__ not in told:
            told.add(thing.__module__)
            parts.append(f"\n## {thing.__module__.rpartition('.')[2]}\n{_words(thing.__module__)}")
        parts.append(f"\n::: {source_path(thing)}\n    options: {{heading: {name}}}\n")
    return "".join(parts)


def _stem(thing: Any) -> int:
    """The place of an op's module in `OPS`; what is no op comes first."""
    stem = thing.__module__.rpartition(".")[2]
    return encfast.ops.OPS.index(stem) if stem in encfast.ops.OPS else -1


def _words(module: str) -> str:
    return f"\n::: {module}\n    options: {{members: [], show_root_heading: false}}\n"


def _op_table() -> str:
    rows = ["| op | what | CPU | CUDA |", "|---|---|---|---|"]
    for stem in encfast.ops.OPS:
        kinds = " | ".join(kind for kind, _ in tables.op_rooms(stem))
        rows.append(f"| `{stem}` | {tables.op_summary(stem)} | {kinds} |")
    return "\n".join(rows)


def on_config(config):
    """Reference pages stand at the end of the navigation."""
    config.nav.append({"Reference": [{Path(page).stem: page} for page in pages()]})
    return config


def on_files(files, config):
    """The reference pages, which are files nowhere."""
    from mkdocs.structure.files import File

    for page, text in pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Tables in the places that ask for them."""
    return re.sub(r"<!-- table: (\w+) -->", lambda found: TABLES[found[1]](), markdown)
