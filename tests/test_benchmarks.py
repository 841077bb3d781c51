# SPDX-License-Identifier: Apache-2.0
"""The instrument: it checks before it times, times in turn, counts the work, and reports what it measured.

No test here depends on how fast anything is: where durations matter, the clock is made of arithmetic.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llmkern import benchmark, ops
from llmkern.benchmark import (
    Case,
    Ceilings,
    Contender,
    Level,
    Phase,
    Protocol,
    Workload,
    cross_entropy,
    embedding,
    lstm,
    sampling,
    training,
)
from llmkern.cli import app
from llmkern.cli import bench as bench_command

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = [embedding, lstm, cross_entropy, sampling, training]
# Round numbers: 100 operations/s; 10 bytes/s near, 5 read and 4 copied far.
CEILINGS = Ceilings(1, 0.0, 100.0, (Level("L2", 1000, 10, 10), Level("DRAM", float("inf"), 5, 4)))


class FakeMachine:
    """A clock that only running a contender moves, and a log of who ran."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.log, self.slowdown, self.seconds = 0.0, [], 1.0, seconds

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, value: float = 1.0) -> Contender:
        def run() -> torch.Tensor:
            self.log.append(name)
            self.now += self.seconds[name] * self.slowdown
            if name == "peer":
                self.slowdown *= 1.01  # the machine drifts
            return torch.tensor([value])

        return Contender(run)

    def case(self, peer_value: float = 1.0) -> Case:
        contenders = {name: self.contender(name) for name in self.seconds}
        contenders["peer"] = self.contender("peer", peer_value)
        workload = Workload(contenders, benchmark.agreement(1e-6))
        return Case("fake", "case", lambda: workload, [Phase("all", flops=50)])


def test_contenders_are_timed_in_turn() -> None:
    machine = FakeMachine(llmkern=1.0, peer=3.0, other=2.0)
    result = benchmark.measure(machine.case(), Protocol(min_rounds=4, max_rounds=4), machine)
    assert machine.log[-12:] == ["llmkern", "peer", "other"] * 4
    assert all(len(timing.samples) == 4 for timing in result.timings.values())


def test_speedup_is_taken_within_each_round() -> None:
    machine = FakeMachine(llmkern=1.0, peer=3.0)
    drifting = benchmark.measure(machine.case(), Protocol(max_rounds=9), machine)
    assert drifting.timings["llmkern"].seconds.iqr > 0.01
    assert drifting.speedup("peer").median == pytest.approx(3.0)
    assert drifting.speedup("peer").iqr == pytest.approx(0.0, abs=1e-9)
    # Ratios 3, 4, 1; the ratio of the medians would be 2.
    samples = {"llmkern": [1.0, 2.0, 4.0], "peer": [3.0, 8.0, 4.0]}
    timings = {name: benchmark.Timing(values, 1) for name, values in samples.items()}
    assert benchmark.Result(machine.case(), 0.0, timings).speedup("peer").median == 3.0


def test_short_calls_are_repeated_within_a_sample_after_one_that_is_not_timed() -> None:
    machine = FakeMachine(llmkern=0.001, peer=0.001)
    protocol = Protocol(seconds=0, min_rounds=2, sample_seconds=0.01)
    result = benchmark.measure(machine.case(), protocol, machine)
    calls = result.timings["llmkern"].calls
    assert calls >= 8
    round_ = ["llmkern"] * (calls + 1) + ["peer"] * (result.timings["peer"].calls + 1)
    assert machine.log[-2 * len(round_) :] == round_ * 2
    assert result.timings["llmkern"].samples[0] < 0.0015


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_wrong_result_is_refused_before_anything_is_timed(value: float) -> None:
    machine = FakeMachine(llmkern=1.0, peer=1.0)

    def clock() -> float:
        raise AssertionError("timed a wrong result")

    with pytest.raises(RuntimeError, match=r"fake case: expected llmkern within 1\.0e-06 of peer"):
        benchmark.measure(machine.case(value), Protocol(), clock)


def test_floor_is_the_slower_of_arithmetic_and_memory_summed_over_phases() -> None:
    phases = [
        Phase("arithmetic", flops=400, bytes=10, working_set=10),  # 4 s
        Phase("memory", flops=1, bytes=30, working_set=2000, repeats=2),  # 2 * 6 s
        Phase("copy", bytes=8, working_set=2000, traffic="copy"),  # 2 s
    ]
    case = Case("fake", "case", lambda: Workload({}, lambda tensors: 0.0), phases)
    assert CEILINGS.floor(case) == pytest.approx(18.0)
    assert CEILINGS.bound(case) == ("read DRAM", 5)
    assert (case.flops, case.bytes) == (402, 78)


def test_table_shows_losses_floor_and_share_of_the_ceiling() -> None:
    machine = FakeMachine(llmkern=2.0, peer=1.0)
    result = benchmark.Result(
        machine.case(),
        0.0,
        {
            "llmkern": benchmark.Timing([2.0, 2.0, 2.0], 1),
            "peer": benchmark.Timing([1.0, 1.0, 1.0], 1),
        },
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in benchmark.table([result], CEILINGS).splitlines()
        if line.startswith("|")
    ]
    assert rows[0][:3] == ["case", "run", "ms"]
    ours = "case|llmkern|2,000|0%|0.0000000250 GFLOP/s|25 % of FMA|500|4.00|"
    assert rows[2] == ours.split("|")
    assert rows[3][1:3] == ["peer", "1,000"] and rows[3][-1] == "0.500x (slower)"


def test_document_is_strict_json_and_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    machine = FakeMachine(llmkern=1.0, peer=3.0)
    result = benchmark.measure(machine.case(), Protocol(max_rounds=5), machine)
    run = benchmark.document([result], CEILINGS, Protocol())
    path = tmp_path / "run.json"
    benchmark.write_document(path, run)
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read == run
    assert {"command", "date", "threads", "machine", "software", "ceilings"} <= read.keys()
    assert read["machine"]["cpu"] and read["software"]["torch"] == torch.__version__
    peer = read["results"][0]["contenders"]["peer"]
    assert peer["llmkern_speedup"] == pytest.approx(3.0) and len(peer["samples_ms"]) == 5
    with pytest.raises(TypeError):
        benchmark.write_document(path, {"figure": object()})
    assert json.loads(path.read_text()) == run
    assert list(tmp_path.iterdir()) == [path]


def test_ceilings_are_measured_from_near_to_far() -> None:
    ceilings = benchmark.measure_ceilings(seconds=0.0)
    assert ceilings.peak > 0 and ceilings.threads == torch.get_num_threads()
    assert all(level.read > 0 and level.copy > 0 for level in ceilings.levels)
    capacities = [level.capacity for level in ceilings.levels]
    assert capacities == sorted(capacities) and capacities[-1] == float("inf")


@pytest.mark.parametrize(
    "case", [case for family in FAMILIES for case in family.QUICK], ids=lambda case: case.name
)
def test_every_family_agrees_with_its_peers(case: Case) -> None:
    assert 0.0 <= benchmark.check(case) < 1e-3


@pytest.mark.parametrize("case", [embedding.forward(50, 8, 20), embedding.training(50, 8, 20)])
def test_check_sees_a_broken_gather(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = ops.embedding
    monkeypatch.setattr(ops, "embedding", lambda ids, weight: gather(ids.flip(0), weight))
    with pytest.raises(RuntimeError, match=f"embedding {case.name}: expected llmkern within"):
        benchmark.check(case)


@pytest.mark.parametrize("setting", ["top_k", "top_p"])
def test_check_sees_a_filter_that_does_nothing(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ops.sample
    off = {"top_k": 0, "top_p": 1.0}[setting]
    monkeypatch.setattr(ops, "sample", lambda *a, **k: sample(*a, **k | {setting: off}))
    with pytest.raises(RuntimeError, match="tokens kept in row 0"):
        benchmark.check(getattr(sampling, setting)(V=1000, B=2))


def test_work_is_counted_from_the_formulas() -> None:
    B, T, H, V = 20, 35, 200, 10_000
    assert lstm.sequence(H, B, T).flops == 8 * B * T * H * (H + H)
    assert lstm.training(H, B, T).flops == 3 * 8 * B * T * H * (H + H)
    assert cross_entropy.training(B * T, V, H).flops == 3 * 2 * B * T * V * H
    small = training.step("small", V=V, H=H, B=B, T=T)
    layers = 2 * lstm.training(H, B, T).flops
    assert small.flops == layers + cross_entropy.training(B * T, V, H).flops
    assert lstm.decode(H).bytes == 4 * H * (H + H + 2) * 4
    ids = embedding.zipf_ids(700, V)
    rows = len(set(ids.tolist())) + 700
    assert embedding.forward(V, H, 700).bytes == rows * H * 4 + 700 * 8


def test_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_command, "measure_ceilings", lambda: CEILINGS)
    path = tmp_path / "figures.json"
    arguments = ["bench", "embedding", "--seconds", "0", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "### embedding" in result.output and "F.embedding" in result.output
    names = [entry["case"] for entry in json.loads(path.read_text())["results"]]
    assert names == [case.name for case in embedding.QUICK]


def test_pytest_benchmark_reports_the_same_samples(tmp_path: Path) -> None:
    theirs = tmp_path / "pytest-benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "addopts=", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", "-k", "forward-V10000-D200-N400", "--seconds", "0"]
    command += ["--results", str(tmp_path), "--save", "run", "--benchmark-json", str(theirs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "F.embedding" in done.stdout
    run = json.loads((tmp_path / "run.json").read_text())
    (local,) = (tmp_path / "local").iterdir()
    assert json.loads(local.read_text()) == run
    (result,), (entry,) = run["results"], json.loads(theirs.read_text())["benchmarks"]
    ours = result["contenders"]["llmkern"]
    assert entry["stats"]["rounds"] == ours["rounds"] == 5
    assert entry["stats"]["median"] * 1e3 == pytest.approx(ours["median_ms"], rel=1e-9)
    assert entry["extra_info"] == result
