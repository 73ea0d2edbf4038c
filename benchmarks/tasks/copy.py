"""`copy` and `reverse`: say again the sequence of this name, forwards or backwards.

Each segment first shows some named sequences, `name s1 s2 ... sn`, then asks for one of them by its name,
followed by blanks; the labels at the name and at the blanks are its symbols, in order or in reverse order.
The sequence was shown in this segment (gap 0) or in one up to the first. Two sequences a segment or more,
so that the name must be looked at even at gap 0.
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
class CopyConfig:
    """The sizes of `copy` and `reverse`."""

    segments: int = 4
    """Segments in a sequence of tokens."""
    sequences: int = 2
    """Named sequences shown at the start of each segment."""
    length: int = 3
    """Symbols of a named sequence."""
    queries: int = 1
    """Names asked for after them."""
    names: int = 8
    """Different names; each is used at most once."""
    symbols: int = 16
    """Different symbols, drawn with replacement."""
    evaluation_sequences: int = 512
    """Sequences of tokens in the evaluation set."""

    def __post_init__(self) -> None:
        require_positive(self, "sequences", "length", "queries", "names", "evaluation_sequences")
        if self.segments < 2:
            raise ValueError(
                f"segments ({self.segments}) must be at least 2, or nothing lies further than gap 0"
            )
        if self.symbols < 2:
            raise ValueError(
                f"symbols ({self.symbols}) must be at least 2, or there is nothing to tell apart"
            )
        if self.segments * self.sequences > self.names:
            raise ValueError(
                f"names ({self.names}) must be at least segments * sequences "
                f"({self.segments * self.sequences}), because no name is given twice"
            )


class Copy(SequenceTask):
    """Copying a named sequence, scored by the gap between showing and asking.

    Token ids: the names, then the symbols, then the blank. Labels are the symbols' token ids.
    """

    name = "copy"
    summary = "repeat the sequence of a given name, by gap in segments"
    Config = CopyConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"segments": 3, "length": 2, "names": 6, "symbols": 8, "evaluation_sequences": 64}
    )
    backwards: ClassVar[bool] = False

    config: CopyConfig

    def set_up(self) -> None:
        c = self.config
        self.vocab_size = c.names + c.symbols + 1
        self._shown = c.sequences * (c.length + 1)
        self.segment_length = self._shown + c.queries * c.length
        self.groups = gap_names(c.segments)
        self.distant = range(1, c.segments)
        self._blank = c.names + c.symbols

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        canvas = Canvas((rows, c.segments, self.segment_length), filler=self._blank)
        total = c.segments * c.sequences
        names = random.random((rows, c.names)).argsort(1)[:, :total]
        symbols = c.names + random.integers(c.symbols, size=(rows, total, c.length))
        shown = np.concatenate([names[:, :, None], symbols], 2)
        canvas.tokens[:, :, : self._shown] = shown.reshape(rows, c.segments, -1)
        segment = np.arange(c.segments)[None, :, None]
        shape = (rows, c.segments, c.queries)
        gaps = random.integers(0, segment + 1, size=shape)
        chosen = (segment - gaps) * c.sequences + random.integers(c.sequences, size=shape)
        every = np.arange(rows)[:, None, None]
        asked = symbols[every, chosen]
        if self.backwards:
            asked = asked[..., ::-1]
        canvas.tokens[:, :, self._shown :: c.length] = names[every, chosen]
        canvas.labels[:, :, self._shown :] = asked.reshape(rows, c.segments, -1)
        canvas.groups[:, :, self._shown :] = gaps.repeat(c.length, 2)
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: a name followed by symbols shows a sequence, else it asks for it."""
        c = self.config
        found: dict[tuple[int, int], int] = {}
        for row, tokens in enumerate(batch.tokens.tolist()):
            shown: dict[int, list[int]] = {}
            for place, token in enumerate(tokens):
                if token >= c.names:
                    continue
                if token not in shown:
                    shown[token] = tokens[place + 1 : place + 1 + c.length]
                    continue
                answer = shown[token][::-1] if self.backwards else shown[token]
                found |= {(row, place + index): symbol for index, symbol in enumerate(answer)}
        return one_hot_logits(answers_from(batch, found), self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `symbols` beyond.

        Exact: no name is given twice and no answer is shown, so nothing in the segment depends on the
        symbols of an older sequence.
        """
        return [1.0] + [1 / self.config.symbols] * (self.config.segments - 1)

    def by_guessing(self) -> Sequence[float]:
        """One in `symbols`, everywhere."""
        return [1 / self.config.symbols] * self.config.segments


class Reverse(Copy):
    """`copy` with the symbols asked for in reverse order."""

    name = "reverse"
    summary = "repeat the sequence of a given name backwards, by gap in segments"
    backwards = True
