"""`recall`: which value was written beside this key, so many segments ago?

Multi-query associative recall (after Zoology's MQAR), spread over segments. Each segment first writes some
pairs, `key value`, then asks for some keys, `key ?`; the label at `?` is the value that was written beside
that key, in this segment (gap 0) or in one up to the first. Keys and values are drawn afresh for every
sequence, so nothing can be learned by heart. Gaps start at zero because a memory whose write passes no
gradient learns what to store only from uses within the segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.sequences import Canvas, SequenceTask, gap_names, require_positive
from benchmarks.task import Batch, one_hot_logits


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """The sizes of `recall`."""

    segments: int = 6
    """Segments in a sequence."""
    writes: int = 2
    """Pairs written at the start of each segment."""
    queries: int = 6
    """Keys asked for after them."""
    keys: int = 16
    """Different keys; a sequence uses `segments * writes` of them, each once."""
    values: int = 16
    """Different values, drawn with replacement."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set."""

    def __post_init__(self) -> None:
        require_positive(self, "segments", "writes", "queries", "keys", "evaluation_sequences")
        if self.segments < 2:
            raise ValueError(
                f"segments ({self.segments}) must be at least 2, or nothing lies further than gap 0"
            )
        if self.values < 2:
            raise ValueError(f"values ({self.values}) must be at least 2, or there is nothing to tell apart")
        pairs = self.segments * self.writes
        if pairs > self.keys:
            raise ValueError(
                f"keys ({self.keys}) must be at least segments * writes ({pairs}), "
                "because a sequence writes no key twice"
            )


class Recall(SequenceTask):
    """Associative recall over segments, scored by the gap between writing and asking.

    Token ids: the keys, then the values, then `?`. Labels are the values' token ids.
    """

    name = "recall"
    summary = "recall the value written beside a key, by gap in segments"
    Config = RecallConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"segments": 3, "keys": 8, "values": 8, "evaluation_sequences": 64}
    )

    config: RecallConfig

    def set_up(self) -> None:
        c = self.config
        self.vocab_size = c.keys + c.values + 1
        self.segment_length = 2 * (c.writes + c.queries)
        self.groups = gap_names(c.segments)
        self.distant = range(1, c.segments)
        self._question = c.keys + c.values

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: what stands after a key, unless it is `?`, is its value."""
        tokens, c = batch.tokens, self.config
        before, after = tokens[:, :-1], tokens[:, 1:]
        written = (before < c.keys) & (after != self._question)
        value_of = torch.full((len(tokens), c.keys + 1), -1)
        # places that write nothing go to a last column that nobody reads
        value_of.scatter_(1, torch.where(written, before, c.keys), torch.where(written, after, -1))
        answers = torch.full_like(tokens, -1)
        answers[:, 1:] = torch.where(
            after == self._question, value_of.gather(1, before.clamp(max=c.keys)), -1
        )
        return one_hot_logits(answers, self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `values` beyond.

        Exact: a key is written once, so at gap 1 or more its segment does not hold its value; values are
        independent and uniform, and no answer is ever shown, so all that the segment holds is independent
        of that value.
        """
        return [1.0] + [1 / self.config.values] * (self.config.segments - 1)

    def by_guessing(self) -> Sequence[float]:
        """One in `values`, everywhere."""
        return [1 / self.config.values] * self.config.segments

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        pairs = c.segments * c.writes
        # b rows, s segments, w writes, q queries
        keys = random.random((rows, c.keys)).argsort(1)[:, :pairs]
        values = c.keys + random.integers(c.values, size=(rows, pairs))
        segment = np.arange(c.segments)[None, :, None]
        shape = (rows, c.segments, c.queries)
        gaps = random.integers(0, segment + 1, size=shape)
        chosen = (segment - gaps) * c.writes + random.integers(c.writes, size=shape)
        chosen = chosen.reshape(rows, -1)

        canvas = Canvas((rows, c.segments, self.segment_length), filler=self._question)
        split = 2 * c.writes
        canvas.tokens[:, :, 0:split:2] = keys.reshape(rows, c.segments, c.writes)
        canvas.tokens[:, :, 1:split:2] = values.reshape(rows, c.segments, c.writes)
        canvas.tokens[:, :, split::2] = np.take_along_axis(keys, chosen, 1).reshape(shape)
        canvas.labels[:, :, split + 1 :: 2] = np.take_along_axis(values, chosen, 1).reshape(shape)
        canvas.groups[:, :, split + 1 :: 2] = gaps
        return canvas.batch()
