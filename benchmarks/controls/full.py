"""The transformer of the other members, attending to everything so far: the upper control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from memory_models.module import MemoryModule
from memory_models.ring import append, numbers
from memory_models.state import Memory, memory_state
from memory_models.transformer import OpenSegment, Past, TransformerConfig, Trunk


@dataclass(frozen=True, kw_only=True)
class FullConfig(TransformerConfig):
    """Options of the `full` control."""

    context: int = 1024
    """Tokens before the segment that stay visible."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 0:
            raise ValueError(f"context ({self.context}) must not be negative")


@memory_state
class FullMemory(Memory):
    """Keys and values of the last `context` tokens and the open segment.

    Keys are rotated to their place in the stream, so that they need not be touched again.

    Attributes:
        segment: the open segment.
        keys: one `[batch, context, heads, dim_head]` a layer, a ring (see `memory_models.ring`).
        values: likewise.
        total: int64 `[batch]`, tokens written since the last reset.
    """

    segment: OpenSegment
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    total: Tensor

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment."""
        return self.segment.filled


class Full(MemoryModule[FullMemory]):
    """Causal attention over the last `context` tokens and the segment, with gradient throughout."""

    config_class: ClassVar[type] = FullConfig

    def __init__(self, config: FullConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.differentiable_memory = config.context > 0
        self.trunk = Trunk(config)

    def init_memory(self, batch_size: int) -> FullMemory:
        """Nothing seen yet."""
        segment = self.trunk.open_segment(batch_size)
        shape = (batch_size, self.config.context, self.config.heads, self.config.head_width)
        empty = tuple(cache.keys.new_zeros(shape) for cache in segment.layers)
        return FullMemory(
            segment=segment, keys=empty, values=tuple(map(torch.clone, empty)), total=segment.filled.clone()
        )

    def read(self, x: Tensor, memory: FullMemory, lengths: Tensor | None) -> tuple[Tensor, FullMemory]:
        """Attend to the past and the segment so far."""
        x, last, place = self.trunk.enter(x, memory.segment, lengths)
        # Places in the stream, so that the keys written need not be rotated again.
        place = replace(place, positions=place.positions + memory.total[:, None])
        held = numbers(memory.total, self.config.context) >= 0
        caches = []
        for layer, (attention, feedforward) in enumerate(
            zip(self.trunk.attentions, self.trunk.feedforwards, strict=True)
        ):
            past = Past(keys=memory.keys[layer], values=memory.values[layer], held=held)
            attended, cache = attention(x, memory.segment.layers[layer], place, past=past)
            x = x + attended
            x = x + feedforward(x)
            caches.append(cache)
        segment = OpenSegment(filled=place.after, last=last, layers=tuple(caches))
        written = FullMemory(segment=segment, keys=memory.keys, values=memory.values, total=memory.total)
        return self.trunk.norm(x), written

    def write(self, memory: FullMemory) -> FullMemory:
        """Append the segment's keys and values."""
        filled = memory.segment.filled
        keys, values = [], []
        for layer, cache in enumerate(memory.segment.layers):
            keys.append(append(memory.keys[layer], memory.total, cache.keys, filled))
            values.append(append(memory.values[layer], memory.total, cache.values, filled))
        return FullMemory(
            segment=self.trunk.open_segment(memory.batch_size),
            keys=tuple(keys),
            values=tuple(values),
            total=memory.total + filled,
        )
