"""The speed command: its protocol, measurement and limits, and what it says without the other environment."""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import Case, Work, cases_htm, command, find_cases, limits, measure, peer, peer_worker

PEERS = peer.ROOT / ".peers"

TOY = """
import os, sys, time
import torch

class Toy:
    def __init__(self, settings, weights, factor):
        self.settings, self.factor, self.seen = settings, factor, []
        if factor == 1:
            torch.save({"w": torch.ones(2)}, weights)
        self.weight = torch.load(weights)["w"]

    def warm_up(self):
        print("a package that chatters on standard output")

    def step(self, index):
        self.seen.append(index)
        if self.settings.get("fail"):
            raise ValueError("the step failed on purpose")
        if self.settings.get("die"):
            print("last words", file=sys.stderr, flush=True)
            os._exit(7)
        time.sleep(self.settings.get("sleep", 0) * self.factor)

    def results(self):
        return {"output": self.weight * self.settings.get("value", 1), "seen": torch.tensor(self.seen)}

def theirs(settings, weights):
    return Toy(settings, weights, 1)

def ours(settings, weights):
    return Toy(settings, weights, 0.25)
"""


def toy_case(folder: Path, **settings: Any) -> Case:
    file = folder / "toy.py"
    file.write_text(TOY)
    work = Work(operations=1e6, bytes=1e6)
    return Case(name="toy", settings=settings, package="torch", work=work, file=file)


def prepare(process: peer.Process, case: Case, folder: Path, side: str = "theirs") -> None:
    process.ask(
        "prepare",
        file=str(case.file),
        side=side,
        settings=dict(case.settings),
        weights=str(folder / "weights.pt"),
        threads=1,
    )


@pytest.fixture(scope="module")
def worker() -> Iterator[peer.Process]:
    with peer.Process(timeout=60) as process:
        yield process


def test_a_worker_answers_in_spite_of_what_the_package_prints(worker: peer.Process, tmp_path: Path) -> None:
    prepare(worker, toy_case(tmp_path, value=3), tmp_path)
    times = worker.ask("run", calls=4)
    assert times["wall"] >= 0
    assert times["cpu"] >= 0
    assert worker.ask("results", path=str(tmp_path / "r.pt")) == ["output", "seen"]
    results = torch.load(tmp_path / "r.pt")
    assert results["output"].tolist() == [3, 3]
    assert results["seen"].tolist() == [0, 1, 2, 3], "each call of a run gets the next input"
    assert worker.ask("threads", count=1) == 1
    assert worker.ask("versions", packages=["torch", "no-such-thing"])["no-such-thing"] is None


def test_a_failed_step_is_reported_and_the_worker_goes_on(worker: peer.Process, tmp_path: Path) -> None:
    prepare(worker, toy_case(tmp_path, fail=True), tmp_path)
    with pytest.raises(peer.WorkerError, match="ValueError: the step failed on purpose"):
        worker.ask("run", calls=1)
    with pytest.raises(peer.WorkerError, match="unknown request 'sing'"):
        worker.ask("sing")
    assert worker.ask("threads", count=1) == 1


def test_a_worker_that_ends_or_hangs_is_an_error_not_a_wait(tmp_path: Path) -> None:
    with peer.Process(timeout=60) as process:
        prepare(process, toy_case(tmp_path, die=True), tmp_path)
        with pytest.raises(peer.WorkerError, match=r"code 7(?s:.*)last words"):
            process.ask("run", calls=1)
        with pytest.raises(peer.WorkerError, match="code 7"):
            process.ask("run", calls=1)
    with pytest.raises(peer.WorkerError, match="no answer"), peer.Process(timeout=60) as process:  # noqa: PT012
        prepare(process, toy_case(tmp_path, sleep=60), tmp_path)
        process.timeout = 0.2
        # The error ends the process in the middle of its step, or the test would last a minute.
        process.ask("run", calls=1)


def test_the_other_environment_never_needs_this_project() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch"}
    case_files = {Path(cases_htm.__file__)} | {case.file for case in find_cases()}
    for file in (peer.WORKER, *case_files):
        tree = ast.parse(file.read_text())
        # Functions of a case file may import either side's package; the file itself may not.
        nodes = list(ast.walk(tree)) if file == peer.WORKER else tree.body
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{file.name}: {names}"


class Fake:
    """A side whose step takes the given seconds, one after the other, and that notes when it was asked."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def ask(self, do: str, **arguments: Any) -> Any:
        self.log.append(f"{self.name}{arguments['calls']}")
        taken = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return {"wall": taken, "cpu": taken / 2}


def test_the_sides_take_turns_and_short_steps_are_repeated() -> None:
    log: list[str] = []
    ours, theirs = Fake("a", [measure.TURN_SECONDS / 5], log), Fake("b", [1.0], log)
    mine, other = measure.alternate(ours, theirs, rounds=4, seconds=60)
    assert log[-8:] == ["a5", "b1"] * 4
    assert mine.calls == 5
    assert other.wall == (1.0,) * 4
    assert other.cpu == (0.5,) * 4


def test_time_that_is_up_ends_the_rounds_but_not_before_three() -> None:
    mine, other = measure.alternate(Fake("a", [1.0], []), Fake("b", [1.0], []), rounds=50, seconds=0)
    assert len(mine.wall) == len(other.wall) == 3
    with pytest.raises(ValueError, match="rounds"):
        measure.alternate(Fake("a", [1.0], []), Fake("b", [1.0], []), rounds=0, seconds=1)


def test_ratio_of_medians_and_spread_of_pairs() -> None:
    found = measure.ratio([1, 2, 3, 4, 100], [10, 20, 30, 40, 50])
    assert found.medians == 30 / 3
    assert found.low == pytest.approx(0.5 + (10 - 0.5) * 0.4)  # pairs: .5, 10, 10, 10, 10
    assert found.high == 10
    # A machine that slows down in the course of a run slows both: the pairs do not see it.
    drift = [1.0, 1.5, 2.0, 4.0]
    found = measure.ratio([2 * slow for slow in drift], [10 * slow for slow in drift])
    assert (found.low, found.medians, found.high) == pytest.approx((5, 5, 5))
    swapped = measure.ratio([10.0, 11.0, 9.0], [1.0, 1.2, 1.1])
    straight = measure.ratio([1.0, 1.2, 1.1], [10.0, 11.0, 9.0])
    assert swapped.medians == pytest.approx(1 / straight.medians)
    for ours, theirs in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="turns"):
            measure.ratio(ours, theirs)


def test_results_agree_only_within_the_tolerance_and_only_if_finite() -> None:
    truth = torch.randn(1, 100, 8)
    near, one_row, broken = truth + 1e-6, truth.clone(), truth.clone()
    one_row[0, 5] += 1
    broken[0, 0, 0] = float("nan")

    def compare(mine: torch.Tensor, stray: float = 0.0) -> measure.Agreement:
        return measure.compare_results({"output": mine}, {"output": truth}, tolerance=1e-4, stray_rows=stray)

    assert compare(near).agrees
    assert not compare(one_row).agrees
    assert compare(one_row, stray=0.01).agrees
    assert compare(one_row).stray_rows == pytest.approx(0.01)
    assert compare(broken).largest == float("inf")
    assert not compare(broken).agrees
    with pytest.raises(ValueError, match="shape"):
        compare(truth[:, :50])
    with pytest.raises(ValueError, match="output"):
        measure.compare_results({"y": truth}, {"output": truth}, tolerance=1, stray_rows=0)


@pytest.mark.parametrize("sampled", [False, True])
def test_extra_memory_is_what_a_step_holds_at_its_peak(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    if sampled:
        monkeypatch.setattr(peer_worker, "_reset_high_water", lambda: False)
    size = 96 << 20

    def hold() -> None:
        for _ in range(3):
            # Written to, or the pages are never there; freed at once: three times the size is never held.
            torch.ones(size // 4).add_(1).sum()

    peer_worker._trim()
    found = peer_worker.extra_peak(hold)
    assert size <= found["bytes"] + (1 << 20) < size + (24 << 20)
    assert (found["method"] == "sampled") == (sampled or not peer_worker._reset_high_water())
    assert peer_worker.extra_peak(lambda: None)["bytes"] < 8 << 20


def test_the_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    machine = limits.Limits(
        threads=1, operations_per_second=1e9, copy_bytes_per_second=1e9, _read={1 << 20: 1e8, 1 << 22: 1e6}
    )
    assert machine.seconds(Work(operations=2e9, bytes=1e6)) == 2.0
    assert machine.bound_by(Work(operations=2e9, bytes=1e6)) == "arithmetic"
    # 4e6 bytes fit into 2^22 only, whose rate is another one.
    assert machine.seconds(Work(operations=1.0, bytes=4e6)) == 4.0
    assert machine.bound_by(Work(operations=1.0, bytes=4e6)) == "memory"


def test_rates_are_measured_and_leave_the_threads_alone() -> None:
    before = torch.get_num_threads()
    machine = limits.measure_limits(threads=1, seconds=0.05)
    assert machine.operations_per_second > 1e8
    assert machine.copy_bytes_per_second > 1e7
    # What fits into a cache is not read more slowly than what does not (half: other programs run too).
    assert machine.read_bytes_per_second(1 << 18) > 0.5 * machine.read_bytes_per_second(1 << 27)
    assert torch.get_num_threads() == before


def test_least_work_of_a_read_counted_by_hand() -> None:
    def work(
        queries: int, memories: int = 20_000, *, backward: bool = False, streaming: bool = False
    ) -> Work:
        return cases_htm.least_work(
            queries=queries, memories=memories, backward=backward, streaming=streaming
        )

    # One more query of a stream: five maps of 512 x 512 (search, query, key, value, output), 625 scores, and
    # 8 heads that score and sum 256 memories of 512.
    one_more = work(2, streaming=True).operations - work(1, streaming=True).operations
    assert one_more == pytest.approx(2 * (5 * 512**2 + 625 * 512 + 2 * 8 * 256 * 512))
    # A stream reads its 625 summaries, 8 chunks and the weights, and neither a weight twice nor the memory.
    assert work(1, streaming=True).bytes == pytest.approx(4 * ((625 + 256) * 512 + 5 * 512**2 + 2 * 512))
    assert work(1).bytes > 4 * 20_000 * 512
    for quantity in ("operations", "bytes"):
        values = [getattr(work(queries), quantity) for queries in cases_htm.QUERIES]
        assert values == sorted(values)
        assert getattr(work(16, backward=True), quantity) > getattr(work(16), quantity)
        assert getattr(work(16, 100_000), quantity) > getattr(work(16), quantity)


def test_the_cases_cover_the_grid_and_carry_the_targets() -> None:
    found = {case.name: case for case in find_cases()}
    for kind in ("forward", "forward+backward"):
        for queries in (1, 16, 128, 512):
            for size in ("2k", "20k", "100k"):
                assert f"htm/{kind}/q{queries}/m{size}" in found
    assert found["htm/forward/q128/m20k"].faster == 12
    assert found["htm/forward+backward/q128/m20k"].faster == 8
    assert found["htm/forward/q128/m20k"].leaner == 5
    assert found["htm/streaming/q1/m20k"].faster == 40
    assert all(json.dumps(dict(case.settings)) for case in found.values())
    assert 0 < len(find_cases(quick=True)) < 5
    assert [case.name for case in find_cases("htm/streaming/*")] == ["htm/streaming/q1/m20k"]
    with pytest.raises(LookupError, match=r"Did you mean 'htm/forward/q128/m20k'"):
        find_cases("htm/forwards/q128/m20k")


def test_without_the_other_environment_the_command_says_make_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(peer.PeersMissingError, match="make peers"):
        peer.find_python(tmp_path / "nowhere")
    assert command.speed(peers=tmp_path / "nowhere", out=tmp_path / "out") == 2
    assert "make peers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arguments_that_make_no_sense_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.speed(cases="nothing/*", peers=tmp_path) == 2
    assert command.speed(threads=(0,), peers=tmp_path) == 2
    assert command.speed(rounds=0, peers=tmp_path) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("nothing/*", "--threads (0)", "--rounds (0)"))


def outcome(
    case: Case, *, agrees: bool = True, extra: tuple[int, int] = (10 << 20, 100 << 20)
) -> measure.Outcome:
    fast = measure.Times(wall=(0.002, 0.002, 0.004), cpu=(0.001, 0.001, 0.002), calls=9)
    slow = measure.Times(wall=(0.1, 0.1, 0.2), cpu=(0.02, 0.02, 0.04), calls=1)
    agreement = measure.Agreement(largest=1e-6, stray_rows=0.0, compared=("output",), agrees=agrees)
    return measure.Outcome(
        case=case,
        times={1: (fast, slow), 2: (fast, slow)},
        extra_bytes=extra,
        memory_method="sampled",
        agreement=agreement,
        others={1: 0.02, 2: 0.5},
    )


def machine_of(threads: int) -> limits.Limits:
    sizes = {1 << power: 1e10 for power in range(16, 29)}
    return limits.Limits(threads=threads, operations_per_second=1e10, copy_bytes_per_second=1e10, _read=sizes)


def test_a_row_counts_cpu_time_of_one_thread_and_wall_time_of_more(tmp_path: Path) -> None:
    case = toy_case(tmp_path)
    one, two = (command.make_row(outcome(case), machine_of(threads)) for threads in (1, 2))
    assert one.ratio.medians == pytest.approx(20)
    assert two.ratio.medians == pytest.approx(50)
    assert one.of_limit == pytest.approx(1e6 / 1e10 / 0.001)
    assert one.extra_bytes == (10 << 20, 100 << 20)
    assert two.extra_bytes is None, "memory is measured once"
    assert "during 1 of 2 rows" in command.summary([one, two])


def test_what_other_programs_took_is_what_neither_side_used() -> None:
    assert measure._others(((100.0, 400.0), 10.0), ((108.0, 420.0), 15.0)) == pytest.approx(3 / 20)
    assert measure._others(((100.0, 400.0), 10.0), ((104.0, 420.0), 15.0)) == 0, "ticks are coarse"
    assert measure._others((None, 10.0), (None, 15.0)) is None


def test_a_fast_wrong_answer_reaches_no_target(tmp_path: Path) -> None:
    case = replace(toy_case(tmp_path), faster=12.0, leaner=5.0)
    right = command.make_row(outcome(case), machine_of(1))
    wrong = command.make_row(outcome(case, agrees=False), machine_of(1))
    slow = command.make_row(outcome(replace(case, faster=21.0)), machine_of(1))
    heavy = command.make_row(outcome(case, extra=(30 << 20, 100 << 20)), machine_of(1))
    assert [done for _, done in right.reached()] == [True, True]
    assert [done for _, done in wrong.reached()] == [False, False]
    assert [done for _, done in slow.reached()] == [False, True]
    assert [done for _, done in heavy.reached()] == [True, False]
    assert "WRONG" in " ".join(wrong.cells())
    assert "toy" in command.summary([wrong])
    assert command.summary([right, heavy]) == "3 of 4 targets reached"


def test_the_table_tells_how_it_was_made(tmp_path: Path) -> None:
    row = command.make_row(outcome(toy_case(tmp_path)), machine_of(1))
    run = command._describe_run({"htm-pytorch": "0.0.4"}, {1: machine_of(1)})
    text = command.markdown(run, [row], [("htm/other", "it broke\ntraceback")])
    assert run["command"] in text
    assert run["versions"]["cpu"] in text
    assert "htm-pytorch 0.0.4" in text
    assert "htm/other FAILED: it broke" in text
    record = json.loads(json.dumps(row.record()))
    assert record["ours"]["cpu"] == [0.001, 0.001, 0.002]
    assert record["case"]["file"] == "toy.py", "no path of this machine is kept"


@pytest.mark.slow
def test_two_processes_are_measured_and_compared(tmp_path: Path) -> None:
    case = toy_case(tmp_path, sleep=0.04)
    found = measure.measure(case, peers_python=Path(sys.executable), threads=(1,), rounds=3, seconds=5)
    mine, other = found.times[1]
    assert 2 < measure.ratio(mine.wall, other.wall).medians < 6
    assert found.agreement.compared == ("output", "seen")
    assert found.agreement.agrees


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="needs the published packages: make peers")
def test_one_real_case_against_the_published_package(tmp_path: Path) -> None:
    names = "htm/forward+backward/q16/m2k"
    assert command.speed(cases=names, quick=True, peers=PEERS, out=tmp_path, rounds=3) == 0
    lines = (tmp_path / "speed.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 1
    assert row["agrees"]
    assert row["largest_difference"] < 1e-4
    assert row["ratio"] > 1
    assert "htm-pytorch" in row["run"]["peers"]
    assert names in (tmp_path / "table.md").read_text()
