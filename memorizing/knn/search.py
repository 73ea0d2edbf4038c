"""Which engine answers for which row, and one form for all their answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing.knn.exact import TopK, block_top_k, exact_top_k, score_slots
from memorizing.knn.faiss_engine import FaissOptions, FaissRow, Read
from memorizing.knn.results import RowStats
from memorizing.knn.ring import Change, Ring
from memorizing.knn.unit import unit

_PROBE_QUERIES = 64
_TIE = 1e-5  # scores this close (relatively) count as equal when a recall is measured


class Search:
    """Finds the nearest pairs of a ring.

    Args:
        ring: where the pairs lie.
        metric: "ip", "cosine" or "l2".
        index: "exact", "ivf", "auto" or a Faiss factory string.
        options: for the Faiss engines.
    """

    def __init__(self, ring: Ring, metric: str, index: str, options: FaissOptions) -> None:
        self.ring = ring
        self.metric = metric
        self.engines: list[FaissRow] = []
        if index != "exact":
            # Imported here for `auto` inherits from the Faiss engine, and neither is needed for `exact`.
            from memorizing.knn.auto import AutoRow

            dim = ring.keys.shape[2]
            self.engines = [
                AutoRow(dim, metric, options) if index == "auto" else FaissRow(index, dim, metric, options)
                for _ in ring.total
            ]

    def changed(self, rows: Sequence[int], changes: Sequence[Change]) -> None:
        """Bring the indexes up to date after a write."""
        if self.engines:
            for row, change in zip(rows, changes, strict=True):
                self.engines[row].update(change, self.ring.count(row), self.reader(row))

    def clear(self, row: int) -> None:
        """Empty the row's index."""
        if self.engines:
            self.engines[row].reset()

    def rebuild(self, row: int) -> None:
        """Train the row's index again on what it holds now."""
        if self.engines and self.ring.count(row) >= self.engines[row].train_from:
            self.engines[row].build(self.ring.count(row), self.reader(row))

    def reader(self, row: int) -> Read:
        """Gives the keys of neighbouring slots of `row` as its index wants them."""

        def read(slots: range) -> Tensor:
            part = slice(slots.start, slots.stop)
            keys = self.ring.keys[row, part].to(torch.float32)
            return keys if self.ring.scale is None else keys * self.ring.scale[row, part].unsqueeze(1)

        return read

    def find(
        self,
        rows: Sequence[int],
        queries: Tensor,
        k: int,
        *,
        ordered: bool = True,
        exact: bool = False,
        probes: int | None = None,
        within: range | None = None,
    ) -> TopK:
        """The best `k` pairs of each row for its queries.

        Args:
            rows: `n` rows of the ring.
            queries: `[n, q, dim]` on the ring's device in its dtype to compute in.
            k: how many are wanted.
            ordered: best first.
            exact: do not use the indexes.
            probes: inverted lists to read, instead of the usual number.
            within: only pairs whose id lies here; None: all.

        Returns:
            Scores and slots `[n, q, k]`; -inf and -1 where the row holds fewer than `k` of them.
        """
        n, q, _ = queries.shape
        scores = queries.new_full((n, q, k), -torch.inf)
        slots = torch.full((n, q, k), -1, dtype=torch.int64, device=queries.device)
        # Half precision scores would tie; autocast must not reach in here.
        with torch.autocast(queries.device.type, enabled=False):
            for first, last, indexed in self._runs(rows, exact, within):
                places = self.ring.places(rows[first], within)
                take = min(k, sum(map(len, places)))
                part = queries[first:last]
                if indexed and take:
                    found = self._indexed(rows[first], part, take, probes, places)
                else:
                    found = self._exact(rows[first], rows[last - 1] + 1, part, take, places, ordered)
                scores[first:last, :, :take] = found.scores
                slots[first:last, :, :take] = found.slots
        return TopK(scores, slots)

    def _runs(
        self, rows: Sequence[int], exact: bool, within: range | None
    ) -> Iterator[tuple[int, int, bool]]:
        """Cut `rows` into runs: neighbours with equal slots that are searched exactly, or single rows."""
        first = 0
        while first < len(rows):
            last = first + 1
            indexed = not exact and bool(self.engines) and self.engines[rows[first]].index is not None
            while (
                not indexed
                and last < len(rows)
                and rows[last] == rows[last - 1] + 1
                and self.ring.places(rows[last], within) == self.ring.places(rows[first], within)
                and (exact or not self.engines or self.engines[rows[last]].index is None)
            ):
                last += 1
            yield first, last, indexed
            first = last

    def _prepared(self, queries: Tensor) -> Tensor:
        """Queries whose product with a key, scaled and shifted by the ring's numbers, is its score."""
        if self.metric == "cosine":
            return unit(queries)
        return queries * 2 if self.metric == "l2" else queries

    def _finished(self, queries: Tensor, scores: Tensor) -> Tensor:
        """The distance's part that depends on the query alone; rounding must not make it positive."""
        if self.metric == "l2":
            scores = (scores - queries.square().sum(-1, keepdim=True)).clamp(max=0.0)
        return scores

    def _exact(
        self,
        first: int,
        last: int,
        queries: Tensor,
        k: int,
        places: Sequence[range],
        ordered: bool = True,
    ) -> TopK:
        scale, bias = self.ring.scale, self.ring.bias
        prepared, parts = self._prepared(queries), []
        for slots in places or [range(0)]:
            part = slice(slots.start, slots.stop)
            found = exact_top_k(
                prepared,
                self.ring.keys[first:last, part],
                min(k, len(slots)),
                scale=None if scale is None else scale[first:last, part],
                bias=None if bias is None else bias[first:last, part],
                ordered=ordered,
            )
            parts.append(TopK(found.scores, found.slots + slots.start))
        scores, chosen = parts[0]
        if len(parts) > 1:
            scores, chosen = (torch.cat(both, -1) for both in zip(*parts, strict=True))
            scores, best = scores.topk(k, sorted=ordered)
            chosen = chosen.gather(-1, best)
        return TopK(self._finished(queries, scores), chosen)

    def _indexed(
        self, row: int, queries: Tensor, k: int, probes: int | None, places: Sequence[range]
    ) -> TopK:
        """Ask the row's index; queries `[1, q, dim]`, results `[1, q, k]` without gaps."""
        engine = self.engines[row]
        self._probe(row, queries)
        if engine.index is None:
            return self._exact(row, row + 1, queries, k, places)
        asked = unit(queries[0]) if self.metric == "cosine" else queries[0]
        seen = sum(map(len, places))
        fetch = min(math.ceil(k * engine.oversample), seen)
        among = places if seen < self.ring.count(row) else None
        nearest = engine.nearest(asked, probes) if among is None else None
        if nearest is not None:
            asked, queries = asked[nearest.order], queries[:, nearest.order]
        scores, slots = engine.search(asked, fetch, probes, among, nearest)
        if not engine.keeps_all:
            scores = self._rescored(row, queries[0], slots)
            best = block_top_k(scores, k)
            scores, slots = best.scores, slots.gather(1, best.slots)
        # Few lists may hold fewer than k: those queries deserve the exact answer, the row has enough.
        short = (slots[:, k - 1] < 0).nonzero().squeeze(1)
        if short.numel():
            again = self._exact(row, row + 1, queries[:, short], k, places)
            scores[short], slots[short] = again.scores[0].to(scores.dtype), again.slots[0]
        if nearest is not None:
            back = nearest.order.argsort()
            scores, slots = scores[back], slots[back]
        return TopK(scores.unsqueeze(0), slots.unsqueeze(0))

    def _rescored(self, row: int, queries: Tensor, slots: Tensor) -> Tensor:
        scale, bias = self.ring.scale, self.ring.bias
        scores = score_slots(
            self._prepared(queries),
            self.ring.keys[row],
            slots.clamp(min=0),
            scale=None if scale is None else scale[row],
            bias=None if bias is None else bias[row],
        )
        return self._finished(queries, scores).masked_fill(slots < 0, -torch.inf)

    def _probe(self, row: int, queries: Tensor) -> None:
        """Let `auto` measure its recall on some of the queries asked, when it is time."""
        from memorizing.knn.auto import AutoRow

        engine = self.engines[row]
        if not isinstance(engine, AutoRow) or not engine.due() or queries.shape[1] == 0:
            return
        step = -(-queries.shape[1] // _PROBE_QUERIES)
        some = queries[:, ::step]
        engine.probe_at = engine.arrived + 1  # not again inside this measurement
        while engine.judge(self.recall(row, some, 32), self.ring.count(row)):
            pass

    def recall(self, row: int, queries: Tensor, k: int) -> float:
        """Share of the true best `k` that the row's engine finds for `queries` `[1, q, dim]`.

        Counted by score: another pair with an equal score is as good.
        """
        k = min(k, self.ring.count(row))
        if k == 0 or queries.shape[1] == 0:
            return 1.0
        truth = self.find([row], queries, k, exact=True).scores
        found = self.find([row], queries, k).scores
        worst = truth[..., -1:]
        slack = _TIE * truth.abs().amax(-1, keepdim=True).clamp(min=1e-6)
        return (found >= worst - slack).float().mean().item()

    def stats(self, row: int) -> RowStats:
        """What is known about one row."""
        held, given = self.ring.count(row), self.ring.total[row]
        engine = self.engines[row] if self.engines else None
        if engine is None or engine.index is None:
            return RowStats(held, given, "exact", None, None, 1.0)
        return RowStats(held, given, engine.spec, engine.probes, engine.lists, engine.recall)

    def packed(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The engines' state: numbers by row, and the trained indexes without their entries."""
        numbers, tensors = [], {}
        for row, engine in enumerate(self.engines):
            state = engine.state()
            empty = state.pop("empty")
            if empty is not None:
                tensors[f"index.{row}"] = torch.from_numpy(np.array(empty))
            numbers.append(state)
        return numbers, tensors

    def unpack(self, numbers: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Take over what `packed` gave; the ring is already filled."""
        for row, (engine, state) in enumerate(zip(self.engines, numbers, strict=True)):
            empty = tensors.get(f"index.{row}")
            state = state | {"empty": None if empty is None else empty.numpy()}
            engine.restore(state, self.ring.count(row), self.reader(row))
