"""Tasks whose batches are whole sequences, drawn afresh: all that such tasks share.

A task says how a batch is drawn, which of its score groups need a memory, and what can be reached without
one; splits, scorer and metrics follow from that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.task import (
    IGNORED,
    AccuracyScorer,
    Batch,
    Scorer,
    Task,
    accuracies,
    accuracy_metrics,
    generator,
)


class SequenceTask(Task):
    """Whole sequences of several segments, each with a fresh memory, scored by accuracy in groups.

    Its `Config` has a field `evaluation_sequences`. Subclasses set the sizes in `set_up` and draw in `draw`.
    """

    streaming = False
    headline = AccuracyScorer.headline
    floor_is = "best possible without memory (exact)"

    distant: Sequence[int]
    """Groups that cannot be answered from the segment itself; they make the mean and the worst accuracy."""

    def __init__(self, config: Any = None, *, cache: str | Path | None = None, **options: Any) -> None:
        super().__init__(config, cache=cache, **options)
        self.set_up()
        self.metrics = accuracy_metrics(self.groups)

    @abstractmethod
    def set_up(self) -> None:
        """Set `vocab_size`, `segment_length`, `groups` and `distant` from the configuration."""

    @abstractmethod
    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        """`rows` sequences."""

    @abstractmethod
    def without_memory(self) -> Sequence[float]:
        """For each group, the best accuracy that a model without memory can reach."""

    @abstractmethod
    def by_guessing(self) -> Sequence[float]:
        """For each group, the accuracy of blind guessing."""

    def batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        return self.draw(generator(self.name, "train", seed, step), batch_size)

    def evaluation(self, *, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        # Drawn as one, then cut, so that the set does not depend on the batch size.
        count = self.config.evaluation_sequences
        everything = self.draw(generator(self.name, "evaluation", seed), count)
        rows = min(batch_size, count)
        for start in range(0, count, rows):
            cut = slice(start, start + rows)
            yield Batch(
                tokens=everything.tokens[cut], labels=everything.labels[cut], groups=everything.groups[cut]
            )

    def scorer(self) -> Scorer:
        return AccuracyScorer(self.groups, self.distant)

    def floor(self) -> dict[str, float]:
        return accuracies(self.groups, self.without_memory(), self.distant)

    def chance(self) -> dict[str, float]:
        return accuracies(self.groups, self.by_guessing(), self.distant)


class Canvas:
    """Tokens, labels and groups under construction: nothing is asked where nothing was put.

    Args:
        shape: of the arrays, rows first; flattened to `[rows, time]` in the batch.
        filler: the token that stands where none was put.
    """

    def __init__(self, shape: tuple[int, ...], *, filler: int = 0) -> None:
        self.tokens = np.full(shape, filler)
        self.labels = np.full(shape, IGNORED)
        self.groups = np.full(shape, -1)

    def batch(self) -> Batch:
        """What was drawn."""
        rows = len(self.tokens)
        tokens, labels, groups = (
            torch.from_numpy(array.reshape(rows, -1)) for array in (self.tokens, self.labels, self.groups)
        )
        return Batch(tokens=tokens, labels=labels, groups=groups)


def require_positive(config: Any, *names: str) -> None:
    """Refuse a field below 1.

    Raises:
        ValueError: naming the first such field.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be at least 1")


def gap_names(count: int) -> tuple[str, ...]:
    """`gap 0` to `gap count - 1`."""
    return tuple(f"gap {gap}" for gap in range(count))


def answers_from(batch: Batch, answers: Mapping[tuple[int, int], int]) -> Tensor:
    """int64 `[batch, time]`: the answer at each `(row, place)`, -1 elsewhere."""
    found = torch.full_like(batch.tokens, -1)
    for (row, place), answer in answers.items():
        found[row, place] = answer
    return found
