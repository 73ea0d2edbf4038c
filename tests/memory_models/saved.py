"""A memory of a few numbers to save, and how two memories are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memory_models import Memory, memory_state, static


@memory_state
class Counter(Memory):
    value: Tensor
    parts: tuple[Tensor, ...]
    width: int = static(default=1)


def counter(value: float = 1.0, rows: int = 2, width: int = 1) -> Counter:
    return Counter(value=torch.full((rows, 3), value), parts=(torch.arange(rows),), width=width)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    theirs = other.tensors()
    assert one.tensors().keys() == theirs.keys()
    for path, leaf in one.tensors().items():
        assert leaf.dtype == theirs[path].dtype
        assert torch.equal(leaf, theirs[path]), path
