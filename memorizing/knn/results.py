"""What the methods of `KNNMemory` return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Lookup(NamedTuple):
    """Scores `[batch, ..., k]`, largest first, and ids (int64); -inf and -1 where fewer are held."""

    scores: Tensor
    ids: Tensor


class Gathered(NamedTuple):
    """Keys `[batch, ..., dim]` and values `[batch, ..., value_dim]`; zero where bool `mask` is false."""

    keys: Tensor
    values: Tensor
    mask: Tensor


class Held(NamedTuple):
    """All pairs of one row, oldest first: keys `[n, dim]`, values `[n, value_dim]`, the rest int64 `[n]`.

    The age of a pair is the number of pairs its row was given after it; `hits` is None unless counted.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    ages: Tensor
    hits: Tensor | None


class Entry(NamedTuple):
    """One pair: see `Held`. `key` is `[dim]`, `value` `[value_dim]`."""

    row: int
    id: int
    age: int
    key: Tensor
    value: Tensor
    hits: int | None


class RowStats(NamedTuple):
    """The state of one row.

    Attributes:
        held: pairs held.
        given: pairs given since the last clear.
        engine: who answers: "exact", "ivf" or a factory string.
        probes: inverted lists read for each query, if there are any; `lists`: how many there are.
        recall: 1 for the exact engine; what `auto` last measured; None where nothing was.
    """

    held: int
    given: int
    engine: str
    probes: int | None
    lists: int | None
    recall: float | None


class Attended(NamedTuple):
    """What `KNNMemory.attend` returns.

    Attributes:
        output: `[batch, ..., value_dim]`, the weighted sum of the values; zero where nothing is held.
        logsumexp: `[batch, ...]` of the scaled scores, -inf where nothing is held. With it the output can be
            joined with another attention as if one softmax had run over both.
        ids: int64 `[batch, ..., k]`, -1 where fewer than `k` pairs are held.
        weights: `[batch, ..., k]`, summing to one where something is held; detached.
    """

    output: Tensor
    logsumexp: Tensor
    ids: Tensor
    weights: Tensor


def entries(row: int, held: Held) -> Iterator[Entry]:
    """The pairs that `row` holds, one by one, oldest first."""
    keys, values, ids, ages, hits = held
    counted = [None] * len(ids) if hits is None else hits.tolist()
    for index, (number, age) in enumerate(zip(ids.tolist(), ages.tolist(), strict=True)):
        yield Entry(row, number, age, keys[index], values[index], counted[index])
