"""One side of a measurement, in a process of its own: prepare a step, time it, weigh it.

The same script serves both sides. For the published packages it is started by the Python of another
environment, where this project does not exist, so it imports nothing but the standard library and torch,
and loads the file with the case by its path. It is spoken to by lines of JSON: a request such as
`{"do": "run", "calls": 3}` on standard input, and `{"ok": ...}` or `{"error": "..."}` on what was
standard output (whatever a package prints goes to standard error instead).

A case file offers `ours(settings, weights)` and `theirs(settings, weights)`: both return an object with

* `step(index)`: the work to be timed, on the input number `index`;
* `warm_up()`: the same code on a tiny input, so that what is loaded once is not counted as the step's;
* `results()`: name -> tensor, what both sides must agree on (of a search: `found` and `best`, see `Case`).

`weights` is the path of a file that `theirs` writes and `ours` reads.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")


class Worker:
    """What a request may ask for: each public method is one `do`."""

    def __init__(self) -> None:
        self._side: Any = None
        self._index = 0

    def versions(self, packages: list[str]) -> dict[str, str | None]:
        """Versions of Python, torch and `packages` here; None for one that is not installed."""
        found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
        for package in packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = None
        return found

    def prepare(self, file: str, side: str, settings: dict[str, Any], weights: str, threads: int) -> None:
        """Build the case's side: modules, weights and inputs, and run it once on something tiny."""
        torch.set_num_threads(threads)
        spec = importlib.util.spec_from_file_location("speed_case", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load the case file {file}")
        module = importlib.util.module_from_spec(spec)
        # dataclasses and typing look their module up by name.
        sys.modules["speed_case"] = module
        spec.loader.exec_module(module)
        self._side = getattr(module, side)(settings, weights)
        self._side.warm_up()

    def threads(self, count: int) -> int:
        """Use `count` threads from now on."""
        torch.set_num_threads(count)
        return torch.get_num_threads()

    def cpu_seconds(self) -> float:
        """CPU seconds that this process has used so far."""
        return time.process_time()

    def run(self, calls: int) -> dict[str, float]:
        """Time `calls` steps: seconds of wall time and of CPU time of the whole process, per step."""
        enabled = gc.isenabled()
        gc.disable()
        try:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                self._side.step(self._index)
                self._index += 1
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        finally:
            if enabled:
                gc.enable()
        return {"wall": wall / calls, "cpu": cpu / calls}

    def longest(self, calls: int) -> dict[str, float]:
        """Seconds of the longest of `calls` steps, by wall time and by CPU time of the whole process."""
        longest = {"wall": 0.0, "cpu": 0.0}
        for _ in range(calls):
            for clock, taken in self.run(1).items():
                longest[clock] = max(longest[clock], taken)
        return longest

    def peak(self) -> dict[str, Any]:
        """Bytes by which steps lift the resident memory above what is there after set-up."""

        def steps() -> None:
            # Two: what the allocator keeps of the first may come on top of the second.
            for index in range(2):
                self._side.step(index)

        gc.collect()
        return extra_peak(steps)

    def results(self, path: str) -> list[str]:
        """Write what both sides must agree on to `path`; the names come back."""
        tensors = {name: tensor.detach().clone() for name, tensor in self._side.results().items()}
        torch.save(tensors, path)
        return sorted(tensors)


def extra_peak(step: Callable[[], object]) -> dict[str, Any]:
    """Peak resident bytes during `step` minus the resident bytes before it, and how that was seen.

    On Linux the kernel's own high-water mark is reset and read. Where that is not allowed a thread
    samples, and on other systems the growth of the process's life-long maximum is all there is; a step
    that stays below an earlier peak then counts as nothing, which `method` lets the reader know.
    """
    _trim()
    if _reset_high_water():
        before = _status_bytes("VmRSS")
        result = step()
        peak, method = _status_bytes("VmHWM"), "high-water mark"
    elif _STATM.exists():
        before = _resident()
        samples: list[int] = []
        done = threading.Event()
        sampler = threading.Thread(target=_sample, args=(samples, done), daemon=True)
        sampler.start()
        try:
            result = step()
            samples.append(_resident())
        finally:
            done.set()
            sampler.join()
        peak, method = max(samples), "sampled"
    else:
        before = _life_maximum()
        result = step()
        peak, method = _life_maximum(), "life-long maximum"
    del result
    return {"bytes": max(peak - before, 0), "method": method}


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        # Some sandboxes accept the write and do nothing, or show no VmHWM.
        return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + (1 << 20)
    except (OSError, KeyError):
        return False


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _sample(samples: list[int], done: threading.Event) -> None:
    while not done.is_set():
        samples.append(_resident())
        time.sleep(0.0005)


def _life_maximum() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def _trim() -> None:
    # Freed blocks that the allocator keeps would be used by the step unseen.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            name = request.pop("do")
            if name.startswith("_") or not hasattr(Worker, name):
                raise ValueError(f"unknown request {name!r}")
            answer: dict[str, Any] = {"ok": getattr(worker, name)(**request)}
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            answer = {"error": message, "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
