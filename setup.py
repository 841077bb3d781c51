# SPDX-License-Identifier: Apache-2.0
"""Builds the two native modules; everything else about the package is in pyproject.toml.

    llmkern._C           operators for torch: CPU always, CUDA where nvcc is found. LibTorch stable ABI,
                         Python limited API.
    llmkern._reference   the scalar float64 specification, bound to numpy by pybind11. Knows no torch.

Environment: LLMKERN_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, LLMKERN_STRICT=1 (warnings are errors),
LLMKERN_SANITIZE=1 (AddressSanitizer and UBSan; `make asan`).
"""

import glob
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.modified import newer_group
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

CSRC = str(Path(__file__).parent.resolve() / "csrc")


def nvcc_facts():
    """(toolkit root, version) of the nvcc on PATH or under CUDA_HOME, or None.

    The root is asked of nvcc itself, because the one on PATH may be a wrapper.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not os.path.exists(nvcc):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        plan = subprocess.run(
            [nvcc, "--dryrun", "-c", source], capture_output=True, text=True, cwd=folder
        )
    root = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.M)
    version = re.search(
        r"release (\d+\.\d+)",
        subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout,
    )
    if root is None or version is None:
        return None
    return os.path.realpath(root.group(1)), version.group(1)


def wanted_cuda():
    """(toolkit root, version) to build CUDA kernels with, or None for a CPU build."""
    setting = os.environ.get("LLMKERN_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"llmkern: expected LLMKERN_CUDA to be auto, 0 or 1, got {setting!r}")
    facts = None if setting == "0" else nvcc_facts()
    if setting == "1" and facts is None:
        raise SystemExit(
            "llmkern: LLMKERN_CUDA=1 needs nvcc on PATH or under CUDA_HOME, found neither"
        )
    return facts


CUDA = wanted_cuda()
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

# Real code for every architecture of use, PTX on the last for what comes after. 9.0a has a code path of its own.
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
ARCHITECTURE_NEEDS = {"9.0a": 12.0, "10.0": 12.8, "12.0": 12.8}  # first nvcc that knows it


def architectures():
    """As in "8.0;9.0a;12.0+PTX": what TORCH_CUDA_ARCH_LIST asks for, else everything this nvcc knows."""
    version = float(CUDA[1])
    known = [a for a in ARCHITECTURES if version >= ARCHITECTURE_NEEDS.get(a, 0)]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(known) + "+PTX"


def architecture_flags():
    flags = []
    for wanted in re.split(r"[; ]+", architectures().strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", wanted):
            raise SystemExit(
                f"llmkern: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0a;12.0+PTX', got {wanted!r}"
            )
        number = wanted.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if wanted.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


X86 = platform.machine() in ("x86_64", "AMD64")
# The CPU kernels are compiled once per instruction set; kernels/cpu/dispatch.cpp checks for exactly these features.
CPU_BUILDS = {"generic": []}
if X86:
    CPU_BUILDS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    CPU_BUILDS["avx512"] = [*CPU_BUILDS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl"]
    CPU_BUILDS["avx512"] += ["-mavx512dq", "-mprefer-vector-width=512"]

DEBUG = os.environ.get("DEBUG") == "1"
# Developers and CI get warnings as errors; a user's newer compiler may warn about what nobody has seen yet.
STRICT = os.environ.get("LLMKERN_STRICT") == "1"
# -ffp-contract=off: a fused multiply-add happens where the source says so and nowhere else, on every instruction set.
CXX_FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS += ["-O0", "-g"] if DEBUG else ["-O3"]
CXX_FLAGS += ["-Werror"] if STRICT else []
SANITIZE = []
if os.environ.get("LLMKERN_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    CXX_FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]
CXX_FLAGS += ["-DLLMKERN_DEBUG"] if DEBUG or SANITIZE else []
CXX_FLAGS += ["-DLLMKERN_X86"] if X86 else []
# nvcc sees no torch header, so it builds beside a CPU torch and beside a torch made with another CUDA.
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", f"-I{CSRC}"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"]
NVCC_FLAGS += ["-Werror", "all-warnings"] if STRICT else []
HEADERS = sorted(
    glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)
)


class Build(BuildExtension):
    """Adds the kernels' objects to llmkern._C; torch's BuildExtension does the rest."""

    def build_extension(self, ext):
        if ext.name == "llmkern._C":
            ext.extra_objects = self.cpu_objects() + (self.cuda_objects() if CUDA else [])
        super().build_extension(ext)

    def cpu_objects(self):
        sources = sorted(
            set(glob.glob("csrc/kernels/cpu/*.cpp")) - {"csrc/kernels/cpu/dispatch.cpp"}
        )
        objects = []
        for isa, flags in CPU_BUILDS.items():
            objects += self.compiler.compile(
                sources,
                output_dir=os.path.join(self.build_temp, isa),
                include_dirs=[CSRC],
                extra_postargs={"cxx": [*CXX_FLAGS, *flags, f"-DLLMKERN_ISA={isa}"]},
                depends=HEADERS,
            )
        return objects

    def cuda_objects(self):
        sources = sorted(glob.glob("csrc/kernels/cuda/*.cu"))
        folder = Path(self.build_temp, f"cuda-{architectures().replace(';', '-')}")
        folder.mkdir(parents=True, exist_ok=True)
        targets = {source: str(folder / f"{Path(source).stem}.o") for source in sources}
        stale = [
            source
            for source, target in targets.items()
            if self.force or newer_group([source, "setup.py", *HEADERS], target)
        ]
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(lambda source: compile_cuda(source, targets[source], len(stale)), stale))
        return list(targets.values())


def compile_cuda(source, target, sources):
    """One of so many sources that are compiled at once; the architectures share what is left of the jobs."""
    nvcc = os.path.join(CUDA[0], "bin", "nvcc")
    threads = max(1, JOBS // sources)
    command = [nvcc, *NVCC_FLAGS, f"-t{threads}", *architecture_flags(), "-c", source]
    print(" ".join([*command, "-o", target]))
    subprocess.run([*command, "-o", target], check=True)


def torch_extension():
    flags = [*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [
        f"-isystem{path}" for path in include_paths()
    ]  # warnings are errors in our code, not in torch's headers
    defines = ['-DLLMKERN_CUDA_ARCHITECTURES=""', '-DLLMKERN_CUDA_VERSION=""']
    sources = sorted(glob.glob("csrc/ops/*.cpp") + glob.glob("csrc/kernels/*.cpp"))
    sources.append("csrc/kernels/cpu/dispatch.cpp")
    link = {"extra_link_args": ["-Wl,--exclude-libs,ALL", *SANITIZE]}
    if CUDA is not None:
        root, version = CUDA
        print(
            f"llmkern: CUDA kernels with nvcc {version} for {architectures()}; set TORCH_CUDA_ARCH_LIST to build fewer"
        )
        defines = [
            f'-DLLMKERN_CUDA_ARCHITECTURES="{architectures()}"',
            f'-DLLMKERN_CUDA_VERSION="{version}"',
            "-DLLMKERN_WITH_CUDA",
        ]
        link["library_dirs"] = [d for d in (f"{root}/lib64", f"{root}/lib") if os.path.isdir(d)]
        link["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
    else:
        print("llmkern: no CUDA kernels in this build (no nvcc, or LLMKERN_CUDA=0)")
    return CppExtension(
        "llmkern._C",
        sources,
        include_dirs=[CSRC],
        depends=HEADERS,
        extra_compile_args={"cxx": [*flags, *defines]},
        py_limited_api=True,
        **link,
    )


def reference_extension():
    return Pybind11Extension(
        "llmkern._reference",
        sorted(glob.glob("csrc/reference/*.cpp")),
        include_dirs=[CSRC],
        depends=HEADERS,
        extra_compile_args=CXX_FLAGS,
    )


if __name__ == "__main__":
    print(
        f"llmkern: building for torch >= 2.10 with the headers of torch {torch.__version__}; MAX_JOBS limits the jobs"
    )
    # Sanitizers are for the kernels; under them the reference would take longer to compile than all of these.
    modules = [torch_extension(), *([] if SANITIZE else [reference_extension()])]
    setup(ext_modules=modules, cmdclass={"build_ext": Build})
