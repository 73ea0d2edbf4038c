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
