"""The engine that chooses: exact while a row is small, Faiss above, as long as the recall holds."""

from __future__ import annotations

from typing import Any

from memorizing.knn.faiss_engine import FaissOptions, FaissRow, Read
from memorizing.knn.ring import Change


class AutoRow(FaissRow):
    """Exact below a crossover; above it inverted lists, as long as live queries are answered well enough.

    When the index is new, and after each quarter of the row has been replaced, up to 64 of the queries asked
    are also answered exactly. If the recall is short of the target, twice as many lists are read; if that
    would be more than an eighth of them all, the row returns to the exact search, until it has been
    replaced once (then twice, four times, …).

    Attributes:
        recall: what the last probe measured, or None.
        rest: pairs yet to arrive before the index is tried again.
    """

    def __init__(self, dim: int, metric: str, options: FaissOptions) -> None:
        super().__init__("ivf", dim, metric, options)
        self._fresh()

    def _fresh(self) -> None:
        self.recall = None
        self.rest = 0
        self.failures = 0
        self.arrived = 0
        self.probe_at = 0

    @property
    def train_from(self) -> int:
        """Pairs from which this row uses an index."""
        return self.options.crossover

    def reset(self) -> None:
        super().reset()
        self._fresh()

    def update(self, change: Change, count: int, read: Read) -> None:
        arrived = sum(map(len, change.added))
        self.rest -= min(self.rest, arrived)
        self.arrived += arrived
        if self.rest == 0:
            super().update(change, count, read)

    def build(self, count: int, read: Read) -> None:
        super().build(count, read)
        self.probe_at = self.arrived

    def due(self) -> bool:
        """Whether the next queries should be used to measure the recall."""
        return self.index is not None and self.arrived >= self.probe_at

    def judge(self, recall: float, count: int) -> bool:
        """Take in a measured recall; true if the number of lists read has been raised: measure again."""
        assert self.probes is not None
        assert self.lists is not None
        self.recall = recall
        if recall >= self.options.target_recall:
            self.probe_at = self.arrived + max(1, count // 4)
            return False
        if 2 * self.probes <= max(self.lists // 8, 1):
            self.set_probes(2 * self.probes)
            return True
        self.index, self.empty, self.trained_on = None, None, 0
        self.rest = count << self.failures
        self.failures += 1
        return False

    def state(self) -> dict[str, Any]:
        own = ("recall", "rest", "failures", "arrived", "probe_at")
        return super().state() | {name: getattr(self, name) for name in own}

    def restore(self, state: dict[str, Any], count: int, read: Read) -> None:
        super().restore(state, count, read)
        for name in ("recall", "rest", "failures", "arrived", "probe_at"):
            setattr(self, name, state[name])
