"""Runs of a comparison on the workers of a Ray cluster, or of a Ray started here.

Each task of Ray starts the very worker process that a comparison on one machine starts, so the numbers, the
checkpoints and what is said of a failure are the same. The results folder must be seen by all machines. A run
is told to stop through a file in its folder, because a cancelled task of Ray could not say how it ended.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.compare import Launch, Process, launch_here

PLACES = ("local", "ray")
STOP = "stop"
_TERMINATE, _KILL = "terminate", "kill"
_POLL_SECONDS = 0.2
# What a shell says of a process that was killed; Ray only says that its worker is gone.
_LOST = -9


@contextmanager
def launcher(place: str, jobs: int) -> Iterator[Launch]:
    """What starts the workers of a comparison, as long as the block lasts.

    Args:
        place: `local` or `ray`. Ray is started here unless one runs already or `RAY_ADDRESS` names a cluster.
        jobs: processes at once; as many processors are given to a Ray that is started here.

    Raises:
        ValueError: if `place` is unknown.
        ImportError: if Ray is wished for and not installed.
    """
    if place not in PLACES:
        raise ValueError(f"place {place!r} is none of {', '.join(PLACES)}")
    if place == "local":
        yield launch_here
        return
    try:
        import ray
    except ImportError as error:
        raise ImportError("--on ray needs Ray: pip install 'memory-models[sweep]'") from error

    ours = not ray.is_initialized()
    if ours:
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    # One that died is a failed run, which the user shall see; the same command tries it again.
    remote = ray.remote(num_cpus=1, max_retries=0)(_work)

    def launch(arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Process:
        folder, identity, seconds = arguments
        stop = (Path(folder) / "runs" / identity / STOP).absolute()
        stop.unlink(missing_ok=True)
        absolute = [str(Path(folder).absolute()), identity, seconds]
        reference = remote.remote(
            absolute, dict(environment), os.path.abspath(log.name), str(stop), os.getcwd()
        )
        return RayProcess(reference, stop, log)

    try:
        yield launch
    finally:
        if ours:
            ray.shutdown()


class RayProcess:
    """A worker that a task of Ray looks after.

    Args:
        reference: of the task.
        stop: the file through which it is told to end.
        log: what the worker says; the last words of a task that was lost are added.
    """

    def __init__(self, reference: Any, stop: Path, log: IO[bytes]) -> None:
        self._reference = reference
        self._stop = stop
        self._log = log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it works."""
        import ray

        if self.returncode is None and ray.wait([self._reference], timeout=0)[0]:
            try:
                self.returncode = int(ray.get(self._reference))
            except ray.exceptions.RayError as error:
                self.returncode = _LOST
                with contextlib.suppress(OSError):
                    self._log.seek(0, os.SEEK_END)
                    self._log.write(f"the task of Ray was lost: {error}\n".encode())
                    self._log.flush()
            self._stop.unlink(missing_ok=True)
        return self.returncode

    def terminate(self) -> None:
        """Ask the worker to save itself and to end."""
        self._tell(_TERMINATE)

    def kill(self) -> None:
        """End the worker at once."""
        self._tell(_KILL)

    def _tell(self, what: str) -> None:
        try:
            self._stop.write_text(what)
        except OSError:
            # A full disk: without its task the worker saves itself as far as it can, and ends.
            import ray

            ray.cancel(self._reference, force=True)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the worker has ended.

        Raises:
            subprocess.TimeoutExpired: if that takes longer than `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the worker of a task of Ray", timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        return code


def _work(arguments: Sequence[str], environment: Mapping[str, str], log: str, stop: str, folder: str) -> int:
    """In a process of Ray: start the worker, hand on what it is told, and say how it ended."""
    results, identity, seconds = arguments
    with Path(log).open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", results, identity, str(os.getpid()), seconds],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, **environment},
            cwd=folder,
            start_new_session=True,
        )
        while process.poll() is None:
            with contextlib.suppress(OSError):
                told = Path(stop).read_text()
                Path(stop).unlink()
                (process.kill if told == _KILL else process.terminate)()
            time.sleep(_POLL_SECONDS)
    return process.returncode
