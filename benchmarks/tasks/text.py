"""`text`: language modelling on real files, scored by what only a memory can know.

Rows are streams that read one document after the other, a segment at a time; the memory is carried along
and reset where a document starts, which is always at a segment border. Beside bits per byte the score that
separates memories is the bits of a rare identifier, all its tokens together, by how many segments back the
same name last occurred. A name that occurs for the first time in its document is the control: no memory
of the document can know it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.corpus import load_corpus
from benchmarks.names import Occurrence, document_frequency, occurrences
from benchmarks.streams import Place, ReadingOrder, deal
from benchmarks.task import IGNORED, Batch, Metric, Scorer, Task, one_hot_logits
from benchmarks.tokens import KINDS, tokenise

_POSITIONS = (0, 64, 256, 1024, 2048, 4096)
# Segments back, from the left bound on; the last but one and the last together are "5+ back".
_GROUPS = ("first", "same segment", "1-4 back", "5-16 back", "17+ back")
_BACK = (0, 1, 5, 17)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text, as which tokens, and how it is scored."""

    data: str = ""
    """File (any bytes if `tokens` is `bytes`), folder or .gz to model; empty: Python's standard library."""
    tokens: str = "bpe"
    """`bpe` (byte-pair encoding trained on the training documents) or `bytes`."""
    vocab_size: int = 2048
    """Tokens of the byte-pair encoding."""
    segment_length: int = 64
    """Tokens of a segment."""
    held_out: int = 32
    """Documents held out for evaluation; at most one in eight of all."""
    evaluation_tokens: int = 6144
    """Tokens read of each held-out document, from its start."""
    documents: int = 0
    """Train on only so many documents; 0: all."""
    min_bytes: int = 1500
    """Shorter documents are left out."""
    document_start: str = ""
    """A line that starts with this text begins a new document, as "  <page>" does in enwik8."""
    rare_documents: int = 2
    """An identifier is rare if at most so many training documents hold it."""
    min_name: int = 3
    """Shortest identifier that is scored, in characters."""

    def __post_init__(self) -> None:
        if self.tokens not in KINDS:
            raise ValueError(f"tokens ({self.tokens!r}) must be one of {', '.join(KINDS)}")
        if not 256 <= self.vocab_size <= 65536:
            raise ValueError(f"vocab_size ({self.vocab_size}) must lie between 256 (the bytes) and 65536")
        for name in ("segment_length", "held_out", "evaluation_tokens", "min_name"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.min_bytes < 2:
            raise ValueError(
                f"min_bytes ({self.min_bytes}) must be at least 2: one token to read, one to ask"
            )
        for name in ("documents", "rare_documents"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")


class Text(Task):
    """Language modelling on documents, streamed with resets.

    `labels[t]` is the token after `tokens[t]` in the same document; the last token of a document is asked
    for and not read. In training each row reads its own share of the documents: those of an epoch, in
    an order drawn from the seed, are dealt one by one to the row that has least to read, so that every
    document is read once per epoch. At step 0 a row begins at a random segment of its first document, so
    that the rows do not start documents in step.
    """

    name = "text"
    summary = "real files (Python's standard library or your own), bits of rare identifiers by distance"
    Config = TextConfig
    streaming = True
    smoke: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"tokens": "bytes", "documents": 12, "held_out": 4, "evaluation_tokens": 768}
    )
    floor_is = "token frequencies, no context (the control `window` measures what needs no memory)"
    groups = _GROUPS
    headline = "identifier bits/5+ back"

    config: TextConfig

    def __init__(
        self, config: TextConfig | None = None, *, cache: str | Path | None = None, **options: Any
    ) -> None:
        super().__init__(config, cache=cache, **options)
        c = self.config
        self.segment_length = c.segment_length
        self._corpus = load_corpus(
            c.data,
            held_out=c.held_out,
            min_bytes=c.min_bytes,
            document_start=c.document_start,
            documents=c.documents,
            raw=c.tokens == "bytes",
        )
        self._text = tokenise(self._corpus, kind=c.tokens, vocab_size=c.vocab_size, cache=self.cache)
        self.vocab_size = self._text.vocab_size
        self._training = _Documents(self._text.training, c.segment_length)
        self._places = _place_borders(c.segment_length)
        self._orders: dict[tuple[int, int], ReadingOrder] = {}
        self.metrics = _metrics(_ranges(_POSITIONS), _ranges(self._places, c.segment_length))

    def batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        order = self._orders.get((seed, batch_size))
        if order is None:
            order = ReadingOrder(self._training.segments, name=self.name, seed=seed, rows=batch_size)
            self._orders = {(seed, batch_size): order}
        return self._cut(self._training, [order.find(row, step) for row in range(batch_size)])

    def evaluation(self, *, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """The held-out documents, dealt to the rows so that all have about the same to read.

        The scores do not depend on the batch size, and there is one set, whatever the seed.
        """
        documents = self._held_out
        for places in deal(documents.segments, rows=min(batch_size, len(documents.segments))):
            yield self._cut(documents, places)

    def scorer(self) -> Scorer:
        return TextScorer(
            metrics=self.metrics,
            places=self._places,
            segment_length=self.segment_length,
            occurrence_groups=[o.group for o in self._occurrences],
            occurrence_tokens=[o.end - o.begin for o in self._occurrences],
        )

    def oracle(self, batch: Batch) -> Tensor:
        """The labels themselves: nobody can know real text, so this only checks the scorer."""
        return one_hot_logits(batch.labels, self.vocab_size)

    def floor(self) -> dict[str, float]:
        """What the frequencies of single tokens in the training documents give."""
        counts = np.ones(self.vocab_size)
        counts += np.bincount(self._training.tokens, minlength=self.vocab_size)
        return self._constant_bits(-np.log2(counts / counts.sum()))

    def chance(self) -> dict[str, float]:
        """Every token equally likely."""
        return self._constant_bits(np.full(self.vocab_size, math.log2(self.vocab_size)))

    def identity(self) -> dict[str, Any]:
        # the content counts, not where it lies
        settings = {name: value for name, value in super().identity().items() if name != "data"}
        return {**settings, "corpus": self._corpus.fingerprint, "encoding": self._text.fingerprint}

    def facts(self) -> dict[str, str | int | float]:
        training, held_out = self._corpus.training, self._corpus.held_out
        size = sum(len(document.content) for document in training)
        names = np.bincount([o.group for o in self._occurrences], minlength=len(_GROUPS))
        return {
            "corpus": self._corpus.description,
            "corpus hash": self._corpus.fingerprint,
            "training documents": len(training),
            "training bytes": size,
            "training tokens": len(self._training.tokens),
            "bytes per token": round(size / len(self._training.tokens), 3),
            "vocabulary": self.vocab_size,
            "held-out documents": len(held_out),
            "held-out tokens scored": int(self._held_out.asked.sum()),
            **{f"rare identifiers, {group}": int(n) for group, n in zip(_GROUPS, names, strict=True)},
        }

    def keep(self, folder: Path) -> None:
        if self._text.tokenizer:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self._text.tokenizer, encoding="utf-8")

    @cached_property
    def _held_out(self) -> _Documents:
        # one more than is read, because the last is only asked for
        cut = [tokens[: self.config.evaluation_tokens + 1] for tokens in self._text.held_out]
        return _Documents(cut, self.segment_length, self._occurrences)

    @cached_property
    def _occurrences(self) -> list[Occurrence]:
        c = self.config
        seen = document_frequency((d.content for d in self._corpus.training), min_length=c.min_name)
        found = []
        for index, document in enumerate(self._corpus.held_out):
            tokens = self._text.held_out[index][: c.evaluation_tokens + 1]
            for name in occurrences(
                document.content, self._text.lengths[tokens], min_length=c.min_name, segment=c.segment_length
            ):
                if seen[name.text] <= c.rare_documents:
                    group = 0 if name.back is None else bisect_right(_BACK, name.back)
                    found.append(Occurrence(index, name.begin, name.end, group))
        return found

    def _cut(self, documents: _Documents, places: Sequence[Place]) -> Batch:
        """One segment for each row."""
        document = np.array([place.document for place in places])
        segment = np.array([place.segment for place in places])
        position = segment[:, None] * self.segment_length + np.arange(self.segment_length)
        mask = (position < documents.asked[document][:, None]) & (document >= 0)[:, None]
        index = np.where(mask, documents.starts[document][:, None] + position, 0)
        answer = index + 1

        def masked(values: NDArray[Any], empty: int) -> Tensor:
            return torch.from_numpy(np.where(mask, values.astype(np.int64), empty))

        labels = documents.tokens[answer]
        return Batch(
            tokens=masked(documents.tokens[index], 0),
            labels=masked(labels, IGNORED),
            groups=masked(documents.group[answer], -1),
            reset=torch.tensor([place.reset for place in places]),
            mask=torch.from_numpy(mask),
            extras={
                "bytes": masked(self._text.lengths[labels], 0),
                "position": masked(position, 0),
                "occurrence": masked(documents.occurrence[answer], -1),
            },
        )

    def _constant_bits(self, bits: NDArray[np.float64]) -> dict[str, float]:
        """The result of a model that gives each token the same bits wherever it stands."""
        scorer = self.scorer()
        assert isinstance(scorer, TextScorer)
        table = torch.from_numpy(bits)
        for batch in self.evaluation(batch_size=len(self._held_out.segments)):
            asked = batch.labels != IGNORED
            scorer.add(table[batch.labels[asked]], batch, asked)
        return scorer.result()


class TextScorer(Scorer):
    """Bits per byte, by position in the document and in the segment, and bits per rare identifier.

    Positions are those of the token from which the next is predicted. An identifier counts once all its
    tokens have been scored; one that an evaluation stops in the middle of is left out.
    """

    headline = Text.headline

    def __init__(
        self,
        *,
        metrics: Sequence[Metric],
        places: Sequence[int],
        segment_length: int,
        occurrence_groups: Sequence[int],
        occurrence_tokens: Sequence[int],
    ) -> None:
        self._metrics = [metric.name for metric in metrics]
        self._segment_length = segment_length
        self._positions = torch.tensor(_POSITIONS[1:])
        self._places = torch.tensor(places[1:])
        self._groups = torch.tensor(occurrence_groups, dtype=torch.int64)
        self._tokens = torch.tensor(occurrence_tokens, dtype=torch.int64)
        # bits and bytes, by position in the document and by place in the segment
        self._by_position = torch.zeros(2, len(_POSITIONS), dtype=torch.float64)
        self._by_place = torch.zeros(2, len(places), dtype=torch.float64)
        self._name_bits = torch.zeros(len(self._groups), dtype=torch.float64)
        self._name_tokens = torch.zeros(len(self._groups), dtype=torch.int64)

    def update(self, logits: Tensor, batch: Batch) -> None:
        asked = batch.labels != IGNORED
        given = logits[asked.to(logits.device)].float()
        labels = batch.labels[asked].to(logits.device)
        nats = F.cross_entropy(given, labels, reduction="none")
        self.add(nats.cpu().double() / math.log(2), batch, asked)

    def add(self, bits: Tensor, batch: Batch, asked: Tensor) -> None:
        """Count bits that are known already.

        Args:
            bits: float64 `[asked positions]`, for each position at which something is asked.
            batch: where they were asked.
            asked: bool `[batch, time]`.
        """
        extras = {name: values[asked].cpu() for name, values in batch.extras.items()}
        both = torch.stack([bits, extras["bytes"].double()])
        position = extras["position"]
        place = position % self._segment_length
        self._by_position.index_add_(1, torch.bucketize(position, self._positions, right=True), both)
        self._by_place.index_add_(1, torch.bucketize(place, self._places, right=True), both)
        named = extras["occurrence"] >= 0
        index = extras["occurrence"][named]
        self._name_bits.index_add_(0, index, bits[named])
        self._name_tokens.index_add_(0, index, torch.ones_like(index))

    def result(self) -> dict[str, float]:
        return {name: bits / n if n else math.nan for name, bits, n in self._sums()}

    def counts(self) -> dict[str, int]:
        """Bytes, or occurrences of rare identifiers."""
        return {name: int(n) for name, _, n in self._sums()}

    def _sums(self) -> list[tuple[str, float, float]]:
        """Name, bits and what they are divided by, for each metric in its order."""
        complete = self._name_tokens == self._tokens
        size = len(_GROUPS)
        groups = self._groups[complete]
        name_bits = torch.bincount(groups, self._name_bits[complete], minlength=size)
        names = torch.stack([name_bits, torch.bincount(groups, minlength=size).double()])
        far = names[:, _GROUPS.index("5-16 back") :].sum(1, keepdim=True)
        total = self._by_position.sum(1, keepdim=True)
        bits, divisors = torch.cat([total, self._by_position, self._by_place, names, far], 1).tolist()
        return list(zip(self._metrics, bits, divisors, strict=True))


class _Documents:
    """Documents end to end.

    Attributes:
        tokens, occurrence, group: by token; which rare identifier the token belongs to and its group, or -1.
        starts, asked, segments: by document; its first token, how many are asked for (all but the first),
            and in how many segments it is read.
    """

    def __init__(
        self,
        documents: Sequence[NDArray[np.integer]],
        segment_length: int,
        named: Sequence[Occurrence] = (),
    ) -> None:
        lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
        self.tokens = np.concatenate(documents)
        self.starts = np.cumsum(lengths) - lengths
        self.asked = lengths - 1
        self.segments = -(-self.asked // segment_length)
        # a view of one number: the training text has no names to mark and may be long
        self.occurrence = self.group = np.broadcast_to(np.int64(-1), len(self.tokens))
        if named:
            self.occurrence, self.group = self.occurrence.copy(), self.group.copy()
        for index, name in enumerate(named):
            start = self.starts[name.document]
            self.occurrence[start + name.begin : start + name.end] = index
            self.group[start + name.begin : start + name.end] = name.group


def _place_borders(segment_length: int) -> tuple[int, ...]:
    """Eighth, quarter and half of a segment: what comes first has the least context."""
    parts = (segment_length // 8, segment_length // 4, segment_length // 2)
    return (0, *sorted({part for part in parts if part}))


def _ranges(borders: Sequence[int], last: int | None = None) -> list[str]:
    ends = [*borders[1:], last]
    return [f"{a}+" if b is None else f"{a}-{b}" for a, b in zip(borders, ends, strict=True)]


def _metrics(positions: Sequence[str], places: Sequence[str]) -> tuple[Metric, ...]:
    def bits_per_byte(name: str, series: str | None = None) -> Metric:
        return Metric(name=name, higher_is_better=False, unit="bits per byte", series=series)

    def per_name(group: str, series: str | None) -> Metric:
        name = f"identifier bits/{group}"
        return Metric(name=name, higher_is_better=False, unit="bits per identifier", series=series)

    return (
        bits_per_byte("bits per byte"),
        *(bits_per_byte(f"bits per byte/position {r}", "bits per byte by position") for r in positions),
        *(bits_per_byte(f"bits per byte/place {r}", "bits per byte by place") for r in places),
        *(per_name(group, "identifier bits") for group in _GROUPS),
        per_name("5+ back", None),
    )
