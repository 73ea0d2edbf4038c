"""`rewrite`: which value was written beside this key last?

Associative recall in which keys are written again with other values (the forgetting variant of MQAR in
Zoology, and ARMT's "rewrite"). Each segment writes some pairs, `key value`, then asks for some keys, `key ?`;
the label at `?` is the value written beside that key last. A memory that keeps everything must also know
which of a key's values is the newest. Keys asked for are drawn so that all distances to the last write are
equally frequent.
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
class RewriteConfig:
    """The sizes of `rewrite`."""

    segments: int = 6
    """Segments in a sequence."""
    writes: int = 2
    """Pairs written at the start of each segment, of different keys."""
    queries: int = 6
    """Keys asked for after them."""
    used: int = 6
    """Keys that a sequence uses; the fewer, the more often each is written again."""
    keys: int = 16
    """Different keys."""
    values: int = 16
    """Different values, drawn with replacement."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set."""

    def __post_init__(self) -> None:
        require_positive(self, "writes", "queries", "keys", "evaluation_sequences")
        if self.segments < 3:
            raise ValueError(
                f"segments ({self.segments}) must be at least 3: one to write, one to write again, one to ask"
            )
        if self.values < 2:
            raise ValueError(f"values ({self.values}) must be at least 2, or there is nothing to tell apart")
        if not self.writes <= self.used <= self.keys:
            raise ValueError(
                f"used ({self.used}) must lie between writes ({self.writes}) and keys ({self.keys})"
            )


class Rewrite(SequenceTask):
    """Recall of the last value, scored by the gap to the last write, rewritten keys apart from others.

    Token ids: the keys, then the values, then `?`. Labels are the values' token ids. The mean and the worst
    accuracy are those of rewritten keys.
    """

    name = "rewrite"
    summary = "recall the last value of keys that are written again and again, by gap"
    Config = RewriteConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"segments": 3, "used": 3, "keys": 8, "values": 8, "evaluation_sequences": 64}
    )

    config: RewriteConfig

    def set_up(self) -> None:
        c = self.config
        self.vocab_size = c.keys + c.values + 1
        self.segment_length = 2 * (c.writes + c.queries)
        # A key that was written twice was written last in the second segment or later.
        rewritten = [f"rewritten/{name}" for name in gap_names(c.segments - 1)]
        self.groups = (*rewritten, *(f"written once/{name}" for name in gap_names(c.segments)))
        self.distant = range(1, c.segments - 1)
        self._question = c.keys + c.values

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        canvas = Canvas((rows, c.segments, self.segment_length), filler=self._question)
        names = random.random((rows, c.keys)).argsort(1)[:, : c.used]
        every = np.arange(rows)[:, None]
        value = np.full((rows, c.used), -1)
        last = np.full((rows, c.used), -1)
        times = np.zeros((rows, c.used), dtype=np.int64)
        split = 2 * c.writes
        for segment in range(c.segments):
            written = random.random((rows, c.used)).argsort(1)[:, : c.writes]
            value[every, written] = c.keys + random.integers(c.values, size=written.shape)
            last[every, written] = segment
            times[every, written] += 1
            asked = _even_choice(random, last, c.queries)
            gap = segment - last[every, asked]
            once = times[every, asked] == 1
            canvas.tokens[:, segment, 0:split:2] = names[every, written]
            canvas.tokens[:, segment, 1:split:2] = value[every, written]
            canvas.tokens[:, segment, split::2] = names[every, asked]
            canvas.labels[:, segment, split + 1 :: 2] = value[every, asked]
            canvas.groups[:, segment, split + 1 :: 2] = np.where(once, c.segments - 1 + gap, gap)
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: the value that last stood after the key."""
        found = {}
        for row, tokens in enumerate(batch.tokens.tolist()):
            value: dict[int, int] = {}
            for place in range(1, len(tokens)):
                before, token = tokens[place - 1], tokens[place]
                if before < self.config.keys and token == self._question:
                    found[row, place] = value[before]
                elif before < self.config.keys:
                    value[before] = token
        return one_hot_logits(answers_from(batch, found), self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `values` beyond: values are independent and their segment is out of sight."""
        beyond = 1 / self.config.values
        count = self.config.segments
        return [1.0] + [beyond] * (count - 2) + [1.0] + [beyond] * (count - 1)

    def by_guessing(self) -> Sequence[float]:
        """One in `values`, everywhere."""
        return [1 / self.config.values] * len(self.groups)


def _even_choice(random: np.random.Generator, last: np.ndarray, count: int) -> np.ndarray:
    """`count` keys of each row, all segments of a last write equally likely, never an unwritten key."""
    same = (last[:, :, None] == last[:, None, :]).sum(2)
    weight = np.where(last >= 0, 1 / same, 0.0)
    upper = weight.cumsum(1)
    drawn = random.random((len(last), count)) * upper[:, -1:]
    return (drawn[:, :, None] >= upper[:, None, :]).sum(2)
