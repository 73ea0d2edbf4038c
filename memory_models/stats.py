"""Diagnostics on request: gates, hits and norms, detached, without changing any return type.

A module calls `record("htm/0/hit age", tensor)`; it does nothing unless somebody listens with
`collect_stats()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Segments back, each bucket twice as wide as the one before; the last holds all that is older.
_BUCKETS = 16
AGE_BUCKETS = (
    "1",
    "2",
    *(f"{2 ** (i - 1) + 1}-{2**i}" for i in range(2, _BUCKETS - 1)),
    f"{2 ** (_BUCKETS - 2) + 1}+",
)

_collector: ContextVar[dict[str, Tensor] | None] = ContextVar("memory_models_stats", default=None)


@contextmanager
def collect_stats() -> Iterator[dict[str, Tensor]]:
    """Gather what modules record inside the block; a name recorded twice keeps its last value."""
    stats: dict[str, Tensor] = {}
    token = _collector.set(stats)
    try:
        yield stats
    finally:
        _collector.reset(token)


def collecting() -> bool:
    """True if somebody listens; ask before computing a costly diagnostic."""
    return not torch.compiler.is_compiling() and _collector.get() is not None


def record(name: str, value: Tensor) -> None:
    """Hand a diagnostic to the listener, detached; without one this does nothing."""
    if collecting():
        stats = _collector.get()
        assert stats is not None
        stats[name] = value.detach()


def effective_number(weights: Tensor) -> Tensor:
    """How many of the last axis's entries count: the exponential of the entropy of their shares (Hill 1973).

    Args:
        weights: `[..., n]`, not negative.

    Returns:
        `[...]`, from 1 (all in one) to `n` (all alike); 0 where all are 0.
    """
    total = weights.sum(-1, keepdim=True)
    number = torch.special.entr(weights / total).sum(-1).exp()
    return torch.where(total[..., 0] > 0, number, 0)


def weight_by_age(
    weights: Tensor, ages: Tensor, segment_length: int, *, lengths: Tensor | None = None
) -> Tensor:
    """How much of what is read lies how many segments back.

    Args:
        weights: `[batch, time, ...]` of what each query reads, not negative.
        ages: int64, the same shape: tokens between each and the newest before the segment; negative where
            nothing is.
        segment_length: tokens of a segment; shorter ones count as if they were full.
        lengths: int64 `[batch]`, queries of each row that are real; None means all.

    Returns:
        `[batch, buckets]`, the sum of the weights in each of `AGE_BUCKETS`: the segment before is 1 back.
    """
    if lengths is not None:
        real = torch.arange(weights.shape[1], device=weights.device) < lengths[:, None]
        weights = torch.where(real.view(*real.shape, *[1] * (weights.dim() - 2)), weights, 0)
    weights = weights.flatten(1).to(torch.promote_types(weights.dtype, torch.float32))
    ages = ages.flatten(1)
    borders = 2 ** torch.arange(_BUCKETS - 1, device=ages.device)
    bucket = torch.bucketize(ages.clamp(min=0) // segment_length + 1, borders)
    found = weights.new_zeros(len(weights), _BUCKETS)
    return found.scatter_add(1, bucket, torch.where(ages >= 0, weights, 0))
