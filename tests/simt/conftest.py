# SPDX-License-Identifier: Apache-2.0
"""The `simt` fixture: kernels compiled for the host, run thread by thread."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import build
from .harness import Kernels

HERE = Path(__file__).parent

# Under AddressSanitizer faults end the process, and lines are not counted.
collect_ignore = ["test_checkers.py", "test_coverage.py", "test_operators.py", "test_sanitizers.py"]
if build.FLAVOUR == "check":
    collect_ignore = []

_loaded: dict[tuple[str, int], Kernels] = {}


def load(name: str, arch: int = 900) -> Kernels:
    """The kernels of a library of `build.sources`, built for an architecture; its device is of that architecture."""
    if (name, arch) not in _loaded:
        _loaded[name, arch] = Kernels(build.library(name, arch))
    _loaded[name, arch].configure(capability=arch // 10)
    return _loaded[name, arch]


@pytest.fixture(scope="session")
def simt(coverage_dir: Path) -> Callable[..., Kernels]:
    """``simt("embedding")`` is the family's kernels; ``simt("lstm", 800)`` those for compute capability 8.0."""
    return load


@pytest.fixture(scope="session")
def coverage_dir() -> Iterator[Path]:
    """Where this session's line counts go."""
    folder = tempfile.mkdtemp()
    os.environ["GCOV_PREFIX"] = folder
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def write_coverage(coverage_dir: Path) -> Path:
    """Writes what has been counted so far; the folder it is in."""
    for kernels in _loaded.values():
        kernels.library.simt_write_coverage()
    return coverage_dir


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Coverage is judged last, and only when every other test of this folder has been collected."""
    coverage = [item for item in items if item.path == HERE / "test_coverage.py"]
    rest = [item for item in items if item not in coverage]
    complete = {item.path for item in items} >= set(HERE.glob("test_*.py"))
    items[:] = rest + (coverage if complete else [])
    if coverage and not complete:
        config.hook.pytest_deselected(items=coverage)
