"""A memory in the caches of transformers, so that `generate()` reorders it with everything else."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memory_models.state import Memory


class CarriesMemory:
    """Mixin for caches: what selects rows of the cache selects rows of `memory` too."""

    memory: Memory | None
    _made_from: ClassVar[type | None] = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows at int64 `[batch]` indices, after a step of beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at these indices."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row so many times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.memory is not None:
            self.memory = repeat_rows(self.memory, self.memory.batch_size * repeats)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()  # type: ignore[misc]
        self.memory = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused but for 0: a memory cannot unread.

        Raises:
            ValueError: if tokens are to be removed.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "a memory cannot take tokens back, which assisted generation and prompt lookup need; "
                "generate by sampling, greedily or with beams"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    def _select(self, rows: Tensor) -> None:
        if self.memory is not None:
            if rows.dtype == torch.bool:
                rows = rows.nonzero().squeeze(1)
            self.memory = self.memory.select(rows)

    def __reduce__(self) -> Any:
        # The class is made at run time, so pickle would not find it by name.
        return _empty, (type(self)._made_from or type(self),), self.__dict__


class MemoryCache(CarriesMemory, Cache):
    """The memory of a `MemoryModelForCausalLM` where other models have keys and values.

    Like every cache of transformers it is replaced in place by a call; the memory in it is a value.

    Args:
        memory: where to start; None: afresh.
        seen: tokens read so far in this text, of which `generate()` takes off as many from its prompt.
    """

    def __init__(self, memory: Memory | None = None, *, seen: int = 0) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.seen = 0

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        return -1 if self.memory is None else self.memory.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether there is a memory."""
        return self.memory is not None


def carry(cache: Any, memory: Memory) -> None:
    """Let a cache of transformers carry a memory from now on."""
    if not isinstance(cache, CarriesMemory):
        # generate() makes its own cache and keeps it, so the object has to stay the same.
        kind: Any = type(cache)
        cache.__class__ = _carrying(kind)
    cache.memory = memory


def carried(cache: Any) -> Memory | None:
    """The memory that a cache carries, if it does."""
    return cache.memory if isinstance(cache, CarriesMemory) else None


def repeat_rows(memory: Memory, rows: int) -> Memory:
    """Each row repeated until there are `rows`, as `generate()` repeats its prompts for beams.

    Raises:
        ValueError: if `rows` is not a multiple of the memory's.
    """
    times, rest = divmod(rows, max(memory.batch_size, 1))
    if rest or not times:
        raise ValueError(
            f"the memory has {memory.batch_size} rows, the input {rows}; take rows with "
            "memory.select(indices)"
        )
    if times == 1:
        return memory
    device = next(iter(memory.tensors().values())).device
    return memory.select(torch.arange(memory.batch_size, device=device).repeat_interleave(times))


@functools.cache
def _carrying(kind: Any) -> Any:
    return type(f"{kind.__name__}WithMemory", (CarriesMemory, kind), {"_made_from": kind})


def _empty(kind: Any) -> Any:
    made = kind if issubclass(kind, CarriesMemory) else _carrying(kind)
    return made.__new__(made)
