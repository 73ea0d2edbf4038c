"""What the classic `MemoryTransformerXL` carries from segment to segment."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memxl.classic_layers import Context

GivenMemories = tuple[Tensor | None, Tensor | None]


class ClassicMemory(NamedTuple):
    """What is carried from segment to segment. A vector that is all zeros is an empty place.

    Attributes:
        short: `[memory layers, batch, tokens held, dim]`, the newest inputs of each memory layer, oldest
            first; a row that wrote fewer tokens than others has empty places before them.
        long: `[batch, slots, dim]`; no slots before the first write.
    """

    short: Tensor
    long: Tensor


class Segment(NamedTuple):
    """An open segment, which `MemoryTransformerXL.read` takes on piece by piece.

    Attributes:
        contexts: what each layer reads: persistent keys, memory, and the tokens so far.
        hiddens: `[memory layers, batch, tokens so far, dim]`, inputs of the memory layers, to be written.
    """

    contexts: tuple[Context, ...]
    hiddens: Tensor


def check_memories(
    given: ClassicMemory | GivenMemories, fresh: ClassicMemory, mem_len: int, lmem_len: int
) -> ClassicMemory:
    """A pair that a user gave, with `fresh`, which is empty, for parts that are None.

    Raises:
        ValueError: if it does not fit the model and the batch that `fresh` is of.
    """
    if len(given) != 2:
        raise ValueError(f"memories must be a pair (short, long), got {len(given)} parts")
    short = fresh.short if given[0] is None else given[0]
    long = fresh.long if given[1] is None else given[1]
    layers, batch, _, dim = fresh.short.shape
    if short.dim() != 4 or (*short.shape[:2], short.shape[3]) != (layers, batch, dim):
        raise ValueError(
            f"the short memory must be [{layers}, {batch}, tokens, {dim}], got {tuple(short.shape)}"
        )
    if short.shape[2] > mem_len:
        raise ValueError(f"the short memory holds {short.shape[2]} tokens, mem_len is {mem_len}")
    if long.shape not in ((batch, lmem_len, dim), (batch, 0, dim)):
        raise ValueError(f"the long memory must be [{batch}, {lmem_len}, {dim}], got {tuple(long.shape)}")
    return ClassicMemory(short, long)


def newest(queue: Tensor, held: int, lengths: Tensor | None, capacity: int) -> Tensor:
    """The newest tokens of each row, aligned at the end, zeros where a row has none.

    Args:
        queue: `[layers, batch, held + time, dim]`, the tokens held and after them those of a segment.
        held: how many were held.
        lengths: int64 `[batch]`, how many of the segment's are real, the first ones; None: all.
        capacity: most tokens to keep.
    """
    total = queue.shape[2]
    kept = min(capacity, total)
    if lengths is None:
        # A copy, so that the memory does not keep the whole queue alive.
        return queue[:, :, total - kept :].clone()
    source = held + lengths[:, None] - kept + torch.arange(kept, device=queue.device)
    rows = torch.arange(queue.shape[1], device=queue.device)[:, None]
    return torch.where(source[..., None] >= 0, queue[:, rows, source.clamp(min=0)], 0)


def may_be_true(values: Tensor) -> bool:
    """Whether any value is true; always so while compiling, where the answer is not known."""
    return torch.compiler.is_compiling() or bool(values.any())
