"""The site builds without a warning, holds every public name, and its Python runs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
BLOCK = re.compile(
    r"(?:<!-- (?P<kind>\S+): (?P<what>.*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)


def reference():
    spec = importlib.util.spec_from_file_location("reference_of_docs", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What `make docs` makes; a warning, a dead link or anchor among them, is an error there."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return folder


def test_every_public_name_is_in_the_reference(site):
    docs = reference()
    text = "".join(page.read_text() for page in (site / "reference").rglob("*.html"))
    places = set(re.findall(r'id="(encfast\.[\w.]+)"', text))
    names = {path: docs.source_path(thing) for path, thing in docs.public()}
    assert len(names) > 300
    assert not [path for path, place in names.items() if place not in places]


def test_no_role_or_request_for_a_table_is_left_on_a_page(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert "mosaicbert" in pages[site / "systems" / "index.html"]
    left = r":(?:class|func|meth|mod|attr|data):<code>|<!-- table"
    assert not [path for path, text in pages.items() if re.search(left, text)]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """One after another, in one namespace, as they are read; what downloads is compiled only."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    assert text.count("```python") == len(BLOCK.findall(text))
    names: dict = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        assert block["kind"] in (None, "needs", "network"), f"{page}: what is {block['kind']}?"
        lines = text[: block.start("code")].count("\n")
        code = compile("\n" * lines + block["code"], f"docs/{page}", "exec")
        if block["kind"] == "network":
            continue
        for package in (block["what"] or "").split(", "):
            if package:
                pytest.importorskip(package)
        exec(code, names)
