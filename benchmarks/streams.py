"""Which segment of which document each row of a streaming task reads, step by step."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.task import generator


class Place(NamedTuple):
    """What one row reads in one step."""

    document: int
    """Number of the document; -1: nothing, the row is done."""
    segment: int
    """Number of the segment within the document."""
    reset: bool
    """Whether the memory is reset before it."""


NOTHING = Place(-1, 0, False)


class ReadingOrder:
    """Endless streams for training: a pure function of (name, seed, rows, row, step).

    The documents of an epoch, in an order drawn afresh, are dealt one by one to the row that has least to
    read so far, so every document is read once in each epoch. A row starts at a random segment of its first
    document, so that rows do not start documents in step.

    Args:
        segments: int `[documents]`, segments of each document, each at least 1.
        name: of the task.
        seed: of the run.
        rows: streams.
    """

    def __init__(self, segments: NDArray[np.int64], *, name: str, seed: int, rows: int) -> None:
        self._segments = segments
        self._random = (name, "train", seed)
        self._epoch = 0
        self._load = [(0, row) for row in range(rows)]
        self._documents: list[list[int]] = [[] for _ in range(rows)]
        self._starts: list[list[int]] = [[] for _ in range(rows)]
        self._deal_until(1)
        first = segments[[documents[0] for documents in self._documents]]
        self._offset = generator(*self._random, "offset").integers(first).tolist()

    def find(self, row: int, step: int) -> Place:
        """What `row` reads at `step`."""
        at = step + self._offset[row]
        self._deal_until(at + 1)
        index = bisect_right(self._starts[row], at) - 1
        segment = at - self._starts[row][index]
        return Place(self._documents[row][index], segment, segment == 0 or step == 0)

    def _deal_until(self, needed: int) -> None:
        """Deal whole epochs until every row has so many segments."""
        while self._load[0][0] < needed:
            order = generator(*self._random, "epoch", self._epoch).permutation(len(self._segments))
            for document in order.tolist():
                length, row = heapq.heappop(self._load)
                self._documents[row].append(document)
                self._starts[row].append(length)
                heapq.heappush(self._load, (length + int(self._segments[document]), row))
            self._epoch += 1


def deal(segments: NDArray[np.int64], *, rows: int) -> Iterator[list[Place]]:
    """Every document once, from its start, for evaluation: longest first, to the row that has least to read.

    Args:
        segments: int `[documents]`, segments of each document.
        rows: streams, at most as many as documents.

    Yields:
        For each step a place for each row; rows that are done read `NOTHING`.
    """
    load = [(0, row) for row in range(rows)]
    shares: list[list[Place]] = [[] for _ in range(rows)]
    for document in np.argsort(-segments, kind="stable").tolist():
        length, row = heapq.heappop(load)
        count = int(segments[document])
        shares[row] += [Place(document, segment, segment == 0) for segment in range(count)]
        heapq.heappush(load, (length + count, row))
    for step in range(max(len(share) for share in shares)):
        yield [share[step] if step < len(share) else NOTHING for share in shares]
