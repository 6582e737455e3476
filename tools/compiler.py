"""The C++ compiler, the flags of each ISA, and incremental parallel compiling.

Used by setup.py and by the tests of what it builds.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

CXX = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-Wall", "-Icsrc"]

# Each ISA of csrc/cpu/isa.h with what it adds to FLAGS, narrowest first.
ISAS: dict[str, list[str]] = {"base": []}
if platform.machine() == "x86_64":
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    # GCC 12 warns of its own _mm512_undefined_ps (GCC bug 105593); base and AVX2 keep the warning.
    ISAS["avx512"] += ["-Wno-uninitialized"]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-mavx512vnni"]
    ISAS["avx512amx"] = [*ISAS["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]


def knows(flags):
    """Whether the compiler accepts `flags`."""
    command = [*CXX, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def known_isas():
    """The part of ISAS that the compiler can make; a sentence about each of the others."""
    known = {isa: flags for isa, flags in ISAS.items() if knows(flags)}
    for isa in ISAS.keys() - known.keys():
        print(f"encfast: {CXX[0]} does not know {' '.join(ISAS[isa])}: no {isa} kernels")
    return known


def jobs():
    """Compilers to run at once: MAX_JOBS, else one a core while each has 1 GB of free memory."""
    with open("/proc/meminfo") as f:
        free_kb = int(re.search(r"MemAvailable: *(\d+)", f.read())[1])
    fit = min(len(os.sched_getaffinity(0)), free_kb // 1_000_000)
    return int(os.environ.get("MAX_JOBS") or max(1, fit))


def up_to_date(obj, command):
    """Whether `obj` came from this very command, and no file it was made of is newer."""
    try:
        with open(f"{obj}.cmd") as cmd, open(f"{obj}.d") as deps:
            files = deps.read().split(":", 1)[1].replace("\\\n", " ").split()
            newest = max(map(os.path.getmtime, files))
            return cmd.read() == command and newest <= os.path.getmtime(obj)
    except OSError:
        return False


def compile_one(unit):
    """Makes the object of one (object, command) unless it is up to date.

    The object is dated by the start of its compile, so that an edit made meanwhile counts as newer.
    """
    obj, start = unit[0], time.time()
    command = shlex.join([*unit[1], "-MMD", "-MF", f"{obj}.d", "-o", obj])
    if up_to_date(obj, command):
        return
    sys.stdout.write(f"{unit[1][0]} {obj}\n")
    os.makedirs(os.path.dirname(obj), exist_ok=True)
    subprocess.check_call(shlex.split(command))
    os.utime(obj, (start, start))
    with open(f"{obj}.cmd", "w") as f:
        f.write(command)


def compile_all(units):
    """Makes every object of [(object, command)], `jobs()` at a time."""
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(compile_one, units))
