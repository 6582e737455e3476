"""README.md tells the truth: its generated parts are current and its first example runs."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.quick


def generator():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current():
    text = (ROOT / "README.md").read_text()
    assert generator().rendered(text) == text, "run: python docs/tables.py"


def test_a_stale_table_is_noticed():
    text = (ROOT / "README.md").read_text()
    stale = text.replace("`mosaicbert` |", "`mosaicbort` |")
    assert stale != text
    assert generator().rendered(stale) == text


def test_the_first_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == names["q"].shape == (17 + 230 + 64, 12, 64)


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
