"""`needle`: one pass-key in a long stretch of filler, asked for at the end of every segment after it.

Some digits behind a marker lie at a random place of a random segment (after the passkey test of Mohtashami
and Jaggi, arXiv:2305.16300). Every segment ends with the questions "digit 1?", "digit 2?", ...; they are
scored from the needle's own segment (gap 0) on. Before it there is nothing to answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from benchmarks.sequences import Canvas, SequenceTask, answers_from, gap_names, require_positive
from benchmarks.task import Batch, one_hot_logits


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """The sizes of `needle`."""

    segments: int = 6
    """Segments in a sequence."""
    segment_length: int = 24
    """Tokens of a segment, the questions at its end included."""
    length: int = 5
    """Digits of the needle."""
    digits: int = 10
    """Different digits, drawn with replacement."""
    filler: int = 16
    """Different tokens of filler, drawn with replacement."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set."""

    def __post_init__(self) -> None:
        require_positive(self, "length", "filler", "evaluation_sequences")
        if self.segments < 2:
            raise ValueError(
                f"segments ({self.segments}) must be at least 2, or nothing lies further than gap 0"
            )
        if self.digits < 2:
            raise ValueError(f"digits ({self.digits}) must be at least 2, or there is nothing to tell apart")
        if self.segment_length < 2 * self.length + 1:
            raise ValueError(
                f"segment_length ({self.segment_length}) must be at least 2 * length + 1 "
                f"({2 * self.length + 1}): marker, digits and questions"
            )


class Needle(SequenceTask):
    """Finding the needle, scored by the gap between it and the question.

    Token ids: the digits, the marker, the questions, then the filler. Labels are the digits' token ids.
    """

    name = "needle"
    summary = "say the digits of a pass-key hidden in filler, by gap in segments"
    Config = NeedleConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"segments": 3, "segment_length": 8, "length": 2, "filler": 4, "evaluation_sequences": 64}
    )

    config: NeedleConfig

    def set_up(self) -> None:
        c = self.config
        self._marker = c.digits
        self._question = self._marker + 1
        self._filler = self._question + c.length
        self.vocab_size = self._filler + c.filler
        self.segment_length = c.segment_length
        self.groups = gap_names(c.segments)
        self.distant = range(1, c.segments)

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        canvas = Canvas((rows, c.segments, c.segment_length))
        canvas.tokens[:] = self._filler + random.integers(c.filler, size=canvas.tokens.shape)
        asked = c.segment_length - c.length
        canvas.tokens[:, :, asked:] = self._question + np.arange(c.length)
        digits = random.integers(c.digits, size=(rows, c.length))
        segment = random.integers(c.segments, size=rows)
        place = random.integers(asked - c.length, size=rows)
        every = np.arange(rows)
        canvas.tokens[every, segment, place] = self._marker
        inside = place[:, None] + 1 + np.arange(c.length)
        canvas.tokens[every[:, None], segment[:, None], inside] = digits
        gap = np.arange(c.segments) - segment[:, None]
        known = (gap >= 0)[:, :, None]
        canvas.labels[:, :, asked:] = np.where(known, digits[:, None], canvas.labels[:, :, asked:])
        canvas.groups[:, :, asked:] = np.where(known, gap[:, :, None], -1)
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: the digits behind the marker, once it was seen."""
        c, found = self.config, {}
        for row, tokens in enumerate(batch.tokens.tolist()):
            needle: list[int] = []
            for place, token in enumerate(tokens):
                if token == self._marker:
                    needle = tokens[place + 1 : place + 1 + c.length]
                elif needle and self._question <= token < self._filler:
                    found[row, place] = needle[token - self._question]
        return one_hot_logits(answers_from(batch, found), self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `digits` beyond: no answer is ever shown."""
        return [1.0] + [1 / self.config.digits] * (self.config.segments - 1)

    def by_guessing(self) -> Sequence[float]:
        """One in `digits`, everywhere."""
        return [1 / self.config.digits] * self.config.segments
