"""`KNNMemory`: keys and values for each row of a batch; the newest are kept, the nearest are found."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from memorizing.knn import checks, packing, storage
from memorizing.knn.attend import attend_found
from memorizing.knn.exact import TopK
from memorizing.knn.faiss_engine import FaissOptions
from memorizing.knn.results import Attended, Entry, Gathered, Held, Lookup, RowStats, entries
from memorizing.knn.ring import Ring
from memorizing.knn.search import Search

METRICS = ("ip", "cosine", "l2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class KNNMemory:
    """A key/value memory for each row of a batch: first in, first out, searched by similarity.

    Each of the `num_indices` rows keeps its newest `max_memories` pairs and never sees another row's. Pairs
    are held in RAM (or on `device`), detached; nothing is written to disk but by `save`. Writing costs
    microseconds whatever the size. The search is exact by default and approximate with Faiss if asked for.

        memory = KNNMemory(dim=64, max_memories=16_000, num_indices=2)
        memory.add(torch.randn(2, 512, 2, 64))
        key_values, mask = memory.search(torch.randn(2, 8, 512, 64), topk=32)

    Every pair has an id, unique in its row for ever: `lookup` returns scores and ids, `gather` reads pairs by
    id when they are wanted. Attention over what is retrieved is `attend`, which lays no pairs out.

    A memory is meant for one thread at a time. After a fork, a child must not use one that its parent has
    searched with several threads (neither torch nor Faiss survives that): start workers by spawning.

    Args:
        dim: length of keys and queries.
        max_memories: pairs a row holds before the oldest gives way.
        num_indices: number of rows, usually the batch size.
        value_dim: length of values; None stands for `dim`.
        metric: what a score is: "ip" `q . k`, "cosine" `q . k / (|q| |k|)` or "l2" `-|q - k|^2`.
        index: "exact"; "ivf" (Faiss inverted lists); "auto" (exact while a row is small, then "ivf" as long
            as the recall measured on live queries holds); or a Faiss factory string that can delete, such as
            "IVF256,SQ8".
        dtype: storage: float32, bfloat16 or float16 (float64 for exact search only). Scores are computed in
            float32 at least.
        device: where the pairs live and are searched; Faiss searches on the CPU.
        track_hits: count how often each pair is retrieved.
        faiss_options: how the Faiss engines build and search.
        memmap_filename: accepted for code written for memorizing-transformers-pytorch; no effect.
        multiprocessing: likewise.

    Raises:
        ImportError: if Faiss is needed and not installed.
        TypeError, ValueError: if an argument has no meaning here.
    """

    def __init__(
        self,
        dim: int,
        max_memories: int = 16_000,
        num_indices: int = 1,
        *,
        value_dim: int | None = None,
        metric: str = "ip",
        index: str = "exact",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        track_hits: bool = False,
        faiss_options: FaissOptions | None = None,
        memmap_filename: str | os.PathLike[str] | None = None,
        multiprocessing: bool | None = None,
    ) -> None:
        self.dim = checks.whole("dim", dim, least=1)
        self.max_memories = checks.whole("max_memories", max_memories, least=1)
        self.num_indices = checks.whole("num_indices", num_indices, least=1)
        self.value_dim = self.dim if value_dim is None else checks.whole("value_dim", value_dim, least=1)
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if not isinstance(index, str):
            raise TypeError(f"index must be a string, such as 'exact', got {index!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if dtype == torch.float64 and index != "exact":
            raise ValueError("Faiss computes in float32: use index='exact' with dtype=torch.float64")
        if memmap_filename is not None or multiprocessing is not None:
            warnings.warn(
                "memmap_filename and multiprocessing have no effect: memories live in RAM, save() keeps them",
                stacklevel=2,
            )
        self.metric = metric
        self.index = index
        self.faiss_options = faiss_options or FaissOptions()
        self._ring = Ring(
            rows=self.num_indices,
            capacity=self.max_memories,
            dim=self.dim,
            value_dim=self.value_dim,
            metric=metric,
            dtype=dtype,
            device=torch.empty(0, device=device).device,
            track_hits=track_hits,
        )
        self._search = Search(self._ring, metric, index, self.faiss_options)
        self._scope = tuple(range(self.num_indices))

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype."""
        return self._ring.keys.dtype

    @property
    def device(self) -> torch.device:
        """Where the pairs live."""
        return self._ring.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes set aside for pairs and counters, and used by the indexes."""
        return self._ring.nbytes + sum(engine.nbytes for engine in self._search.engines)

    @property
    def counts(self) -> Tensor:
        """Pairs held by each row, int64 `[num_indices]` on the CPU."""
        return torch.tensor([self._ring.count(row) for row in range(self.num_indices)])

    def __len__(self) -> int:
        """Pairs held by all rows together."""
        return sum(map(self._ring.count, range(self.num_indices)))

    def __repr__(self) -> str:
        return (
            f"KNNMemory(dim={self.dim}, max_memories={self.max_memories}, num_indices={self.num_indices}, "
            f"metric={self.metric!r}, index={self.index!r}, dtype={self.dtype}, device='{self.device}'): "
            f"{len(self)} pairs"
        )

    @contextmanager
    def at_batch_indices(self, rows: int | Iterable[int] | Tensor) -> Iterator[Self]:
        """Within the block the memory has only these rows, in this order; its calls take as large a batch.

        Whatever happens in the block, all rows are back afterwards (or those of the block around it).

        Args:
            rows: row numbers, or a bool tensor `[num_indices]`. Also in a nested block they count from the
                memory's first row.

        Raises:
            IndexError: if a row does not exist.
            ValueError: if a row is named twice.
        """
        before = self._scope
        self._scope = checks.row_numbers(rows, self.num_indices)
        try:
            yield self
        finally:
            self._scope = before

    def add(self, memories: Tensor, values: Tensor | None = None) -> None:
        """Append pairs to each row; the oldest give way. Gradients stop here.

        Args:
            memories: `[batch, n, 2, dim]`, key and value of each pair, oldest first; or, with `values`, the
                keys alone, `[batch, n, dim]`. `n` may be 0, or more than a row can hold.
            values: `[batch, n, value_dim]`.

        Raises:
            TypeError: if a tensor is not of floating point.
            ValueError: if a shape does not fit, or a number is NaN or infinite (in the storage dtype).
                Nothing has been added then.
        """
        batch = len(self._scope)
        if values is None:
            if self.value_dim != self.dim:
                raise ValueError(
                    f"values have {self.value_dim} numbers and keys {self.dim}: call add(keys, values)"
                )
            checks.floating("memories", memories, (batch, None, 2, self.dim), "[batch, n, 2, dim]")
            stored = self._stored(memories)
            checks.finite("memories", stored)
            keys, values = stored.unbind(2)
        else:
            checks.floating("keys", memories, (batch, None, self.dim), "[batch, n, dim]")
            n = memories.shape[1]
            checks.floating("values", values, (batch, n, self.value_dim), "[batch, n, value_dim]")
            keys, values = self._stored(memories), self._stored(values)
            checks.finite("keys", keys)
            checks.finite("values", values)
        if keys.shape[1]:
            self._search.changed(self._scope, self._ring.write(self._scope, keys, values))

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype)

    @property
    def next_ids(self) -> Tensor:
        """The id that each row's next pair will get, int64 `[num_indices]` on the CPU."""
        ring = self._ring
        return torch.tensor([ring.first_id[row] + ring.total[row] for row in range(self.num_indices)])

    def clear(self, rows: int | Iterable[int] | Tensor | None = None) -> None:
        """Forget all pairs of some rows.

        Args:
            rows: row numbers counted from the memory's first row, or a bool tensor `[num_indices]`; None
                stands for all rows (within `at_batch_indices`, for its rows).

        Raises:
            IndexError: if a row does not exist.
        """
        for row in self._scope if rows is None else checks.row_numbers(rows, self.num_indices):
            self._ring.clear(row)
            self._search.clear(row)

    def search(
        self, queries: Tensor, topk: int, *, nprobe: int | None = None, increment_hits: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The `topk` nearest pairs of each query, best first, keys and values laid out.

        Args:
            queries: `[batch, ..., dim]`. A query with NaN finds arbitrary pairs of its row.
            topk: pairs wanted; 0 is allowed.
            nprobe: inverted lists to read, for an index that has them, instead of the usual number.
            increment_hits: count this retrieval, if hits are counted at all.

        Returns:
            Pairs `[batch, ..., topk, 2, dim]` in the queries' dtype and on their device, zero where the
            row holds fewer than `topk`; and the bool mask `[batch, ..., topk]`, false there.

        Raises:
            TypeError: if `queries` is not of floating point or `topk` no integer.
            ValueError: if a shape does not fit, if `topk` is negative, or if values are not as long as keys
                (use `lookup` and `gather`).
        """
        if self.value_dim != self.dim:
            raise ValueError(
                f"values have {self.value_dim} numbers and keys {self.dim}, which do not stack: "
                "use lookup() and gather()"
            )
        slots = self._find(queries, topk, nprobe, increment_hits).slots
        shape = (*queries.shape[:-1], slots.shape[-1])
        pairs = self._ring.stacked(self._scope, slots).view(*shape, 2, self.dim)
        return pairs.to(queries.device, queries.dtype), (slots >= 0).view(shape).to(queries.device)

    def lookup(
        self,
        queries: Tensor,
        k: int,
        *,
        nprobe: int | None = None,
        increment_hits: bool = True,
        within: range | None = None,
    ) -> Lookup:
        """As `search`, but only scores and ids: several times cheaper, and nothing is copied.

        Args:
            queries, k, nprobe, increment_hits: as in `search`.
            within: find only pairs whose id lies in this range, as if the others did not exist.

        Returns:
            Scores (float32, or float64 if stored so) and ids, both `[batch, ..., k]` on the queries' device.

        Raises:
            TypeError, ValueError: as `search`, and if `within` is no range or has steps.
        """
        if within is not None and not isinstance(within, range):
            raise TypeError(f"within must be a range, such as range(0, 5), got {within!r}")
        if within is not None and within.step != 1:
            raise ValueError(f"within must be a range without steps, got {within}")
        scores, slots = self._find(queries, k, nprobe, increment_hits, within)
        ids = self._ring.ids(self._scope, slots)
        shape = (*queries.shape[:-1], slots.shape[-1])
        return Lookup(scores.view(shape).to(queries.device), ids.view(shape).to(queries.device))

    def gather(self, ids: Tensor) -> Gathered:
        """Keys and values by id, in the storage dtype, on the ids' device.

        Args:
            ids: int64 `[batch, ...]`, from `lookup`. An id whose pair has given way since, or -1, is masked.

        Raises:
            TypeError: if `ids` is not an integer tensor.
            ValueError: if its batch does not match.
        """
        slots, held = self._located(ids)
        flat = self._ring.flat(self._scope, slots).flatten()
        gone = ~held.flatten().unsqueeze(1)
        keys = self._ring.keys.flatten(0, 1).index_select(0, flat).masked_fill_(gone, 0)
        values = self._ring.values.flatten(0, 1).index_select(0, flat).masked_fill_(gone, 0)
        return Gathered(
            keys.view(*ids.shape, self.dim).to(ids.device),
            values.view(*ids.shape, self.value_dim).to(ids.device),
            held.to(ids.device),
        )

    def ages(self, ids: Tensor) -> Tensor:
        """Pairs a row was given after the one with this id; int64 `[batch, ...]`, -1 where gone."""
        _, held = self._located(ids)
        ends = [self._ring.first_id[row] + self._ring.total[row] - 1 for row in self._scope]
        newest = torch.tensor(ends, device=ids.device).view(-1, *[1] * (ids.dim() - 1))
        return torch.where(held.to(ids.device), newest - ids, -1)

    def _located(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        checks.ids(ids, rows=len(self._scope))
        return self._ring.find(self._scope, ids.to(self.device))

    def attend(
        self,
        queries: Tensor,
        k: int,
        *,
        scale: Tensor | float | None = None,
        nprobe: int | None = None,
        snapshot: bool = False,
    ) -> Attended:
        """Softmax attention of each query over its `k` nearest pairs, differentiable by queries and scale.

        The pairs are never laid out: tens of times faster than `search` followed by attention, and without
        its memory (Memorizing Transformers §3.2). The pairs themselves receive no gradient.

        Args:
            queries: `[batch, ..., dim]`.
            k: pairs attended to.
            scale: factor of the scores before the softmax: a number, or a tensor that broadcasts to
                `[batch, ...]`, such as `[heads, 1]`. None: `dim ** -0.5` for the inner product, else 1.
            nprobe: as in `search`.
            snapshot: copy the retrieved pairs for the backward pass. Needed only if, before it, so much is
                added that these pairs give way, or their row is cleared.

        Returns:
            Output, logsumexp and weights in the queries' dtype, and ids.

        Raises:
            RuntimeError: in the backward pass, if retrieved pairs are gone and there is no snapshot.
            TypeError, ValueError: as `search`, and if `scale` is no number and no such tensor.
        """
        if scale is None:
            scale = self.dim**-0.5 if self.metric == "ip" else 1.0
        checks.queries(queries, rows=len(self._scope), dim=self.dim)
        checks.scale(scale, queries.shape[:-1])
        return attend_found(
            self._ring,
            self._scope,
            queries,
            self._find(queries, k, nprobe, True),
            metric=self.metric,
            scale=scale,
            snapshot=snapshot,
        )

    @torch.no_grad()
    def _find(
        self,
        queries: Tensor,
        k: int,
        nprobe: int | None,
        increment_hits: bool,
        within: range | None = None,
    ) -> TopK:
        """Scores and slots, `[batch, q, k]`."""
        k = checks.whole("k", k, least=0)
        if nprobe is not None:
            checks.whole("nprobe", nprobe, least=1)
        asked = self._asked(queries)
        found = self._search.find(self._scope, asked, k, probes=nprobe, within=within)
        if self._ring.hits is not None and increment_hits:
            hit = self._ring.flat(self._scope, found.slots)[found.slots >= 0]
            self._ring.hits.view(-1).index_add_(0, hit, torch.ones_like(hit))
        return found

    def _asked(self, queries: Tensor) -> Tensor:
        """Queries `[batch, q, dim]` where and as they are computed with."""
        checks.queries(queries, rows=len(self._scope), dim=self.dim)
        asked = queries.detach().to(self.device, self._ring.compute_dtype)
        return asked.reshape(len(self._scope), math.prod(queries.shape[1:-1]), self.dim)

    def contents(self, row: int) -> Held:
        """All pairs of one row, counted from the memory's first, oldest first (copies, on its device).

        Raises:
            IndexError: if the row does not exist.
        """
        (row,) = checks.row_numbers(checks.whole("row", row, least=-(2**62)), self.num_indices)
        return self._ring.held(row)

    def __iter__(self) -> Iterator[Entry]:
        """Every pair, row by row, oldest first. `contents` is faster where a whole row is wanted."""
        for row in range(self.num_indices):
            yield from entries(row, self.contents(row))

    def stats(self) -> list[RowStats]:
        """The state of each row."""
        return [self._search.stats(row) for row in range(self.num_indices)]

    @torch.no_grad()
    def recall(self, queries: Tensor, k: int = 32) -> Tensor:
        """Share of the true `k` nearest that a search finds, measured on these queries; float32 `[batch]`.

        Args:
            queries: `[batch, ..., dim]`; some dozens a row are enough.
            k: neighbours.
        """
        asked = self._asked(queries)
        return torch.tensor(
            [self._search.recall(row, q[None], k) for row, q in zip(self._scope, asked, strict=True)]
        )

    def rebuild(self) -> None:
        """Train the Faiss indexes of the rows in scope again, as when the keys have changed in nature."""
        for row in self._scope:
            self._search.rebuild(row)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole memory to one file; `KNNMemory.load` gives back an equal one.

        The file is complete and on disk before it takes the name `path`: whatever happens, that name holds
        the former content or the new one.
        """
        storage.save(Path(path), *packing.pack(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Self:
        """Read a memory that `save` has written.

        Args:
            path: the file; it is not needed afterwards.
            device: where the memory shall live.

        Raises:
            FileNotFoundError: if there is none.
            MemoryFileError: if the file is damaged, or something else.
        """
        return packing.unpack(cls, *storage.load(Path(path)), device=device)

    def fork(self, *, before: int | None = None) -> Self:
        """A memory of its own with the same pairs and ids, or only those with ids below `before`.

        What both are given from then on goes to each alone, and may get the same ids.
        """
        return packing.fork(self, before)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are memories of their own, with no scope open."""
        return packing.unpack, (type(self), *packing.pack(self), str(self.device))
