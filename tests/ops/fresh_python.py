"""Another Python for what is fixed once per process: the ISA, and what was loaded."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# How scripts that measure memory begin: `peak(f)` is how many bytes f needs for a time.
PEAK = """
import gc, re, sys, torch, encfast
from pathlib import Path

def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

def peak(f):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    f()
    return resident("VmHWM") - before
"""


def python(*args, **env):
    """Runs another Python in the repository and returns its output; fails with it."""
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def run_under_isa(isa, cases, *tests):
    """The ISA is chosen once per process, so each runs the cases in its own."""
    run = (
        "import sys, pytest, torch, encfast;"
        f"assert torch.ops.encfast.cpu_isa() == {isa!r}, torch.ops.encfast.cpu_isa();"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    out = python("-c", run, *tests, "-k", cases, ENCFAST_CPU_ISA=isa, OMP_NUM_THREADS="1")
    assert " passed" in out
