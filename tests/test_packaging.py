# SPDX-License-Identifier: Apache-2.0
"""The sdist holds every source; the libraries of a wheel built from it need neither libtorch_python nor CUDA."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN = ("libtorch_python", "libtorch_cuda", "libc10_cuda", "libpython", "libcudart", "libgomp")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, ROOT]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "LLMKERN_CUDA": "0"}
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_holds_every_tracked_source(sdist):
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "llmkern", "tests", "benchmarks", "examples", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:  # not a git checkout: what lies in csrc must do
        names = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    else:
        names = [name for name in tracked.stdout.splitlines() if (ROOT / name).exists()]
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert len(names) > 20
    assert not [name for name in names if name not in held]
    assert not [name for name in held if name.endswith((".so", ".o"))]


@pytest.mark.slow
def test_wheel_from_sdist(sdist, tmp_path):
    """Without optimisation: it is about what the archive holds and what the linker gets, and takes a fourth as long."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", sdist]
    subprocess.run(
        [*command, "-w", tmp_path],
        check=True,
        capture_output=True,
        env={**os.environ, "LLMKERN_CUDA": "0", "DEBUG": "1"},
    )
    (wheel,) = tmp_path.glob("llmkern-*.whl")
    # llmkern._C serves every Python; llmkern._reference, and with it the wheel, the one that built it.
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.split("-")[2:4] == [python, python]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    libraries = sorted((tmp_path / "site").rglob("*.so"))
    assert [library.name.split(".")[0] for library in libraries] == ["_C", "_reference"]
    for library in libraries:
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True)
        assert not [name for name in FORBIDDEN if name in dynamic.stdout], library.name
    program = "import llmkern, torch; print(llmkern.ops.embedding(torch.tensor([1]), torch.eye(2)))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "tensor([[0., 1.]])\n", ran.stderr
