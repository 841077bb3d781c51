# SPDX-License-Identifier: Apache-2.0
"""A family of kernels has a room on every floor, with its own stem; what a new one still lacks is said by name."""

from pathlib import Path

import pytest

from tests.conftest import ROOT

# Headers of csrc/kernels that families share. Every other header there is the contract of a family.
SHARED = {"arithmetic", "cores", "deferred", "half", "mask", "pages", "parallel", "philox", "run"}
SHARED |= {"thread_memory"}
FAMILIES = sorted(path.stem for path in ROOT.glob("csrc/kernels/*.h") if path.stem not in SHARED)
# What every family has, a file or a folder; CONTRIBUTING.md lists the same.
SIBLINGS = (
    "csrc/kernels/cpu/NAME.cpp",
    "csrc/kernels/cuda/NAME.cu",
    "csrc/reference/NAME.cpp",
    "csrc/ops/NAME.cpp",
    "llmkern/ops/NAME.py",
    "llmkern/benchmark/NAME.py",
    "benchmarks/bench_NAME.py",
    "tests/ops/test_NAME.py",
    "tests/simt/bindings/NAME.cpp",
    "tests/simt/test_NAME.py",
    "tests/cuda/test_NAME.py",
)
# Places that name every family, and how.
MENTIONS = {
    "csrc/reference/module.cpp": "bind_NAME(m);",
    "csrc/README.md": "`NAME`",
    "tests/promises.py": 'family="NAME"',
}
CPU_ONLY = "has no CUDA kernels yet: its operators refuse CUDA tensors"
SMALL = "is measured inside the LSTM's and the training step's cases"
EXCEPTIONS = {
    ("decoding", "csrc/kernels/cuda/NAME.cu"): CPU_ONLY,
    ("decoding", "tests/simt/bindings/NAME.cpp"): CPU_ONLY,
    ("decoding", "tests/simt/test_NAME.py"): CPU_ONLY,
    ("decoding", "tests/cuda/test_NAME.py"): CPU_ONLY,
    ("decoding", "llmkern/benchmark/NAME.py"): "awaits the native decoder, which it is a part of",
    ("decoding", "benchmarks/bench_NAME.py"): "awaits the native decoder, which it is a part of",
    ("dropout", "llmkern/benchmark/NAME.py"): SMALL,
    ("dropout", "benchmarks/bench_NAME.py"): SMALL,
}


def has(root: Path, sibling: str) -> bool:
    """As this file, as a folder of its stem, or as several files whose names begin with it: test_NAME_errors.py."""
    path = root / sibling
    if path.exists() or path.with_suffix("").is_dir():
        return True
    return path.name.startswith("test_") and any(path.parent.glob(f"{path.stem}_*{path.suffix}"))


def missing(root: Path, family: str) -> list[str]:
    files = [s for s in SIBLINGS if (family, s) not in EXCEPTIONS]
    absent = [s.replace("NAME", family) for s in files if not has(root, s.replace("NAME", family))]
    for file, mention in MENTIONS.items():
        if mention.replace("NAME", family) not in (root / file).read_text():
            absent.append(f"{mention.replace('NAME', family)} in {file}")
    return absent


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_complete(family: str) -> None:
    absent = missing(ROOT, family)
    assert not absent, (
        f"csrc/kernels/{family}.h is the contract of a family that lacks {', '.join(absent)}. "
        "CONTRIBUTING.md says what each is for; a header without kernels of its own belongs in SHARED"
    )


def test_a_new_family_is_told_what_it_lacks(tmp_path: Path) -> None:
    for file in MENTIONS:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / "llmkern/ops/crf").mkdir(parents=True)
    (tmp_path / "tests/ops").mkdir(parents=True)
    (tmp_path / "tests/ops/test_crf_errors.py").touch()
    absent = missing(tmp_path, "crf")
    assert "csrc/kernels/cuda/crf.cu" in absent and 'family="crf" in tests/promises.py' in absent
    assert "llmkern/ops/crf.py" not in absent and "tests/ops/test_crf.py" not in absent


@pytest.mark.parametrize(("family", "sibling"), EXCEPTIONS)
def test_exceptions_are_still_needed(family: str, sibling: str) -> None:
    assert family in FAMILIES
    assert not has(ROOT, sibling.replace("NAME", family)), "it is there: take it off the list"


def test_contributing_names_every_touch_point() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [s for s in (*SIBLINGS, *MENTIONS) if s not in text] == []
