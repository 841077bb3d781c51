# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the whole suite: corpora, instruction sets, thread counts, the tolerance table."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Before llmkern reads it: tests about threads take as many as they say, however few cores there are.
os.environ.setdefault("LLMKERN_CORES", "64")
import llmkern

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("generic", "avx2", "avx512")
DETECTED = torch.ops.llmkern.cpu_isa_detected()

# The error a result may have against float64, relative to the largest value of the expected result.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 8e-3,
    torch.bfloat16: 3e-2,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora; tests that need one skip where it is absent."""
    folder = Path(os.environ.get("LLMKERN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}; set LLMKERN_DATA")
    return folder


@pytest.fixture(params=ISAS[: ISAS.index(DETECTED) + 1])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every build of the CPU kernels that this machine can execute."""
    before = torch.ops.llmkern.cpu_isa()
    torch.ops.llmkern.select_cpu_isa(request.param)
    yield request.param
    torch.ops.llmkern.select_cpu_isa(before)


@pytest.fixture
def on_isas() -> Iterator[Callable[[], Iterator[str]]]:
    """``for isa in on_isas()`` is on each of those builds in turn: for tests whose expectation is dear."""
    before = torch.ops.llmkern.cpu_isa()

    def builds() -> Iterator[str]:
        for isa in ISAS[: ISAS.index(DETECTED) + 1]:
            torch.ops.llmkern.select_cpu_isa(isa)
            yield isa

    yield builds
    torch.ops.llmkern.select_cpu_isa(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small problems: two threads waiting for each other on a busy machine take ten times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_threads() -> Iterator:
    """``on_threads(n, f)`` is f() on n threads."""
    before = torch.get_num_threads()

    def run(threads: int, f):
        torch.set_num_threads(threads)
        return f()

    yield run
    torch.set_num_threads(before)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """|got - expected| <= tolerance * max |expected|, in float64, with the numbers in the message."""
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    got, expected = got.detach().double(), expected.detach().double()
    assert torch.isfinite(got).all() == torch.isfinite(expected).all()
    if got.numel() == 0:
        return
    error = (got - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-30)
    assert error <= tolerance * scale, f"error {error:.3e} over {tolerance:.1e} * {scale:.3e}"


def assert_no_less_accurate(
    name: str, got: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor
) -> None:
    """The root mean square error of ours against float64 is at most that of torch, and two roundings of a float32 or an
    eighth of a rounding of a 16-bit number.

    The largest error would be a matter of luck: which of two random walks has the farther outlier.
    """
    scale = truth.square().mean().sqrt().item()
    ours, others = ((t.double() - truth).square().mean().sqrt().item() for t in (got, torchs))
    wide = got.dtype in (torch.float32, torch.float64)
    slack = (2**-23 if wide else torch.finfo(got.dtype).eps / 8) * scale
    assert ours <= others + slack, f"{name}: error {ours:.3e}, torch's {others:.3e} + {slack:.1e}"


assert llmkern.ops  # the suite tests the installed package
