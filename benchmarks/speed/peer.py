"""Drives a worker process: ours in this environment, the published package's in the other one."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("peer_worker.py")
ROOT = Path(__file__).resolve().parents[2]


class PeersMissingError(RuntimeError):
    """The environment with the published packages is not there."""


class WorkerError(RuntimeError):
    """A worker answered with an error, went silent, or ended."""


def find_python(peers: Path) -> Path:
    """The Python of the environment `peers`, sought below the working directory and below the checkout.

    Raises:
        PeersMissingError: if there is none.
    """
    for folder in dict.fromkeys((peers, ROOT / peers)):
        for name in ("bin/python", "Scripts/python.exe"):
            if (folder / name).exists():
                # Not resolved: the link's own place is what makes it the environment's Python.
                return (folder / name).absolute()
    raise PeersMissingError(
        f"the published packages are not installed: no Python at {peers}/bin/python. "
        "Run `make peers` once (it builds that environment), or name another one with --peers"
    )


class Process:
    """A worker and the pipe to it; use it in a `with` statement, which ends the process.

    Args:
        python: the interpreter to run it with; None means this one, with this project importable.
        timeout: seconds to wait for an answer before the worker is given up.
    """

    def __init__(self, python: Path | None = None, *, timeout: float = 600.0) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = dict(os.environ)
        if python is None:
            # -P: the folder of the script must not be searched for modules.
            command = [sys.executable, "-P", str(WORKER)]
            paths = [str(ROOT), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        else:
            # -I: neither the checkout (whose `memformer` has the name of a published one) nor PYTHONPATH.
            command = [str(python), "-I", str(WORKER)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
        )
        self._buffer = b""

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer.

        Raises:
            WorkerError: if the worker reports an error, ends, or takes longer than `timeout`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            raise WorkerError(self._ended(do)) from None
        answer = json.loads(self._line(do))
        if "error" in answer:
            raise WorkerError(f"{do}: {answer['error']}\n{answer.get('traceback', '')}".rstrip())
        return answer["ok"]

    def close(self) -> None:
        """End the process; asking again is an error."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # It may be in the middle of a step of minutes.
            self._process.kill()
        self.close()

    def _line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise WorkerError(f"{do}: no answer within {self.timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise WorkerError(self._ended(do))
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self, do: str) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace")[-2000:].strip()
        return f"{do}: the worker ended with code {code}" + (f":\n{tail}" if tail else "")
