"""No instruction beyond the baseline may stand outside the namespace of an ISA that has it.

A template or inline function of the standard library that is instantiated in an AVX-512 object is a
weak symbol: the linker keeps one copy for the whole library, which may be the AVX-512 one, and the
baseline then dies of SIGILL on a lesser machine. Hence no weak symbols in the objects, and a
disassembly of the library. Leaks are planted to show that the checks can fail.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import encfast
from compiler import CXX, FLAGS, ISAS, knows

ROOT = Path(__file__).parent.parent
WIDE_ISAS = [isa for isa in ISAS if isa != "base"]
VNNI_ISAS = {"avx512bf16", "avx512amx"}

# What betrays an instruction (AT&T syntax of objdump), and the ISAs that have it.
SIGNS = [
    (re.compile(r"%tmm|\ttile|\tldtilecfg|\tsttilecfg"), {"avx512amx"}),
    (re.compile(r"\tvdpbf16ps|\tvcvtne2?ps2?bf16"), {"avx512bf16", "avx512amx"}),
    (re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"), {"avx512", "avx512bf16", "avx512amx"}),
    (re.compile(r"%ymm|\tv[a-z]"), set(WIDE_ISAS)),
]

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not WIDE_ISAS, reason="one ISA only on this architecture"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump (binutils)"),
]


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def weak_symbols(obj: Path) -> list[str]:
    """Weak, vague-linkage and unique symbols that `obj` defines."""
    return re.findall(r"^\S+ [WVu] (.*)$", run("nm", "-C", str(obj)), re.MULTILINE)


def namespace_isa(symbol: str) -> str:
    """The ISA in whose namespace encfast::<isa> a mangled function stands; "base" for any other."""
    if m := re.match(r"_Z+NK?7encfast(\d+)", symbol):
        name = symbol[m.end() : m.end() + int(m[1])]
        return name if name in ISAS else "base"
    return "base"


def leaks(library: Path) -> list[str]:
    """'function: instruction' where that is wider than the function's namespace allows."""
    found, symbol, isa = [], "?", "base"
    for line in run("objdump", "-d", "--no-show-raw-insn", str(library)).splitlines():
        if m := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            symbol, isa = m[1], namespace_isa(m[1])
        elif isa not in isas_having(line):
            found.append(f"{symbol}: {line.strip()}")
    return found


def isas_having(instruction: str) -> set[str]:
    """The ISAs that have this instruction, by the most telling of its signs."""
    return next((isas for sign, isas in SIGNS if sign.search(instruction)), set(ISAS))


def native_objects(isa: str) -> list[Path]:
    built = ROOT.glob(f"build/native/*-torch{torch.__version__}/{isa}/csrc/cpu/*.o")
    objects = [o for o in built if (ROOT / "csrc/cpu" / o.stem).exists()]
    if not objects:
        pytest.skip(f"no {isa} objects under build/native: not built in this checkout")
    return objects


@pytest.mark.parametrize("isa", WIDE_ISAS)
def test_objects_define_no_weak_symbol(isa):
    for obj in native_objects(isa):
        assert not weak_symbols(obj), obj


def test_wide_code_stays_in_its_namespace():
    if encfast._load.error is not None:
        pytest.skip(f"no compiled library: {encfast._load.error}")
    library = encfast._load.find_library()
    assert not leaks(library)[:10]


def test_disassembly_shows_wide_code():
    """There is something to find: functions are named, and the wide ISAs use wide registers."""
    if encfast._load.error is not None:
        pytest.skip(f"no compiled library: {encfast._load.error}")
    code = run("objdump", "-d", "--no-show-raw-insn", str(encfast._load.find_library()))
    for isa, register in {"avx2": "%ymm", "avx512": "%zmm"}.items():
        if isa in encfast._load.record["isas"]:
            assert f"7encfast{len(isa)}{isa}" in code
            assert register in code


def test_sums_of_register_tiles_are_not_spilt():
    """GCC 12 kept half of the int8 tile's sums on the stack: the product ran at half speed."""
    if encfast._load.error is not None:
        pytest.skip(f"no compiled library: {encfast._load.error}")
    code = run("objdump", "-d", "--no-show-raw-insn", str(encfast._load.find_library()))
    tiles, spilt, symbol = set(), set(), ""
    for line in code.splitlines():
        if m := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            symbol = m[1] if "gemm_rows" in m[1] and namespace_isa(m[1]) in VNNI_ISAS else ""
            tiles |= {symbol} - {""}
        elif symbol and re.search(r"%zmm.*\(%rsp\)|\(%rsp\).*%zmm", line):
            spilt.add(symbol)
    assert tiles or not VNNI_ISAS & set(encfast._load.record["isas"])
    assert not spilt


# A pointer keeps the optimiser from inlining the one weak function away.
STANDARD_LIBRARY = """
#include <algorithm>
namespace encfast::ENCFAST_ISA {
const float& (*larger)(const float&, const float&) = &std::max<float>;
}
"""
VECTOR_LOOP = """
namespace encfast::ENCFAST_ISA {
void scale(float* x, float a) { for (int i = 0; i < 4096; ++i) x[i] = x[i] * a + 1; }
}
"""
TILES = """
#include <immintrin.h>
namespace encfast::ENCFAST_ISA {
void clear() { _tile_zero(0); }
}
"""


def plant(folder: Path, source: str, flags: str, namespace: str) -> tuple[Path, Path]:
    """Compiles `source` with one ISA's flags in another's namespace: (object, library)."""
    if not knows(ISAS[flags]):
        pytest.skip(f"{CXX[0]} does not know the flags of {flags}")
    cpp, obj, so = folder / "leak.cpp", folder / "leak.o", folder / "leak.so"
    cpp.write_text(source)
    command = [*CXX, *FLAGS, *ISAS[flags], f"-DENCFAST_ISA={namespace}", "-c", cpp, "-o", obj]
    run(*map(str, command))
    run(*CXX, "-shared", str(obj), "-o", str(so))
    return obj, so


def test_planted_standard_library_is_found(tmp_path):
    obj, so = plant(tmp_path, STANDARD_LIBRARY, "avx512", "avx512")
    assert any("std::" in name for name in weak_symbols(obj))
    assert any(line.startswith("_ZSt") for line in leaks(so))


@pytest.mark.parametrize(
    ("source", "flags", "namespace"),
    [
        (VECTOR_LOOP, "avx2", "base"),
        (VECTOR_LOOP, "avx512", "base"),
        (TILES, "avx512amx", "avx512bf16"),
        (VECTOR_LOOP.replace("encfast::ENCFAST_ISA", "other::ENCFAST_ISA"), "avx2", "avx2"),
    ],
    ids=["avx2-in-base", "avx512-in-base", "amx-in-avx512bf16", "avx2-in-no-isa"],
)
def test_planted_wide_code_is_found(tmp_path, source, flags, namespace):
    _, so = plant(tmp_path, source, flags, namespace)
    assert leaks(so)


@pytest.mark.parametrize(("source", "isa"), [(VECTOR_LOOP, "avx2"), (VECTOR_LOOP, "avx512")])
def test_code_in_its_own_namespace_passes(tmp_path, source, isa):
    obj, so = plant(tmp_path, source, isa, isa)
    assert not weak_symbols(obj)
    assert not leaks(so)
