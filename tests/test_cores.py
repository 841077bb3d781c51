# SPDX-License-Identifier: Apache-2.0
"""How many cores the process may use: by affinity, by the control group's quota, by what the user says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.native import programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's files and calls")


@pytest.fixture(scope="module")
def program() -> Path:
    return programs.program("cores", ["csrc/kernels/cores.cpp", "tests/native/cores.cpp"])


VERSION_1 = "9:name=systemd:/\n4:cpu,cpuacct:/jobs/one\n0::/\n"
OLD = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/\n", {}, 0),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 0),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "garbage"}, 0),
        # The least of the group's and of those that it lies in.
        (
            "0::/jobs/one\n",
            {
                "sys/fs/cgroup/jobs/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
            },
            3,
        ),
        # A container may see the path of its group, but not the folder.
        ("0::/docker/1234\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (VERSION_1, {}, 0),
        (VERSION_1, {f"{OLD}/cpu.cfs_quota_us": "-1\n", f"{OLD}/cpu.cfs_period_us": "100000\n"}, 0),
        (
            VERSION_1,
            {
                f"{OLD}/jobs/one/cpu.cfs_quota_us": "250000\n",
                f"{OLD}/jobs/one/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_quota(
    program: Path, tmp_path: Path, groups: str, files: dict[str, str], cores: int
) -> None:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    result = subprocess.run([program, tmp_path], check=True, capture_output=True, text=True)
    assert int(result.stdout) == cores


COUNT = """
import os, time
import llmkern

def count():
    time.sleep(0.25)  # looked up again after a tenth of a second
    return llmkern.info()["usable_cores"]

everywhere = os.sched_getaffinity(0)
first = count()
os.sched_setaffinity(0, {min(everywhere)})
one = count()
os.sched_setaffinity(0, everywhere)
print(first, one, count())
"""


def counts(**environment: str) -> list[int]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LLMKERN", "OMP", "KMP"))}
    command = [sys.executable, "-c", COUNT]
    result = subprocess.run(
        command, cwd=ROOT, env=variables | environment, check=True, capture_output=True, text=True
    )
    return [int(n) for n in result.stdout.split()]


def test_affinity_is_followed() -> None:
    first, one, again = counts()
    assert one == 1 and first == again <= len(os.sched_getaffinity(0))


def test_what_the_user_says_counts() -> None:
    assert counts(LLMKERN_CORES="7") == [7, 7, 7]


def test_threads_that_openmp_binds_count_all_cores() -> None:
    """Each may run on one core then, and together they may run on all."""
    assert len(set(counts(OMP_PROC_BIND="true"))) == 1


WORK = """
import sys
import torch
from llmkern import ops

torch.set_num_threads(4)
x, state = torch.zeros(8, 1, 256), torch.zeros(1, 256)
weights = [torch.zeros(1024, 256), torch.zeros(1024, 256), torch.zeros(1024), torch.zeros(1024)]
ops.lstm(x, state, state, *weights)
ops.sample(torch.zeros(64, 4096), seed=1)
ops.sample(torch.zeros(1, 1 << 17), seed=1)
print(torch.ops.llmkern.memory_stats()[-1])  # threads that have worked
"""


@pytest.mark.parametrize("cores", [1, 2, 9])
def test_no_more_threads_work_than_there_are_cores(cores: int) -> None:
    """Workers that wait for each other would wait for the system to take the core from another one."""
    result = subprocess.run(
        [sys.executable, "-c", WORK],
        cwd=ROOT,
        env=os.environ | {"LLMKERN_CORES": str(cores)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(result.stdout) == min(cores, 4)
