"""What a run is called and where it is kept: run ids, `results.jsonl`, one folder for each run.

A results folder looks like this:

    results.jsonl            one line of JSON for each run that ended, in order; only ever appended to
    comparison.json          which runs the last comparison consists of
    sweep.json               which runs the last sweep consists of
    tuning.json              which runs only chose a learning rate
    comparison.lock          held by the comparison that is at work, and which it is; so sweep.lock
    runs/<id>/spec.json      everything that changes the numbers of the run
    runs/<id>/model          the trained model
    runs/<id>/checkpoint.pt  where to go on after an interruption
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Record = dict[str, Any]

FINISHED = "finished"
DIVERGED = "diverged"
FAILED = "failed"


class RunBusyError(RuntimeError):
    """Another process is at work on the same run."""


class FolderBusyError(RuntimeError):
    """Another command is at work in the folder."""


def run_id(description: Mapping[str, Any]) -> str:
    """Twelve hex digits that change with anything in `description`, and with nothing else."""
    text = json.dumps(plain(description), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain(value: Any) -> Any:
    """The same value in what JSON knows; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    return str(value)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` so that a reader, or a crash at any moment, sees the old content or the new.

    Raises:
        OSError: if it cannot be written; the old content then still stands.
    """
    # Here, because it loads torch, which looking at results does not need.
    from memory_models.files import replace_file

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: part.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(plain(value), indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


class Results:
    """A results folder. Several processes may append to it at once.

    Args:
        folder: made when something is first written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.lines = self.folder / "results.jsonl"
        self.comparison = self.folder / "comparison.json"
        self.sweep = self.folder / "sweep.json"
        self.tuning = self.folder / "tuning.json"

    def run_folder(self, identity: str) -> Path:
        """Where the run keeps its settings, its checkpoint and its log."""
        return self.folder / "runs" / identity

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and wait until the disk has it; mend a line that a crash left half written.

        Raises:
            OSError: if it cannot be written; the lines that were there stay as they were.
        """
        from memory_models.files import sync_folder

        line = json.dumps(plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        created = not self.lines.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lines.open("a+b") as file, _locked(file):
            end = _mend_last_line(file)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                # A full disk may have taken half of the line.
                with contextlib.suppress(OSError):
                    os.truncate(self.lines, end)
                raise
        if created:
            sync_folder(self.folder)

    def records(self) -> list[Record]:
        """All lines in order; a line that a crash cut short is left out."""
        try:
            data = self.lines.read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                logger.warning("%s line %d is not complete and is left out", self.lines, number)
                continue
            if isinstance(record, dict) and "id" in record:
                found.append(record)
        return found

    def latest(self) -> dict[str, Record]:
        """The last line of every run by its id; a finished line is never hidden by a later failure."""
        last: dict[str, Record] = {}
        for record in self.records():
            before = last.get(record["id"])
            if before is None or before.get("status") != FINISHED or record.get("status") == FINISHED:
                last[record["id"]] = record
        return last

    def is_finished(self, identity: str) -> bool:
        """Whether the run has a finished line."""
        return self.latest().get(identity, {}).get("status") == FINISHED

    def latest_attempt(self, identity: str) -> Record:
        """The last line of a run, whatever it says.

        Raises:
            LookupError: if there is none.
        """
        for record in reversed(self.records()):
            if record["id"] == identity:
                return record
        raise LookupError(f"{self.lines} has no line of run {identity}")

    @contextlib.contextmanager
    def claim(self, identity: str) -> Iterator[Path]:
        """Hold the run for this process and yield its folder. The claim ends with the process at the latest.

        Raises:
            RunBusyError: if a living process holds it.
        """
        folder = self.run_folder(identity)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a+b") as file:
            if not _try_lock(file):
                raise RunBusyError(f"run {identity} is being worked on by another process (see {folder})")
            try:
                yield folder
            finally:
                _unlock(file)

    @contextlib.contextmanager
    def hold(self, what: str, purpose: Any) -> Iterator[None]:
        """Hold the folder for a comparison or a sweep; those of one and the same purpose share it.

        Another one would replace the note of which runs belong to it. The hold ends with the process.

        Args:
            what: `comparison` or `sweep`; the two do not disturb each other.
            purpose: plain values that tell what is done.

        Raises:
            FolderBusyError: if a living process holds the folder for another purpose.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key = run_id({"purpose": purpose}).encode()
        path = self.folder / f"{what}.lock"
        deadline = time.monotonic() + _HOLD_SECONDS
        with path.open("a+b") as file:
            while not _share(file, key):
                # Not at the first refusal: one that is about to be refused itself holds it for a moment.
                if time.monotonic() > deadline:
                    raise FolderBusyError(
                        f"another {what} is at work in {self.folder}; give another folder (--out), or wait "
                        "until it has ended"
                    )
                time.sleep(0.05)
            try:
                yield
            finally:
                _unlock(file)


_HOLD_SECONDS = 2.0


def _share(file: Any, key: bytes) -> bool:
    """Whether the file now is held together with those that have written the same key, or alone."""
    if _try_lock(file):
        file.truncate(0)
        file.write(key)
        file.flush()
        # Not one step: somebody may come between, so what counts is what stands there afterwards.
        _unlock(file)
    if not _try_lock(file, shared=True):
        return False
    file.seek(0)
    if file.read() == key:
        return True
    _unlock(file)
    return False


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for `path`, which may be replaced or not exist.

    Raises:
        OSError: if the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a+b") as file, _locked(file):
        yield


def _mend_last_line(file: Any) -> int:
    """Leave the file ending in a newline; return its length in bytes."""
    file.seek(0)
    data = file.read()
    if not data or data.endswith(b"\n"):
        return len(data)
    start = data.rfind(b"\n") + 1
    try:
        json.loads(data[start:])
    except ValueError:
        logger.warning("%s: the last line was cut short and is taken out", file.name)
        file.truncate(start)
        return start
    file.write(b"\n")
    file.flush()
    return len(data) + 1


try:
    import fcntl
except ImportError:
    # Without fcntl there is no lock; one comparison at a time is then the user's care.
    def _try_lock(file: Any, *, shared: bool = False) -> bool:
        return True

    def _lock(file: Any) -> None: ...

    def _unlock(file: Any) -> None: ...

else:

    def _try_lock(file: Any, *, shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock(file: Any) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)

    def _unlock(file: Any) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _locked(file: Any) -> Iterator[None]:
    _lock(file)
    try:
        yield
    finally:
        _unlock(file)
