"""Every public docstring says what its function takes, gives and refuses; its examples run.

The rules are those of the house: a summary; each argument by name, in the docstring, in that of its
class or in that of a function it refers to by name; errors where the function raises any; where
arguments stand under Args, what comes back under Returns (of shorter docstrings the summary is what
comes back). Fields of dataclasses have their units beside them in the source, which the reference
shows.
"""

import ast
import dataclasses
import doctest
import functools
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import encfast

ROOT = Path(__file__).resolve().parent.parent
# PyTorch's two arguments of every module, which its own docstrings leave out as well.
FACTORY = {"device", "dtype"}
RAISED = {"ValueError", "TypeError", "NotImplementedError", "RuntimeError", "KeyError"}
NOT_TOLD = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@functools.cache
def reference():
    spec = importlib.util.spec_from_file_location("reference_of_docs", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def public() -> dict:
    return dict(reference().public())


def own_methods(cls: type):
    """Public functions, constructors and properties that the class itself defines."""
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def functions(things: dict):
    """Path, function and class of every function and method of `things`."""
    for path, thing in things.items():
        if inspect.isfunction(thing):
            yield path, thing, None
        elif not issubclass(thing, tuple):
            yield from ((f"{path}.{name}", f, thing) for name, f in own_methods(thing))
            if "__init__" in vars(thing) and not is_described_by_its_fields(thing):
                yield path, thing.__init__, thing


def is_described_by_its_fields(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or getattr(cls, "_is_protocol", False)


def told(function, cls: type | None) -> str:
    """Its docstring, those of its class and of bases in the same package, what these refer to."""
    texts = [function.__doc__ or ""]
    for base in cls.__mro__ if cls else ():
        if base.__module__.split(".")[0] == cls.__module__.split(".")[0]:
            texts += [
                base.__doc__ or "",
                getattr(vars(base).get(function.__name__), "__doc__", "") or "",
            ]
    return "\n".join(texts + [text for t in texts for text in referred(t, function, cls)])


def referred(text: str, function, cls: type | None):
    """Docstrings of the functions that stand in backticks."""
    names = sys.modules[function.__module__].__dict__
    for name in set(re.findall(r"`~?([\w.]+)`", text)) - {"None", "True", "False"}:
        thing = vars(cls).get(name) if cls else None
        thing = thing or names.get(name) or public().get(name) or public().get(f"encfast.{name}")
        if callable(thing) and thing is not function:
            yield inspect.getdoc(thing) or ""


def named(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def raised(function) -> set[str]:
    """Errors that the function raises by itself or by a `check`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(getattr(node.exc.func, "id", ""))
        if isinstance(node, ast.Call) and re.match(r"_?check(_|$)", getattr(node.func, "id", "")):
            found.add("ValueError")
    return found & RAISED


def faults(things: dict) -> list[str]:
    found = [f"{path}: no docstring" for path, thing in things.items() if not summary(thing)]
    for path, function, cls in functions(things):
        text, constructor = told(function, cls), function.__name__ == "__init__"
        if cls and not constructor and not inspect.getdoc(function):
            found.append(f"{path}: no docstring")
        left = [n for n in parameters(function, cls) if not named(n, text)]
        if left:
            found.append(f"{path}: says nothing of {', '.join(left)}")
        if raised(function) and not re.search(r"Raises:|Error\b|[Rr]efuse", text):
            found.append(f"{path}: does not say that it raises {', '.join(raised(function))}")
        if not constructor and gives(function, cls) and not returns(function):
            found.append(f"{path}: does not say what it returns")
    return found


def summary(thing) -> str:
    """The first line; the signature that `dataclass` writes is none."""
    text = inspect.getdoc(thing) or ""
    return "" if text.startswith(f"{thing.__name__}(") else text.split("\n")[0]


def parameters(function, cls: type | None) -> list[str]:
    free = FACTORY if cls and issubclass(cls, nn.Module) else set()
    given = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind not in NOT_TOLD
    ]
    return [n for n in given if n not in {"self", "cls"} | free]


def gives(function, cls: type | None) -> bool:
    """Whether it returns more than None, or than the object that its class is about."""
    given = inspect.signature(function).return_annotation
    return given not in (None, "None", inspect.Signature.empty, cls and cls.__name__)


def returns(function) -> bool:
    text = inspect.getdoc(function) or ""
    return "Args:" not in text or re.search(r"^(Returns|Yields):", text, re.M) is not None


def test_every_public_docstring_is_complete():
    found = faults(public())
    assert not found, "\n".join(found)


def silent(x):
    pass


def nameless(x, how) -> None:
    """Does something to x."""


def strict(x) -> None:
    """Does something to x."""
    if x:
        raise ValueError("x")


def closed(x) -> int:
    """Does something.

    Args:
        x: anything.
    """
    return x


class Referring:
    """Does as `closed` says.

    Args:
        width: of it.
    """

    def __init__(self, width, height) -> None:
        pass

    def forward(self, x) -> None:
        """Does as `nameless`."""

    def backward(self, y) -> None:
        """Does as `nameless`."""


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (silent, ["it: no docstring", "it: says nothing of x"]),
        (nameless, ["it: says nothing of how"]),
        (strict, ["it: does not say that it raises ValueError"]),
        (closed, ["it: does not say what it returns"]),
        (Referring, ["it.backward: says nothing of y", "it: says nothing of height"]),
    ],
)
def test_what_is_missing_is_found(thing, expected):
    assert sorted(faults({"it": thing})) == sorted(expected)


def test_the_examples_of_docstrings_run():
    """Not a case for each: to find them imports every module, and collecting tests should not."""
    globs = {
        "torch": torch,
        "encfast": encfast,
        "ops": encfast.ops,
        "PackedBatch": encfast.PackedBatch,
    }
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for path, thing in public().items():
        for test in doctest.DocTestFinder().find(thing, path, globs=dict(globs)):
            torch.manual_seed(0)
            runner.run(test, out=told.append)
    assert runner.tries > 200
    assert not runner.failures, "".join(told)


# What a reader would try first; other functions may have examples as well.
SHOWN = (
    "encfast.PackedBatch",
    "encfast.create",
    "encfast.list_models",
    "encfast.exportable",
    "encfast.contrastive.",
    "encfast.data.PackedCollator",
    "encfast.data.TokenBudgetSampler",
    "encfast.data.LengthBucketSampler",
    "encfast.data.pack_ffd",
    "encfast.data.bucket_by_length",
    "encfast.data.mask_tokens",
    "encfast.gradient_cache.",
    "encfast.inference.compile_encoder",
    "encfast.integrations.open_clip.",
    "encfast.losses.",
    "encfast.ops.",
    "encfast.ranking_losses.",
)


def test_what_a_reader_tries_first_has_an_example():
    tried = {path: thing for path, thing in public().items() if path.startswith(SHOWN)}
    made = {
        path for path, thing in tried.items() if inspect.isclass(thing) and issubclass(thing, tuple)
    }
    assert len(tried) > 70
    assert not [p for p in tried.keys() - made if ">>>" not in (tried[p].__doc__ or "")]
