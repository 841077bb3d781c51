# SPDX-License-Identifier: Apache-2.0
"""The instrument: it checks before it times, times in turn, counts the work, and reports what it measured.

No test here depends on how fast anything is: where durations matter, the clock is made of arithmetic.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import compare
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
    device,
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
LEVELS = (Level("L2", 1000, 10, 10), Level("DRAM", float("inf"), 5, 4))
CEILINGS = Ceilings(1, 0.0, {torch.float32: 100.0, torch.bfloat16: 800.0}, LEVELS)


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
    assert {
        "command",
        "date",
        "device",
        "gpu",
        "threads",
        "machine",
        "software",
        "ceilings",
    } <= read.keys()
    assert read["machine"]["cpu"] and read["software"]["torch"] == torch.__version__
    peer = read["results"][0]["contenders"]["peer"]
    assert peer["llmkern_speedup"] == pytest.approx(3.0) and len(peer["samples_ms"]) == 5
    with pytest.raises(TypeError):
        benchmark.write_document(path, {"figure": object()})
    assert json.loads(path.read_text()) == run
    assert list(tmp_path.iterdir()) == [path]


def test_sixteen_bits_have_a_ceiling_and_a_name_of_their_own() -> None:
    phases = [Phase("all", flops=1600, bytes=1, working_set=1)]
    case = Case("fake", "case", lambda: Workload({}, max), phases, dtype=torch.bfloat16)
    assert CEILINGS.floor(case) == pytest.approx(2.0)
    assert CEILINGS.bound(case) == ("tensor cores", 800.0)
    wide, narrow = lstm.decode(512), lstm.decode(512, dtype=torch.bfloat16)
    assert (wide.name, narrow.name) == ("decode-H512-B1", "decode-H512-B1-bfloat16")
    assert narrow.flops == wide.flops and narrow.bytes == wide.bytes / 2
    exact, close = torch.tensor([1.0]), torch.tensor([1.1])
    tensors = {"llmkern": [exact], "peer": [close], "peer, graph": [close]}
    assert benchmark.agreement(1e-6, looser={"peer": 0.2})(tensors) == 0.0
    with pytest.raises(RuntimeError, match=r"within 5\.0e-02 of peer"):
        benchmark.agreement(1e-6, looser={"peer": 0.05})(tensors)


def test_cold_cases_of_a_gpu_are_measured_by_its_memory() -> None:
    """By the same case, a CPU's is measured by the cache that its data fit in."""
    phases = [Phase("all", bytes=30, working_set=30)]
    case = Case("fake", "case", lambda: Workload({}, max), phases, cold=True)
    assert CEILINGS.bound(case) == ("read L2", 10)
    gpu = replace(CEILINGS, device=torch.device("cuda"))
    assert gpu.bound(case) == ("read DRAM", 5)
    assert gpu.bound(replace(case, cold=False)) == ("read L2", 10)


def test_a_cold_case_is_built_so_often_that_the_cache_cannot_hold_it() -> None:
    case = Case("fake", "case", lambda: Workload({}, max), [Phase("all", bytes=100)], cold=True)
    assert device.copies_needed(case, cache=1000) == 31
    assert device.copies_needed(case, cache=10**9) == 256
    assert device.copies_needed(replace(case, cold=False), cache=1000) == 1


def test_runs_take_their_inputs_in_turn_and_the_check_sees_the_first() -> None:
    log = []

    def workload(i: int) -> Workload:
        def contender(name: str) -> Contender:
            return Contender(lambda: log.append((name, i)) or torch.tensor([float(i)]))

        return Workload(
            {name: contender(name) for name in ("llmkern", "peer")}, benchmark.agreement(0.0)
        )

    turns = device.in_turn([workload(i) for i in range(3)])
    assert turns.copies == 3
    for _ in range(4):
        turns.contenders["llmkern"].run()
    turns.contenders["peer"].run()
    assert log == [("llmkern", 0), ("llmkern", 1), ("llmkern", 2), ("llmkern", 0), ("peer", 0)]


def test_graphs_stand_beside_what_they_were_made_of_and_compete_with_each_other() -> None:
    machine = FakeMachine(llmkern=4.0, peer=2.0, waits=1.0, breaks=1.0)
    workload = machine.case().build()
    contenders = dict(workload.contenders)
    contenders["waits"] = replace(contenders["waits"], capturable=False)

    def capture(contender: Contender) -> Contender:
        if contender is contenders["breaks"]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return contender

    graphs = device.with_graphs(replace(workload, contenders=contenders), capture)
    added = [name for name in graphs.contenders if name.endswith(", graph")]
    assert added == ["llmkern, graph", "peer, graph"]
    assert graphs.absent == {
        "breaks, graph": "RuntimeError: operation not permitted when stream is capturing"
    }
    samples = {"llmkern": [4.0], "peer": [2.0], "llmkern, graph": [1.0], "peer, graph": [3.0]}
    timings = {name: benchmark.Timing(values, 1) for name, values in samples.items()}
    result = benchmark.Result(machine.case(), 0.0, timings, absent=graphs.absent)
    assert result.speedup("peer").median == 0.5
    assert result.speedup("peer, graph").median == 3.0
    shown = benchmark.summary(result, CEILINGS)
    assert "llmkern_speedup" not in shown["contenders"]["llmkern, graph"]
    assert "case: no breaks, graph: RuntimeError" in benchmark.table([result], CEILINGS)


def test_a_peer_that_cannot_is_absent_but_llmkern_must() -> None:
    def broken() -> torch.Tensor:
        raise NotImplementedError("not for BFloat16")

    machine = FakeMachine(llmkern=1.0, peer=1.0)
    contenders = dict(machine.case().build().contenders)
    for name in ("peer", "llmkern"):
        workload = Workload(contenders | {name: Contender(broken)}, benchmark.agreement(0.0))
        case = Case("fake", "case", lambda w=workload: w, [Phase("all", flops=50)])
        if name == "peer":
            result = benchmark.measure(case, Protocol(max_rounds=5), machine)
            assert list(result.timings) == ["llmkern"]
            assert result.absent == {"peer": "NotImplementedError: not for BFloat16"}
        else:
            with pytest.raises(NotImplementedError):
                benchmark.measure(case, Protocol(), machine)


def test_clock_of_a_gpu_adds_up_what_its_events_say(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: "Event") -> float:
            return torch.tensor((later.at - self.at) * 1e3, dtype=torch.float32).item()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = device.EventClock()
    now = 3600.0
    start = clock()
    now += 5e-6  # five microseconds, an hour after the first event
    assert clock() - start == pytest.approx(5e-6, rel=1e-6)


@pytest.mark.parametrize("family", ["lstm", "cross_entropy", "embedding", "sampling", "training"])
def test_both_devices_have_cases_with_names_of_their_own(family: str) -> None:
    cases = importlib.import_module(f"benchmarks.bench_{family}").CASES
    assert cases.keys() == {"cpu", "cuda"}
    for mine in cases.values():
        names = [case.name for case in mine]
        assert len(set(names)) == len(names) > 0
        assert all(CEILINGS.floor(replace(case, dtype=torch.float32)) > 0 for case in mine)


def test_a_gpu_is_asked_for_in_vain_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "embedding", "--device", "cuda"])
    assert result.exit_code == 2 and "expected a GPU for --device cuda" in result.output


def test_ceilings_are_measured_from_near_to_far() -> None:
    ceilings = benchmark.measure_ceilings(seconds=0.0)
    assert ceilings.peaks[torch.float32] > 0 and ceilings.threads == torch.get_num_threads()
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


SAMPLING = [
    *(sampling.plain(50, B) for B in (1, 20)),
    *(sampling.top_k(1000, 3, return_logprob=asked) for asked in (True, False)),
    *(case(1000, 20, dtype=torch.bfloat16) for case in (sampling.top_p, sampling.processors)),
]


@pytest.mark.parametrize("case", SAMPLING, ids=str)
def test_sampling_agrees_with_its_peers(case: Case) -> None:
    assert 0.0 <= benchmark.check(case) < 1e-5


@pytest.mark.parametrize(
    ("case", "setting", "off"),
    [
        (sampling.top_k(1000, 2), "top_k", 0),
        (sampling.top_p(1000, 2), "top_p", 1.0),
        (sampling.processors(100_000, 2), "top_k", 0),
        (sampling.processors(1000, 2), "min_p", 0.0),
    ],
)
def test_check_sees_a_filter_that_does_nothing(
    case: Case, setting: str, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ops.sample
    monkeypatch.setattr(ops, "sample", lambda *a, **k: sample(*a, **k | {setting: off}))
    with pytest.raises(RuntimeError, match="tokens kept in row 0"):
        benchmark.check(case)


def test_check_sees_a_penalty_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ops.sample
    monkeypatch.setattr(ops, "sample", lambda *a, **k: sample(*a, **k | {"repetition_penalty": 1}))
    with pytest.raises(RuntimeError, match=r"kept|logprobs within"):
        benchmark.check(sampling.processors(300, 20))


def test_a_goal_is_shown_beside_the_floor() -> None:
    """0.5 s is the floor of 50 operations at 100 a second."""
    timings = {name: benchmark.Timing([2.0] * 3, 1) for name in ("llmkern", "peer")}
    case = replace(FakeMachine(llmkern=1.0).case(), goal=lambda floor: 3 * floor + 0.1)
    result = benchmark.Result(case, 0.0, timings)
    summary = benchmark.summary(result, CEILINGS)
    assert summary["goal_ms"] == pytest.approx(1600.0)
    assert summary["contenders"]["peer"]["time_over_goal"] == pytest.approx(1.25)
    header, _, *rows = benchmark.table([result], CEILINGS).splitlines()[-4:]
    assert header.split("|")[-3].strip() == "time/goal"
    assert [row.split("|")[-3].strip() for row in rows] == ["1.25", "1.25"]
    without = benchmark.table([replace(result, case=replace(case, goal=None))], CEILINGS)
    assert "goal" not in without


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


def test_one_line_a_case_names_the_fastest_peer_and_the_fastest_graph() -> None:
    seconds = {"llmkern": 4.0, "slow": 9.0, "fast": 2.0}
    seconds |= {"llmkern, graph": 1.0, "slow, graph": 3.0, "fast, graph": 1.5}
    timings = {name: benchmark.Timing([s * 1e-3] * 3, 1) for name, s in seconds.items()}
    case = FakeMachine(llmkern=1.0, peer=1.0).case()
    summary = benchmark.summary(benchmark.Result(case, 0.0, timings), CEILINGS)
    (row,) = compare.rows({"results": [summary]})
    assert row[:-1] == ("fake case", "4.0000", "fast", "0.50x", "1.0000", "1.50x")
    assert row[-1] == "50000% of FMA"


def run_pytest(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Not as a worker of the pytest that runs this test: pytest-benchmark measures nothing in one."""
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)


def test_stopped_early_a_run_reports_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_embedding.py", "-o", "addopts="]
    command += ["-p", "no:cacheprovider", "-k", "D200", "--seconds", "0", "--stop-after", "0"]
    done = run_pytest([*command, "--results", str(tmp_path)])
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    assert "--stop-after 0: the other cases were not measured" in done.stdout
    (path,) = (tmp_path / "local").iterdir()
    (only,) = json.loads(path.read_text())["results"]
    assert only["case"] == "forward-V10000-D200-N400"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "facts nonsense"], "expected parts among facts, tests, sanitizer and"),
        (["--what"], "unknown option --what"),
        (["/nonexistent"], "/nonexistent does not exist"),
    ],
)
def test_the_script_for_a_gpu_refuses_what_it_does_not_know(arguments, message) -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_pytest_benchmark_reports_the_same_samples(tmp_path: Path) -> None:
    theirs = tmp_path / "pytest-benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "addopts=", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", "-k", "forward-V10000-D200-N400", "--seconds", "0"]
    command += ["--results", str(tmp_path), "--save", "run", "--benchmark-json", str(theirs)]
    done = run_pytest(command)
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
