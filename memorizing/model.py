"""The Memorizing Transformer over embeddings, with exact rings of pairs inside the state."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from memorizing.config import MemorizingConfig
from memorizing.layers import KNNAttention
from memorizing.memory import MemorizingMemory, OutsidePairs, PairMemory, XLCache
from memorizing.store import OutsideStore, OutsideView
from memory_models.module import MemoryModule
from memory_models.ring import append
from memory_models.transformer import OpenSegment, Place, SegmentAttention, Trunk, rotate


class Memorizing(MemoryModule[MemorizingMemory]):
    """The standard transformer whose memory layers also attend to the nearest of all earlier pairs.

    A segment is searched for before it is written, so that no token finds itself or what follows. With
    `xl_cache` every layer also sees the newest tokens before the segment, and the memory gets a pair when
    it leaves the cache: each past token is seen once.

    With `xl_shift` the cache of a layer holds keys and values of its own outputs, in place of its inputs
    (enhanced recurrence, Ding et al. 2021, arXiv:2012.15688, §3.3; "shift XL memories down"): each segment
    then adds a whole pass through the layers to what came before, and information reaches further than
    depth times cache. So does what leaves the cache for the memory.

    With `store="outside"` the pairs are in `store`, which `commit` writes between segments. A memory that
    `save_memory` wrote refers to it; `store.save` and `store.load` keep the pairs.
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
        self.store = OutsideStore(config) if config.store == "outside" else None

    def init_memory(self, batch_size: int) -> MemorizingMemory:
        """No pairs, nothing cached and an open segment without tokens."""
        config, weight = self.config, self.trunk.norm.weight
        sizes = batch_size, config.kept_pairs, config.stores, config.head_width
        kind = PairMemory if self.store is None else OutsidePairs
        return MemorizingMemory(
            segment=self.trunk.open_segment(batch_size),
            layers=tuple(kind.empty(*sizes, like=weight) for _ in config.layers_with_memory),
            caches=tuple(
                XLCache.empty(batch_size, config.xl_cache, config.heads, config.head_width, like=weight)
                for _ in range(config.depth if config.xl_cache else 0)
            ),
            outputs=tuple(
                weight.new_zeros(batch_size, config.segment_length, config.dim)
                for _ in range(config.depth if config.xl_shift else 0)
            ),
        )

    def read(
        self, x: Tensor, memory: MemorizingMemory, lengths: Tensor | None
    ) -> tuple[Tensor, MemorizingMemory]:
        """Attend to the segment so far, to the cache, and in memory layers to the nearest pairs."""
        x, last, place = self.trunk.enter(x, memory.segment, lengths)
        caches, outputs = [], []
        for layer, (attention, feedforward) in enumerate(
            zip(self.trunk.attentions, self.trunk.feedforwards, strict=True)
        ):
            past = memory.caches[layer].past() if memory.caches else None
            cache = memory.segment.layers[layer]
            if layer in self.config.layers_with_memory:
                pairs = self._pairs(memory, self.config.layers_with_memory.index(layer))
                attended, cache = attention(x, cache, place, past=past, memory=pairs)
            else:
                attended, cache = attention(x, cache, place, past=past)
            x = x + attended
            x = x + feedforward(x)
            caches.append(cache)
            if memory.outputs:
                kept = memory.outputs[layer]
                outputs.append(append(kept, place.filled, x.detach().to(kept.dtype), lengths))
        segment = OpenSegment(filled=place.after, last=last, layers=tuple(caches))
        return self.trunk.norm(x), MemorizingMemory(
            segment=segment, layers=memory.layers, caches=memory.caches, outputs=tuple(outputs)
        )

    def write(self, memory: MemorizingMemory) -> MemorizingMemory:
        """Append the segment's pairs, or those that it pushes out of the cache, to the memory."""
        filled, layers, caches = memory.segment.filled, list(memory.layers), []
        for layer, cache in enumerate(memory.segment.layers):
            keys, values, count = cache.keys, cache.values, filled
            if memory.caches:
                if memory.outputs:
                    keys, values = self._of_outputs(layer, memory)
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
            segment=self.trunk.open_segment(memory.batch_size),
            layers=tuple(layers),
            caches=tuple(caches),
            outputs=tuple(torch.zeros_like(output) for output in memory.outputs),
        )

    def commit(self, memory: MemorizingMemory) -> MemorizingMemory:
        """Write to the outside store, if there is one, what the memory's rows have added to it.

        Between segments; `unroll` and `generate` do it. The same memory may be committed again, and older
        ones may still be read, as `OutsideStore` says.

        Raises:
            StoreError: if more than `pending_segments` segments were never committed, or the memory is
                older than what the store still holds.
        """
        if self.store is None:
            return memory
        layers = [layer for layer in memory.layers if isinstance(layer, OutsidePairs)]
        return dataclasses.replace(memory, layers=self.store.commit(layers, training=self.training))

    def outside_bytes(self, memory: MemorizingMemory) -> int:
        """Bytes of the outside store, if there is one, that belong to the memory's rows."""
        layer = next((layer for layer in memory.layers if isinstance(layer, OutsidePairs)), None)
        return 0 if self.store is None or layer is None else self.store.bytes_of(layer)

    def _pairs(self, memory: MemorizingMemory, index: int) -> PairMemory | OutsideView:
        pairs = memory.layers[index]
        if isinstance(pairs, PairMemory):
            return pairs
        assert self.store is not None
        return OutsideView(pairs, self.store, index)

    @torch.no_grad()
    def _of_outputs(self, layer: int, memory: MemorizingMemory) -> tuple[Tensor, Tensor]:
        # The keys and values of the layer's own outputs, `[batch, segment_length, heads, dim_head]`.
        attention, outputs = self.trunk.attentions[layer], memory.outputs[layer]
        assert isinstance(attention, SegmentAttention)
        start = torch.zeros_like(memory.segment.filled)
        place = Place.of(start, self.segment_length, None, self.segment_length)
        _, keys, values, _ = attention.project(
            attention.norm(outputs), attention.init_cache(memory.batch_size), place
        )
        return keys if attention.cosine else rotate(keys, place.positions), values
