# SPDX-License-Identifier: Apache-2.0
"""Every fault the checkers promise to see is planted once and reported by name; its clean twin is not."""

import re

import numpy as np
import pytest

from .harness import KernelError, Output, Scratch

# library, kernel, what the report must say: the kind of fault, then the block and thread, then what and where.
FAULTS = [
    (
        "races",
        "missing_barrier",
        r"shared memory race.*thread \(1, 0, 0\): reads 4 bytes at `tile`\+0, which block \(0, 0, 0\), thread \(0, 0, 0\) wrote \(tests/simt/faults/races.cu:\d+\) with nothing to order the two \(tests/simt/faults/races.cu:\d+\)",
    ),
    (
        "races",
        "missing_second_barrier",
        r"shared memory race.*writes 4 bytes at `tile`.*which block 0, several threads read",
    ),
    ("races", "missing_warp_barrier", r"shared memory race.*reads 4 bytes at `tile`"),
    (
        "races",
        "barrier_too_small",
        r"shared memory race.*reads 4 bytes at dynamic shared memory\+\d+, which block \(0, 0, 0\), thread",
    ),
    (
        "races",
        "blocks_share_output",
        r"global memory race.*block \(1, 0, 0\), thread \(0, 0, 0\): writes 4 bytes at `out`\+0, which block 0",
    ),
    ("races", "missing_grid_barrier", r"global memory race|uninitialised read.*`scratch`"),
    (
        "races",
        "missing_fence",
        r"global memory race.*block \(2, 0, 0\).*reads 4 bytes at `scratch`\+0",
    ),
    (
        "races",
        "plain_update",
        r"global memory race.*thread \(1, 0, 0\): reads 4 bytes at `counters`\+0",
    ),
    ("races", "missing_cluster_barrier", r"(shared memory race|uninitialised read).*`tile`"),
    (
        "races",
        "returns_too_early",
        r"shared memory out of bounds.*reads `tile` of block \(1, 0, 0\), which has exited",
    ),
    (
        "bounds",
        "static_shared",
        r"shared memory out of bounds.*thread \(63, 0, 0\): writes 4 bytes at `tile`\+256, which has 256 bytes",
    ),
    (
        "bounds",
        "array_index",
        r"array index out of bounds.*thread \(7, 0, 0\): index 8 of 'float \[8\]' \(tests/simt/faults/bounds.cu:\d+\)",
    ),
    (
        "bounds",
        "dynamic_shared",
        r"shared memory out of bounds.*thread \(9, 0, 0\): writes 4 bytes at dynamic shared memory\+256",
    ),
    (
        "bounds",
        "global_read",
        r"global memory out of bounds.*thread \(0, 0, 0\): reads 4 bytes.*before",
    ),
    (
        "bounds",
        "global_write",
        r"global memory out of bounds.*thread \(63, 0, 0\): writes 4 bytes at `out`\+256",
    ),
    ("bounds", "null_pointer", r"out of bounds.*reads 4 bytes at address 0, which is in no buffer"),
    (
        "bounds",
        "input_written",
        r"write to an input.*thread \(3, 0, 0\): writes 4 bytes at `in`\+12",
    ),
    (
        "bounds",
        "misaligned",
        r"misaligned access.*thread \(7, 0, 0\): 'const struct Pack' at an address 4 bytes past a multiple of 16",
    ),
    (
        "bounds",
        "copied",
        r"global memory out of bounds.*thread \(0, 0, 0\): reads 260 bytes at `in`\+0, which has 256",
    ),
    (
        "masks",
        "caller_missing",
        r"wrong lane mask.*thread \(0, 0, 0\): __shfl_sync.* 0xfffffffe, which lacks the calling lane 0",
    ),
    (
        "masks",
        "lane_elsewhere",
        r"wrong lane mask.*thread \(0, 0, 0\): waits in __shfl_xor_sync.*for lane 16 of its mask, which is in __syncthreads",
    ),
    ("masks", "lane_returned", r"wrong lane mask.*thread \(\d+, 0, 0\): .*lane 5.*has returned"),
    (
        "masks",
        "masks_differ",
        r"wrong lane mask.*thread \(5, 0, 0\): __syncwarp.*mask 0x7fffffff, but lane 0 waits with mask 0xffffffff",
    ),
    (
        "masks",
        "source_missing",
        r"wrong lane mask.*__shfl_sync.*reads lane 16, which is not in its mask 0x0000ffff",
    ),
    (
        "masks",
        "beyond_the_block",
        r"wrong lane mask.*thread \(32, 0, 0\).*names lanes beyond the block's 48 threads",
    ),
    (
        "masks",
        "operations_differ",
        r"wrong lane mask.*thread \(9, 0, 0\): comes to __all_sync.*but lane 0 of its mask is in __any_sync",
    ),
    (
        "barriers",
        "thread_returned",
        r"barrier divergence.*thread \(0, 0, 0\): waits in __syncthreads.*but thread \(40, 0, 0\) has returned",
    ),
    (
        "barriers",
        "thread_elsewhere",
        r"barrier divergence.*thread \(32, 0, 0\): comes to __syncthreads.*barriers.cu:20.*wait at the one.*barriers.cu:24",
    ),
    (
        "barriers",
        "too_few_at_named_barrier",
        r"barrier divergence.*thread \(0, 0, 0\): waits in a named barrier, but thread \(32, 0, 0\) has returned",
    ),
    (
        "barriers",
        "block_left_the_grid",
        r"barrier divergence.*block \(0, 0, 0\).*waits in grid.sync.*block \(1, 0, 0\), thread \(0, 0, 0\) has returned",
    ),
    (
        "barriers",
        "spins_for_ever",
        r"deadlock.*block \(0, 0, 0\).*waits for ever in a loop over a volatile",
    ),
    ("barriers", "phase_never_ends", r"deadlock.*waits for ever in mbarrier_wait"),
    (
        "initialisation",
        "shared_read",
        r"uninitialised read.*thread \(17, 0, 0\): reads 4 bytes at `tile`\+68, which nothing has written",
    ),
    (
        "initialisation",
        "left_by_another_block",
        r"uninitialised read.*block \(1, 0, 0\), thread \(0, 0, 0\): reads 4 bytes at `tile`\+0",
    ),
    ("initialisation", "global_read", r"uninitialised read.*reads 4 bytes at `scratch`\+0"),
    (
        "initialisation",
        "half_a_word",
        r"uninitialised read.*thread \(5, 0, 0\): reads 4 bytes at `tile`\+20",
    ),
    (
        "initialisation",
        "unwritten_output",
        r"unwritten output: unwritten_output<true> leaves out\[63\] unwritten",
    ),
    ("copies", "not_waited_for", r"uninitialised read.*reads 4 bytes at `tile`\+0"),
    ("copies", "no_barrier_after_wait", r"shared memory race.*reads 4 bytes at `tile`"),
    (
        "copies",
        "never_waited_for",
        r"unfinished copy.*thread \(0, 0, 0\): returns with asynchronous copies not waited for",
    ),
    (
        "copies",
        "copy_beyond_the_input",
        r"global memory out of bounds.*thread \(63, 0, 0\): reads 4 bytes at `in`\+256",
    ),
    (
        "copies",
        "bulk_copy_not_waited_for",
        r"shared memory race.*reads 4 bytes at `tile`\+\d+, which an asynchronous copy wrote",
    ),
    ("copies", "mbarrier_used_too_early", r"shared memory race.*thread \(1, 0, 0\).*`barrier`"),
]
TWO_BLOCKS = {
    "blocks_share_output",
    "missing_grid_barrier",
    "missing_cluster_barrier",
    "block_left_the_grid",
    "spins_for_ever",
    "left_by_another_block",
}


def run(simt, library, kernel, planted, counters=0):
    N = 48 if kernel == "beyond_the_block" else 64
    blocks = 1 if planted and kernel == "blocks_share_output" else 1 + (kernel in TWO_BLOCKS)
    return simt(f"faults/{library}").run(
        f"{kernel}<{'true' if planted else 'false'}>",
        **{"in": np.arange(N, dtype=np.float32)},
        out=Output(N * blocks, np.float32),
        scratch=Scratch(128, np.float32),
        counters=np.array([counters], np.int32),
        N=N,
    )["out"]


@pytest.mark.parametrize(("library", "kernel", "report"), FAULTS, ids=[f[1] for f in FAULTS])
def test_planted_fault_is_reported(simt, library, kernel, report):
    with pytest.raises(KernelError) as raised:
        run(simt, library, kernel, True)
    assert re.search(report, str(raised.value)), raised.value
    assert kernel in str(raised.value)


@pytest.mark.parametrize(("library", "kernel"), [f[:2] for f in FAULTS], ids=[f[1] for f in FAULTS])
def test_clean_twin_is_not_reported(simt, library, kernel):
    assert np.isfinite(run(simt, library, kernel, False)).all()


def test_a_block_that_returns_while_it_is_read(simt):
    """The reader ran first this time; on a GPU it might not."""
    with pytest.raises(
        KernelError, match=r"block \(0, 0, 0\).*returns while block 1, thread 0 reads its `tile`"
    ):
        run(simt, "races", "returns_too_early", True, counters=1)


def test_reports_survive_the_next_launch(simt):
    """A fault leaves threads where they stood; the next launch starts afresh."""
    for _ in range(3):
        with pytest.raises(KernelError):
            run(simt, "barriers", "thread_returned", True)
        assert run(simt, "barriers", "thread_returned", False)[5] == 5
