"""`KNNMemory` against memorizing-transformers-pytorch's and against Faiss: searching, adding, a layer's step.

Both processes load this file, and in one of them this project does not exist: outside functions it imports
only the standard library and torch.

Every value is its key reversed, so that a search which returns another key's value is found out.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.speed import Case, Work

DIM, K, QUERIES, HEADS, ADDED = 64, 32, 4096, 8, 512
SIZES = {"2k": 2_048, "8k": 8_192, "16k": 16_384, "65k": 65_536, "262k": 262_144}
GRID = ("2k", "16k", "65k", "262k")
PUBLISHED, FLAT = "memorizing-transformers-pytorch", "faiss-cpu"
NEAR_LIMIT = {"2k": 0.25, "16k": 0.45, "65k": 0.58, "262k": 0.65}
EXACT_RECALL, LISTS_RECALL = 1.0, 0.96
_CENTRES, _NOISE = 256, 0.3
_SCALE = 20.0  # of the attention, as the published layer has it at first
_CHUNKS = 16  # so many different ones are added in turn
_ROOM = 64  # adds that the published memory has room for
_PROBES = {"65k": 4, "262k": 4}  # inverted lists read for each query, as few as the recall allows; else 8
_CHECKED = 256  # queries of a row by which the recall is measured


def cases() -> list[Case]:
    """Rows and sizes, exact and with inverted lists; then Faiss flat, adding, and a layer's step."""
    return [*_lookups(), *_laid_out(), *_flat(), *_adds(), *_layers()]


def _lookups() -> Iterator[Case]:
    for index, rows, size in itertools.product(("exact", "ivf"), (2, 8), GRID):
        yield _case(
            f"knn/lookup {index}/r{rows}/m{size}",
            step="lookup",
            index=index,
            rows=rows,
            size=size,
            faster=3.0 if index == "ivf" else None,
            near_limit=NEAR_LIMIT[size] if index == "exact" else None,
            note="ours returns scores and ids; the published search can only lay the pairs out"
            + (f"; {_probes(SIZES[size])} lists read a query (by default 16)" if index == "ivf" else ""),
        )
    for size in ("2k", "16k"):
        yield _case(
            f"knn/lookup exact without structure/r2/m{size}",
            step="lookup",
            index="exact",
            rows=2,
            size=size,
            data="random",
            near_limit=NEAR_LIMIT[size],
            quick=size == "2k",
            note="keys of a normal distribution, where an approximate search finds little",
        )


def _laid_out() -> Iterator[Case]:
    for index, size in itertools.product(("exact", "ivf"), GRID):
        yield _case(
            f"knn/search {index}/r2/m{size}",
            step="search",
            index=index,
            rows=2,
            size=size,
            note="both lay keys and values out",
        )


def _flat() -> Iterator[Case]:
    for size in GRID:
        yield _case(
            f"knn/lookup exact or Faiss flat/r2/m{size}",
            step="lookup",
            index="exact",
            rows=2,
            size=size,
            package=FLAT,
            queries={"65k": 1024, "262k": 512}.get(size, QUERIES),
            faster=2.0 if size in ("65k", "262k") else None,
            near_limit=NEAR_LIMIT[size],
            note="both return scores and ids; Faiss is `IndexFlatIP`",
        )


def _adds() -> Iterator[Case]:
    for index, size in itertools.product(("exact", "ivf"), GRID):
        exact = index == "exact"
        yield _case(
            f"knn/add {index}/r2/m{size}",
            step="add",
            index=index,
            rows=2,
            size=size,
            faster=50.0 if exact else None,
            pause=1e-3 if exact else None,
            singly=_ROOM // 2,
            note=f"{ADDED} pairs a row; ours is full and forgets as many, the published one has room, for at "
            "its limit it forgets everything",
        )


def _layers() -> Iterator[Case]:
    for index, size in itertools.product(("exact", "ivf"), ("2k", "8k", "16k", "65k")):
        targets = {"exact": 1.6, "ivf": 3.5}
        yield _case(
            f"knn/layer {index}/r2/m{size}",
            step="layer",
            index=index,
            rows=2,
            size=size,
            faster=targets[index] if size == "8k" else None,
            note="search for 8 heads of 512 queries, attention forward and backward, 512 pairs added a row",
        )


def _case(
    name: str,
    *,
    step: str,
    index: str,
    rows: int,
    size: str,
    package: str = PUBLISHED,
    queries: int = QUERIES,
    data: str = "clustered",
    **fields: Any,
) -> Case:
    from benchmarks.speed import Case

    held = SIZES[size]
    return Case(
        name=name,
        package=package,
        settings={
            "step": step,
            "index": index,
            "rows": rows,
            "held": held,
            "queries": queries,
            "data": data,
            "against": package,
            "seed": 0,
        },
        work=least_work(step=step, index=index, rows=rows, held=held, queries=queries),
        # A row smaller than the index is trained on is searched exactly, and must be.
        recall=LISTS_RECALL if index == "ivf" and held >= 4096 else EXACT_RECALL,
        **fields,
    )


def _probes(held: int) -> int:
    return next((few for size, few in _PROBES.items() if SIZES[size] == held), 8)


def least_work(*, step: str, index: str, rows: int, held: int, queries: int) -> Work:
    """Operations and bytes of the cheapest ways known to do a step.

    Exact search takes every query's product with every key; nothing is counted for choosing among the
    scores. With inverted lists it takes the product with the centres and with the keys of one list: least if
    there are as many lists as keys in each. Attention takes the products with the `K` values forward, and
    with `K` values and keys backward. Of bytes each key is read once, each result written once.
    """
    from benchmarks.speed import Work

    asked = rows * queries
    scored = float(held) if index == "exact" else 2 * held**0.5
    operations, numbers = 0.0, 0.0
    if step == "add":
        return Work(operations=0, bytes=4 * 2 * rows * ADDED * 2 * DIM)
    operations += 2 * asked * scored * DIM
    numbers += rows * held * DIM + asked * DIM
    if step == "lookup":
        numbers += 3 * asked * K  # a score and an id of twice its size
    elif step == "search":
        numbers += asked * K * 2 * DIM
    else:
        operations += 3 * 2 * asked * K * DIM
        numbers += rows * held * DIM + 3 * asked * DIM + 2 * rows * ADDED * 2 * DIM
    return Work(operations=operations, bytes=4 * numbers)


def keys_and_queries(
    *, rows: int, held: int, more: int, queries: int, data: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `[rows, held, DIM]`, further ones `[rows, more, DIM]`, and queries `[rows, queries, DIM]`.

    Args:
        rows: number of rows.
        held: keys to begin with.
        more: keys to add.
        queries: of each row.
        data: "clustered", unit vectors around 256 centres with queries near keys held, as a memorizing layer
            makes them; or "random", independent normal numbers.
        seed: of everything.

    Raises:
        ValueError: if `data` is neither.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, DIM, generator=generator)

    if data == "random":
        return normal(rows, held), normal(rows, more), normal(rows, queries)
    if data != "clustered":
        raise ValueError(f"data must be 'clustered' or 'random', got {data!r}")
    centres = normal(_CENTRES)
    which = torch.randint(_CENTRES, (rows, held + more), generator=generator)
    keys = F.normalize(centres[which] + _NOISE * normal(rows, held + more), dim=-1)
    near = torch.randint(held, (rows, queries, 1), generator=generator).expand(-1, -1, DIM)
    # A unit vector's numbers are an eighth of those of a centre: so is the noise that moves it as far.
    asked = keys.gather(1, near) + _NOISE * DIM**-0.5 * normal(rows, queries)
    return keys[:, :held], keys[:, held:], F.normalize(asked, dim=-1)


def with_values(keys: Tensor) -> Tensor:
    """Pairs `[..., 2, DIM]` of keys and the values that belong to them."""
    return torch.stack([keys, keys.flip(-1)], -2)


class Store(Protocol):
    """A memory under test."""

    capacity: int

    def add(self, pairs: Tensor) -> None: ...

    def lookup(self, queries: Tensor) -> object:
        """Search as cheaply as it can be done."""

    def search(self, queries: Tensor) -> Tensor:
        """Pairs `[rows, ..., K, 2, DIM]`."""

    def attend(self, queries: Tensor) -> Tensor:
        """Attention of queries over what they find, differentiable."""


def theirs(settings: Mapping[str, Any], weights: str) -> Stepping:
    """The published memory, or Faiss's exact index."""
    kind = {PUBLISHED: PublishedStore, FLAT: FlatStore}[settings["against"]]
    return Stepping(kind, settings)


def ours(settings: Mapping[str, Any], weights: str) -> Stepping:
    """Our memory."""
    return Stepping(OurStore, settings)


class Stepping:
    """Fills a store with the case's keys, then takes the case's step over and over.

    Args:
        kind: makes a store of the settings and the number of pairs that it shall keep.
        settings: what `_case` put into the case.
    """

    def __init__(self, kind: Any, settings: Mapping[str, Any]) -> None:
        self.kind, self.settings = kind, settings
        rows, self.held = settings["rows"], settings["held"]
        self.keys, more, self.queries = keys_and_queries(
            rows=rows,
            held=self.held,
            more=_CHUNKS * ADDED,
            queries=settings["queries"],
            data=settings["data"],
            seed=settings["seed"],
        )
        self.more = [with_values(chunk) for chunk in more.split(ADDED, dim=1)]
        self.given: list[int] = []
        generator = torch.Generator().manual_seed(settings["seed"] + 1)
        self.direction = torch.randn(rows, HEADS, settings["queries"] // HEADS, DIM, generator=generator)
        self.store: Store = kind(settings, self.held)
        # In pieces, as a model does, and so that all pairs are never there twice.
        for chunk in self.keys.split(4 * ADDED, dim=1):
            self.store.add(with_values(chunk))

    def step(self, index: int) -> None:
        """One search, add, or layer's step."""
        self._take(self.store, self.queries, self.more[index % _CHUNKS], self.direction)
        if self.settings["step"] in ("add", "layer"):
            self.given.append(index % _CHUNKS)

    def warm_up(self) -> None:
        """The same on a small store of its own."""
        store = self.kind(self.settings, 4 * K)
        store.add(with_values(self.keys[:, : 2 * K]))
        few = 2 * HEADS
        self._take(store, self.queries[:, :few], self.more[0][:, :few], self.direction[:, :, :2])

    def results(self) -> dict[str, Tensor]:
        """The true scores of what some queries find in the store as it is, and of what they should find."""
        asked = self.queries[:, :: max(1, self.queries.shape[1] // _CHECKED)]
        pairs = self.store.search(asked)
        keys, values = pairs[..., 0, :], pairs[..., 1, :]
        found = torch.einsum("rqd,rqkd->rqk", asked, keys)
        found = found.masked_fill((values != keys.flip(-1)).any(-1), -torch.inf)
        # Nothing found is laid out as zeros, whose value would be right.
        found = found.masked_fill((keys == 0).all(-1), -torch.inf)
        added = [self.more[chunk][:, :, 0] for chunk in self.given]
        held = torch.cat([self.keys, *added], 1)[:, -self.store.capacity :]
        best = [(some @ row.T).topk(K).values for some, row in zip(asked, held, strict=True)]
        return {"found": found.flatten(0, 1), "best": torch.cat(best)}

    def _take(self, store: Store, queries: Tensor, pairs: Tensor, direction: Tensor) -> None:
        step = self.settings["step"]
        if step == "add":
            store.add(pairs)
        elif step == "lookup":
            store.lookup(queries)
        elif step == "search":
            store.search(queries)
        else:
            asked = queries.unflatten(1, (HEADS, -1)).detach().requires_grad_()
            (store.attend(asked) * direction).sum().backward()
            store.add(pairs)


class OurStore:
    """`memorizing.KNNMemory`, its limit the number of pairs it holds: each add makes it forget as many."""

    def __init__(self, settings: Mapping[str, Any], capacity: int) -> None:
        from memorizing import FaissOptions, KNNMemory

        self.capacity = capacity
        self.memory = KNNMemory(
            DIM,
            capacity,
            settings["rows"],
            index=settings["index"],
            faiss_options=FaissOptions(probes=_probes(capacity)) if settings["index"] == "ivf" else None,
        )

    def add(self, pairs: Tensor) -> None:
        """Add pairs `[rows, n, 2, DIM]`."""
        self.memory.add(pairs)

    def lookup(self, queries: Tensor) -> object:
        """Scores and ids."""
        return self.memory.lookup(queries, K)

    def search(self, queries: Tensor) -> Tensor:
        """Pairs, laid out."""
        return self.memory.search(queries, K)[0]

    def attend(self, queries: Tensor) -> Tensor:
        """Attention without laying pairs out."""
        return self.memory.attend(queries, K, scale=_SCALE).output


class PublishedStore:
    """The published memory, with room for what is added: at its limit it would forget everything."""

    def __init__(self, settings: Mapping[str, Any], capacity: int) -> None:
        import faiss  # type: ignore[import-not-found, unused-ignore]
        from memorizing_transformers_pytorch import KNNMemory  # type: ignore[import-not-found, unused-ignore]

        self.faiss = faiss
        # It writes to a file, which is gone with the process.
        self.folder = tempfile.TemporaryDirectory()
        self.capacity = capacity + _ROOM * ADDED
        self.memory = KNNMemory(
            dim=DIM,
            max_memories=self.capacity,
            num_indices=settings["rows"],
            memmap_filename=str(Path(self.folder.name) / "memory"),
            multiprocessing=False,
        )

    def add(self, pairs: Tensor) -> None:
        """Add pairs `[rows, n, 2, DIM]`."""
        self._threads()
        self.memory.add(pairs)

    def lookup(self, queries: Tensor) -> object:
        """It has but one search."""
        return self.search(queries)

    def search(self, queries: Tensor) -> Tensor:
        """Pairs, laid out."""
        return self._search(queries)[0]

    def attend(self, queries: Tensor) -> Tensor:
        """Attention over the pairs laid out, as its layer does."""
        pairs, mask = self._search(queries)
        keys, values = pairs.unbind(-2)
        scores = torch.einsum("rhqd,rhqkd->rhqk", queries, keys) * _SCALE
        weights = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max).softmax(-1)
        return torch.einsum("rhqk,rhqkd->rhqd", weights, values)

    def _search(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        self._threads()
        pairs, mask = self.memory.search(queries, K)
        return pairs, mask

    def _threads(self) -> None:
        # Faiss would take all cores.
        self.faiss.omp_set_num_threads(torch.get_num_threads())


class FlatStore:
    """Faiss's exact index, one for each row; it keeps keys only."""

    def __init__(self, settings: Mapping[str, Any], capacity: int) -> None:
        import faiss

        self.faiss = faiss
        self.capacity = capacity
        self.indexes = [faiss.IndexFlatIP(DIM) for _ in range(settings["rows"])]

    def add(self, pairs: Tensor) -> None:
        """Add pairs `[rows, n, 2, DIM]`."""
        for index, keys in zip(self.indexes, pairs[:, :, 0], strict=True):
            index.add(keys.contiguous().numpy())

    def lookup(self, queries: Tensor) -> object:
        """Scores and ids."""
        self.faiss.omp_set_num_threads(torch.get_num_threads())
        return [index.search(some.numpy(), K) for index, some in zip(self.indexes, queries, strict=True)]

    def search(self, queries: Tensor) -> Tensor:
        """The keys found, with the values that belong to them."""
        found = []
        for index, some in zip(self.indexes, queries, strict=True):
            ids = index.search(some.contiguous().numpy(), K)[1]
            keys = torch.from_numpy(index.reconstruct_batch(ids.ravel())).view(*ids.shape, DIM)
            found.append(with_values(keys))
        return torch.stack(found)

    def attend(self, queries: Tensor) -> Tensor:
        """There is none."""
        raise NotImplementedError("Faiss keeps no values to attend to")
