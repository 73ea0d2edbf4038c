"""The store itself: one ring of keys and values for each row, first in, first out.

Every pair a row was ever given has an id: 0, 1, 2, … in order of arrival, never used twice, not even after
a clear. The pair at position `p` since the last clear lives in slot `p % capacity`, key and value alike, so
that the two cannot get out of step; it is held until `capacity` younger pairs have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memorizing.knn import pages
from memorizing.knn.results import Held
from memorizing.knn.unit import inverse_lengths


class Change(NamedTuple):
    """What one write did to a row: the slots that lost their pair, and the slots that got one."""

    removed: list[range]
    added: list[range]


class Ring:
    """Keys `[rows, capacity, dim]` and values `[rows, capacity, value_dim]` with a counter for each row.

    Attributes:
        total: for each row, pairs written since its last clear.
        first_id: for each row, the id of the first pair written after its last clear.
        scale: `[rows, capacity]` 1 / |key|, for the cosine; otherwise None.
        bias: `[rows, capacity]` -|key|^2, for the distance; otherwise None.
        hits: int64 `[rows, capacity]` times a pair was retrieved, if asked for; otherwise None.
    """

    def __init__(
        self,
        *,
        rows: int,
        capacity: int,
        dim: int,
        value_dim: int,
        metric: str,
        dtype: torch.dtype,
        device: torch.device,
        track_hits: bool,
    ) -> None:
        # zeros, not empty: the pages are only claimed when written, and a dot product over a slot that was
        # never written must stay finite.
        self.compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = self.compute_dtype) -> Tensor:
            return torch.zeros(rows, capacity, *shape, dtype=dtype, device=device)

        # A memory made in inference mode must still be writable outside of it.
        with torch.inference_mode(False):
            self.keys = zeros(dim, dtype=dtype)
            self.values = zeros(value_dim, dtype=dtype)
            self.scale = zeros() if metric == "cosine" else None
            self.bias = zeros() if metric == "l2" else None
            self.hits = zeros(dtype=torch.int64) if track_hits else None
        self.capacity = capacity
        self.total = [0] * rows
        self.first_id = [0] * rows

    def count(self, row: int) -> int:
        """Pairs the row holds."""
        return min(self.total[row], self.capacity)

    def oldest_id(self, row: int) -> int:
        """Id of the oldest pair held (of the next pair to come, when the row is empty)."""
        return self.first_id[row] + self.total[row] - self.count(row)

    def slots(self, row: int) -> Tensor:
        """Slots of the pairs held, oldest first, int64 `[count]`."""
        total = self.total[row]
        positions = torch.arange(total - self.count(row), total, device=self.keys.device)
        return positions % self.capacity

    def places(self, row: int, within: range | None = None) -> list[range]:
        """Slots of the pairs held, or of those with an id in `within`: at most two ranges, none empty."""
        if within is None:
            return [range(self.count(row))] if self.total[row] else []
        first = max(self.total[row] - self.count(row), within.start - self.first_id[row])
        last = min(self.total[row], within.stop - self.first_id[row])
        return self._ranges(first, max(0, last - first))

    def clear(self, row: int) -> None:
        """Forget the row's pairs at once; nothing is overwritten, but nothing of it can be reached."""
        self.first_id[row] += self.total[row]
        self.total[row] = 0

    @torch.no_grad()
    def write(self, rows: Sequence[int], keys: Tensor, values: Tensor) -> list[Change]:
        """Append `[len(rows), n, …]` keys and values in the store's dtype; the oldest pairs give way."""
        arrived = keys.shape[1]
        n = min(arrived, self.capacity)
        keys, values = keys[:, arrived - n :], values[:, arrived - n :]
        aside: list[tuple[Tensor, Tensor]] = []
        if self.scale is not None:
            aside.append((self.scale, inverse_lengths(keys.to(self.compute_dtype))))
        if self.bias is not None:
            aside.append((self.bias, -keys.to(self.compute_dtype).square().sum(-1)))
        changes = []
        for index, row in enumerate(rows):
            begin = self.total[row] + arrived - n
            held = self.count(row)
            lost = min(held, max(0, held + arrived - self.capacity))
            change = Change(self._ranges(self.total[row] - held, lost), self._ranges(begin, n))
            first = 0
            for slots in change.added:
                to = slice(slots.start, slots.stop)
                part = slice(first, first + len(slots))
                self.keys[row, to] = keys[index, part]
                self.values[row, to] = values[index, part]
                for store, new in aside:
                    store[row, to] = new[index, part]
                if self.hits is not None:
                    self.hits[row, to] = 0
                first += len(slots)
            self.total[row] += arrived
            changes.append(change)
        return changes

    def _ranges(self, position: int, n: int) -> list[range]:
        """The slots of `n` neighbouring positions: one range, or two where the ring closes."""
        start = position % self.capacity
        head = min(n, self.capacity - start)
        return [r for r in (range(start, start + head), range(n - head)) if len(r)]

    def ids(self, rows: Sequence[int], slots: Tensor) -> Tensor:
        """Ids of the pairs in `slots` `[len(rows), …]`; -1 stays -1."""
        newest = [self.total[row] - 1 for row in rows]
        last = self._per_row([position % self.capacity for position in newest], slots)
        # Up to the newest pair's slot this turn of the ring, behind it the turn before.
        turn = [self.first_id[row] + p - p % self.capacity for row, p in zip(rows, newest, strict=True)]
        this = self._per_row(turn, slots)
        ids = slots + torch.where(slots > last, this - self.capacity, this)
        return ids.masked_fill_(slots < 0, -1)

    def find(self, rows: Sequence[int], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of the pairs with these ids `[len(rows), …]` (0 where gone), and which are still held."""
        oldest = self._per_row([self.oldest_id(row) for row in rows], ids)
        first = self._per_row([self.first_id[row] for row in rows], ids)
        end = self._per_row([self.first_id[row] + self.total[row] for row in rows], ids)
        held = (ids >= oldest) & (ids < end)
        return torch.where(held, (ids - first) % self.capacity, 0), held

    def flat(self, rows: Sequence[int], slots: Tensor) -> Tensor:
        """Slots `[len(rows), …]` as indices into the rows laid end to end."""
        return slots + self._per_row([row * self.capacity for row in rows], slots)

    def held(self, row: int) -> Held:
        """All pairs of the row, oldest first, copied."""
        slots = self.slots(row)
        ages = torch.arange(len(slots) - 1, -1, -1, device=self.keys.device)
        return Held(
            self.keys[row, slots],
            self.values[row, slots],
            self.first_id[row] + self.total[row] - 1 - ages,
            ages,
            None if self.hits is None else self.hits[row, slots],
        )

    def stacked(self, rows: Sequence[int], slots: Tensor) -> Tensor:
        """Keys and values, of equal length, in `slots` `[len(rows), …]`, one pair after the other.

        Returns:
            `[slots.numel(), 2, dim]` in the storage dtype, zero for slot -1.
        """
        mask = slots >= 0
        flat = self.flat(rows, slots.clamp(min=0)).flatten()
        dim, dtype, device = self.keys.shape[2], self.keys.dtype, self.keys.device
        pairs = pages.empty(flat.numel(), 2, dim, dtype=dtype, device=device)
        torch.index_select(self.keys.flatten(0, 1), 0, flat, out=pairs[:, 0])
        torch.index_select(self.values.flatten(0, 1), 0, flat, out=pairs[:, 1])
        if not mask.all():
            pairs[~mask.flatten()] = 0
        return pairs

    @staticmethod
    def _per_row(numbers: Sequence[int], like: Tensor) -> Tensor:
        """One number for each row, shaped to broadcast against `like` `[rows, …]`."""
        return torch.tensor(numbers, dtype=torch.int64, device=like.device).view(-1, *[1] * (like.dim() - 1))

    @property
    def nbytes(self) -> int:
        """Bytes set aside for everything the ring stores."""
        held = (self.keys, self.values, self.scale, self.bias, self.hits)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


class Unchanged:
    """Called, it makes sure that the pairs with these ids are all still where they were.

    Args:
        ring: where they are.
        rows: `n` rows.
        ids: `[n, ...]`, -1 where there is none.
    """

    def __init__(self, ring: Ring, rows: Sequence[int], ids: Tensor) -> None:
        self.ring = ring
        self.rows = tuple(rows)
        # The oldest of each row is enough, for the oldest goes first.
        youngest = torch.iinfo(torch.int64).max
        self.oldest = ids.masked_fill(ids < 0, youngest).flatten(1).amin(1) if ids.numel() else None

    def __call__(self) -> None:
        if self.oldest is None:
            return
        for row, oldest in zip(self.rows, self.oldest.tolist(), strict=True):
            if oldest < self.ring.oldest_id(row):
                raise RuntimeError(
                    f"row {row} was cleared, or pairs retrieved from it have given way, before the backward "
                    "pass through attend(): add afterwards, raise max_memories, or use snapshot=True"
                )
