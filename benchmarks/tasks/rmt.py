"""`rmt-copy` and `rmt-reverse`: the synthetic tasks of the Recurrent Memory Transformer, for its tables.

Bulatov et al. (arXiv:2207.06881), §4.1 and their released settings: a random sequence X, then a start token
and the answer, X twice (copy) or X backwards (reverse), cut into equal segments. The answer is given to the
model as it goes (teacher forcing); only its tokens are scored. A symbol's gap is the number of segments
back to where it last stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.sequences import Canvas, SequenceTask, require_positive
from benchmarks.task import Batch, one_hot_logits


@dataclass(frozen=True, kw_only=True)
class RMTConfig:
    """The sizes of `rmt-copy`; the defaults are one of the paper's short runs, 3 segments of 24."""

    length: int = 24
    """Symbols of X."""
    segments: int = 3
    """Segments that X and the answer are cut into."""
    symbols: int = 10
    """Different symbols."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set (20,000 in the paper)."""

    def __post_init__(self) -> None:
        require_positive(self, "length", "evaluation_sequences")
        if self.segments < 2:
            raise ValueError(f"segments ({self.segments}) must be at least 2, or there is nothing to carry")
        if self.symbols < 2:
            raise ValueError(
                f"symbols ({self.symbols}) must be at least 2, or there is nothing to tell apart"
            )


@dataclass(frozen=True, kw_only=True)
class RMTReverseConfig(RMTConfig):
    """The sizes of `rmt-reverse`; the defaults are one of the paper's short runs, 4 segments of 12."""

    segments: int = 4
    """Segments that X and the answer are cut into."""


class RMTCopy(SequenceTask):
    """X, then X twice.

    Token ids: the symbols, then the start token. Labels are the symbols' token ids.
    """

    name = "rmt-copy"
    summary = "the copy task of the Recurrent Memory Transformer, by gap in segments"
    Config = RMTConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType({"length": 12, "evaluation_sequences": 64})
    order: ClassVar[tuple[int, ...]] = (1, 1)
    """The answer: X forwards (1) or backwards (-1), as often as stated."""

    config: RMTConfig

    def set_up(self) -> None:
        c = self.config
        time = c.length * (1 + len(self.order))
        if time % c.segments:
            raise ValueError(f"{time} tokens cannot be cut into {c.segments} equal segments")
        self.vocab_size = c.symbols + 1
        self.segment_length = time // c.segments
        forwards = np.arange(c.length)
        self._source = np.concatenate([forwards[::step] for step in self.order])
        # The place of each symbol of X when it was last given, X itself or an answer before.
        gaps, last = [], forwards.copy()
        for index, source in enumerate(self._source):
            place = c.length + index
            gaps.append(place // self.segment_length - last[source] // self.segment_length)
            last[source] = place + 1
        found = sorted(set(gaps))
        self.groups = tuple(f"gap {gap}" for gap in found)
        self._group = np.array([found.index(gap) for gap in gaps])
        self._gaps = found
        self.distant = [index for index, gap in enumerate(found) if gap]
        if not self.distant:
            raise ValueError(f"segments ({c.segments}) leave X within reach of all answers; take more")

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        canvas = Canvas((rows, c.segments * self.segment_length))
        symbols = random.integers(c.symbols, size=(rows, c.length))
        answer = symbols[:, self._source]
        canvas.tokens[:, : c.length] = symbols
        canvas.tokens[:, c.length] = c.symbols
        canvas.tokens[:, c.length + 1 :] = answer[:, :-1]
        canvas.labels[:, c.length :] = answer
        canvas.groups[:, c.length :] = self._group
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: X as it stands at the start."""
        answers = torch.full_like(batch.tokens, -1)
        answers[:, self.config.length :] = batch.tokens[:, torch.from_numpy(self._source)]
        return one_hot_logits(answers, self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `symbols` beyond: symbols are independent of each other."""
        return [1 / self.config.symbols if gap else 1.0 for gap in self._gaps]

    def by_guessing(self) -> Sequence[float]:
        """One in `symbols`, everywhere."""
        return [1 / self.config.symbols] * len(self.groups)


class RMTReverse(RMTCopy):
    """X, then X backwards."""

    name = "rmt-reverse"
    summary = "the reverse task of the Recurrent Memory Transformer, by gap in segments"
    Config = RMTReverseConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"length": 12, "segments": 4, "evaluation_sequences": 64}
    )
    order = (-1,)
