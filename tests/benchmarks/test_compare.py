"""Several runs at once: order, failures, interruptions, going on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from benchmarks import compare as module
from benchmarks.compare import Job, Process, compare, write_comparison
from benchmarks.progress import WAITING, BarDisplay, LineDisplay, duration, outcome
from benchmarks.results import DIVERGED, FAILED, FINISHED, Results, read_json
from benchmarks.settings import RunSpec, plan
from benchmarks.summary import load
from benchmarks.train import CannotWriteError, heading
from benchmarks.worker import EXIT_BUSY, EXIT_CANNOT_WRITE, Reporter
from tests.benchmarks.tiny import STREAM, TINY, comparison

# More than any test waits for.
LONG = ("steps=100000", "pause=0.005")


def tiny_plan(*assignments: str, seed: int = 0) -> RunSpec:
    return plan(TINY, STREAM, seed, smoke=True, assignments=assignments)


def quiet() -> LineDisplay:
    return LineDisplay(io.StringIO())


def test_a_worker_that_dies_is_a_failed_run_and_does_not_stop_the_others(tmp_path: Path) -> None:
    results = Results(tmp_path)
    good, dying = tiny_plan(), tiny_plan("trouble=die")
    stream = io.StringIO()
    records = compare([good, dying], results, jobs=2, display=LineDisplay(stream))
    assert [record["status"] for record in records] == [FINISHED, FAILED]
    assert [record["id"] for record in records] == [good.id, dying.id]
    assert "SIGKILL" in records[1]["error"]
    assert records[1]["stderr"][-1] == "last words"
    assert "last words" in stream.getvalue()


class Scripted:
    """In place of `subprocess.Popen`: a process that ends at once, as told."""

    started: list[str]
    code = 0

    def __init__(self, command: list[str], **options: Any) -> None:
        assert options["env"]["OMP_NUM_THREADS"] == options["env"]["MKL_NUM_THREADS"] == "1"
        folder, identity = command[3:5]
        type(self).started.append(identity)
        self.returncode = self.code
        if self.code == 0:
            spec = read_json(Results(folder).run_folder(identity) / "spec.json")
            Results(folder).append(
                {
                    "id": identity,
                    "model": spec["model"],
                    "status": FINISHED,
                    "task_facts": {"headline": "a"},
                    "scores": {"a": 1.0},
                    "seconds": {"training": 1.0, "evaluation": 0.0},
                }
            )
        else:
            options["stderr"].write(b"the disk is full\n")
            options["stderr"].flush()

    def poll(self) -> int:
        return self.code


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    kind = type("ScriptedNow", (Scripted,), {"started": []})
    monkeypatch.setattr(module.subprocess, "Popen", kind)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    return kind


def test_finished_runs_are_skipped_and_failed_ones_tried_again(
    tmp_path: Path, scripted: type[Scripted]
) -> None:
    results = Results(tmp_path)
    specs = [tiny_plan(seed=seed) for seed in range(3)]
    results.append({**heading(specs[0]), "status": DIVERGED, "error": "nan"})
    results.append({**heading(specs[1]), "status": FAILED, "error": "bad luck"})
    compare(specs[2:], results, jobs=1, display=quiet())
    before = results.lines.read_bytes()
    stream = io.StringIO()
    records = compare(specs, results, jobs=2, display=LineDisplay(stream))
    assert scripted.started == [specs[2].id, specs[0].id, specs[1].id]
    assert "3 runs, 1 of them finished before" in stream.getvalue()
    assert [record["status"] for record in records] == [FINISHED] * 3
    # What went wrong before is still there to be seen.
    assert results.lines.read_bytes().startswith(before)
    assert len(results.records()) == 5


def test_the_longest_run_starts_first(tmp_path: Path, scripted: type[Scripted]) -> None:
    specs = [tiny_plan(f"steps={steps}") for steps in (5, 50, 20)]
    compare(specs, Results(tmp_path), jobs=1, display=quiet())
    assert scripted.started == [specs[1].id, specs[2].id, specs[0].id]


def test_rows_that_differ_in_name_only_share_a_run(tmp_path: Path, scripted: type[Scripted]) -> None:
    results = Results(tmp_path)
    specs = [tiny_plan(), plan(f"{TINY} gradient=bptt", STREAM, 0, smoke=True), tiny_plan("gradient=replay")]
    write_comparison(specs, results, "memory-bench compare")
    records = compare(specs, results, jobs=2, display=quiet())
    assert scripted.started == [specs[0].id, specs[2].id]
    assert [record["id"] for record in records] == [spec.id for spec in specs]
    assert [row.model for row in load(tmp_path).rows] == [TINY, f"{TINY} gradient=bptt"]


def test_a_disk_that_refuses_ends_the_comparison_with_the_reason(
    tmp_path: Path, scripted: type[Scripted]
) -> None:
    scripted.code = EXIT_CANNOT_WRITE  # type: ignore[attr-defined]
    with pytest.raises(CannotWriteError, match="the disk is full"):
        compare([tiny_plan()], Results(tmp_path), jobs=1, display=quiet())
    assert Results(tmp_path).records() == []


def test_jobs_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs"):
        compare([tiny_plan()], Results(tmp_path), jobs=0, display=quiet())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_saves_itself_and_says_how_to_go_on(tmp_path: Path, number: int) -> None:
    command = comparison(tmp_path, "--seeds", "0", "1", "--set", *LONG)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and so these tests' own children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    specs = [tiny_plan(*LONG, seed=seed) for seed in (0, 1)]
    folders = [Results(tmp_path).run_folder(spec.id) for spec in specs]
    _wait_for(
        lambda: all((read_json(f / "progress.json") or {}).get("step", 0) > 2 for f in folders), process
    )
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "0 of 2 runs are finished, the others saved" in said
    assert "memory-bench compare --models" in said
    for folder in folders:
        assert (folder / "checkpoint.pt").exists()
    assert Results(tmp_path).records() == []
    # No worker is left behind: each run can be claimed.
    for spec in specs:
        with Results(tmp_path).claim(spec.id):
            pass


def test_workers_end_when_the_comparison_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(comparison(tmp_path, "--set", *LONG), stdout=subprocess.DEVNULL)
    spec = tiny_plan(*LONG)
    results = Results(tmp_path)
    progress = results.run_folder(spec.id) / "progress.json"
    _wait_for(lambda: (read_json(progress) or {}).get("step", 0) > 2, process)
    process.kill()
    process.wait()
    _wait_for(lambda: (results.run_folder(spec.id) / "checkpoint.pt").exists())
    _wait_for(lambda: _is_free(results, spec.id))
    assert not results.is_finished(spec.id)


def impatient(arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Process:
    """A worker that waits for another process no longer than a moment."""
    folder, identity, seconds = arguments
    script = "import sys; from benchmarks import worker; worker.BUSY_SECONDS = 0.2; sys.exit(worker.main())"
    command = [sys.executable, "-c", script, folder, identity, str(os.getpid()), seconds]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})


# In place of another comparison's worker: it ends its run as soon as there is a line of another one.
HOLDER = """
import sys, time
from benchmarks.results import FINISHED, Results
folder, busy, other = sys.argv[1:]
results = Results(folder)
with results.claim(busy):
    print("held", flush=True)
    while not results.is_finished(other):
        time.sleep(0.05)
    seconds = {"training": 1.0, "evaluation": 0.0}
    results.append({"id": busy, "model": "", "status": FINISHED, "seconds": seconds, "by": "holder"})
"""


@pytest.mark.slow
def test_a_run_of_another_process_is_waited_for_and_not_done_again(tmp_path: Path) -> None:
    busy, other = tiny_plan("steps=40"), tiny_plan("steps=4")
    words = [sys.executable, "-c", HOLDER, str(tmp_path), busy.id, other.id]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    stream = io.StringIO()
    specs, results = [busy, other], Results(tmp_path)
    records = compare(specs, results, jobs=1, display=LineDisplay(stream), launch=impatient)
    assert [record["status"] for record in records] == [FINISHED] * 2
    assert records[0]["by"] == "holder"
    assert [record["id"] for record in results.records()] == [other.id, busy.id]
    assert stream.getvalue().count(WAITING) == 1
    assert holder.wait(30) == 0


def test_a_busy_run_gives_way_to_the_others(tmp_path: Path, scripted: type[Scripted]) -> None:
    specs = [tiny_plan(f"steps={steps}") for steps in (50, 5)]
    codes = iter([EXIT_BUSY, 0, EXIT_BUSY, 0])
    begin = scripted.__init__

    def in_turn(self: Scripted, command: list[str], **options: Any) -> None:
        self.code = next(codes)
        begin(self, command, **options)

    scripted.__init__ = in_turn  # type: ignore[method-assign]
    records = compare(specs, Results(tmp_path), jobs=1, display=quiet())
    assert scripted.started == [specs[0].id, specs[1].id, specs[0].id, specs[0].id]
    assert [record["status"] for record in records] == [FINISHED] * 2


def _is_free(results: Results, identity: str) -> bool:
    from benchmarks.results import RunBusyError

    try:
        with results.claim(identity):
            return True
    except RunBusyError:
        return False


def _wait_for(condition: Any, process: subprocess.Popen[Any] | None = None) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)


def test_the_time_left_follows_from_the_speed_so_far() -> None:
    spec = tiny_plan("steps=100")

    def job(step: int, rate: float) -> Job:
        progress = {"step": step, "steps": 100, "rate": rate, "phase": "training"}
        return Job(spec=spec, process=None, log=None, progress=progress)  # type: ignore[arg-type]

    estimate = module._Estimate([])
    assert estimate.seconds_left([], [], 2) == 0
    assert estimate.seconds_left([job(0, 0.0)], [], 2) is None
    one = estimate.seconds_left([job(50, 10.0)], [], 2)
    assert one == pytest.approx(5 + 10 * module.EVALUATION_SHARE)
    # One more like it waits: on the second processor it takes its whole time.
    two = estimate.seconds_left([job(50, 10.0)], [spec], 2)
    assert two == pytest.approx(10 * (1 + module.EVALUATION_SHARE))
    # On one processor it comes after the first.
    assert estimate.seconds_left([job(50, 10.0)], [spec], 1) == pytest.approx(one + two)


def test_progress_is_written_now_and_then(tmp_path: Path) -> None:
    from benchmarks.train import Progress

    path = tmp_path / "progress.json"
    reporter = Reporter(path)
    for step in range(3):
        reporter(Progress(phase="training", step=step, steps=9, rate=1.0, loss=float("nan")))
    assert read_json(path) == {"phase": "training", "step": 0, "steps": 9, "rate": 1.0, "loss": None}
    reporter(Progress(phase="evaluating", step=9, steps=9, rate=1.0, loss=0.5))
    assert read_json(path)["phase"] == "evaluating"
    Reporter(tmp_path / "no" / "folder" / "progress.json")(
        Progress(phase="training", step=0, steps=9, rate=1.0, loss=0.5)
    )


def test_bars_take_all_that_happens(capsys: pytest.CaptureFixture[str]) -> None:
    display = BarDisplay()
    display.start(total=2, done=1)
    display.job_started("a")
    display.job_progress("a", {})
    for phase in ("training", "evaluating"):
        display.job_progress("a", {"step": 1, "steps": 4, "rate": 2.0, "phase": phase, "loss": 0.5})
    display.time_left(75.0)
    display.job_ended("a", {"status": FAILED, "error": "no [luck]", "stderr": ["why"]})
    display.stop()
    said = capsys.readouterr().out
    assert "FAILED: no [luck]" in said
    assert "1 min 15 s left" in said


def test_durations_and_outcomes_read_well() -> None:
    assert [duration(s) for s in (None, 0.4, 59.6, 95, 7260)] == [
        "?",
        "0 s",
        "1 min 00 s",
        "1 min 35 s",
        "2 h 01 min",
    ]
    record = {
        "status": FINISHED,
        "task_facts": {"headline": "accuracy"},
        "scores": {"accuracy": None},
        "seconds": {"training": 60.0, "evaluation": 5.0},
    }
    assert outcome("htm seed 0", record) == "htm seed 0: accuracy none after 1 min 05 s"
