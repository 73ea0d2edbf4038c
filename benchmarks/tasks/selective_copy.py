"""`selective-copy`: repeat, in order, the few symbols that lay among noise.

After Gu and Dao's selective copying (arXiv:2312.00752, §4.1.1): symbols at random places of a long sequence
of noise, then as many markers; the label at marker number `i` is symbol number `i`. Which symbol an answer
stands for follows from counting, across segments. The gap of an answer is the number of segments between
its symbol and the markers.
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
class SelectiveCopyConfig:
    """The sizes of `selective-copy`."""

    segments: int = 4
    """Segments in a sequence; the markers stand at the end of the last."""
    segment_length: int = 16
    """Tokens of a segment."""
    data: int = 4
    """Symbols to be repeated."""
    symbols: int = 8
    """Different symbols, drawn with replacement."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set."""

    def __post_init__(self) -> None:
        require_positive(self, "data", "evaluation_sequences")
        if self.segments < 2:
            raise ValueError(
                f"segments ({self.segments}) must be at least 2, or nothing lies further than gap 0"
            )
        if self.symbols < 2:
            raise ValueError(
                f"symbols ({self.symbols}) must be at least 2, or there is nothing to tell apart"
            )
        if self.segment_length <= self.data:
            raise ValueError(
                f"segment_length ({self.segment_length}) must be more than data ({self.data}), for the "
                "markers and at least one token before them"
            )


class SelectiveCopy(SequenceTask):
    """Repeating the symbols among the noise, scored by the gap between a symbol and the markers.

    Token ids: the symbols, then noise, then the marker. Labels are the symbols' token ids.
    """

    name = "selective-copy"
    summary = "repeat in order the symbols that lay among noise, by gap in segments"
    Config = SelectiveCopyConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"segments": 3, "segment_length": 8, "data": 4, "symbols": 8, "evaluation_sequences": 64}
    )

    config: SelectiveCopyConfig

    def set_up(self) -> None:
        c = self.config
        self.vocab_size = c.symbols + 2
        self.segment_length = c.segment_length
        self.groups = gap_names(c.segments)
        self.distant = range(1, c.segments)
        self._noise, self._marker = c.symbols, c.symbols + 1

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        time = c.segments * c.segment_length
        room = time - c.data
        canvas = Canvas((rows, time), filler=self._noise)
        places = np.sort(random.random((rows, room)).argsort(1)[:, : c.data], 1)
        symbols = random.integers(c.symbols, size=(rows, c.data))
        np.put_along_axis(canvas.tokens, places, symbols, 1)
        canvas.tokens[:, room:] = self._marker
        canvas.labels[:, room:] = symbols
        canvas.groups[:, room:] = c.segments - 1 - places // c.segment_length
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: symbol number `i` at marker number `i`."""
        found: dict[tuple[int, int], int] = {}
        for row, tokens in enumerate(batch.tokens.tolist()):
            symbols = [token for token in tokens if token < self.config.symbols]
            markers = [place for place, token in enumerate(tokens) if token == self._marker]
            found |= {(row, place): symbol for place, symbol in zip(markers, symbols, strict=True)}
        return one_hot_logits(answers_from(batch, found), self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `symbols` beyond.

        Exact: the number of symbols is the same in all sequences, so those of the last segment are the
        answers at the last markers, and the others are independent of all that the segment holds.
        """
        return [1.0] + [1 / self.config.symbols] * (self.config.segments - 1)

    def by_guessing(self) -> Sequence[float]:
        """One in `symbols`, everywhere."""
        return [1 / self.config.symbols] * self.config.segments
