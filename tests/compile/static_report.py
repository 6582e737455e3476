"""What a compiled kernel of Triton or CUDA C++ tells without running: resources, occupancy, code.

Everything is read from the machine code, by the disassemblers that come with Triton. It says
nothing of latency, bank conflicts or memory stalls: compare it with itself, it does not predict a
speed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from pipe_bound import tensor_use_bound

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024


class Machine(NamedTuple):
    """What one SM of NVIDIA, or one CU of AMD, can hold (bytes, warps of 32 or 64 threads)."""

    block_shared: int  # the most one block may have
    shared: int
    reserved: int  # shared memory the system takes per block
    warps: int
    blocks: int


# CUDA C++ programming guide, "technical specifications per compute capability".
# AMD: CDNA 2 and 3 ISA guides; 4 SIMDs of 8 waves.
MACHINES = {
    "sm_80": Machine(163 * KIB, 164 * KIB, KIB, 64, 32),
    "sm_86": Machine(99 * KIB, 100 * KIB, KIB, 48, 16),
    "sm_89": Machine(99 * KIB, 100 * KIB, KIB, 48, 24),
    "sm_90": Machine(227 * KIB, 228 * KIB, KIB, 64, 32),
    "sm_100": Machine(227 * KIB, 228 * KIB, KIB, 64, 32),
    "sm_120": Machine(99 * KIB, 100 * KIB, KIB, 48, 24),
    "gfx90a": Machine(64 * KIB, 64 * KIB, 0, 32, 32),
    "gfx942": Machine(64 * KIB, 64 * KIB, 0, 32, 32),
}

# Class of an instruction: the first pattern that its opcode begins with.
NVIDIA_CLASSES = {
    "wgmma": r"[HQIB]GMMA",
    "tcgen05": r"UTC\w*MMA",
    "mma": r"[HIQBDO]MMA",
    "async copy": r"LDGSTS|UTMA|UBLKCP",
    "ldmatrix": r"LDSM|STSM",
    "tensor memory": r"LDTM|STTM",
    "shared": r"LDS|STS|ATOMS",
    "local": r"LDL|STL",
    "global load": r"LDG",
    "global store": r"STG",
    "atomic": r"ATOM|RED[.G]|REDG",
    "barrier": r"BAR|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|FENCE|MEMBAR",
    "special": r"MUFU",
    "shuffle": r"SHFL|REDUX|VOTE",
    "float": r"FFMA|FMUL|FADD|DFMA|DMUL|DADD|FHADD|FMNMX|HFMA2|HADD2|HMUL2|HMNMX",
    "convert": r"F2F|I2F|F2I|F2FP|FRND",
    "select": r"F?SEL|FSETP|ISETP|PLOP|USEL|UISETP|FSET|P2R|R2P",
    "integer": r"IMAD|IADD|LEA|LOP3|SHF|VIADD|IMNMX|VIMNMX|UIADD|ULEA|UIMAD|ULOP|USHF|IABS|U?SGXT|"
    r"U?POPC",
    "move": r"U?MOV|U?PRMT|R2UR|S2R|S2UR|CS2R|LDC|ULDC|UCLEA",
    "branch": r"BRA|BSSY|BSYNC|EXIT|CALL|RET|BREAK|NOP",
}
AMD_CLASSES = {
    "mfma": r"v_mfma|v_smfmac",
    "shared": r"ds_read|ds_write|ds_load|ds_store",
    "shuffle": r"ds_|v_readlane|v_readfirstlane|v_permlane",
    "local": r"scratch_",
    "global load": r"(global|buffer|flat)_load",
    "global store": r"(global|buffer|flat)_store",
    "atomic": r"(global|buffer|flat)_atomic",
    "barrier": r"s_barrier|s_waitcnt",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "branch": r"s_c?branch|s_endpgm",
    "scalar": r"s_",
    "vector": r"v_",
}
AMD_INSTRUCTION = re.compile(r"\s+((?:[sv]|ds|global|buffer|flat|scratch)_\w+)(.*)")
TENSOR_CLASSES = ("mma", "wgmma", "tcgen05", "mfma")


class Instruction(NamedTuple):
    place: int  # byte address, or position in AMD's assembly
    opcode: str
    jumps_to: str | None  # label


@dataclass(frozen=True)
class Report:
    """Figures of one kernel; `instructions` and `loop` count by class."""

    name: str
    arch: str
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    shared_limit: int
    blocks: int  # that one SM holds at once
    limiter: str  # what keeps it from holding more
    occupancy: float
    instructions: dict[str, int]
    loop: dict[str, int]  # main loop; empty where the kernel has none
    loop_spills: int  # accesses to local memory in all innermost loops
    tensor_use_bound: float | None  # of the main loop, see pipe_bound.py

    @property
    def problems(self) -> list[str]:
        """Why this kernel would fail to launch, or crawl."""
        found = []
        if self.shared > self.shared_limit:
            found.append(f"shared memory {self.shared} of at most {self.shared_limit} bytes")
        if self.loop_spills:
            found.append(f"{self.loop_spills} accesses to local memory in loops")
        # What is spilt outside of loops moves once per program; AMD's assembly does not tell where.
        if self.spill_bytes and not (self.loop and self.arch.startswith("sm_")):
            found.append(f"{self.spill_bytes} bytes per thread spilt")
        return [f"{self.name} on {self.arch}: {problem}" for problem in found]

    @property
    def tensor_instructions(self) -> set[str]:
        return self.instructions.keys() & set(TENSOR_CLASSES)

    def as_json(self) -> dict:
        return asdict(self)


def report(kernel) -> Report:
    """Report of a `triton.compiler.CompiledKernel`."""
    target, meta = kernel.metadata.target, kernel.metadata
    if target.backend == "cuda":
        cubin = _Cubin(kernel.asm["cubin"])
        arch, code = f"sm_{target.arch}", cubin.code(meta.name)
    else:
        arch, code = target.arch, _read_amd(kernel.asm["amdgcn"])
    return _report(meta.name, arch, meta.num_warps, meta.shared, code)


def reports_of_cubin(cubin: bytes, arch: str, warps: int) -> list[Report]:
    """Reports of all kernels that nvcc put into a cubin, by name, for blocks of so many warps.

    Shared memory asked for at the launch is not known here and does not count.
    """
    read = _Cubin(cubin)
    reports = []
    for name, used in read.usage.items():
        shared = _asked_for(used["SHARED"], arch)
        reports.append(_report(_plain_name(name), arch, warps, shared, read.code(name)))
    return sorted(reports, key=lambda found: found.name)


def _asked_for(shared: int, arch: str) -> int:
    """From sm_90 on a kernel with shared memory is listed with what the system takes."""
    listed = shared and int(arch.removeprefix("sm_")) >= 90
    return shared - MACHINES[arch].reserved if listed else shared


class Code(NamedTuple):
    """One kernel as its disassembler shows it."""

    registers: int
    spill_bytes: int  # of stack and local memory
    instructions: list[Instruction]
    labels: dict[str, int]


def _report(name: str, arch: str, warps: int, shared: int, code: Code) -> Report:
    if arch.startswith("sm_"):
        classes, warp_limit = NVIDIA_CLASSES, _nvidia_warps(code.registers)
    else:
        classes, warp_limit = AMD_CLASSES, _amd_warps(code.registers)
    blocks, limiter = _occupancy(MACHINES[arch], warps, shared, warp_limit)
    loops = _innermost_loops(code.instructions, code.labels)
    loop = _main_loop(loops, classes)
    return Report(
        name=name,
        arch=arch,
        warps=warps,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared=shared,
        shared_limit=MACHINES[arch].block_shared,
        blocks=blocks,
        limiter=limiter,
        occupancy=round(blocks * warps / MACHINES[arch].warps, 3),
        instructions=_mix(code.instructions, classes),
        loop=_mix(loop, classes),
        loop_spills=sum(_class_of(i.opcode, classes) == "local" for body in loops for i in body),
        tensor_use_bound=tensor_use_bound([i.opcode for i in loop], arch),
    )


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True)
    return done.stdout


def _plain_name(mangled: str) -> str:
    """The name of a C++ kernel with its template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|\bencfast::|^void ", "", name.strip())
    return name.partition("(")[0]


class _Cubin:
    """Machine code of NVIDIA; `usage` is by function: registers, bytes of stack, shared memory."""

    def __init__(self, cubin: bytes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            usage = _run("cuobjdump", "--dump-resource-usage", str(path))
            self.text = _run("nvdisasm", "-c", str(path))
        rows = re.findall(r"Function (\S+):\s*\n(.*)", usage)
        assert rows, f"no resource usage in:\n{usage}"
        self.usage = {
            name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", row)}
            for name, row in rows
        }

    def code(self, name: str) -> Code:
        used = self.usage[name]
        return Code(used["REG"], used["STACK"] + used["LOCAL"], *_parse_sass(self.text, name))


def _parse_sass(text: str, name: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of `name` in nvdisasm's text, and where its labels stand."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels of the next instruction
    inside = False
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            inside = section[1] == name
        elif not inside:
            continue
        elif label := re.match(r"(\.L\w+):", line):
            waiting.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([\w.]+)(.*?);", line):
            place = int(found[1], 16)
            labels |= dict.fromkeys(waiting, place)
            waiting = []
            jump = re.search(r"`\((\.L\w+)\)", found[3]) if found[2].startswith("BRA") else None
            code.append(Instruction(place, found[2], jump and jump[1]))
    assert code, f"no instructions of {name}"
    return code, labels


def _read_amd(text: str) -> Code:
    """From AMD's assembly; registers are VGPRs, accumulation VGPRs included."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(AMD_INSTRUCTION, line):
            jump = re.search(r"(\.L\w+)", found[2]) if "branch" in found[1] else None
            code.append(Instruction(len(code), found[1], jump and jump[1]))
    assert code, "no instructions"
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    # Spills of scalar registers go to lanes of a vector register and cost no memory.
    return Code(used["vgpr_count"], used["private_segment_fixed_size"], code, labels)


def _nvidia_warps(registers: int) -> int:
    """Warps whose registers an SM holds: 4 parts of 16384, given out 256 at a time."""
    per_warp = -(-registers * 32 // 256) * 256
    return 4 * (16384 // per_warp) if per_warp else 64


def _amd_warps(registers: int) -> int:
    """Waves whose VGPRs a CU holds: 4 SIMDs of 512 per lane, given out 8 at a time."""
    return 4 * min(8, 512 // max(8, -(-registers // 8) * 8))


def _occupancy(machine: Machine, warps: int, shared: int, warp_limit: int) -> tuple[int, str]:
    """Blocks one SM holds at once, and what limits them."""
    if shared > machine.block_shared:
        return 0, "shared memory"
    per_block = -(-(shared + machine.reserved) // 128) * 128
    limits = {
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
        "registers": warp_limit // warps,
        "shared memory": machine.shared // per_block if per_block else machine.blocks,
    }
    limiter = min(limits, key=limits.__getitem__)
    return limits[limiter], limiter


def _class_of(opcode: str, classes: dict[str, str]) -> str:
    return next((name for name, pattern in classes.items() if re.match(pattern, opcode)), "other")


def _mix(code: list[Instruction], classes: dict[str, str]) -> dict[str, int]:
    return dict(sorted(Counter(_class_of(i.opcode, classes) for i in code).items()))


def _innermost_loops(code: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """Bodies of the loops that have no loop inside."""
    spans = {
        (labels[i.jumps_to], i.place)
        for i in code
        # A jump to itself is the trap behind the end of the code.
        if i.jumps_to in labels and labels[i.jumps_to] < i.place
    }
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[i for i in code if first <= i.place <= last] for first, last in sorted(inner)]


def _main_loop(loops: list[list[Instruction]], classes: dict[str, str]) -> list[Instruction]:
    """The loop with the most tensor-core instructions, the shortest of those; without any, the
    longest."""
    tensor = [sum(_class_of(i.opcode, classes) in TENSOR_CLASSES for i in b) for b in loops]
    if any(tensor):
        most = [b for b, count in zip(loops, tensor, strict=True) if count == max(tensor)]
        return min(most, key=len)
    return max(loops, key=len, default=[])
