"""One run in a process of its own: `python -m benchmarks.worker FOLDER ID PARENT SECONDS`.

The comparison starts it; `FOLDER/runs/ID/spec.json` says what to do. It tells how far it is in
`progress.json` beside that file, saves itself every so many seconds and on SIGTERM, and ends when its
parent process is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import FINISHED, Results, RunBusyError, plain, read_json

PROGRESS = "progress.json"
PROGRESS_SECONDS = 0.5
BUSY_SECONDS = 30.0

# Exit codes that Python itself does not use, so that a crash is not taken for an answer.
EXIT_FINISHED = 0
EXIT_RECORDED_FAILURE = 20
EXIT_STOPPED = 21
EXIT_CANNOT_WRITE = 22
EXIT_BUSY = 23


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the run; returns one of the exit codes above."""
    folder, identity, parent, seconds = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from benchmarks.settings import RunSpec
    from benchmarks.train import CannotWriteError, run

    results = Results(folder)
    spec = RunSpec.from_json(read_json(results.run_folder(identity) / "spec.json"))
    with stop_on_signal() as caught:

        def stopped() -> bool:
            return caught() or os.getppid() != int(parent)

        try:
            wait_until_free(results, identity, stopped, seconds=BUSY_SECONDS)
            record = run(
                spec,
                results,
                stopped=stopped,
                progress=Reporter(results.run_folder(identity) / PROGRESS),
                checkpoint_seconds=float(seconds),
            )
        except CannotWriteError as error:
            print(error, file=sys.stderr)
            return EXIT_CANNOT_WRITE
        except RunBusyError:
            return EXIT_BUSY
    if record is None:
        return EXIT_STOPPED
    return EXIT_FINISHED if record["status"] == FINISHED else EXIT_RECORDED_FAILURE


def wait_until_free(
    results: Results, identity: str, stopped: Callable[[], bool], *, seconds: float = math.inf
) -> None:
    """Wait until no other process holds the run, or until `stopped` says true.

    Raises:
        RunBusyError: if that takes longer than `seconds`.
    """
    # A comparison that was killed leaves workers that need a moment to notice and to save themselves.
    deadline = time.monotonic() + seconds
    while not stopped():
        try:
            with results.claim(identity):
                return
        except RunBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside the block the first SIGINT or SIGTERM only makes the yielded function say true."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            # Somebody insists.
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Reporter:
    """Writes the progress to a file, now and then, for whoever watches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        self._phase = ""

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS and progress.phase == self._phase:
            return
        self._last, self._phase = now, progress.phase
        # Not worth a run's life: if it cannot be written, nobody watches.
        with contextlib.suppress(OSError):
            temporary = self._path.with_suffix(".part")
            temporary.write_text(json.dumps(plain(dataclasses.asdict(progress))))
            temporary.replace(self._path)


if __name__ == "__main__":
    sys.exit(main())
