"""Approximate search with Faiss: one index for each row, kept first in, first out without rebuilding.

Faiss is imported when an index is first asked for, never with the package, and nothing of it is patched.
Its thread count is set in `_threads` alone, for the length of a call, to that of torch.

Real keys are strongly clustered, and inverted lists find them with a recall above 0.98 while reading a few
per cent of the store; they also delete at the price of a scan over ids (a few nanoseconds each). Graph
indexes (HNSW) cannot delete, so they are refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorizing.knn.exact import TopK
from memorizing.knn.ring import Change

Read = Callable[[range], Tensor]
"""Gives the keys `[n, dim]` of neighbouring slots of a row, as its metric wants them indexed."""

# Queries in the order of the lists they read find those in the cache. It pays where not all lists fit there
# (bytes of an index) and several queries read the same one.
_ORDER_FROM_BYTES = 2**22
_TABLE_FROM = 131_072  # from here on a table of ids is cheaper than scanning all ids for those to remove


@dataclass(frozen=True, kw_only=True)
class FaissOptions:
    """How the Faiss engines (`index="ivf"`, `"auto"` or a factory string) build and search.

    Raises:
        ValueError: if a number is out of its range.
    """

    train_from: int = 4096
    """Pairs a row must hold before its index is trained; below, the search is exact."""
    train_sample: int = 16_384
    """Most keys the quantiser is trained on (an even sample of the row)."""
    grow: float = 4.0
    """Train again when a row has grown by this factor since the last training."""
    lists: int | None = None
    """Inverted lists; None: about twice the square root of the pairs held."""
    probes: int = 16
    """Inverted lists read for each query."""
    oversample: float | None = None
    """Candidates fetched for each neighbour wanted, then scored exactly with the stored keys. None: 1.125 for
    `ivf`, whose lists hold bfloat16; else 4. No effect on lists of whole keys ("…,Flat")."""
    crossover: int = 8192
    """`auto`: pairs from which a row leaves the exact search. With 4,096 queries on one thread, lists
    are slower at 2,048 pairs, 1.5 times faster at 4,096, 2.5 at 8,192, 3 at 16,384; few gain later."""
    target_recall: float = 0.98
    """`auto`: recall to hold, measured on live queries, by reading more lists or by going back to exact."""

    def __post_init__(self) -> None:
        for name in ("train_from", "train_sample", "probes", "crossover"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lists is not None and self.lists < 1:
            raise ValueError(f"lists must be at least 1, got {self.lists}")
        if self.oversample is not None and self.oversample < 1:
            raise ValueError(f"oversample must be at least 1, got {self.oversample}")
        if self.grow <= 1:
            raise ValueError(f"grow must be above 1, got {self.grow}")
        if not 0 < self.target_recall <= 1:
            raise ValueError(f"target_recall must lie in (0, 1], got {self.target_recall}")


def load_faiss() -> Any:
    """The faiss module.

    Raises:
        ImportError: if it is not installed, naming the way out.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "this index needs Faiss: `pip install faiss-cpu`; index='exact' needs nothing but torch"
        ) from error
    return faiss


@contextmanager
def _threads(faiss: Any) -> Iterator[None]:
    """Faiss runs with as many threads as torch inside, and as before outside.

    One thread on macOS, where the wheels of torch and Faiss bring an OpenMP each and crash with more.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def make_index(spec: str, dim: int, metric: str) -> Any:
    """An untrained index for a factory string, made so that it takes ids and deletes by id.

    Raises:
        ValueError: if Faiss does not know the string, or its index cannot delete.
    """
    faiss = load_faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    # Only inverted lists keep ids of their own; the others would number by position and shift on deletion.
    keeps_ids = "IVF" in spec or "IDMap" in spec
    try:
        index = faiss.index_factory(dim, spec if keeps_ids else f"IDMap,{spec}", kind)
    except RuntimeError as error:
        raise ValueError(f"Faiss cannot make index {spec!r} for dim {dim}: {error}") from error
    try:
        index.remove_ids(np.empty(0, np.int64))
    except RuntimeError as error:
        raise ValueError(
            f"index {spec!r} cannot remove entries, which first in, first out needs; "
            "take 'ivf', 'auto', 'exact' or a factory string with inverted lists such as 'IVF256,Flat'"
        ) from error
    return index


class Nearest(NamedTuple):
    """The lists to read for each of some queries, and an order of the queries in which neighbours share them.

    Attributes:
        order: `[q]`, the queries' places, those of the same nearest list side by side.
        lists: `[q, probes]` in this order, nearest first.
        scores: of the lists' centres, alike.
    """

    order: Tensor
    lists: np.ndarray
    scores: np.ndarray


class FaissRow:
    """The Faiss index of one row. Ids in the index are slots of the ring.

    Attributes:
        index: the Faiss index, or None while the row is searched exactly.
        trained_on: pairs the row held at the last training.
        probes: inverted lists read for each query, or None for an index without them.
        lists: how many there are.
        recall: as last measured, or None.
    """

    def __init__(self, spec: str, dim: int, metric: str, options: FaissOptions) -> None:
        self.spec = spec
        self.dim = dim
        self.metric = metric
        self.options = options
        self.keeps_all = re.fullmatch(r"(IDMap2?,)?(IVF[^,]*,)?Flat", spec) is not None
        usual = 1.125 if spec == "ivf" else 4
        self.oversample = 1 if self.keeps_all else options.oversample or usual
        self.empty: np.ndarray | None = None
        self.trained_on = 0
        self.probes: int | None = None
        self.lists: int | None = None
        self.recall: float | None = None
        self.index: Any = None
        load_faiss()
        if spec != "ivf":
            self._check(spec)

    def _check(self, spec: str) -> None:
        inverted = load_faiss().try_extract_index_ivf(make_index(spec, self.dim, self.metric))
        if inverted is not None and inverted.nlist > self.train_from:
            raise ValueError(
                f"index {spec!r} has {inverted.nlist} lists, more than the {self.train_from} pairs it is "
                "trained on: raise train_from"
            )

    @property
    def train_from(self) -> int:
        """Pairs from which this row uses an index."""
        return self.options.train_from

    @property
    def nbytes(self) -> int:
        """Bytes of the index, near enough: codes, ids and the lists' centres."""
        if self.index is None:
            return 0
        return self.index.ntotal * (self.index.sa_code_size() + 8) + (self.lists or 0) * self.dim * 4

    def reset(self) -> None:
        """Forget everything, the training too: what comes next may look different."""
        self.index, self.empty, self.trained_on, self.probes, self.lists = None, None, 0, None, None

    def update(self, change: Change, count: int, read: Read) -> None:
        """Follow one write of the ring.

        Args:
            change: the slots that lost and got a pair.
            count: pairs the row now holds.
            read: gives the keys of neighbouring slots.
        """
        if count < self.train_from:
            return
        if self.index is None or count >= self.options.grow * self.trained_on:
            self.build(count, read)
            return
        faiss = load_faiss()
        with _threads(faiss):
            removed = sum(map(len, change.removed))
            if removed >= count:
                self.index.reset()
            elif removed and count >= _TABLE_FROM:
                # Called on the index itself, where the table is known.
                gone = [np.arange(slots.start, slots.stop) for slots in change.removed]
                self.index.remove_ids(np.concatenate(gone))
            else:
                for slots in change.removed:
                    self.index.remove_ids(faiss.IDSelectorRange(slots.start, slots.stop))
            for slots in change.added:
                self._add(slots, count, read)

    def build(self, count: int, read: Read) -> None:
        """Train on the keys in the slots below `count` and index them all."""
        faiss = load_faiss()
        # Two times the square root, to the nearest power of two: 256 lists at 8k pairs, 512 at 65k.
        lists = min(count, self.options.lists or 2 ** int(np.log2(2 * count**0.5) + 0.5))
        # Reading the lists is bound by memory: bfloat16 makes it up to twice as fast as float32, and unlike
        # float16 or codes of a byte it takes keys of any size.
        spec = f"IVF{lists},SQbf16" if self.spec == "ivf" else self.spec
        self.index = make_index(spec, self.dim, self.metric)
        inverted = faiss.try_extract_index_ivf(self.index)
        if inverted is not None:
            # Ten rounds are enough here, and Faiss's warnings on small samples have nothing to say.
            inverted.cp.niter, inverted.cp.min_points_per_centroid = 10, 1
            inverted.cp.max_points_per_centroid = 64
            lists = inverted.nlist
        sample = read(range(count))[:: -(-count // max(self.options.train_sample, 32 * lists))]
        with _threads(faiss):
            self.index.train(_array(sample))
            self.empty = faiss.serialize_index(self.index)
            self._configure(self.options.probes)
            self._add(range(count), count, read)
        self.trained_on = count

    def _configure(self, probes: int) -> None:
        """Set what a stored index does not remember by itself."""
        faiss = load_faiss()
        inverted = faiss.try_extract_index_ivf(self.index)
        if inverted is not None:
            self.lists = inverted.nlist
            self.set_probes(probes)

    def set_probes(self, probes: int) -> None:
        """Read `probes` inverted lists for each query (as many as there are, at most)."""
        assert self.lists is not None
        self.probes = min(probes, self.lists)
        load_faiss().try_extract_index_ivf(self.index).nprobe = self.probes

    def _add(self, slots: range, count: int, read: Read) -> None:
        faiss = load_faiss()
        if count >= _TABLE_FROM and self.spec == "ivf" and self.index.direct_map.no():
            self.index.set_direct_map_type(faiss.DirectMap.Hashtable)
        self.index.add_with_ids(_array(read(slots)), np.arange(slots.start, slots.stop))

    def nearest(self, queries: Tensor, probes: int | None = None) -> Nearest | None:
        """Choose the lists before the search, so that queries `[q, dim]` can be asked in a better order.

        Returns:
            None where that would not pay, or the index hides its lists.
        """
        faiss = load_faiss()
        if self.lists is None or len(queries) < self.lists or not isinstance(self.index, faiss.IndexIVF):
            return None
        if self.index.ntotal * self.index.code_size < _ORDER_FROM_BYTES:
            return None
        with _threads(faiss), self._reading(probes) as reading:
            scores, lists = self.index.quantizer.search(_array(queries), reading)
        order = torch.from_numpy(lists[:, 0]).argsort()
        return Nearest(order.to(queries.device), lists[order.numpy()], scores[order.numpy()])

    @contextmanager
    def _reading(self, probes: int | None) -> Iterator[int | None]:
        """For a while `probes` lists are read for a query; None: as usual."""
        usual = self.probes
        if probes is None or usual is None:
            yield usual
            return
        try:
            self.set_probes(probes)
            yield self.probes
        finally:
            self.set_probes(usual)

    def search(
        self,
        queries: Tensor,
        k: int,
        probes: int | None = None,
        among: Sequence[range] | None = None,
        nearest: Nearest | None = None,
    ) -> TopK:
        """The best `k` of each query `[q, dim]`; slots are -1 where Faiss found fewer.

        Args:
            queries: as the metric wants them.
            k: neighbours, times `oversample` when they will be scored again.
            probes: inverted lists to read in this call instead of the usual number.
            among: at most two ranges of slots outside of which nothing is found; None: everywhere.
            nearest: from `nearest`, with the same `probes`; the queries come in its order, without `among`.
        """
        faiss = load_faiss()
        wanted = _array(queries)
        scores = np.empty((len(wanted), k), np.float32)
        slots = np.empty((len(wanted), k), np.int64)
        with _threads(faiss), self._reading(probes):
            if nearest is None:
                params = None if among is None else self._params(among)
                self.index.search(wanted, k, D=scores, I=slots, params=params)
            else:
                self.index.search_preassigned(wanted, k, nearest.lists, nearest.scores, D=scores, I=slots)
        found = torch.from_numpy(scores).to(queries.device)
        if self.metric == "l2":
            found.neg_()
        places = torch.from_numpy(slots).to(queries.device)
        return TopK(found.masked_fill_(places < 0, -torch.inf), places)

    def _params(self, among: Sequence[range]) -> Any:
        # Python keeps what a selector points to only as long as somebody holds it: Faiss's wrappers do.
        faiss = load_faiss()
        first, *rest = (faiss.IDSelectorRange(slots.start, slots.stop) for slots in among)
        selector = faiss.IDSelectorOr(first, rest[0]) if rest else first
        if self.probes is None:
            return faiss.SearchParameters(sel=selector)
        return faiss.SearchParametersIVF(sel=selector, nprobe=self.probes)

    def state(self) -> dict[str, Any]:
        """What a copy needs beside the keys: the trained, empty index and the numbers around it."""
        return {"empty": self.empty, "trained_on": self.trained_on, "probes": self.probes}

    def restore(self, state: dict[str, Any], count: int, read: Read) -> None:
        """Become the row that gave this `state` and held `count` pairs."""
        self.reset()
        if state["empty"] is None:
            return
        faiss = load_faiss()
        self.empty = np.asarray(state["empty"], np.uint8)
        self.index = faiss.deserialize_index(self.empty)
        self.trained_on = state["trained_on"]
        if state["probes"] is not None:
            self._configure(state["probes"])
        with _threads(faiss):
            self._add(range(count), count, read)


def _array(tensor: Tensor) -> np.ndarray:
    """Contiguous float32 rows for Faiss; no copy where the tensor already is that."""
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
