"""The Memorizing Transformer over embeddings, with exact rings of pairs inside the state."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from memorizing.config import MemorizingConfig
from memorizing.layers import KNNAttention
from memorizing.memory import MemorizingMemory, PairMemory, XLCache
from memory_models.module import MemoryModule
from memory_models.transformer import OpenSegment, Trunk, rotate


class Memorizing(MemoryModule[MemorizingMemory]):
    """The standard transformer whose memory layers also attend to the nearest of all earlier pairs.

    A segment is searched for before it is written, so that no token finds itself or what follows. With
    `xl_cache` every layer also sees the newest tokens before the segment, and the memory gets a pair when
    it leaves the cache: each past token is seen once.
    """

    config_class: ClassVar[type] = MemorizingConfig

    def __init__(self, config: MemorizingConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.trunk = Trunk(config)
        for layer in config.layers_with_memory:
            matching = config.matching_layer and layer == config.depth - 1
            self.trunk.attentions[layer] = KNNAttention(
                config, matching=matching, name=f"memorizing/layer {layer}"
            )

    def init_memory(self, batch_size: int) -> MemorizingMemory:
        """No pairs, nothing cached and an open segment without tokens."""
        config, weight = self.config, self.trunk.norm.weight
        return MemorizingMemory(
            segment=self.trunk.open_segment(batch_size),
            layers=tuple(
                PairMemory.empty(batch_size, config.memories, config.stores, config.head_width, like=weight)
                for _ in config.layers_with_memory
            ),
            caches=tuple(
                XLCache.empty(batch_size, config.xl_cache, config.heads, config.head_width, like=weight)
                for _ in range(config.depth if config.xl_cache else 0)
            ),
        )

    def read(
        self, x: Tensor, memory: MemorizingMemory, lengths: Tensor | None
    ) -> tuple[Tensor, MemorizingMemory]:
        """Attend to the segment so far, to the cache, and in memory layers to the nearest pairs."""
        x, last, place = self.trunk.enter(x, memory.segment, lengths)
        caches = []
        for layer, (attention, feedforward) in enumerate(
            zip(self.trunk.attentions, self.trunk.feedforwards, strict=True)
        ):
            past = memory.caches[layer].past() if memory.caches else None
            cache = memory.segment.layers[layer]
            if layer in self.config.layers_with_memory:
                pairs = memory.layers[self.config.layers_with_memory.index(layer)]
                attended, cache = attention(x, cache, place, past=past, memory=pairs)
            else:
                attended, cache = attention(x, cache, place, past=past)
            x = x + attended
            x = x + feedforward(x)
            caches.append(cache)
        segment = OpenSegment(filled=place.after, last=last, layers=tuple(caches))
        return self.trunk.norm(x), MemorizingMemory(
            segment=segment, layers=memory.layers, caches=memory.caches
        )

    def write(self, memory: MemorizingMemory) -> MemorizingMemory:
        """Append the segment's pairs, or those that it pushes out of the cache, to the memory."""
        filled, layers, caches = memory.segment.filled, list(memory.layers), []
        for layer, cache in enumerate(memory.segment.layers):
            keys, values, count = cache.keys, cache.values, filled
            if memory.caches:
                xl, keys, values, count = memory.caches[layer].push(keys, values, filled)
                if not self.trunk.attentions[layer].cosine:
                    # The next segment counts its positions from where this one ends.
                    shifted = rotate(xl.keys, -filled[:, None])
                    xl = XLCache(keys=shifted, values=xl.values, held=xl.held)
                caches.append(xl)
            if layer in self.config.layers_with_memory:
                index = self.config.layers_with_memory.index(layer)
                layers[index] = layers[index].append(keys, values, count)
        return MemorizingMemory(
            segment=self.trunk.open_segment(memory.batch_size), layers=tuple(layers), caches=tuple(caches)
        )
