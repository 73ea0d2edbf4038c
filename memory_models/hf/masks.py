"""Which tokens of a call are padding, in the words of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor


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
