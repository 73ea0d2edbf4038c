"""Runs on Ray: the same numbers as here, the same words of a failure."""

from __future__ import annotations

import functools
import inspect
import io
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks import commands, fanout
from benchmarks import compare as compare_module
from benchmarks.cli import main
from benchmarks.compare import compare, launch_here
from benchmarks.fanout import RayProcess, launcher
from benchmarks.progress import LineDisplay
from benchmarks.results import FAILED, FINISHED, Results
from benchmarks.settings import plan
from benchmarks.worker import EXIT_STOPPED
from tests.benchmarks.made_up import record, scores
from tests.benchmarks.tiny import STREAM, TINY


class PretendRay(ModuleType):
    """As much of Ray as is called here; a task is a thread, and `said` notes what was asked of it."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.runs = False

    def is_initialized(self) -> bool:
        return self.runs

    def init(self, **options: Any) -> None:
        self.said.append(("init", options))
        self.runs = True

    def shutdown(self) -> None:
        self.said.append(("shutdown", {}))
        self.runs = False

    def remote(self, **options: Any) -> Callable[..., Any]:
        assert self.runs
        self.said.append(("remote", options))
        return lambda function: SimpleNamespace(remote=functools.partial(self._begin, function))

    def _begin(self, *task: Any) -> Future[Any]:
        # A process of Ray gets a copy.
        function, *arguments = pickle.loads(pickle.dumps(task))
        reference: Future[Any] = Future()
        thread = threading.Thread(target=lambda: reference.set_result(function(*arguments)), daemon=True)
        thread.start()
        return reference

    def wait(self, object_refs: Sequence[Future[Any]], /, *, timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0
        done = [reference for reference in object_refs if reference.done()]
        return done, [reference for reference in object_refs if reference not in done]

    def get(self, object_refs: Future[Any], /) -> Any:
        return object_refs.result(timeout=0)

    def cancel(self, object_ref: Future[Any], /, *, force: bool) -> None:
        assert force
        object_ref.set_exception(self.exceptions.RayError("cancelled"))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> PretendRay:
    pretended = PretendRay()
    monkeypatch.setitem(sys.modules, "ray", pretended)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(fanout, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(compare_module, "POLL_SECONDS", 0.01)
    return pretended


FINISH = 'cat "$3/runs/$4/line" >> "$3/results.jsonl"'
DIE = "echo last words; kill -9 $$"
WORK_ON = "trap 'exit 21' TERM; echo ready; while :; do sleep 0.02; done"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Results, str, str], None]:
    """Lets a run's worker be a shell script, which takes the arguments of `python -m benchmarks.worker`."""
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\n[ "$2" = benchmarks.worker ] && . "$3/runs/$4/script"\n')
    shell.chmod(0o755)
    monkeypatch.setattr(fanout, "sys", SimpleNamespace(executable=str(shell)))

    def write(results: Results, identity: str, text: str) -> None:
        folder = results.run_folder(identity)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "script").write_text(text + "\n")

    return write


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="local, ray"), launcher("moon", 1):
        pass


def test_local_is_the_usual_way() -> None:
    with launcher("local", 1) as launch:
        assert launch is launch_here


def test_on_ray_every_run_is_a_task_of_ray(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray: PretendRay,
    script: Callable[[Results, str, str], None],
) -> None:
    # As a user says it: a folder that is not absolute.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "_report", lambda *_: None)
    results = Results(Path("out"))
    good, dying = (plan(TINY, STREAM, seed, smoke=True) for seed in (0, 1))
    script(results, good.id, FINISH)
    line = record(TINY, 0, scores(0.5), id=good.id)
    (results.run_folder(good.id) / "line").write_text(json.dumps(line) + "\n")
    script(results, dying.id, f'echo "threads $OMP_NUM_THREADS"; {DIE}')
    words = [
        "--models",
        TINY,
        "--no-controls",
        "--task",
        STREAM,
        "--smoke",
        "--seeds",
        "0",
        "1",
        "--jobs",
        "3",
        "--out",
        "out",
    ]
    assert main(["compare", *words, "--on", "ray"]) == 1
    found = results.latest()
    assert [found[spec.id]["status"] for spec in (good, dying)] == [FINISHED, FAILED]
    assert "SIGKILL" in found[dying.id]["error"]
    assert found[dying.id]["stderr"] == ["threads 1", "last words"]
    here = {"num_cpus": 3, "include_dashboard": False}
    assert ray.said == [
        ("init", {"log_to_driver": False, "logging_level": "ERROR", **here}),
        ("remote", {"num_cpus": 1, "max_retries": 0}),
        ("shutdown", {}),
    ]


def test_without_being_asked_nothing_runs_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def launch(arguments: Sequence[str], *_: Any) -> Any:
        folder, identity, _ = arguments
        started.append(identity)
        Results(folder).append(record(TINY, 0, scores(0.5), id=identity))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(fanout, "launch_here", launch)
    monkeypatch.setattr(commands, "_report", lambda *_: None)
    words = ["compare", "--models", TINY, "--no-controls", "--task", STREAM]
    words += ["--smoke", "--out", str(tmp_path)]
    assert main([*words, "--on", "ray"]) == 2
    assert "pip install 'memory-models[sweep]'" in capsys.readouterr().err
    assert not started
    assert main(words) == 0
    assert started == [plan(TINY, STREAM, 0, smoke=True).id]


def test_a_ray_that_runs_already_is_used_and_left_running(
    monkeypatch: pytest.MonkeyPatch, ray: PretendRay
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with launcher("ray", 2):
        pass
    # The address says how many processors there are.
    assert ray.said[0] == ("init", {"log_to_driver": False, "logging_level": "ERROR"})
    ray.said.clear()
    ray.init()
    with launcher("ray", 2):
        pass
    assert [call for call, _ in ray.said] == ["init", "remote"]


@pytest.mark.parametrize(("told", "code"), [("terminate", EXIT_STOPPED), ("kill", -9)])
def test_a_worker_on_ray_ends_as_it_is_told(
    tmp_path: Path, ray: PretendRay, script: Callable[[Results, str, str], None], told: str, code: int
) -> None:
    results = Results(tmp_path)
    script(results, "run", WORK_ON)
    stop = results.run_folder("run") / fanout.STOP
    # Left over from another time: this worker is not told by it.
    stop.write_text("kill")
    path = tmp_path / "log"
    with launcher("ray", 1) as launch, path.open("wb") as log:
        process = launch([str(tmp_path), "run", "20.0"], {}, log)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        while path.read_text() != "ready\n":
            assert process.poll() is None
        getattr(process, told)()
        assert process.wait(60) == process.returncode == code
    assert not stop.exists()


def test_a_task_that_ray_loses_is_a_killed_worker(tmp_path: Path, ray: PretendRay) -> None:
    path = tmp_path / "log"
    with path.open("wb") as log:
        # A disk that refuses, here a folder that is not there: the task itself is cancelled.
        process = RayProcess(Future(), tmp_path / "no" / "stop", log)
        assert process.poll() is None
        process.terminate()
        assert process.poll() == -9
    assert path.read_text() == "the task of Ray was lost: cancelled\n"


@pytest.mark.slow
def test_what_is_pretended_of_ray_is_so() -> None:
    real = pytest.importorskip("ray")
    assert issubclass(real.exceptions.RayError, Exception)
    given = {"init": ["num_cpus", "include_dashboard", "log_to_driver", "logging_level"]}
    for name in ("is_initialized", "init", "shutdown", "wait", "get", "cancel"):
        told = inspect.signature(getattr(PretendRay(), name)).parameters
        by_name = [key for key, parameter in told.items() if parameter.kind is parameter.KEYWORD_ONLY]
        known = inspect.signature(getattr(real, name)).parameters
        assert {*given.get(name, by_name)} <= {*known}, name
        # What is given by its place, ahead of what must be named.
        places = [parameter for parameter in known.values() if parameter.kind is not parameter.KEYWORD_ONLY]
        assert len(told) - len(by_name) <= len(places) or name == "init", name


@pytest.mark.slow
def test_ray_gives_the_same_numbers_and_the_same_words(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    good = plan(TINY, STREAM, 0, smoke=True)
    dying = plan(TINY, STREAM, 0, smoke=True, assignments=["trouble=die"])
    said = io.StringIO()
    found = {}
    for place in ("local", "ray"):
        results = Results(tmp_path / place)
        with launcher(place, 1) as launch:
            found[place] = compare([good, dying], results, jobs=1, display=LineDisplay(said), launch=launch)
    for here, there in zip(found["local"], found["ray"], strict=True):
        assert here["status"] == there["status"]
        assert here.get("scores") == there.get("scores")
        assert here.get("error") == there.get("error")
        assert here.get("stderr") == there.get("stderr")
    assert [record["status"] for record in found["ray"]] == [FINISHED, FAILED]
    assert found["ray"][1]["stderr"][-1] == "last words"
