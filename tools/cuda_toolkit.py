"""Finds the nvcc that fits the installed PyTorch, and its flags.

Used by setup.py and by the tests of what it builds. As a program it serves `make wheel-cuda`, whose
nvcc comes from pip:

    python tools/cuda_toolkit.py requirements    what to ask pip for
    python tools/cuda_toolkit.py home            CUDA_HOME, once those are installed
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from compiler import CXX

DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
# The parts of nvcc as pip packages, which unpack into one tree; the runtime comes with PyTorch.
NVCC_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")


def find_nvcc():
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of the nvidia-cuda-nvcc wheel; else None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None]
    homes += glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu*"))
    return next(
        filter(None, (shutil.which("nvcc", path=home and f"{home}/bin") for home in homes)), None
    )


def pip_requirements(torch):
    """The pip packages that make up the nvcc of this PyTorch's CUDA."""
    cuda = torch.version.cuda
    # Before 13 pip's packages hold ptxas and the like, but no nvcc.
    if cuda is None or int(cuda.split(".")[0]) < 13:
        has = f"CUDA {cuda}" if cuda else "no CUDA"
        raise SystemExit(
            f"PyTorch {torch.__version__} has {has}; nvcc comes from pip for CUDA 13 or later"
        )
    return [f"{package}=={cuda}.*" for package in NVCC_PACKAGES]


def pip_home(torch):
    """The folder in which these packages serve as a CUDA toolkit."""
    major = torch.version.cuda.split(".")[0]
    home = os.path.join(sysconfig.get_path("purelib"), "nvidia", f"cu{major}")
    if not shutil.which("nvcc", path=f"{home}/bin"):
        raise SystemExit(f"no nvcc in {home}/bin")
    return home


def ask(nvcc, *args):
    """What nvcc prints for `args`, on either stream."""
    return subprocess.run([nvcc, *args], stdout=-1, stderr=-2, text=True, check=False).stdout


def nvcc_or_reason(torch):
    """(nvcc, None) when CUDA sources can be built for this PyTorch, else (None, why not)."""
    want, nvcc = os.environ.get("ENCFAST_CUDA", "auto"), find_nvcc()
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"ENCFAST_CUDA={want!r}: expected 0 (never), 1 (required) or auto")
    release = re.search(r"release ([\d.]+)", ask(nvcc, "--version")) if nvcc else None
    if want == "0":
        why = "ENCFAST_CUDA=0 at build time"
    elif torch.version.cuda is None:
        why = f"built with PyTorch {torch.__version__}, which has no CUDA"
    elif release is None:
        why = "no working nvcc in CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel at build time"
    elif release[1] != torch.version.cuda:
        why = f"nvcc {release[1]} does not match the CUDA {torch.version.cuda} of PyTorch"
    else:
        return nvcc, None
    if want == "1":
        raise SystemExit(f"ENCFAST_CUDA=1, but: {why}")
    return None, why


def gencode(archs):
    """nvcc flags for architectures written as in TORCH_CUDA_ARCH_LIST: "8.0;9.0a;12.0+PTX"."""
    flags = []
    for arch in archs.replace(";", " ").split():
        if not (m := re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={archs!r}: {arch!r} is not like 8.0, 9.0a or 12.0+PTX"
            )
        code = f"[compute_{m[1]}{m[2]},sm_{m[1]}{m[2]}]" if m[3] else f"sm_{m[1]}{m[2]}"
        flags.append(f"-gencode=arch=compute_{m[1]}{m[2]},code={code}")
    return flags


def units(nvcc, archs, objects):
    """(object, command) for each CUDA file, under the folder `objects`."""
    host = ["-ccbin", CXX[0], "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
    for src in sorted(glob("csrc/cuda/*.cu")):
        flags = ["-O3", "-std=c++17", *gencode(archs), *host]
        yield f"{objects}/{src}.o", [nvcc, *flags, "-c", src]


def link_flags(nvcc):
    """Linker flags for the static CUDA runtime of nvcc's toolkit.

    nvcc says itself where that is: the one on PATH may be a wrapper script outside the toolkit.
    """
    top = re.search(r"#\$ TOP=(.*)", ask(nvcc, "--dryrun", "-x", "cu", os.devnull))[1]
    folders = [
        f"-L{top}/{lib}" for lib in (f"targets/{platform.machine()}-linux/lib", "lib64", "lib")
    ]
    return [*folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def main():
    import torch

    asked = sys.argv[1:]
    if asked == ["requirements"]:
        print(*pip_requirements(torch))
    elif asked == ["home"]:
        print(pip_home(torch))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
