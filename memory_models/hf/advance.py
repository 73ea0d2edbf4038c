"""Any number of tokens through a member, one call after another, with segments of equal length.

`unroll` ends its last segment and wants rows of equal length. Here rows may hold different numbers of real
tokens (left padding), and the last segment stays open, so that a prompt and the tokens generated after it one
by one are cut into the same segments as the whole text at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat

from memory_models.module import MemoryModule
from memory_models.state import Memory


def advance(
    module: MemoryModule[Any], x: Tensor, memory: Memory | None, mask: Tensor | None
) -> tuple[Tensor, Memory]:
    """Read on, and write each row's segment when it has `segment_length` tokens.

    Args:
        module: any member.
        x: `[batch, time, dim]`, any number of tokens.
        memory: where to go on; None starts afresh.
        mask: bool `[batch, time]`, false at padding; None: none.

    Returns:
        The output `[batch, time, dim]`, zero at padding, and the memory; its open segment is not full.

    Raises:
        TypeError, ValueError: as `MemoryModule.forward`.
    """
    batch, time = x.shape[:2]
    memory = _close_full(module, module.init_memory(batch) if memory is None else memory, x)
    outputs, begin = [], 0
    while begin < time:
        # As many tokens as the row with the least room can take.
        room = module.segment_length - memory.open_length
        if mask is None or batch == 0:
            taken = min(int(room.min()) if batch else module.segment_length, time - begin)
        else:
            held = mask[:, begin : begin + module.segment_length].cumsum(1)
            taken = int((held <= room[:, None]).all(0).sum())
        piece = slice(begin, begin + taken)
        y, memory = module(x[:, piece], memory, mask=None if mask is None else mask[:, piece], close=False)
        memory = _close_full(module, memory, x)
        outputs.append(y)
        begin += taken
    return cat(outputs, 1) if outputs else x, memory


def newest_flags(attention_mask: Any, batch: int, time: int) -> Tensor | None:
    """The last `time` columns of a mask of transformers as bool `[batch, time]`; None if all are real.

    Args:
        attention_mask: `[batch, past + time]` with 0 at padding, or None.
        batch: rows of the call.
        time: tokens of the call.

    Raises:
        ValueError: if it is no such mask, a prepared one of four dimensions say.
    """
    if attention_mask is None:
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2:
        raise ValueError(
            "a memory has to know which tokens are padding, which this attention_mask "
            f"({type(attention_mask).__name__} {shape or ''}) does not say: pass the tokenizer's mask "
            "[batch, time], and generate with a dynamic cache, not cache_implementation='static'"
        )
    if shape[0] != batch or shape[1] < time:
        raise ValueError(f"attention_mask is {shape}, the call has {batch} rows of {time} tokens")
    flags = attention_mask[:, shape[1] - time :] != 0
    return None if bool(flags.all()) else flags


def _close_full(module: MemoryModule[Any], memory: Memory, x: Tensor) -> Memory:
    full = memory.open_length >= module.segment_length
    if not bool(full.any()):
        return memory
    nothing = x.new_zeros(memory.batch_size, 0, module.dim)
    # Between segments is when an outside store is written.
    return module.commit(module(nothing, memory, close=full)[1])
