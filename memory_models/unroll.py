"""Long input through a model of short segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from memory_models.checks import check_flags, check_reset, check_tensor
from memory_models.lm import MemoryLM
from memory_models.module import MemoryModule
from memory_models.state import Memory
from memory_models.wrapped import unwrapped

M = TypeVar("M", bound=Memory)


@overload
def unroll(
    model: MemoryModule[M],
    x: Tensor,
    memory: M | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    segment: int | None = None,
    detach_every: int | None = None,
    close: bool = True,
) -> tuple[Tensor, M]: ...


@overload
def unroll(
    model: MemoryLM | Callable[..., Any],
    x: Tensor,
    memory: Memory | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    segment: int | None = None,
    detach_every: int | None = None,
    close: bool = True,
) -> tuple[Tensor, Any]: ...


def unroll(
    model: MemoryModule[Any] | MemoryLM | Callable[..., Any],
    x: Tensor,
    memory: Memory | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    segment: int | None = None,
    detach_every: int | None = None,
    close: bool = True,
) -> tuple[Tensor, Any]:
    """Cut a long input into segments and carry the memory through them.

    Each row is cut after so many of its own tokens, wherever its padding stands, so that it gives what it
    would give alone.

    Args:
        model: a memory module (`x` is `[batch, time, dim]`) or a language model (`[batch, time]` ids),
            also in `torch.compile` or `DistributedDataParallel`.
        x: input of any length.
        memory: where to go on; if its segment is still open, the first piece completes it.
        mask: bool `[batch, time]`, false at padding, anywhere in a row.
        reset: bool `[batch]` (at the first token) or `[batch, time]`.
        segment: tokens of a segment; None: the model's `segment_length`.
        detach_every: cut the gradient after every so many segments (truncated back-propagation
            through time); None: never.
        close: whether a row's last segment ends with its last token, if it is shorter than the others.

    Returns:
        The outputs `[batch, time, dim]` or logits `[batch, time, vocab_size]`, and the last memory.

    Raises:
        TypeError: if `mask` or `reset` is not boolean, or as the model.
        ValueError: if `segment` or `detach_every` is out of range, if shapes disagree, or if the rows of an
            open segment differ in length, so that no one cut completes them all.
    """
    # A wrapper is called, so that it does its part, but knows nothing of segments.
    inner = unwrapped(model)
    if not hasattr(inner, "segment_length"):
        raise TypeError(f"unroll takes a MemoryModule or a MemoryLM, got {type(inner).__name__}")
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"unroll takes x [batch, time, ...], got {tuple(x.shape)}")
    length = inner.segment_length if segment is None else segment
    if not 1 <= length <= inner.segment_length:
        raise ValueError(f"segment ({length}) must lie between 1 and segment_length ({inner.segment_length})")
    if detach_every is not None and detach_every < 1:
        raise ValueError(f"detach_every ({detach_every}) must be at least 1, or None for full gradients")
    # Here, because slices of a mask that is too long would fit.
    batch, time = x.shape[:2]
    check_flags("mask", mask, (batch, time), x.device)
    check_reset(reset, batch, time, x.device)
    if reset is not None and reset.dim() == 1:
        start = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if x.shape[1]:
            start[:, 0] = reset
        reset = start
    back = None
    if mask is not None:
        x, mask, reset, back = _packed(x, mask, reset)
    outputs, begin, ended = [], 0, 0
    # An open segment may be longer than `segment`; then it ends before the first token.
    room = max(0, length - _open(memory))
    while True:
        end = min(begin + room, x.shape[1])
        last = end == x.shape[1]
        ends: bool | Tensor = close if last and end - begin < room else True
        if ends and mask is not None and not close:
            # A row whose tokens are used up keeps its segment open.
            ends = mask[:, begin:end].sum(1) >= room
        out = model(
            x[:, begin:end],
            memory,
            mask=None if mask is None else mask[:, begin:end],
            reset=None if reset is None else reset[:, begin:end],
            close=ends,
        )
        outputs.append(out[0])
        # Between segments is when an outside store is written.
        memory = out[1] if ends is False else inner.commit(out[1])
        if last:
            break
        ended += 1
        if detach_every is not None and ended % detach_every == 0:
            memory = memory.detach()
        begin, room = end, length
    y = torch.cat(outputs, 1)
    return y if back is None else y[_rows(y), back], memory


def _packed(x: Tensor, mask: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Input, mask and reset with each row's padding behind its tokens, and where each place has gone."""
    rows, order = _rows(x), torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    packed = mask[rows, order]
    if reset is not None:
        # A document that begins at padding begins at the next token; after the last one, right behind it.
        begun = reset.long().cumsum(1)
        begun = torch.where(packed, begun[rows, order], begun[:, -1:])
        reset = begun.diff(dim=1, prepend=begun.new_zeros(len(begun), 1)) > 0
    return x[rows, order], packed, reset, torch.argsort(order, dim=1)


def _rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)[:, None]


def _open(memory: Memory | None) -> int:
    if memory is None or memory.batch_size == 0:
        return 0
    lengths = memory.open_length
    if bool((lengths != lengths[0]).any()):
        raise ValueError(
            "the rows of the open segment differ in length "
            f"({lengths.tolist()}); end it with close=True before unrolling on"
        )
    return int(lengths[0])
