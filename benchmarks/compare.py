"""Several runs, a few at once, each in a process of its own; stopped at will, gone on with later."""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO, Any, Protocol

from benchmarks.progress import Display
from benchmarks.results import FAILED, FINISHED, Record, Results, read_json, write_json
from benchmarks.settings import RunSpec, relative_cost
from benchmarks.train import CannotWriteError, heading
from benchmarks.worker import (
    EXIT_BUSY,
    EXIT_CANNOT_WRITE,
    EXIT_FINISHED,
    EXIT_RECORDED_FAILURE,
    EXIT_STOPPED,
    PROGRESS,
)

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20.0
LOG = "stderr.log"
# What the evaluation takes, as a share of the training, before any run has told.
EVALUATION_SHARE = 0.15

# glibc hands large blocks back to the system at every step and asks for them anew; keeping them took 4 to 9 %
# off the processor time of `text`. Other systems ignore the names.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**28),
}


class InterruptedComparison(Exception):
    """The user stopped the comparison; finished runs are kept, the others have saved themselves."""


class Process(Protocol):
    """A worker at work, here or elsewhere; as `subprocess.Popen`."""

    @property
    def returncode(self) -> int | Any:
        """How it ended: an exit code, or minus the number of the signal that killed it."""

    def poll(self) -> int | None:
        """The exit code, or None while it works."""

    def terminate(self) -> None:
        """Ask it to save itself and to end."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; raises `subprocess.TimeoutExpired`."""


Launch = Callable[[Sequence[str], Mapping[str, str], IO[bytes]], Process]
"""Starts a worker, given its arguments FOLDER, ID and SECONDS, variables of the environment, and a file for
what it says."""


def launch_here(arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Process:
    """A worker on this machine."""
    folder, identity, seconds = arguments
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", folder, identity, str(os.getpid()), seconds],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, **environment},
        # A terminal sends Ctrl-C to everybody; the workers shall hear it from us only.
        start_new_session=True,
    )


@dataclass
class Job:
    """A run and the process that does it."""

    spec: RunSpec
    process: Process
    log: IO[bytes]
    started: float = field(default_factory=time.monotonic)
    progress: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def title(self) -> str:
        """Name for a progress bar."""
        return self.name or f"{self.spec.label} seed {self.spec.seed}"

    def seconds_left(self) -> float | None:
        """A guess from the speed so far; None before it is known."""
        rate = self.progress.get("rate")
        if not rate or not self.progress.get("step"):
            return None
        whole = self.progress["steps"] / rate
        left = (self.progress["steps"] - self.progress["step"]) / rate
        return left + whole * EVALUATION_SHARE * (1.0 if self.progress.get("phase") == "training" else 0.5)


def compare(
    specs: Sequence[RunSpec],
    results: Results,
    *,
    jobs: int,
    display: Display,
    checkpoint_seconds: float = 20.0,
    names: Mapping[str, str] = MappingProxyType({}),
    launch: Launch = launch_here,
) -> list[Record]:
    """Do all runs that are not finished, the longest first.

    A run that another process is at work on is waited for after the others, as long as that process lives.

    Args:
        specs: what to run; a run whose id has a finished line is skipped.
        results: where to keep it.
        jobs: processes at once.
        display: told of everything that happens.
        checkpoint_seconds: how much work an interruption may cost.
        names: by run id, what to call a run where model and seed do not tell it from the others.
        launch: starts the worker of a run.

    Returns:
        The last line of every run, in the order of `specs`.

    Raises:
        InterruptedComparison: after Ctrl-C or SIGTERM, once all workers have saved themselves.
        CannotWriteError: if a worker met a disk that refuses; the other workers are stopped first.
        ValueError: if `jobs` is less than 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs ({jobs}) must be at least 1")
    before = results.latest()
    # Rows of a table may share a run.
    distinct = list({spec.id: spec for spec in specs}.values())
    done = [spec for spec in distinct if before.get(spec.id, {}).get("status") == FINISHED]
    waiting = sorted((spec for spec in distinct if spec not in done), key=relative_cost, reverse=True)
    display.start(total=len(distinct), done=len(done))
    estimate = _Estimate([before[spec.id] for spec in done])
    running: list[Job] = []
    busy: set[str] = set()
    with _sigterm_as_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    job = _start(waiting.pop(0), results, checkpoint_seconds, launch)
                    job.name = names.get(job.spec.id, "")
                    running.append(job)
                    if job.spec.id not in busy:
                        display.job_started(job.title)
                time.sleep(POLL_SECONDS)
                for job in list(running):
                    job.progress = read_json(_folder(results, job) / PROGRESS) or job.progress
                    if job.process.poll() is None:
                        display.job_progress(job.title, job.progress)
                        continue
                    running.remove(job)
                    if job.process.returncode == EXIT_BUSY:
                        job.log.close()
                        busy.add(job.spec.id)
                        waiting.append(job.spec)
                        display.job_waiting(job.title)
                        continue
                    record = _finish(job, results)
                    estimate.learn(record)
                    display.job_ended(job.title, record)
                display.time_left(estimate.seconds_left(running, waiting, jobs))
        except BaseException as error:
            _stop(running)
            if isinstance(error, KeyboardInterrupt):
                raise InterruptedComparison from None
            raise
        finally:
            display.stop()
    after = results.latest()
    return [after[spec.id] for spec in specs]


def write_comparison(
    specs: Sequence[RunSpec],
    results: Results,
    command: str,
    *,
    match: Mapping[str, Any] | None = None,
    tuning: Mapping[str, Any] | None = None,
    longer: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Note which runs belong together, and on what terms, for the report."""
    runs = [{"id": spec.id, "model": spec.label, "seed": spec.seed} for spec in specs]
    write_json(
        results.comparison,
        {
            "task": specs[0].task,
            "command": command,
            "runs": runs,
            "match": match,
            "tuning": tuning,
            "longer": list(longer),
        },
    )


def _start(spec: RunSpec, results: Results, checkpoint_seconds: float, launch: Launch) -> Job:
    folder = results.run_folder(spec.id)
    try:
        write_json(folder / "spec.json", spec.to_json())
        (folder / PROGRESS).unlink(missing_ok=True)
        log = (folder / LOG).open("wb")
    except OSError as error:
        raise CannotWriteError(f"cannot write {folder}: {error.strerror or error}") from error
    threads = str(spec.train.threads)
    # What the user has set of the allocator's variables stands.
    allocator = {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}
    environment = {**allocator, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    process = launch([str(results.folder), spec.id, str(checkpoint_seconds)], environment, log)
    return Job(spec=spec, process=process, log=log)


def _finish(job: Job, results: Results) -> Record:
    job.log.close()
    code = job.process.returncode
    if code in (EXIT_FINISHED, EXIT_RECORDED_FAILURE):
        return results.latest_attempt(job.spec.id)
    tail = (_folder(results, job) / LOG).read_text(errors="replace").splitlines()[-15:]
    if code == EXIT_CANNOT_WRITE:
        raise CannotWriteError("\n".join(tail) or f"run {job.spec.id} could not write its results")
    if code == EXIT_STOPPED:
        reason = "the worker was told to stop by somebody else"
    elif code < 0:
        reason = f"the worker was killed by signal {-code} ({signal.Signals(-code).name})"
        if -code == getattr(signal, "SIGKILL", None):
            reason += "; perhaps there was not enough memory"
    else:
        reason = f"the worker ended with exit code {code}"
    record = {**heading(job.spec), "status": FAILED, "error": reason, "stderr": tail}
    try:
        results.append(record)
    except OSError as error:
        raise CannotWriteError(f"cannot write {results.lines}: {error.strerror or error}") from error
    return record


def _stop(running: Sequence[Job]) -> None:
    for job in running:
        if job.process.poll() is None:
            job.process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for job in running:
        try:
            job.process.wait(max(deadline - time.monotonic(), 0.01))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            # It goes on from its last checkpoint all the same.
            job.process.kill()
            job.process.wait()
        job.log.close()


def _folder(results: Results, job: Job) -> Any:
    return results.run_folder(job.spec.id)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Estimate:
    """Guesses the time left from the runs that ended and from those under way."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._seconds: dict[str, float] = {}
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        seconds = record.get("seconds", {})
        if record.get("status") == FINISHED:
            self._seconds[record["model"]] = seconds["training"] + seconds["evaluation"]

    def seconds_left(self, running: Sequence[Job], waiting: Sequence[RunSpec], jobs: int) -> float | None:
        if not running and not waiting:
            return 0.0
        # Seconds for one unit of `relative_cost`, as the runs under way show it.
        scales = []
        now = []
        for job in running:
            left = job.seconds_left()
            if left is not None:
                now.append(left)
                whole = job.progress["steps"] / job.progress["rate"] * (1 + EVALUATION_SHARE)
                scales.append(whole / relative_cost(job.spec))
        if len(now) < len(running) or (not scales and waiting):
            return None
        scale = sum(scales) / max(len(scales), 1)
        free = now + [0.0] * (jobs - len(now))
        heapq.heapify(free)
        for spec in waiting:
            seconds = self._seconds.get(spec.model, relative_cost(spec) * scale)
            heapq.heappush(free, heapq.heappop(free) + seconds)
        return max(free)
