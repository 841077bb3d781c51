# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run, compiled once for all processes of a test run and kept until their sources change."""

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from tests.conftest import ROOT

OUT = ROOT / "build" / "native"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread", "-Icsrc"]


def program(name: str, sources: Sequence[str], *flags: str) -> Path:
    """Compiles sources, whose paths are relative to the root, into a program; its path.

    Raises:
        RuntimeError: they do not compile; the compiler's words.
    """
    command = ["g++", *FLAGS, *flags, *sources]
    folder = OUT / f"{name}-{_key(command, sources)}"
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not path.exists():
            new = f"{path}.new"  # a compiler that is interrupted leaves a part of a file
            result = subprocess.run([*command, "-o", new], cwd=ROOT, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"tests/native: {name} does not compile\n{result.stderr}")
            Path(new).rename(path)
    return path


def _key(command: Sequence[str], sources: Sequence[str]) -> str:
    """Of the command and the contents of the sources and of every header that they might include."""
    key = hashlib.sha256("\0".join(command).encode())
    headers = (str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    for name in sorted({*sources, *headers}):
        key.update(name.encode() + (ROOT / name).read_bytes())
    return key.hexdigest()[:16]
