"""Any number of tokens through a model, one call after another, with segments of equal length.

`unroll` ends its last segment and wants rows of equal length. Here rows may hold different numbers of real
tokens and open segments of different lengths, and the last segment stays open, so that a prompt and the
tokens generated after it one by one are cut into the same segments as the whole text at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memory_models.lm import MemoryLM
from memory_models.module import MemoryModule
from memory_models.state import Memory


def advance(
    model: MemoryModule[Any] | MemoryLM, x: Tensor, memory: Memory | None, mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Read on, and write each row's segment when it has `segment_length` tokens.

    Args:
        model: a memory module (`x` is `[batch, time, dim]`) or a language model (`[batch, time]` ids).
        x: input of any length.
        memory: where to go on; None starts afresh.
        mask: bool `[batch, time]`, false at padding; None: none.

    Returns:
        The outputs `[batch, time, dim]`, zero at padding, or logits `[batch, time, vocab_size]`, and the
        memory; its open segment is not full.

    Raises:
        TypeError, ValueError: as the model.
    """
    outputs = []
    for y, after in pieces(model, x, memory, mask):
        outputs.append(y)
        memory = after
    return torch.cat(outputs, 1), memory


def pieces(
    model: MemoryModule[Any] | MemoryLM, x: Tensor, memory: Memory | None, mask: Tensor | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """As `advance`, call by call: the output of each, `[batch, some, ...]`, and the memory after it."""
    batch, time = x.shape[:2]
    memory = model.init_memory(batch) if memory is None else memory
    begin = 0
    while True:
        # As many tokens as the row with the least room can take: none if it was left open though full.
        room = model.segment_length - memory.open_length
        if mask is None:
            taken = min(int(room.min()) if batch else model.segment_length, time - begin)
        else:
            held = mask[:, begin : begin + model.segment_length].cumsum(1)
            taken = int((held <= room[:, None]).all(0).sum())
        piece = slice(begin, begin + taken)
        flags = None if mask is None else mask[:, piece]
        full = room <= (taken if flags is None else flags.sum(1))
        ends = bool(full.any())
        y, memory = model(x[:, piece], memory, mask=flags, close=full if ends else False)[:2]
        if ends:
            # Between segments is when an outside store is written.
            memory = model.commit(memory)
        yield y, memory
        begin += taken
        if begin == time:
            return
