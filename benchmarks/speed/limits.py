"""The physical limit: what this machine multiplies and moves in a second, seen in the same run.

No version of a step can be quicker than its operations at the speed of a plain matrix product, nor than its
bytes at the speed at which memory of that extent is read. The larger of the two is the limit; how near a
version comes to it says what is left to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.speed import Work

_PRODUCT = 1024
"""Rows and columns of the matrices whose product sets the limit."""
_SMALLEST = 1 << 16
_LARGEST = 1 << 28


@dataclass(kw_only=True)
class Limits:
    """Rates of this machine with some number of threads; the bandwidths are measured when first asked for."""

    threads: int
    operations_per_second: float
    """Of a float32 matrix product."""
    copy_bytes_per_second: float
    """Of a copy far larger than the caches, bytes read and bytes written both counted."""
    _read: dict[int, float] = field(default_factory=dict)

    def read_bytes_per_second(self, size: float) -> float:
        """Bytes read in a second when `size` bytes are read again and again: small ones come from a cache."""
        rounded = 1 << (max(_SMALLEST, min(_LARGEST, int(size))) - 1).bit_length()
        if rounded not in self._read:
            self._read[rounded] = read_bandwidth(rounded, threads=self.threads)
        return self._read[rounded]

    def seconds(self, work: Work) -> float:
        """The least time in which `work` can be done."""
        return max(
            work.operations / self.operations_per_second,
            work.bytes / self.read_bytes_per_second(work.bytes),
        )

    def bound_by(self, work: Work) -> str:
        """`"arithmetic"` or `"memory"`, whichever takes longer."""
        arithmetic = work.operations / self.operations_per_second
        return "arithmetic" if arithmetic == self.seconds(work) else "memory"


def measure_limits(*, threads: int, seconds: float = 0.5) -> Limits:
    """Measure what `threads` threads multiply and copy; about `3 * seconds` long."""
    return Limits(
        threads=threads,
        operations_per_second=matmul_rate(threads=threads, seconds=2 * seconds),
        copy_bytes_per_second=copy_bandwidth(threads=threads, seconds=seconds),
    )


class MatrixProduct:
    """A square float32 matrix product as a side that takes its turn with others; see `measure.Side`.

    The machine's speed changes while a case is timed, above all where others use it too: a limit that was
    measured before says little then, one that was measured in turn does.
    """

    operations = 2.0 * _PRODUCT**3
    """In one product."""

    def __init__(self, *, threads: int) -> None:
        self.threads = threads
        self._factors = torch.randn(2, _PRODUCT, _PRODUCT)
        self._out = torch.empty(_PRODUCT, _PRODUCT)

    def ask(self, do: str, **arguments: Any) -> dict[str, float]:
        """`"run"`: seconds of wall time and CPU time of a product, the mean of `calls`."""
        if do != "run":
            raise ValueError(f"a matrix product can only be run, not {do!r}")
        calls: int = arguments["calls"]
        with _threads(self.threads), torch.no_grad():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                torch.mm(*self._factors, out=self._out)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall / calls, "cpu": cpu / calls}


def matmul_rate(*, threads: int, size: int = _PRODUCT, seconds: float = 1.0) -> float:
    """Operations in a second of a square float32 matrix product of `size`, the best of many."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), threads=threads, seconds=seconds)


def copy_bandwidth(*, threads: int, size: int = _LARGEST, seconds: float = 0.5) -> float:
    """Bytes in a second, read and written ones counted, of a copy of `size` bytes, the best of many."""
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    return 2 * size / _best(lambda: target.copy_(source), threads=threads, seconds=seconds)


def read_bandwidth(size: int, *, threads: int, seconds: float = 0.3) -> float:
    """Bytes in a second of reading `size` bytes over and over, as a sum or a matrix-vector product does."""
    width = 512
    data = torch.ones(size // 4 // width, width)
    vector, out = torch.ones(width), torch.empty(data.shape[0])
    steps: tuple[Callable[[], object], ...] = (data.sum, lambda: torch.mv(data, vector, out=out))
    return max(size / _best(step, threads=threads, seconds=seconds / 2) for step in steps)


def _best(step: Callable[[], object], *, threads: int, seconds: float) -> float:
    """Seconds of the quickest step within `seconds`: CPU time of one thread, wall time of several."""
    clock = time.process_time if threads == 1 else time.perf_counter
    quickest = float("inf")
    with _threads(threads), torch.no_grad():
        step()
        end = time.monotonic() + seconds
        while True:
            # One process alone: what others do to the machine falls out with the quickest.
            start = clock()
            step()
            quickest = min(quickest, clock() - start)
            if time.monotonic() > end:
                return max(quickest, 1e-9)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
