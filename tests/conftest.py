# SPDX-License-Identifier: Apache-2.0
"""For the whole suite: corpora, instruction sets, threads, the tolerance table; and how processes share the tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Processes that run tests beside each other (-n) share the cores, they and the processes that they start: two teams of
# threads on the same cores wait for each other. Tests about threads set their own number.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if PROCESSES > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // PROCESSES))

# Before llmkern reads it: tests about threads take as many as they say, however few cores there are.
os.environ.setdefault("LLMKERN_CORES", "64")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402  (it reads the number of threads)

import llmkern  # noqa: E402

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


# How long an example takes, and its drawing, is the machine's affair.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

# What takes minutes begins first, so that no process is left with it at the end.
LONGEST = (
    "tests/simt",
    "tests/simt/test_sanitizers.py",
    "tests/simt/test_operators.py",
    "tests/test_packaging.py",
)


def part_of(nodeid: str) -> str:
    """The part of the suite that stays in one process with a test: its file, because files have fixtures of their own.

    The emulated kernels are one part, because the lines that they executed are counted by process.
    """
    file = nodeid.split("::", 1)[0]
    return "tests/simt" if file.startswith("tests/simt/") and file not in LONGEST else file


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's: absent where that is
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Parts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    config.option.loadscopereorder = False  # the longest come first, not the most numerous
    return Parts(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {part: rank for rank, part in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(part_of(item.nodeid), len(ranks)))


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
