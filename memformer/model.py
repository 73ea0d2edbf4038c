"""Memformer as a causal language-model decoder over embeddings."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from memformer.config import MemformerConfig
from memformer.layers import GatedSlotWrite, SlotAttention, SlotWrite
from memformer.memory import MemformerMemory
from memory_models.module import MemoryModule
from memory_models.transformer import OpenSegment, Trunk


class MemformerDecoder(MemoryModule[MemformerMemory]):
    """The standard transformer that reads memory slots, and writes them when its segment ends.

    The paper's encoder, made causal: self-attention within the segment, cross-attention to the slots, then
    feed-forward, each pre-norm and added to the residual stream. Tokens read the slots as the segment
    before left them. The write takes the last layer's output. The gradient of a later loss passes through
    slots and hiddens into earlier segments, until the memory is detached.
    """

    config_class: ClassVar[type] = MemformerConfig
    differentiable_memory = True

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.trunk = Trunk(config)
        self.reads = nn.ModuleList(
            SlotAttention(
                config.dim,
                heads=config.heads,
                dim_head=config.head_width,
                dropout=config.dropout,
                name=f"memformer/layer {layer}",
            )
            for layer in config.layers_with_memory
        )
        self.writer = _make_write(config)

    def init_memory(self, batch_size: int) -> MemformerMemory:
        """The slots of a new document, and an open segment without tokens."""
        return MemformerMemory.fresh(
            self.writer.initial(), self.trunk.open_segment(batch_size), self.segment_length
        )

    def read(
        self, x: Tensor, memory: MemformerMemory, lengths: Tensor | None
    ) -> tuple[Tensor, MemformerMemory]:
        """Attend to the segment so far, and in memory layers to the slots."""
        x, last, place = self.trunk.enter(x, memory.segment, lengths)
        caches = []
        for layer, (attention, feedforward) in enumerate(
            zip(self.trunk.attentions, self.trunk.feedforwards, strict=True)
        ):
            attended, cache = attention(x, memory.segment.layers[layer], place)
            x = x + attended
            if layer in self.config.layers_with_memory:
                x = x + self.reads[self.config.layers_with_memory.index(layer)](x, memory.slots)
            x = x + feedforward(x)
            caches.append(cache)
        x = self.trunk.norm(x)
        segment = OpenSegment(filled=place.after, last=last, layers=tuple(caches))
        return x, memory.extended(segment, x, place)

    def write(self, memory: MemformerMemory) -> MemformerMemory:
        """Let the slots take in the segment."""
        return MemformerMemory(
            slots=self.writer(memory.slots, memory.hiddens, memory.written()),
            segment=self.trunk.open_segment(memory.batch_size),
            hiddens=memory.hiddens.new_zeros(memory.hiddens.shape),
        )


def _make_write(config: MemformerConfig) -> SlotWrite | GatedSlotWrite:
    if config.write == "gru":
        return GatedSlotWrite(
            config.dim, slots=config.slots, heads=config.heads_of_write, iterations=config.write_iterations
        )
    return SlotWrite(
        config.dim,
        slots=config.slots,
        heads=config.heads_of_write,
        temperature=config.temperature,
        forgetting=config.forgetting,
        own_bias=config.own_bias,
        iterations=config.write_iterations,
    )
