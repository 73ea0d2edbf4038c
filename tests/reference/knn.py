"""A key/value memory as plain lists: what `memorizing.KNNMemory` must hold and find."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Pair:
    """One key with its value, and its number in order of arrival."""

    id: int
    key: list[float]
    value: list[float]


class ListMemory:
    """For each row the list of its pairs, oldest first, never longer than the capacity."""

    def __init__(self, capacity: int, rows: int, metric: str = "ip") -> None:
        self.capacity = capacity
        self.metric = metric
        self.rows: list[list[Pair]] = [[] for _ in range(rows)]
        self.next_id = [0] * rows

    def add(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Append pairs one by one; drop from the front whatever is too many."""
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            self.rows[row].append(Pair(self.next_id[row], key, value))
            self.next_id[row] += 1
            if len(self.rows[row]) > self.capacity:
                del self.rows[row][0]

    def clear(self, row: int) -> None:
        """Forget the row's pairs; ids go on."""
        self.rows[row] = []

    def score(self, query: list[float], key: list[float]) -> float:
        """Higher is nearer."""
        product = sum(q * k for q, k in zip(query, key, strict=True))
        if self.metric == "cosine":
            lengths = math.sqrt(sum(q * q for q in query)) * math.sqrt(sum(k * k for k in key))
            return product / lengths if lengths else 0.0
        if self.metric == "l2":
            return -sum((q - k) ** 2 for q, k in zip(query, key, strict=True))
        return product

    def nearest(self, row: int, query: list[float], k: int) -> list[tuple[float, Pair]]:
        """The best `k` with their scores, best first; fewer if fewer are held."""
        scored = [(self.score(query, pair.key), pair) for pair in self.rows[row]]
        return sorted(scored, key=lambda item: -item[0])[:k]
