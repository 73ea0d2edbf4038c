"""Memory Transformer-XL over embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memory_models.module import MemoryModule
from memory_models.ring import append
from memory_models.transformer import OpenSegment, Trunk
from memxl.config import MemXLConfig
from memxl.layers import MemXLAttention
from memxl.memory import MemoryWriter, MemXLMemory, ShortMemory


class MemXL(MemoryModule[MemXLMemory]):
    """Transformer-XL's short memory, and a long memory of slots written at the end of each segment.

    The design of the package memory-transformer-xl. Each memory layer attends to the newest inputs it had
    before the segment (detached); chosen layers also to the slots, which are one for all layers. Gradients
    flow through the slots from segment to segment, to the network that writes them; with `write_gradient`
    also into the hiddens that are written.
    """

    config_class: ClassVar[type] = MemXLConfig

    def __init__(self, config: MemXLConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.differentiable_memory = config.write_gradient and bool(config.layers_with_long_memory)
        self.trunk = Trunk(config)
        for layer in sorted({*config.layers_with_memory, *config.layers_with_long_memory}):
            self.trunk.attentions[layer] = MemXLAttention(
                config,
                matching=config.matching_layer and layer == config.depth - 1,
                reads_long=layer in config.layers_with_long_memory,
                name=f"memxl/layer {layer}",
            )
        self.writer = MemoryWriter(config) if config.lmem_len else None

    def init_memory(self, batch_size: int) -> MemXLMemory:
        """No short memory, the learned first slots, and an open segment without tokens."""
        config, weight = self.config, self.trunk.norm.weight
        if self.writer is None:
            long = weight.new_zeros(batch_size, 0, self.dim)
        else:
            long = self.writer.init_slots(batch_size)
        layers = len(config.layers_with_memory)
        hidden = weight.new_zeros(batch_size, self.segment_length, self.dim)
        return MemXLMemory(
            segment=self.trunk.open_segment(batch_size),
            hiddens=tuple(hidden.clone() for _ in range(layers)),
            short=ShortMemory.empty(batch_size, config.short_length, layers, self.dim, like=weight),
            long=long,
        )

    def read(self, x: Tensor, memory: MemXLMemory, lengths: Tensor | None) -> tuple[Tensor, MemXLMemory]:
        """Attend to the segment so far, to the short memory and to the slots."""
        x, last, place = self.trunk.enter(x, memory.segment, lengths)
        held, caches, hiddens = memory.short.places(), [], list(memory.hiddens)
        for layer, (attention, feedforward) in enumerate(
            zip(self.trunk.attentions, self.trunk.feedforwards, strict=True)
        ):
            cache = memory.segment.layers[layer]
            if not isinstance(attention, MemXLAttention):
                attended, cache = attention(x, cache, place)
            elif layer in self.config.layers_with_memory:
                index = self.config.layers_with_memory.index(layer)
                hidden = hiddens[index]
                stored = (x if self.config.write_gradient else x.detach()).to(hidden.dtype)
                hiddens[index] = stored if place.whole else append(hidden, place.filled, stored, lengths)
                short = memory.short.hiddens[index]
                attended, cache = attention(x, cache, place, short=short, held=held, long=memory.long)
            else:
                attended, cache = attention(x, cache, place, long=memory.long)
            x = x + attended
            x = x + feedforward(x)
            caches.append(cache)
        segment = OpenSegment(filled=place.after, last=last, layers=tuple(caches))
        return self.trunk.norm(x), MemXLMemory(
            segment=segment, hiddens=tuple(hiddens), short=memory.short, long=memory.long
        )

    def write(self, memory: MemXLMemory) -> MemXLMemory:
        """Write short memory and segment into the slots, then move the segment into the short memory."""
        filled, long = memory.segment.filled, memory.long
        if self.writer is not None:
            steps = torch.arange(self.segment_length, device=filled.device)
            valid = torch.cat([memory.short.places(), steps < filled[:, None]], 1)
            # A row whose segment is empty keeps its slots, whatever its short memory holds.
            valid = valid & (filled > 0)[:, None]
            hiddens = [
                torch.cat([old, new], 1)
                for old, new in zip(memory.short.hiddens, memory.hiddens, strict=True)
            ]
            long = self.writer(long, hiddens, valid)
        return MemXLMemory(
            segment=self.trunk.open_segment(memory.batch_size),
            hiddens=tuple(hidden.new_zeros(hidden.shape) for hidden in memory.hiddens),
            short=memory.short.push(memory.hiddens, filled),
            long=long,
        )
