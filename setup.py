"""Builds encfast._ops (LibTorch stable ABI, one object per ISA, optional CUDA) and encfast._host.

PyTorch is imported when something is compiled, never for metadata. Objects live in build/native and
are remade only when their command or one of their files changed.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(ROOT, "tools"))  # a build backend does not do it
import cuda_toolkit  # noqa: E402
from compiler import CXX, FLAGS, compile_all, known_isas  # noqa: E402

TORCH_TARGET = (2, 10)  # the oldest PyTorch whose stable ABI the library asks for


class BuildNative(build_ext):
    """Compiles both extensions over one pool of jobs, links them and writes the build record."""

    def build_extensions(self):
        if sys.platform != "linux" or not shutil.which(CXX[0]):
            why = f"encfast: not Linux, or no C++ compiler {CXX[0]!r}: no compiled operators"
            if os.environ.get("ENCFAST_REQUIRE_NATIVE") == "1":
                raise SystemExit(why)
            print(why)
            self.extensions = []
            return
        import torch

        self.torch_root = os.path.dirname(torch.__file__)
        self.objects = f"build/native/{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"
        self.isas = known_isas()
        self.nvcc, self.why_no_cuda = cuda_toolkit.nvcc_or_reason(torch)
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_toolkit.DEFAULT_ARCHS
        # Cores first: they take the longest.
        ops = [*self.core_units(), *self.bind_units(), *self.cuda_units()]
        host = self.host_units()
        compile_all([*ops, *host])
        self.link("encfast._ops", ops, ["-Wl,-z,defs", *self.torch_libraries()])
        if host:
            self.link("encfast._host", host, [])
        self.record = self.make_record(torch)
        self.write_record()

    def core_units(self):
        """(object, command) for each torch-free core and ISA.

        CXXFLAGS is left out: -march=native there would put this machine's ISA into the baseline.
        """
        for src in sorted(glob("csrc/cpu/*.cpp"), key=os.path.getsize, reverse=True):
            for isa, flags in self.isas.items():
                command = [*CXX, *FLAGS, *flags, f"-DENCFAST_ISA={isa}", "-c", src]
                yield f"{self.objects}/{isa}/{src}.o", command

    def bind_units(self):
        """(object, command) for each binding; those of CUDA ops only with CUDA."""
        target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
        isas = " ".join(f"X({isa})" for isa in self.isas)
        flags = [f"-DTORCH_TARGET_VERSION={target}", f"-DENCFAST_BUILT_ISAS(X)={isas}"]
        flags += ["-isystem", f"{self.torch_root}/include"]
        for src in sorted(glob("csrc/bind/*.cpp")):
            if self.nvcc or not src.endswith("_cuda.cpp"):
                yield self.cxx(src, flags)

    def cuda_units(self):
        """(object, command) for each CUDA file, where CUDA is built."""
        return cuda_toolkit.units(self.nvcc, self.archs, self.objects) if self.nvcc else []

    def host_units(self):
        """(object, command) for each file of the NumPy helpers, which NumPy itself can replace."""
        import pybind11

        python = sysconfig.get_path("include")
        if not os.path.exists(f"{python}/Python.h"):
            print(f"encfast: no Python.h in {python}: no encfast._host, NumPy does its work")
            self.extensions = [e for e in self.extensions if e.name != "encfast._host"]
            return []
        flags = ["-isystem", pybind11.get_include(), "-isystem", python]
        return [self.cxx(src, flags) for src in sorted(glob("csrc/host/*.cpp"))]

    def cxx(self, src, flags):
        env = shlex.split(os.environ.get("CXXFLAGS", ""))
        return f"{self.objects}/{src}.o", [*CXX, *FLAGS, *env, *flags, "-c", src]

    def torch_libraries(self):
        """Never torch_cuda, c10_cuda or the shared cudart: a CPU-only PyTorch has none of them."""
        libraries = [f"-L{self.torch_root}/lib", "-lc10", "-ltorch_cpu"]
        # Nothing needs libtorch itself, but it brings libtorch_cuda along where there is one.
        libraries += ["-Wl,--no-as-needed", "-ltorch"]
        return libraries + (cuda_toolkit.link_flags(self.nvcc) if self.nvcc else [])

    def link(self, name, units, libraries):
        out, objects = self.get_ext_fullpath(name), [obj for obj, _ in units]
        env = shlex.split(os.environ.get("LDFLAGS", ""))
        os.makedirs(os.path.dirname(out), exist_ok=True)
        subprocess.check_call([*CXX, "-shared", "-o", out, *objects, *libraries, *env])

    def make_record(self, torch):
        """What encfast._load checks and encfast.info shows."""
        git = ["git", "describe", "--always", "--dirty"]
        return {
            "encfast": self.distribution.get_version(),
            "torch": torch.__version__,
            "torch_at_least": "{}.{}".format(*TORCH_TARGET),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "compiler": subprocess.check_output([*CXX, "--version"], text=True).splitlines()[0],
            "isas": list(self.isas),
            "cuda": torch.version.cuda if self.nvcc else None,
            "cuda_archs": self.archs if self.nvcc else None,
            "cuda_why_not": self.why_no_cuda,
            "git": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        }

    def write_record(self):
        """encfast/_build_info.json beside the libraries, where they are at the moment."""
        folder = os.path.dirname(self.get_ext_fullpath("encfast._ops"))
        with open(os.path.join(folder, "_build_info.json"), "w") as f:
            json.dump(self.record, f, indent=1)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if self.extensions:
            self.write_record()


setup(
    packages=find_packages(include=["encfast", "encfast.*"]),
    ext_modules=[Extension("encfast._ops", []), Extension("encfast._host", [])],  # sources: *_units
    cmdclass={"build_ext": BuildNative},
)
