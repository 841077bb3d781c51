# SPDX-License-Identifier: Apache-2.0
"""Where memory runs out, the error says how many bytes, in which operator, and what to lower."""

import os
import subprocess
import sys

import pytest
import torch

from llmkern import ops
from tests.conftest import ROOT

HUGE = 1 << 46  # as many elements as no machine has addresses for


def message(what: str, bytes_wanted: int, purpose: str, lower: str) -> str:
    return (
        f"llmkern.{what}: out of memory. Expected {bytes_wanted} bytes ({bytes_wanted / 2**30:.2f} GiB) for {purpose}, "
        f"got none from the allocator; lower {lower}"
    )


def test_a_copy_of_an_expanded_input():
    x = torch.zeros(1, 4).expand(HUGE, 4)
    with pytest.raises(RuntimeError) as error:
        ops.dropout(x, 0.5)
    shape = f"a tensor of shape [{HUGE}, 4]"
    assert str(error.value) == message("dropout", HUGE * 16, shape, "the batch size")


def test_an_lstm_of_an_expanded_input():
    x, h, c = torch.zeros(1, 1, 4).expand(HUGE, 1, 4), torch.zeros(1, 8), torch.zeros(1, 8)
    with pytest.raises(
        RuntimeError, match=r"llmkern\.lstm: out of memory\. .*or the number of steps of a call"
    ):
        ops.lstm(x, h, c, *torch.nn.LSTM(4, 8).parameters())


def test_a_result_of_any_shape():
    ids = torch.zeros(1, dtype=torch.int64).expand(2, HUGE)
    with pytest.raises(
        RuntimeError, match=r"llmkern\.embedding: out of memory\. .* lower the number of ids"
    ):
        ops.embedding(ids, torch.zeros(3, 4))


def test_a_result():
    logits, scores = torch.zeros(1, 2, 9), torch.zeros(1, 2)
    with pytest.raises(RuntimeError) as error:
        ops.beam_search_step(logits, scores, num_candidates=HUGE)
    shape = f"a tensor of shape [1, {HUGE}]"
    lower = "the batch size or the number of beams"
    assert str(error.value) == message("beam_search_step", HUGE * 4, shape, lower)


WORKING_MEMORY = """
import resource, sys
import torch
from llmkern import ops

torch.set_num_threads(int(sys.argv[1]))
ops.sample(torch.zeros(2, 1 << 16), seed=0)  # starts the threads
logits = torch.zeros(2, 1 << 22)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20), resource.RLIM_INFINITY))
try:
    ops.sample(logits, seed=0)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(ops.sample(logits, seed=0).valid.all().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_working_memory_of_any_thread(threads):
    """The limit leaves no room for what a row of 4 million tokens needs; without it all is well again."""
    result = subprocess.run(
        [sys.executable, "-c", WORKING_MEMORY, threads],
        cwd=ROOT,
        env=os.environ | {"LLMKERN_CORES": "2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    error, valid = result.stdout.splitlines()
    assert error.startswith("llmkern.sample: out of memory. Expected ")
    assert error.endswith("for working memory, got none from the allocator; lower the batch size")
    assert valid == "True"
