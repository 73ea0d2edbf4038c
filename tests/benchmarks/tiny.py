"""The smallest model and the smallest streaming task for tests of the harness.

Worker processes find them by the names `TINY` and `STREAM`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.task import (
    AccuracyScorer,
    Batch,
    Scorer,
    Task,
    accuracies,
    accuracy_metrics,
    generator,
    one_hot_logits,
)
from memory_models.module import MemoryModule
from memory_models.state import Memory, memory_state

TINY = "tests.benchmarks.tiny:Tiny"
STREAM = "tests.benchmarks.tiny:Stream"


def comparison(out: Path, *options: str) -> list[str]:
    """The command, for a process of its own, that compares `TINY` on `STREAM` and writes to `out`."""
    what = ["compare", "--models", TINY, "--no-controls", "--task", STREAM, "--smoke", "--out", str(out)]
    return [sys.executable, "-m", "benchmarks.cli", *what, *options]


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    dim: int = 8
    segment_length: int = 16
    dropout: float = 0.1
    pause: float = 0.0
    """Seconds that each segment takes."""
    trouble: str = ""
    """What goes wrong in training: `nan`, `raise` or `die`."""


@memory_state
class TinyMemory(Memory):
    """The sum of all inputs before the open segment, and of those in it."""

    total: Tensor
    open: Tensor
    filled: Tensor

    @property
    def open_length(self) -> Tensor:
        return self.filled


class Tiny(MemoryModule[TinyMemory]):
    """Reads its input, the sum of all inputs up to it, and nothing else."""

    config_class: ClassVar[type] = TinyConfig
    differentiable_memory = True

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.mix = nn.Linear(2 * config.dim, config.dim)
        # A generator in the model, so that resuming has a random state to restore.
        self.dropout = nn.Dropout(config.dropout)

    def init_memory(self, batch_size: int) -> TinyMemory:
        zeros = self.mix.weight.new_zeros(batch_size, self.dim)
        return TinyMemory(total=zeros, open=zeros, filled=torch.zeros(batch_size, dtype=torch.int64))

    def read(self, x: Tensor, memory: TinyMemory, lengths: Tensor | None) -> tuple[Tensor, TinyMemory]:
        assert lengths is None
        if self.training:
            self._have_trouble()
        sums = x.cumsum(1) + (memory.total + memory.open)[:, None]
        y = x + self.dropout(torch.tanh(self.mix(torch.cat([x, sums / 10], -1))))
        if self.config.trouble == "nan" and self.training:
            y = y * float("nan")
        length = memory.filled + x.shape[1]
        return y, TinyMemory(total=memory.total, open=memory.open + x.sum(1), filled=length)

    def write(self, memory: TinyMemory) -> TinyMemory:
        fresh = self.init_memory(memory.batch_size)
        return TinyMemory(total=(memory.total + memory.open) * 0.9, open=fresh.open, filled=fresh.filled)

    def _have_trouble(self) -> None:
        time.sleep(self.config.pause)
        if self.config.trouble == "raise":
            raise RuntimeError("this model is broken on purpose")
        if self.config.trouble == "die":
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    symbols: int = 4
    segments: int = 6


class Stream(Task):
    """Each document repeats its first symbol's successor for ever; asked everywhere, streamed."""

    name = "stream"
    summary = "tiny streaming task of the tests"
    Config = StreamConfig
    streaming = True

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.vocab_size = self.config.symbols
        self.segment_length = 4
        self.groups = ("near", "far")
        self.metrics = accuracy_metrics(self.groups)
        self.headline = "mean accuracy"

    def batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        return self._segment(generator("stream", seed, step), batch_size, step % 3 == 0)

    def evaluation(self, *, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        for segment in range(self.config.segments):
            yield self._segment(generator("stream", "held out", segment), batch_size, segment % 3 == 0)

    def scorer(self) -> Scorer:
        return AccuracyScorer(self.groups, [1])

    def oracle(self, batch: Batch) -> Tensor:
        return one_hot_logits(batch.labels, self.vocab_size)

    def floor(self) -> dict[str, float]:
        return accuracies(self.groups, [1 / self.config.symbols] * 2, [1])

    def chance(self) -> dict[str, float]:
        return self.floor()

    def _segment(self, random: Any, rows: int, begins: bool) -> Batch:
        tokens = torch.from_numpy(random.integers(self.config.symbols, size=(rows, 4)))
        return Batch(
            tokens=tokens,
            labels=(tokens + 1) % self.config.symbols,
            groups=torch.full_like(tokens, 0 if begins else 1),
            reset=torch.full((rows,), begins),
        )
