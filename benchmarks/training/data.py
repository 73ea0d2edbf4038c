"""Documents as batches: which tokens each row reads at each step.

A row reads documents one after the other, each from its start to its end in segments; where a new one
begins its memory is reset. Everything is a pure function of (seed, rows, row, step), so a step is all there
is to know of the place in the data, and rows can be shared out among processes as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.corpus import Corpus, load_corpus
from benchmarks.streams import NOTHING, Place, ReadingOrder, deal
from benchmarks.training.settings import TrainConfig
from benchmarks.training.tokenizer import Tokenizer
from memory_models.lm import IGNORED_LABEL


class Piece(NamedTuple):
    """One segment of some rows."""

    tokens: Tensor
    """int64 `[rows, segment_length]`."""
    labels: Tensor
    """int64 `[rows, segment_length]`, the next token; -100 at padding."""
    mask: Tensor
    """bool `[rows, segment_length]`, false at padding."""
    reset: Tensor
    """bool `[rows]`, true where a document begins."""

    def to(self, device: torch.device) -> Piece:
        """The same on a device."""
        return Piece(*(part.to(device, non_blocking=True) for part in self))

    @property
    def asked(self) -> int:
        """Labels that are asked."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Text:
    """The documents of a training as token ids."""

    training: Documents
    held_out: Documents
    corpus: Corpus
    tokenizer: Tokenizer
    end_token: str
    """Token put after each document; empty: none."""

    def identity(self) -> dict[str, Any]:
        """What must be the same when a training goes on."""
        return {
            "data": self.corpus.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "end_token": self.end_token,
            "vocab_size": self.tokenizer.vocab_size,
        }


def load_text(config: TrainConfig, tokenizer: Tokenizer, segment_length: int) -> Text:
    """Find the documents, split them and encode them.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if there is too little text to train on and to hold out.
        TokenizerError: if the tokenizer has no token `end_token`.
    """
    corpus = _corpus(config, tokenizer)
    end = None if not config.end_token else tokenizer.id_of(config.end_token)
    sides = []
    for name, documents in (("training", corpus.training), ("held-out", corpus.held_out)):
        ids = tokenizer.encode_all([document.content for document in documents])
        if end is not None:
            ids = [np.append(one, np.array([end], dtype=one.dtype)) for one in ids]
        if name == "held-out":
            ids = [one[: config.held_out_tokens] for one in ids]
        # Of a document of one token there is nothing to ask.
        ids = [one for one in ids if len(one) > 1]
        if not ids:
            raise ValueError(f"{config.data} leaves no {name} document of two tokens or more; give more text")
        sides.append(Documents(ids, segment_length))
    training, held_out = sides
    return Text(training, held_out, corpus, tokenizer, config.end_token)


def _corpus(config: TrainConfig, tokenizer: Tokenizer) -> Corpus:
    return load_corpus(
        str(config.data),
        held_out=config.held_out,
        min_bytes=max(1, config.min_bytes),
        document_start=config.document_start,
        raw=tokenizer.is_bytes,
    )


class Documents:
    """Token ids of documents end to end, read a segment at a time.

    Args:
        ids: of each document, at least two.
        segment_length: tokens of a segment.
    """

    def __init__(self, ids: Sequence[NDArray[np.integer]], segment_length: int) -> None:
        lengths = np.array([len(one) for one in ids], dtype=np.int64)
        self.segment_length = segment_length
        self.tokens = np.concatenate(ids)
        self.starts = np.cumsum(lengths) - lengths
        # All but the first token are asked for.
        self.asked = lengths - 1
        self.segments = -(-self.asked // segment_length)

    def cut(self, places: Sequence[Place]) -> Piece:
        """One segment for each place."""
        document = np.array([place.document for place in places])
        segment = np.array([place.segment for place in places])
        position = segment[:, None] * self.segment_length + np.arange(self.segment_length)
        mask = (position < self.asked[document][:, None]) & (document >= 0)[:, None]
        index = np.where(mask, self.starts[document][:, None] + position, 0)

        def masked(values: NDArray[np.integer], empty: int) -> Tensor:
            return torch.from_numpy(np.where(mask, values.astype(np.int64), empty))

        return Piece(
            tokens=masked(self.tokens[index], 0),
            labels=masked(self.tokens[index + 1], IGNORED_LABEL),
            mask=torch.from_numpy(mask),
            reset=torch.tensor([place.reset for place in places]),
        )

    def evaluation(self, *, rows: int, share: slice) -> Iterator[Piece]:
        """Every document once: the rows of `share` out of `rows`, as many steps for each share."""
        dealt = min(rows, len(self.segments))
        for places in deal(self.segments, rows=dealt):
            yield self.cut([*places, *[NOTHING] * (rows - dealt)][share])


class Stream:
    """Endless training data.

    Args:
        documents: to read.
        rows: read side by side, over all processes together.
        segments: read by a row in one step.
        seed: of the order.
    """

    def __init__(self, documents: Documents, *, rows: int, segments: int, seed: int) -> None:
        self._documents = documents
        self._segments = segments
        self._order = ReadingOrder(documents.segments, name="training", seed=seed, rows=rows)

    def window(self, step: int, rows: range) -> list[Piece]:
        """What some rows read in a step, a piece for each segment."""
        first = step * self._segments
        return [
            self._documents.cut([self._order.find(row, number) for row in rows])
            for number in range(first, first + self._segments)
        ]
