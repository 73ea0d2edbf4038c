"""What the classic `MemorizingTransformer` carries from call to call, and where documents begin in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing.knn import KNNMemory
from memory_models.state import Memory, memory_state


class KNNMemoryList(list[KNNMemory]):
    """The stores of one model, one for each memorizing layer; each has a row for each row of the batch."""

    def cleanup(self) -> None:
        """Let the stores go, and with them their RAM; the list is empty afterwards."""
        self.clear()

    def clear_memory(
        self,
        batch_indices: int | Iterable[int] | Tensor | None = None,
        memory_indices: Iterable[int] | None = None,
    ) -> None:
        """Forget all pairs of some rows.

        Args:
            batch_indices: rows, as in `KNNMemory.clear`; None stands for all.
            memory_indices: places in this list; None stands for all.

        Raises:
            IndexError: if a row or a store does not exist.
        """
        rows = list(batch_indices) if isinstance(batch_indices, Iterator) else batch_indices
        for memory in self if memory_indices is None else [self[index] for index in memory_indices]:
            memory.clear(rows)

    @contextmanager
    def at_batch_indices(self, indices: int | Iterable[int] | Tensor) -> Iterator[Self]:
        """Within the block every store has only these rows, in this order (`KNNMemory.at_batch_indices`)."""
        rows = list(indices) if isinstance(indices, Iterator) else indices
        with ExitStack() as stack:
            for memory in self:
                stack.enter_context(memory.at_batch_indices(rows))
            yield self


@memory_state
class XLMemories(Memory):
    """Keys and values of the newest tokens, for the layers that attend to them beside their segment.

    To be passed on as it is. It has the length, the items and the order of the list that
    memorizing-transformers-pytorch returns, and also says how much of each row is held: after a clear a row
    starts again from nothing, whatever the other rows hold.

    Attributes:
        layers: for each layer `[batch, cached, 2, dim_head]`, key and value, oldest first, detached.
        held: int64 `[batch]`, so many of a row's last places are held; what stands before is to be ignored.
    """

    layers: tuple[Tensor, ...]
    held: Tensor

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> Tensor:
        return self.layers[layer]

    @property
    def cached(self) -> int:
        """Places of each row."""
        return self.layers[0].shape[1] if self.layers else 0

    @classmethod
    def given(
        cls,
        memories: XLMemories | Sequence[Tensor] | None,
        sizes: tuple[int, int, int],
        device: torch.device,
    ) -> XLMemories:
        """What a caller passes, checked; None holds nothing, and of a plain list everything is held.

        Args:
            sizes: batch, layers, width of a head.

        Raises:
            ValueError: if the number of layers or a shape does not fit.
        """
        batch, layers, dim_head = sizes
        if memories is None:
            memories = [torch.zeros(batch, 0, 2, dim_head, device=device)] * layers
        if len(memories) != layers:
            raise ValueError(f"the model has {layers} XL layers, got xl_memories of {len(memories)}")
        items = tuple(memories)
        for item in items:
            wanted = (batch, items[0].shape[1], 2, dim_head)
            if item.shape != wanted:
                raise ValueError(
                    f"xl_memories must be [batch, cached, 2, dim_head] = {list(wanted)}, "
                    f"got {list(item.shape)}"
                )
        if isinstance(memories, XLMemories):
            return memories
        held = torch.full((batch,), items[0].shape[1] if items else 0, dtype=torch.int64, device=device)
        return cls(layers=items, held=held)

    def after(self, pairs: Sequence[Tensor], time: int, documents: Documents | None, most: int) -> XLMemories:
        """The caches behind a segment of `time` tokens.

        Args:
            pairs: for each layer `[batch, cached + time, 2, dim_head]`.
            documents: where documents begin in the segment.
            most: places a cache has.
        """
        places = self.cached + time
        # A copy: a view would keep the whole segment alive.
        layers = tuple(layer[:, max(0, places - most) :].clone() for layer in pairs)
        held = held_after(self.held, time, documents).clamp(max=most)
        return XLMemories(layers=layers, held=held)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where documents begin within one segment.

    Attributes:
        number: int64 `[batch, time]`: how many have begun up to each token. Tokens of number 0 continue what
            the memories hold.
        begin: int64 `[batch]`: first token of the row's last document; 0 where none begins, and `time` where
            it begins behind the segment.
        cleared: bool `[batch]`: whether any begins, so that what the memories hold of the row is over.
    """

    number: Tensor
    begin: Tensor
    cleared: Tensor

    @classmethod
    def find(cls, tokens: Tensor, sos: int | None, eos: int | None) -> Self | None:
        """Documents begin at each token `sos` and behind each `eos`; None where none begins at all.

        Args:
            tokens: int64 `[batch, time]`.
            sos: id of the token that starts a sequence, or None.
            eos: id of the token that ends one, or None.
        """
        starts = torch.zeros(tokens.shape[0], tokens.shape[1] + 1, dtype=torch.bool, device=tokens.device)
        if sos is not None:
            starts[:, :-1] |= tokens == sos
        if eos is not None:
            starts[:, 1:] |= tokens == eos
        if (sos is None and eos is None) or not starts.any():
            return None
        places = torch.arange(starts.shape[1], device=tokens.device)
        return cls(
            number=starts[:, :-1].cumsum(1),
            begin=torch.where(starts, places, 0).amax(1),
            cleared=starts.any(1),
        )


def held_after(held: Tensor, time: int, documents: Documents | None) -> Tensor:
    """int64 `[batch]`: tokens that a row has when a segment of `time` tokens joins the `held` ones before."""
    if documents is None:
        return held + time
    return torch.where(documents.cleared, time - documents.begin, held + time)


def hide(past: XLMemories, time: int, documents: Documents | None) -> Tensor | None:
    """Which keys of cache and segment a token may not see; None where nothing but the future is hidden.

    Returns:
        bool `[batch, 1, time, cached + time]`.
    """
    cached = past.cached
    missing = torch.arange(cached, device=past.held.device) < (cached - past.held)[:, None]
    if documents is None:
        if not missing.any():
            return None
        return F.pad(missing, (0, time))[:, None, None].expand(-1, 1, time, -1)
    number = documents.number
    # The cache is of the document that goes on, number 0.
    of_keys = F.pad(number, (cached, 0))
    return ((number[:, :, None] != of_keys[:, None]) | F.pad(missing, (0, time))[:, None])[:, None]


@torch.no_grad()
def write_pairs(
    memory: KNNMemory, pairs: Tensor, available: list[int], keep: int, cleared: list[bool]
) -> None:
    """Store what leaves the cache, row by row, after clearing the rows in which a document began.

    Args:
        memory: the layer's store.
        pairs: `[batch, places, 2, dim_head]`, cache and segment, oldest first.
        available: for each row, so many of its last places are held.
        keep: as many newest ones stay in the cache; without a cache 0.
        cleared: for each row, whether what it holds is over.
    """
    # Rows of a store count from its first one, also within at_batch_indices.
    scope = memory._scope
    if any(cleared):
        memory.clear([row for row, clear in zip(scope, cleared, strict=True) if clear])
    places = pairs.shape[1]
    end = max(0, places - keep)
    if len(set(available)) == 1:
        memory.add(pairs[:, min(places - available[0], end) : end])
        return
    for index, (row, count) in enumerate(zip(scope, available, strict=True)):
        with memory.at_batch_indices(row):
            memory.add(pairs[index : index + 1, min(places - count, end) : end])
