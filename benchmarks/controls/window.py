"""The transformer of the other members, with no memory: each segment starts from nothing."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from memory_models.module import MemoryModule
from memory_models.transformer import OpenSegment, TransformerConfig, Trunk


class Window(MemoryModule[OpenSegment]):
    """Causal attention within a segment; nothing crosses its border."""

    config_class: ClassVar[type] = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dim, self.segment_length = config.dim, config.segment_length
        self.trunk = Trunk(config)

    def init_memory(self, batch_size: int) -> OpenSegment:
        """An open segment without tokens; there is nothing else."""
        return self.trunk.open_segment(batch_size)

    def read(self, x: Tensor, memory: OpenSegment, lengths: Tensor | None) -> tuple[Tensor, OpenSegment]:
        """Attend to the segment so far."""
        x, last, place = self.trunk.enter(x, memory, lengths)
        caches = []
        for attention, feedforward, cache in zip(
            self.trunk.attentions, self.trunk.feedforwards, memory.layers, strict=True
        ):
            attended, cache = attention(x, cache, place)
            x = x + attended
            x = x + feedforward(x)
            caches.append(cache)
        return self.trunk.norm(x), OpenSegment(filled=place.after, last=last, layers=tuple(caches))

    def write(self, memory: OpenSegment) -> OpenSegment:
        """Forget the segment."""
        return self.trunk.open_segment(memory.batch_size)
