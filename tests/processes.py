"""Test files that are also the processes they test: forked, so that PyTorch is imported once."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def fork(process: Callable[[int, int, Path], None], worlds: Iterable[int], folder: Path) -> None:
    """`process(rank, world, folder)` for all ranks at once, one world after the other."""
    context = multiprocessing.get_context("fork")
    for world in worlds:
        running = [context.Process(target=process, args=(r, world, folder)) for r in range(world)]
        for p in running:
            p.start()
        for p in running:
            p.join()
        if any(p.exitcode for p in running):
            sys.exit(1)


def run_script(script: str, folder: Path) -> Path:
    """Runs a test file with a folder for its results, which it returns; fails with it."""
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return folder
