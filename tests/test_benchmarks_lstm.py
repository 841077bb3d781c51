# SPDX-License-Identifier: Apache-2.0
"""The LSTM's cases beside the plain ones: right results, checks that see wrong ones, work, and memory."""

from typing import Any

import pytest
import torch

from benchmarks import lstm_memory
from llmkern import benchmark, ops
from llmkern.benchmark import Case, lstm, lstm_options

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = ("layer-norm", "zoneout", "weight-dropout", "locked-dropout")


@pytest.mark.parametrize(
    "case",
    [lstm.ragged_training(9, 5, 16), *(lstm_options.training(o, 12, 3, 5) for o in OPTIONS)],
    ids=str,
)
def test_cases_agree_with_their_peers(case: Case) -> None:
    assert 0.0 <= benchmark.check(case) < 1e-4


@pytest.mark.parametrize("option", ["layer-norm", "zoneout"])
def test_check_sees_an_option_that_does_nothing(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ops.lstm

    def plain(x: Any, *tensors: Any, **options: Any) -> Any:
        used = sum(options[name].sum() for name in ("norm_gates", "norm_cell") if name in options)
        return run(x + 0 * used, *tensors)

    monkeypatch.setattr(ops, "lstm", plain)
    with pytest.raises(RuntimeError, match=r"expected llmkern within .* of torch loop"):
        benchmark.check(lstm_options.training(option, 12, 3, 5))


@pytest.mark.parametrize("option", ["weight-dropout", "locked-dropout"])
def test_check_sees_a_mask_that_is_drawn_anew(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drop = ops.dropout
    monkeypatch.setattr(ops, "dropout", lambda x, p, seed, **options: drop(x, p, **options))
    with pytest.raises(RuntimeError, match=r"expected llmkern within .* of torch loop"):
        benchmark.check(lstm_options.training(option, 12, 3, 5))


def test_ragged_work_is_that_of_the_steps_there_are() -> None:
    B, T, H = 32, 500, 64
    steps = torch.linspace(T, T / 8, B).round().sum().item()
    assert steps / (B * T) == pytest.approx(0.56, abs=0.01)
    flops = lstm.ragged_training(H, B, T).flops
    assert flops == pytest.approx(3 * 8 * steps * H * (H + H))


def test_memory_of_a_step() -> None:
    """Output and cells, and four gates where they are not computed again; torch keeps more."""
    measured = lstm_memory.measure(6, 4, 40)
    of_output = {name: c["saved_per_output"] for name, c in measured["contenders"].items()}
    assert of_output["llmkern"] == 6 and of_output["llmkern, recompute"] == 2
    assert of_output["nn.LSTM"] > 6
    for contender in measured["contenders"].values():
        assert contender["largest_allocation_bytes"] >= 6 * 4 * 40 * 4
        assert lstm_memory.is_within_limit(contender)
    assert "memory-H40-B4-T6" in lstm_memory.table([measured])


def test_memory_of_a_step_has_a_limit() -> None:
    allowed = 32 << 20
    assert lstm_memory.is_within_limit({"largest_allocation_bytes": allowed})
    assert not lstm_memory.is_within_limit({"largest_allocation_bytes": allowed + 1})


def test_memory_that_the_profiler_does_not_see_is_counted() -> None:
    """A step whose blocks have gone from the cache takes its gates, 5 MB, from the system; the next step does not."""
    x, state = torch.zeros(160, 16, 128, requires_grad=True), torch.zeros(16, 128)
    weights = list(torch.nn.LSTM(128, 128).parameters())

    def step() -> None:
        ops.lstm(x, state, state, *weights)[0].sum().backward()

    step()
    ops.empty_cache()
    assert lstm_memory.largest_allocation(step) >= 160 * 16 * 4 * 128 * 4
    assert lstm_memory.largest_allocation(step) < 160 * 16 * 4 * 128 * 4
