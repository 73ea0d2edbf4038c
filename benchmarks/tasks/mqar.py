"""`mqar`: multi-query associative recall as it was published, cut into segments.

Arora et al. 2023, "Zoology" (arXiv:2312.04927), after their released generator: a sequence begins with all
its pairs, `key value`, and then asks for each key once; the label at the key asked for is its value. The
places for questions are weighted by a power law, so that most come soon after the pairs. With `segments=1`
and the other defaults the data are those of the first setting of their figure 2; the others have (length,
pairs) of (128, 8), (256, 16) and (512, 64).

Between the questions stands token 0, as in figure 2. The release can put random tokens there, which may be
keys of the same sequence, so that a key stands before some other token than its value (zoology's issue 29).
Here random fillers are never keys of their sequence.

As all pairs of the default sizes lie in the first segment, a memory frozen after it misses nothing.
"""

from __future__ import annotations

import math
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
class MQARConfig:
    """The sizes of `mqar`; with `segments=1` they are the paper's smallest."""

    vocabulary: int = 8192
    """Token ids: the filler 0, then the keys, and from half of them on the values."""
    length: int = 64
    """Tokens of a sequence."""
    pairs: int = 4
    """Pairs at its start, of different keys and different values; each is asked for once."""
    segments: int = 4
    """Segments that the sequence is cut into; 1: as published, where nothing need be carried."""
    power: float = 0.01
    """Exponent a: the x-th place for a question has weight x^(a-1); 1: all places alike."""
    random_fillers: bool = False
    """Fill with random tokens that are no keys of the sequence, in place of token 0."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set (3,000 in the paper)."""

    def __post_init__(self) -> None:
        require_positive(self, "length", "pairs", "segments", "evaluation_sequences")
        if self.length % (2 * self.segments):
            raise ValueError(
                f"length ({self.length}) must be a multiple of 2 * segments ({2 * self.segments}), "
                "or a pair would be cut in two"
            )
        if 4 * self.pairs > self.length:
            raise ValueError(
                f"length ({self.length}) must be at least 4 * pairs ({4 * self.pairs}): two tokens to write "
                "each and two to ask for it"
            )
        room = self.length // (2 * self.segments)
        if self.pairs > room and self.pairs % room:
            raise ValueError(
                f"pairs ({self.pairs}) must fit into one segment (at most {room}) or fill whole ones (a "
                f"multiple of {room}), or values in sight would say which ones the older cannot be"
            )
        if self.vocabulary < 2 * self.pairs + 2:
            raise ValueError(
                f"vocabulary ({self.vocabulary}) must be at least 2 * pairs + 2 ({2 * self.pairs + 2}), "
                "because keys are the lower half without token 0 and no key is written twice"
            )
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"power ({self.power}) must be positive and finite; 1 makes all places alike")

    @property
    def values(self) -> int:
        """Different values."""
        return self.vocabulary - self.vocabulary // 2


class MQAR(SequenceTask):
    """Zoology's associative recall, scored by the gap in segments between writing and asking.

    Token ids: the filler 0, the keys 1 to V/2 - 1, the values V/2 to V - 1. Labels are the values' token ids.
    With one segment all is at gap 0, and the mean accuracy is the one of the paper.
    """

    name = "mqar"
    summary = "Zoology's multi-query associative recall, by gap in segments"
    Config = MQARConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"vocabulary": 32, "length": 24, "segments": 3, "pairs": 3, "evaluation_sequences": 64}
    )

    config: MQARConfig

    @classmethod
    def longer(cls, options: Mapping[str, Any], factor: int) -> dict[str, Any]:
        """The options at `factor` times the length: more segments, as many pairs, the same tokens."""
        c = MQARConfig(**options)
        return {**options, "length": factor * c.length, "segments": factor * c.segments}

    def set_up(self) -> None:
        c = self.config
        self.vocab_size = c.vocabulary
        self.segment_length = c.length // c.segments
        asked = range(2 * c.pairs, c.length, 2)
        written = range(0, 2 * c.pairs, 2)
        self._gaps = sorted({self._segment(q) - self._segment(w) for q in asked for w in written})
        self.groups = tuple(f"gap {gap}" for gap in self._gaps)
        # In one segment there is nothing else to take the mean of.
        self.distant = [index for index, gap in enumerate(self._gaps) if gap] or [0]

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        keys = 1 + _distinct(random, rows, c.vocabulary // 2 - 1, c.pairs)
        values = c.vocabulary // 2 + _distinct(random, rows, c.values, c.pairs)
        written = np.arange(0, 2 * c.pairs, 2)
        asked = 2 * c.pairs + 2 * self._draw_places(random, rows)
        canvas = Canvas((rows, c.length))
        if c.random_fillers:
            others = random.integers(c.vocabulary - c.pairs, size=canvas.tokens.shape)
            canvas.tokens[:] = _not_among(others, keys)
        canvas.tokens[:, written] = keys
        canvas.tokens[:, written + 1] = values
        np.put_along_axis(canvas.tokens, asked, keys, 1)
        np.put_along_axis(canvas.labels, asked, values, 1)
        gaps = self._segment(asked) - self._segment(written)
        np.put_along_axis(canvas.groups, asked, np.searchsorted(self._gaps, gaps), 1)
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: what stood beside the key at the start."""
        tokens, split = batch.tokens, 2 * self.config.pairs
        same = tokens[:, split:, None] == tokens[:, None, 0:split:2]
        answers = torch.full_like(tokens, -1)
        value = (same * tokens[:, None, 1:split:2]).sum(-1)
        answers[:, split:] = torch.where(same.any(-1), value, -1)
        return one_hot_logits(answers, self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `values` beyond.

        Exact: a segment that asks for an older pair holds none itself, for pairs come first and lie in one
        segment or fill theirs; so it holds only keys and fillers, which are independent of the values.
        """
        return [1 / self.config.values if gap else 1.0 for gap in self._gaps]

    def by_guessing(self) -> Sequence[float]:
        """One in `values`, everywhere."""
        return [1 / self.config.values] * len(self.groups)

    def _segment(self, place: Any) -> Any:
        return place // self.segment_length

    def _draw_places(self, random: np.random.Generator, rows: int) -> np.ndarray:
        c = self.config
        place = np.arange(1, c.length // 2 - c.pairs + 1)
        # The largest of log weights plus Gumbel noise, in order: places drawn one by one without replacement.
        noisy = (c.power - 1) * np.log(place) + random.gumbel(size=(rows, len(place)))
        return (-noisy).argsort(1)[:, : c.pairs]


def _distinct(random: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """`count` different numbers below `size` for each row, in random order."""
    chosen = np.empty((rows, 0), dtype=np.int64)
    for index in range(count):
        rank = random.integers(size - index, size=(rows, 1))
        chosen = np.concatenate([chosen, _not_among(rank, chosen)], 1)
    return chosen


def _not_among(ranks: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """The number of each rank, counted from 0, among the numbers that are not `excluded` in its row."""
    for number in np.sort(excluded, 1).T:
        ranks = ranks + (ranks >= number[:, None])
    return ranks
