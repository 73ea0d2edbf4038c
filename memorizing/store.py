"""Pairs of many streams outside the state: a resource that a memory refers to, not a part of it.

`forward` reads the store and never writes it. What a segment adds waits in the state (`OutsidePairs`) until
`commit` writes it between segments; so it does no harm that a forward runs twice. A state sees the pairs of
its own past and no others, whatever the store was given since.
"""

from __future__ import annotations

import itertools
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memorizing.config import MemorizingConfig
from memorizing.knn import KNNMemory, MemoryFileError, packing, storage
from memorizing.memory import OutsidePairs, PairMemory

_stores: weakref.WeakValueDictionary[int, OutsideStore] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def store_of(number: int) -> OutsideStore:
    """The store of that number: operators take numbers, not objects."""
    return _stores[number]


class Found(NamedTuple):
    """What one row's queries found: the memory that holds the pairs, scores and ids `[stores, i, k]`."""

    memory: KNNMemory
    scores: Tensor
    ids: Tensor


class StoreError(RuntimeError):
    """The store does not hold what a state refers to; the message names why and the way out."""


class OutsideView(NamedTuple):
    """One layer's pairs together with the store that holds most of them, to be read by `KNNAttention`."""

    pairs: OutsidePairs
    store: OutsideStore
    layer: int


class OutsideStore:
    """For each stream a `KNNMemory` a memory layer, with a row for each head of keys and values.

    A stream is what one row of a batch reads from a reset on. It enters the store at its first commit and
    gives way when more than `store_streams` were used after it (streams of training and of evaluation do
    not push each other out). A state that refers to it cannot be read any more then.

    An old state can be read, and go on, until its stream has gone `pending_segments` further. Two states
    that went apart share a stream until both have been committed; then the second gets a copy.

    Args:
        config: sizes and the options named `store_...`.
    """

    def __init__(self, config: MemorizingConfig) -> None:
        self.config = config
        self.layers = len(config.layers_with_memory)
        self._streams: dict[int, _Stream] = {}
        self._most = {True: 0, False: 0}
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _stores[self.number] = self

    @property
    def nbytes(self) -> int:
        """Bytes set aside for the pairs of all streams, and used by their indexes."""
        return sum(stream.nbytes for stream in self._streams.values())

    def bytes_of(self, pairs: OutsidePairs) -> int:
        """The part of `nbytes` that belongs to the rows of a state, of which this is any layer.

        Rows that share a stream share its bytes; a row that was never committed has none.
        """
        held = (self._streams.get(number) for number in set(pairs.stream.tolist()))
        return sum(stream.nbytes for stream in held if stream is not None)

    @property
    def _capacity(self) -> int:
        # So many more that a state as old as `pending_segments` still finds all of its own.
        return self.config.memories + self.config.kept_pairs

    def __len__(self) -> int:
        """Streams held."""
        return len(self._streams)

    def __repr__(self) -> str:
        return f"OutsideStore({len(self)} streams of up to {self.config.memories} pairs a store and layer)"

    @torch.no_grad()
    def commit(self, layers: Sequence[OutsidePairs], *, training: bool = False) -> tuple[OutsidePairs, ...]:
        """Write what the store lacks of these pairs; a second commit of the same state writes nothing.

        Args:
            layers: the pairs of each memory layer.
            training: whose streams they are; they give way among themselves.

        Returns:
            The same pairs, known to be in the store.

        Raises:
            StoreError: if pairs have left the state before they were committed, or the store no longer
                holds what the state refers to, or has other pairs in its place.
            ValueError: if a key or a value is not finite (in the store's dtype).
        """
        recent = layers[0].recent
        kept = recent.keys.shape[2]
        if kept >= self.config.memories:
            return tuple(layers)
        totals, committed = recent.total.tolist(), layers[0].committed.tolist()
        streams = layers[0].stream.tolist()
        # Those in use first, so that none of them gives way to a new one.
        for number in streams:
            if number in self._streams:
                self._streams[number] = self._streams.pop(number)
        self._most[training] = max(self._most[training], len(streams))
        for row, total in enumerate(totals):
            if total > committed[row] or streams[row] >= 0:
                pairs = dict(enumerate(layer.recent for layer in layers))
                streams[row] = self._commit_row(pairs, row, streams[row], committed[row], total, training)
        number = torch.tensor(streams, dtype=torch.int64, device=recent.total.device)
        return tuple(
            OutsidePairs(recent=layer.recent, committed=layer.total.clone(), stream=number.clone())
            for layer in layers
        )

    def _commit_row(
        self,
        layers: Mapping[int, PairMemory],
        row: int,
        number: int,
        committed: int,
        total: int,
        training: bool,
    ) -> int:
        kept = layers[0].keys.shape[2]
        _check_pending(row, committed, total, kept)
        if number < 0:
            number = self._add(_Stream(self._new_memories(layers[0].keys), training))
            self._streams[number].write(layers, row, 0, total)
            return number
        stream = self._find(row, number, committed)
        _check_own(stream, layers, row, number, committed, total)
        held = stream.total
        if held == committed:
            stream.write(layers, row, committed, total)
            return number
        # Somebody has written since: this very past, or another one that began with it.
        same = min(held, total)
        if stream.has(layers, row, max(committed, total - kept), same):
            stream.write(layers, row, same, total)
            return number
        begin = max(0, total - kept)
        needed = range(max(0, total - self.config.memories), begin)
        _check_held(row, needed, stream.oldest, self.config)
        if needed:
            memories = [memory.fork(before=begin) for memory in stream.memories]
        else:
            memories = self._new_memories(layers[0].keys)
        number = self._add(_Stream(memories, training))
        self._streams[number].write(layers, row, begin, total)
        return number

    def read(self, queries: Tensor, view: OutsidePairs, layer: int, k: int) -> dict[int, Found]:
        """Search the store for each row that has pairs there and not in the state.

        Args:
            queries: `[batch, stores, i, dim_head]`.
            view: the rows' counters, and the pairs by which a foreign stream is told.
            layer: number of the memory layer, counted among those.
            k: pairs wanted.

        Returns:
            What was found, by row.

        Raises:
            StoreError: if the store lacks what the state refers to, or has other pairs in its place.
        """
        results: dict[int, Found] = {}
        kept, memories = view.recent.keys.shape[2], self.config.memories
        counters = zip(view.total.tolist(), view.committed.tolist(), view.stream.tolist(), strict=True)
        for row, (total, committed, number) in enumerate(counters):
            needed = range(max(0, total - memories), total - kept)
            if not needed:
                continue
            _check_pending(row, committed, total, kept)
            stream = self._find(row, number, committed)
            _check_held(row, needed, stream.oldest, self.config)
            _check_own(stream, {layer: view.recent}, row, number, committed, total)
            memory = stream.memories[layer]
            results[row] = Found(memory, *memory.lookup(queries[row], k, within=needed))
        return results

    def _find(self, row: int, number: int, committed: int) -> _Stream:
        stream = self._streams.get(number)
        if stream is None:
            raise StoreError(
                f"row {row} refers to stream {number}, which is not in the store: it gave way to streams "
                f"used after it (raise store_streams above {self._limit(True)} for training, "
                f"{self._limit(False)} for evaluation), or the memory belongs to another model (carry the "
                "store over with model.store.save and load)"
            )
        if stream.total < committed:
            raise StoreError(
                f"row {row} has committed {committed} pairs, but the store holds its first {stream.total}: "
                "save the store and the memory together"
            )
        return stream

    def _limit(self, training: bool) -> int:
        return self.config.store_streams or 2 * self._most[training]

    def _add(self, stream: _Stream) -> int:
        group = [number for number, other in self._streams.items() if other.training == stream.training]
        for number in group[: max(0, len(group) + 1 - self._limit(stream.training))]:
            del self._streams[number]
        # Counted numbers would begin alike in every store, and a memory of another model, or one kept while
        # the store was not, would find a stream that is not its own. Not from torch's generator: what a
        # model computes must not depend on when it is committed.
        number = secrets.randbits(63)
        self._streams[number] = stream
        return number

    def _new_memories(self, keys: Tensor) -> list[KNNMemory]:
        config = self.config
        return [
            KNNMemory(
                config.head_width,
                self._capacity,
                config.stores,
                index=config.store_index,
                dtype=getattr(torch, config.store_dtype) if config.store_dtype else keys.dtype,
                device=config.store_device or keys.device,
            )
            for _ in range(self.layers)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all streams to one file, atomically; a memory saved beside it finds its pairs again."""
        about: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for number, stream in self._streams.items():
            packed = [packing.pack(memory) for memory in stream.memories]
            about.append(
                {"number": number, "training": stream.training, "memories": [text for text, _ in packed]}
            )
            for layer, (_, parts) in enumerate(packed):
                tensors |= {f"{number}.{layer}.{name}": part for name, part in parts.items()}
        storage.save(Path(path), {"streams": about}, tensors)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Hold the streams that `save` wrote, and no others.

        Raises:
            FileNotFoundError: if there is no file.
            MemoryFileError: if it is damaged, or was written by a model with other options.
        """
        about, tensors = storage.load(Path(path))
        if "streams" not in about:
            raise MemoryFileError(f"{path} holds one KNNMemory, not an outside store")
        streams = {}
        for entry in about["streams"]:
            memories = []
            for layer, description in enumerate(entry["memories"]):
                prefix = f"{entry['number']}.{layer}."
                parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                device = self.config.store_device
                memory = packing.unpack(KNNMemory, description, parts, device)
                sizes = (memory.dim, memory.max_memories, memory.num_indices)
                wanted = (self.config.head_width, self._capacity, self.config.stores)
                if sizes != wanted or len(entry["memories"]) != self.layers:
                    raise MemoryFileError(
                        f"{path} has memories of (dim_head, pairs, stores) {sizes} in "
                        f"{len(entry['memories'])} layers; this model needs {wanted} in {self.layers}"
                    )
                memories.append(memory)
            streams[entry["number"]] = _Stream(memories, entry["training"])
        self._streams = streams

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "number"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or a pickle is a store of its own, with the same streams.
        self.__dict__.update(state)
        self._register()


class _Stream:
    # One stream's memories, a memory layer each; ids are the numbers of its pairs.
    def __init__(self, memories: list[KNNMemory], training: bool) -> None:
        self.memories, self.training = memories, training
        self._known: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}}

    @property
    def total(self) -> int:
        return int(self.memories[0].next_ids[0])

    @property
    def oldest(self) -> int:
        return self.total - int(self.memories[0].counts[0])

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self.memories)

    def write(self, layers: Mapping[int, PairMemory], row: int, begin: int, end: int) -> None:
        for layer, pairs in layers.items():
            slots = torch.arange(begin, end, device=pairs.keys.device) % pairs.keys.shape[2]
            self.memories[layer].add(pairs.keys[row][:, slots], pairs.values[row][:, slots])

    def has(self, layers: Mapping[int, PairMemory], row: int, begin: int, end: int) -> bool:
        """Whether the pairs with these numbers are the very ones that the state has."""
        for layer, pairs in layers.items():
            memory = self.memories[layer]
            ids = torch.arange(begin, end, device=pairs.keys.device)
            held = memory.gather(ids.expand(memory.num_indices, -1))
            slots = ids % pairs.keys.shape[2]
            same = bool(held.mask.all())
            for theirs, ours in ((held.keys, pairs.keys), (held.values, pairs.values)):
                same = same and _equal(theirs, ours[row][:, slots])
            if not same:
                return False
        return True

    def owns(self, layers: Mapping[int, PairMemory], row: int, committed: int, total: int) -> bool:
        """Whether what the state has and has committed is what the stream holds in its place."""
        for layer, pairs in layers.items():
            # Pieces of one segment ask with the same tensors, for which one comparison is enough.
            known, until = self._known.get((layer, row), (None, 0))
            if known is not None and known() is pairs.keys and until == committed:
                continue
            begin = max(0, total - pairs.keys.shape[2], self.oldest)
            if begin < committed and not self.has({layer: pairs}, row, begin, committed):
                return False
            self._known[layer, row] = weakref.ref(pairs.keys), committed
        return True


def _equal(one: Tensor, other: Tensor) -> bool:
    # In the coarser of both dtypes: the store may be coarser than the state, or the state since converted.
    coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarser), other.to(coarser))


def _check_own(
    stream: _Stream, layers: Mapping[int, PairMemory], row: int, number: int, committed: int, total: int
) -> None:
    if not stream.owns(layers, row, committed, total):
        raise StoreError(
            f"row {row} refers to stream {number}, which holds other pairs in the place of its own: the "
            "memory comes from another copy of this model, whose stream went another way (carry the store "
            "over with model.store.save and load)"
        )


def _check_pending(row: int, committed: int, total: int, kept: int) -> None:
    if committed < total - kept:
        raise StoreError(
            f"row {row} has written {total} pairs, of which {committed} are in the store and {kept} in the "
            "state: call memory = model.commit(memory) between segments (unroll and generate do), or raise "
            "pending_segments"
        )


def _check_held(row: int, needed: range, oldest: int, config: MemorizingConfig) -> None:
    if needed and needed.start < oldest:
        raise StoreError(
            f"row {row} is an old state that needs pairs from number {needed.start} on, but its stream went "
            f"on and holds them from {oldest} on only: to go back further raise pending_segments "
            f"({config.pending_segments})"
        )
