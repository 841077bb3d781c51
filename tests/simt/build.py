# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for the host: the runtime once, and a library for every .cu source a test asks for.

Three flavours. ``check`` has our own checkers behind gcc's -fsanitize=thread hooks, and counts lines for the coverage
test; ``asan`` has AddressSanitizer and UndefinedBehaviorSanitizer; ``plain`` checks nothing and has one library, the
operators: kernels and their torch bindings (operators.py). Ninja rebuilds what changed, headers included; one process
at a time, so that the workers of a parallel run build a library once.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
# Relative to ROOT, where the compiler runs: reports name files as a reader would.
HERE = Path("tests/simt")
FLAVOUR = os.environ.get("LLMKERN_SIMT", "check")
OUT = Path("build/simt") / FLAVOUR
CXX = os.environ.get("CXX", "g++")
ARCHITECTURES = (800, 900)

# -fno-gnu-unique: what is one in a library must not be one in the process, which may load it for two architectures.
COMMON = "-std=c++20 -fno-gnu-unique -g1 -fPIC -pthread -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno"
INCLUDES = f"-I{HERE}/include -I{HERE}/bindings -Icsrc"
HOST = {
    "check": "-O2 -fvisibility-inlines-hidden",
    "asan": "-O1 -fsanitize=address -DSIMT_UNCHECKED",
    "plain": "-O2 -DSIMT_UNCHECKED",
}
# The pass for -fsanitize=thread inserts calls only; nothing links its library.
KERNEL = {
    "check": "-O1 -Wno-unknown-pragmas -fsanitize=thread,bounds,alignment --coverage"
    " --param tsan-distinguish-volatile=1 --param tsan-instrument-func-entry-exit=0",
    "asan": "-O1 -Wno-unknown-pragmas -fsanitize=address,undefined"
    " -fno-sanitize-recover=all -fno-omit-frame-pointer",
    "plain": "-O2 -Wno-unknown-pragmas",
}
LINK = {
    "check": "-lgcov -Wl,-u,__gcov_dump -Wl,--wrap=memcpy -Wl,--wrap=memmove -Wl,--wrap=memset",
    "asan": "-fsanitize=address,undefined",
    "plain": "",
}
RED_ZONE_BYTES = 64
TORCH = ""
if FLAVOUR == "plain":
    from torch.utils.cpp_extension import include_paths, library_paths

    # The bindings' CPU half is not registered here, hence unused.
    TORCH = " ".join(f"-isystem{path}" for path in include_paths())
    TORCH += " -DTORCH_TARGET_VERSION=0x020a000000000000 -DLLMKERN_WITH_CUDA -fvisibility=hidden -Wno-unused-function"
    LINK["plain"] = " ".join(f"-L{path}" for path in library_paths()) + " -l:libtorch_cpu.so"

RULES = f"""
builddir = {OUT}
rule host
  command = {CXX} {COMMON} {HOST[FLAVOUR]} {INCLUDES} -DLLMKERN_SIMT=900 -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule torch
  command = {CXX} {COMMON} {HOST[FLAVOUR]} {TORCH} {INCLUDES} -DLLMKERN_SIMT=900 -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule library
  command = {CXX} -shared -pthread {"-fsanitize=address" if FLAVOUR == "asan" else ""} $in -o $out
rule assemble
  command = {CXX} {COMMON} {KERNEL[FLAVOUR]} {INCLUDES} -DLLMKERN_SIMT=$arch -MMD -MF $out.d -MT $out $
    -x c++ -S $in -o $out
  depfile = $out.d
  deps = gcc
rule object
  command = {sys.executable} {HERE}/build.py $in $out.s && {CXX} -c $out.s -o $out
rule kernels
  command = {CXX} -shared -pthread $in -o $out -L{OUT} -l:libsimt.so -Wl,-rpath,'$$ORIGIN:$$ORIGIN/..' {LINK[FLAVOUR]}
"""


def add_red_zones(assembly: str) -> str:
    """Puts unused bytes behind every __shared__ variable, so that an access beside it is in none."""
    in_shared, lines = False, []
    for line in assembly.splitlines():
        if re.match(r"\s*\.(section|text|data|bss)", line):
            in_shared = ".tbss" in line
        lines.append(line)
        if in_shared and re.match(r"\s*\.zero\s+\d+", line):
            lines.append(f"\t.zero\t{RED_ZONE_BYTES}")
    return "\n".join(lines) + "\n"


def sources() -> dict[str, list[str]]:
    """Every library by name: families of the package with their binding, and what the tests of the runtime need."""
    if FLAVOUR == "plain":
        ops = set((ROOT / "csrc/ops").glob("*.cpp")) - {ROOT / "csrc/ops/library.cpp"}
        files = sorted([*(ROOT / "csrc/kernels/cuda").glob("*.cu"), *ops])
        return {"operators": [str(f.relative_to(ROOT)) for f in files]}
    found = {}
    for binding in sorted((ROOT / HERE / "bindings").glob("*.cpp")):
        kernels = ROOT / "csrc/kernels/cuda"
        files = sorted([*kernels.glob(f"{binding.stem}.cu"), *kernels.glob(f"{binding.stem}_*.cu")])
        found[binding.stem] = [*files, binding]
    for folder in ("faults", "kernels"):
        for file in sorted((ROOT / HERE / folder).glob("*.cu")):
            found[f"{folder}/{file.stem}"] = [file]
    return {name: [str(f.relative_to(ROOT)) for f in files] for name, files in found.items()}


def _object(name: str, file: str, arch: int) -> tuple[str, str]:
    """The path of a source's object, and the statements that build it."""
    path = f"{OUT}/{name}-{arch}/{Path(file).name}"
    if not file.endswith(".cu"):
        return f"{path}.o", f"build {path}.o: {'torch' if 'csrc/ops' in file else 'host'} {file}\n"
    text = f"build {path}.s: assemble {file}\n  arch = {arch}\n"
    return f"{path}.o", text + f"build {path}.o: object {path}.s | {HERE}/build.py\n"


def _statements() -> str:
    text = RULES
    runtime = sorted(file.stem for file in (ROOT / HERE / "runtime").glob("*.cpp"))
    if FLAVOUR != "check":
        runtime.remove("hooks")
    files = [f"{HERE}/runtime/{stem}.cpp" for stem in runtime]
    if FLAVOUR == "plain":
        # Beside the kernels, not among them: what is thread_local there is taken for shared memory, which each block
        # finds full of noise.
        files += sorted(str(f.relative_to(ROOT)) for f in (ROOT / "csrc/kernels").glob("*.cpp"))
    objects = [f"{OUT}/runtime/{Path(file).stem}.o" for file in files]
    for path, file in zip(objects, files, strict=True):
        text += f"build {path}: host {file}\n"
    text += f"build {OUT}/libsimt.so: library {' '.join(objects)}\n"
    for name, files in sources().items():
        for arch in ARCHITECTURES:
            objects, rules = zip(*(_object(name, file, arch) for file in files), strict=True)
            text += "".join(rules)
            text += (
                f"build {OUT}/{name}-{arch}.so: kernels {' '.join(objects)} | {OUT}/libsimt.so\n"
            )
    return text


def library(name: str, arch: int = 900) -> Path:
    """Builds a library of kernels, if anything it needs has changed.

    Args:
        name: as in `sources`.
        arch: the architecture to emulate, 800 or 900: what LLMKERN_ARCH is in the kernels.

    Returns:
        Its path.

    Raises:
        RuntimeError: it does not compile; the compiler's words.
    """
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    rules = ROOT / OUT / "build.ninja"
    statements = _statements()
    target = OUT / f"{name}-{arch}.so"
    command = [sys.executable, "-m", "ninja", "-f", str(rules.relative_to(ROOT)), str(target)]
    command += ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    with FileLock(ROOT / OUT / "lock"):
        if not rules.exists() or rules.read_text() != statements:
            rules.write_text(statements)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"tests/simt: {name} does not compile for the host\n{result.stdout}")
    return ROOT / target


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(add_red_zones(source.read_text()))
