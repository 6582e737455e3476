"""README.md and docs/gpu.md tell the truth: generated parts are current, the example runs."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.quick


PAGES = {"README.md": "docs/tables.py", "docs/gpu.md": "docs/gpu.py"}


def generator(source):
    spec = importlib.util.spec_from_file_location(f"pages_of_{Path(source).stem}", ROOT / source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_generated_parts_are_current(page):
    text = (ROOT / page).read_text()
    assert generator(PAGES[page]).rendered(text) == text, f"run: python {PAGES[page]}"


@pytest.mark.parametrize(
    ("page", "word"), [("README.md", "`mosaicbert` |"), ("docs/gpu.md", "| 0 B |")]
)
def test_a_stale_table_is_noticed(page, word):
    text = (ROOT / page).read_text()
    stale = text.replace(word, "| wrong |", 1)
    assert stale != text
    assert generator(PAGES[page]).rendered(stale) == text


def test_the_first_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == names["q"].shape == (17 + 230 + 64, 12, 64)


@pytest.mark.parametrize(
    ("section", "results"),
    [("Mixtures of experts", ("loss",)), ("Losses without their matrices", ("contrastive", "mlm"))],
)
def test_the_short_examples_run(section, results):
    text = (ROOT / "README.md").read_text().split(f"## {section}")[1]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    for name in results:
        assert names[name].isfinite() and names[name].dim() == 0


def test_the_example_of_transformers_runs():
    pytest.importorskip("transformers")
    text = (ROOT / "README.md").read_text().split("## Inside transformers")[1]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert names["model"].config._attn_implementation == "encfast"


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
