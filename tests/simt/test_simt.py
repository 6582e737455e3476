"""The kernels of csrc/cuda on the CPU, every CUDA thread a fiber: results against plain loops, also
under the sanitizers; and each kind of bug planted once, to be caught."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = sorted(path.stem for path in CSRC.glob("cuda/*.cu"))

CHECKERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """built(driver, checker) is the program, compiled once."""
    folder = tmp_path_factory.mktemp("simt")

    def build(driver: str, checker: str) -> Path:
        program = folder / f"{driver}-{checker}"
        if not program.exists():
            flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
            flags += ["-Wno-unknown-pragmas", *CHECKERS[checker], f"-I{CSRC}", f"-I{HERE}"]
            source = str(HERE / f"{driver}.cpp")
            done = subprocess.run(
                ["g++", *flags, source, "-o", program], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        return program

    return build


def run(program: Path, *args: object) -> tuple[int, str]:
    """Exit code, and all that the program printed."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1:history_size=0"}
    command = [str(program), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.quick
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_file_has_a_driver(kernel):
    assert (HERE / f"{kernel}.cpp").exists()


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(built, kernel, checker):
    code, text = run(built(kernel, checker), 2)
    assert code == 0, text


@pytest.mark.slow
@pytest.mark.parametrize("checker, seeds", [("plain", 30), ("asan", 8), ("tsan", 5)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_under_many_schedules(built, kernel, checker, seeds):
    code, text = run(built(kernel, checker), seeds)
    assert code == 0, text


# Bug: who must find it, under each of these seeds, and what the report says.
PLANTED = {
    "global_bounds": ("asan", "heap-buffer-overflow"),
    "shared_bounds": ("asan", "use-after-poison"),
    "vector_alignment": ("asan", "misaligned address"),
    "no_barrier": ("tsan", "data race"),
    "no_syncwarp": ("tsan", "data race"),
    "shuffle_as_barrier": ("tsan", "data race"),
    "sum_of_blocks": ("tsan", "data race"),
    "buffer_reuse": ("tsan", "data race"),
    "unwritten_shared": ("plain", "wrong result"),
    "unwritten_result": ("plain", "wrong result"),
    "divergent_barrier": ("plain", "other threads of the block on line"),
    "divergent_ballot": ("plain", "waits for ever in"),
    "exited_lane": ("plain", "waits for lane 3, which has exited"),
    "different_operations": ("plain", "__ballot_sync"),
    "lane_outside_of_mask": ("plain", "reads lane 20, which takes no part"),
    "order_of_blocks": ("plain", "wrong result"),
    "lost_thread": ("plain", "waits for ever in"),
    "grid_too_high": ("plain", "illegal grid (1, 65536, 1)"),
    "block_too_large": ("plain", "illegal block (1025, 1, 1)"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found_and_its_absence_is_silent(built, bug):
    checker, report = PLANTED[bug]
    for seed in range(3):
        code, text = run(built("planted", checker), bug, "bug", seed)
        assert code != 0 and report in text, text
    for checker in CHECKERS:
        code, text = run(built("planted", checker), bug, "fixed", 0)
        assert code == 0, text


@pytest.mark.parametrize(
    "kernel, call, said",
    [
        ("pad", "bad_index", "index out of range"),
        ("patch_gather", "bad_id", "id out of range"),
        ("patch_gather", "negative_id", "id out of range"),
        ("patch_gather", "bad_start", "cu_seqlens does not fit"),
        ("patch_gather", "bad_end", "cu_seqlens does not fit"),
        ("patch_gather", "negative_length", "cu_seqlens does not fit"),
        ("patch_gather", "keep_too_long", "cu_keep does not fit"),
        ("patch_gather", "negative_keep", "cu_keep does not fit"),
        ("moe_route", "bad_id", "expert id out of range"),
        ("moe_route", "negative_id", "expert id out of range"),
        ("moe_route", "bad_gradient_id", "id out of range"),
        ("moe_rows", "bad_row", "row out of range"),
        ("moe_rows", "negative_row", "row out of range"),
        ("moe_rows", "bad_slot", "slot out of range"),
        ("moe_rows", "bad_gradient_row", "row out of range"),
        ("restore_rows", "bad_index", "index out of range"),
        ("restore_rows", "bad_add_index", "add_index out of range"),
        ("restore_rows", "bad_sorted_index", "row index is out of range"),
    ],
)
def test_a_bad_value_stops_the_kernel(built, kernel, call, said):
    """What a GPU kernel cannot refuse, it asserts: nothing is read out of bounds."""
    code, text = run(built(kernel, "asan"), call)
    assert code != 0 and said in text, text
