"""`ballet`: which dancer danced this dance? The supervised form of HTM's own task.

After Lampinen et al. (arXiv:2105.14039), §4.1: dancers dance one after the other, each one of 13 dances of 16
steps, with a pause after each; then a dance is named and the dancer is wanted. Here a frame is one token,
the dancer and the direction of the step, instead of an image; a segment is one dance, the pause and some
questions; and any dance up to now may be asked for, not the one at the end only, because a memory whose write
passes no gradient learns what to store from questions within the segment.

Some dances have the same steps in another order (circles and pluses, the two times, the two chevrons). If
such a rival was danced too, a memory that forgets order inside a dance cannot tell them apart; these
questions are scored apart.
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

DIRECTIONS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
_ALONG = {"E": "W", "W": "E"}
_ZEE = "NE W W E E SW NE SW SW E E W W NE SW NE"
_CIRCLE = "N E S S W W N N E E S S W W N E"
_PLUS = "N S E W S N W E " * 2
_TIMES = "NE SW SE NW SW NE NW SE " * 2
_CHEVRON = "NW S SE NE N SW NE SW NE S SW NW N SE NW SE"


def _mirrored(steps: str) -> str:
    """East and west exchanged."""
    return "".join(_ALONG.get(letter, letter) for letter in steps)


def _turned(steps: str) -> str:
    """By half a turn."""
    exchange = {**_ALONG, "N": "S", "S": "N"}
    return "".join(exchange.get(letter, letter) for letter in steps)


DANCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: tuple(steps.split())
        for name, steps in {
            "circle clockwise": _CIRCLE,
            "circle anticlockwise": _mirrored(_CIRCLE),
            "up and down": "N S S N " * 4,
            "left and right": "E W W E " * 4,
            "falling diagonal": "NW SE SE NW " * 4,
            "rising diagonal": "NE SW SW NE " * 4,
            "plus clockwise": _PLUS,
            "plus anticlockwise": _mirrored(_PLUS),
            "times clockwise": _TIMES,
            "times anticlockwise": _mirrored(_TIMES),
            "zee": _ZEE,
            "chevron down": _CHEVRON,
            "chevron up": _turned(_CHEVRON),
        }.items()
    }
)
"""The 13 dances of the paper's released environment, 16 steps each."""
STEPS = 16


@dataclass(frozen=True, kw_only=True)
class BalletConfig:
    """The sizes of `ballet`."""

    dancers: int = 8
    """Dancers, each dances once; also the number of segments."""
    delay: int = 4
    """Idle frames after each dance (16 and 48 in the paper)."""
    queries: int = 4
    """Dances asked for at the end of each segment."""
    evaluation_sequences: int = 512
    """Sequences in the evaluation set."""

    def __post_init__(self) -> None:
        require_positive(self, "queries", "evaluation_sequences")
        if self.delay < 0:
            raise ValueError(f"delay ({self.delay}) must not be negative")
        if not 3 <= self.dancers <= len(DANCES):
            raise ValueError(
                f"dancers ({self.dancers}) must lie between 3 and {len(DANCES)}, the number of dances"
            )


class Ballet(SequenceTask):
    """Naming the dancer of a dance, scored by how many dances ago it was.

    Token ids: dancer `d` stepping in direction `s` is `8 d + s`, then idle, then the dances' names, then the
    dancers' names, which are labels only.
    """

    name = "ballet"
    summary = "say who danced a given dance, by how many dances ago; dances that differ in order only apart"
    Config = BalletConfig
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"dancers": 4, "delay": 1, "queries": 2, "evaluation_sequences": 64}
    )

    config: BalletConfig

    def set_up(self) -> None:
        c = self.config
        self._idle = len(DIRECTIONS) * c.dancers
        self._dance = self._idle + 1
        self._dancer = self._dance + len(DANCES)
        self.vocab_size = self._dancer + c.dancers
        self.segment_length = STEPS + c.delay + c.queries
        gaps = gap_names(c.dancers)
        self.groups = (*(f"no rival/{gap}" for gap in gaps), *(f"rival danced/{gap}" for gap in gaps))
        self.distant = [index for index in range(len(self.groups)) if index % c.dancers]
        self._steps = np.array([[DIRECTIONS.index(step) for step in steps] for steps in DANCES.values()])
        ordered = np.sort(self._steps, 1)
        self._rivals = (ordered[:, None] == ordered[None, :]).all(2) & ~np.eye(len(DANCES), dtype=bool)

    def draw(self, random: np.random.Generator, rows: int) -> Batch:
        c = self.config
        canvas = Canvas((rows, c.dancers, self.segment_length), filler=self._idle)
        dancers = random.random((rows, c.dancers)).argsort(1)
        dances = random.random((rows, len(DANCES))).argsort(1)[:, : c.dancers]
        frames = len(DIRECTIONS) * dancers[:, :, None] + self._steps[dances]
        canvas.tokens[:, :, :STEPS] = frames
        segment = np.arange(c.dancers)[None, :, None]
        gaps = random.integers(0, segment + 1, size=(rows, c.dancers, c.queries))
        asked = segment - gaps
        every = np.arange(rows)[:, None, None]
        # Whether a rival of the dance asked for was danced up to now.
        seen = self._rivals[dances[:, :, None], dances[:, None, :]].cumsum(2) > 0
        rival = seen[every, asked, segment]
        start = STEPS + c.delay
        canvas.tokens[:, :, start:] = self._dance + dances[every, asked]
        canvas.labels[:, :, start:] = self._dancer + dancers[every, asked]
        canvas.groups[:, :, start:] = np.where(rival, c.dancers, 0) + gaps
        return canvas.batch()

    def oracle(self, batch: Batch) -> Tensor:
        """Solve from the tokens alone: read the steps of each dance, and who danced it."""
        names = {steps: index for index, steps in enumerate(map(tuple, self._steps.tolist()))}
        found = {}
        for row, tokens in enumerate(batch.tokens.tolist()):
            danced: dict[int, int] = {}
            for start in range(0, len(tokens), self.segment_length):
                frames = tokens[start : start + STEPS]
                steps = tuple(frame % len(DIRECTIONS) for frame in frames)
                danced[names[steps]] = frames[0] // len(DIRECTIONS)
                for place in range(start + STEPS + self.config.delay, start + self.segment_length):
                    found[row, place] = self._dancer + danced[tokens[place] - self._dance]
        return one_hot_logits(answers_from(batch, found), self.vocab_size)

    def without_memory(self) -> Sequence[float]:
        """1 at gap 0, one in `dancers - 1` beyond: it is any of the others."""
        one = [1.0] + [1 / (self.config.dancers - 1)] * (self.config.dancers - 1)
        return [*one, *one]

    def by_guessing(self) -> Sequence[float]:
        """One in `dancers`, everywhere."""
        return [1 / self.config.dancers] * len(self.groups)
