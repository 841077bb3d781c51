# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels' tests under AddressSanitizer and UBSan: `make asan`.

The sanitized library lives in build/asan beside copies of the sources and tests, so that the one in the source tree
stays as it is. Arguments are handed to pytest: `python tests/native/asan.py -k lstm`.
"""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "asan"
TREES = {"csrc": "*.*", "llmkern": "*.py", "tests": "*.py", "benchmarks": "*.py"}
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")

# The compiler and opcheck run torch's tracer for minutes, and no line of a kernel that other tests do not run.
TESTS = ["tests/ops", "tests/nn", "-k", "not compile and not opcheck", "-m", "not slow"]


def mirror() -> None:
    """Copies what changed and removes what is gone, so that the next build is incremental and still right."""
    wanted = {Path(name) for name in FILES}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "llmkern").glob("_reference*.so")}  # as it is
    for tree, pattern in TREES.items():
        wanted |= {p.relative_to(ROOT) for p in (ROOT / tree).rglob(pattern) if p.is_file()}
        for old in (BUILD / tree).rglob(pattern):
            if old.is_file() and old.suffix != ".so" and old.relative_to(BUILD) not in wanted:
                old.unlink()
    for name in wanted:
        if not (BUILD / name).exists() or not filecmp.cmp(ROOT / name, BUILD / name):
            (BUILD / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, BUILD / name)


def runtime(name: str) -> str:
    """The path of a library of the compiler."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"make asan: expected {compiler} to have {name}, found none; install it")
    return path


def environment() -> dict[str, str]:
    return os.environ | {
        # libstdc++ too: the sanitizer looks for its __cxa_throw when the process starts, and Python has none.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python and torch keep memory until the process ends: every run would report leaks that are none of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def check_instrumented(env: dict[str, str]) -> None:
    """The tests would pass just as well on a library without sanitizers."""
    code = "import llmkern, sys; print(sys.modules['llmkern._C'].__file__)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=BUILD, env=env, capture_output=True, text=True)
    library = result.stdout.strip()
    if (
        not library.startswith(str(BUILD))
        or b"__asan_report_store" not in Path(library).read_bytes()
    ):
        raise SystemExit(
            f"make asan: the tests would not run the sanitized library\n{result.stderr}"
        )


def main() -> int:
    mirror()
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    switches = {"LLMKERN_SANITIZE": "1", "LLMKERN_CUDA": "0"}
    subprocess.run(build, cwd=BUILD, env=os.environ | switches, check=True)
    env = environment()
    check_instrumented(env)
    # A report ends the process; capture=sys leaves stderr itself alone, so that the report is seen.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]
    return subprocess.run([*command, *TESTS, *sys.argv[1:]], cwd=BUILD, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
