"""The transformer with Hierarchical Transformer Memory, over embeddings."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htm.chunks import with_previous
from htm.config import HTMConfig
from htm.layers import HTMAttention
from htm.memory import ChunkMemory, HTMMemory
from memory_models.module import MemoryModule
from memory_models.ring import append
from memory_models.stats import collecting, effective_number, record, weight_by_age
from memory_models.transformer import OpenSegment, Trunk


class HTM(MemoryModule[HTMMemory]):
    """Causal attention within a segment, then a read of earlier segments' chunks, then feed-forward.

    Figure 1 of the paper: each part is pre-norm and added to the residual stream. A token sees the tokens
    of its own segment through local attention and everything written before the segment through the
    memory, the open chunk included. What is stored is the memory sub-layer's input, normalised (without
    gain, so that it can be done once, at the write) and detached.
    """

    config_class: ClassVar[type] = HTMConfig

    def __init__(self, config: HTMConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.differentiable_memory = config.write_gradient
        self.trunk = Trunk(config)
        self.read_norms, self.reads = nn.ModuleList(), nn.ModuleList()
        for layer in config.layers_with_memory:
            matching = config.matching_layer and layer == config.depth - 1
            self.read_norms.append(nn.RMSNorm(config.dim))
            self.reads.append(
                HTMAttention(
                    config.dim,
                    heads=config.memory_heads or config.heads,
                    topk_mems=config.topk,
                    mem_chunk_size=config.chunk_size,
                    dim_head=config.memory_dim_head or config.head_width,
                    add_pos_enc=config.positions,
                    detach_memories=not config.write_gradient,
                    matching=matching,
                    init_scale=None if matching else config.init_scale,
                )
            )

    def init_memory(self, batch_size: int) -> HTMMemory:
        """No chunks and an open segment without tokens."""
        config, weight = self.config, self.trunk.norm.weight
        hidden = weight.new_zeros(batch_size, self.segment_length, self.dim)
        widths: list[int] = [read.memory_dim for read in self.reads]  # type: ignore[misc]
        return HTMMemory(
            segment=self.trunk.open_segment(batch_size),
            hiddens=tuple(hidden.clone() for _ in widths),
            layers=tuple(
                ChunkMemory.empty(batch_size, config.chunks, config.chunk_size, width, like=weight)
                for width in widths
            ),
        )

    def read(self, x: Tensor, memory: HTMMemory, lengths: Tensor | None) -> tuple[Tensor, HTMMemory]:
        """Attend to the segment so far and to the chunks written before it."""
        x, last, place = self.trunk.enter(x, memory.segment, lengths)
        caches, hiddens = [], []
        for layer, (attention, feedforward) in enumerate(
            zip(self.trunk.attentions, self.trunk.feedforwards, strict=True)
        ):
            attended, cache = attention(x, memory.segment.layers[layer], place)
            x = x + attended
            if layer in self.config.layers_with_memory:
                index = self.config.layers_with_memory.index(layer)
                chunks, hidden = memory.layers[index], memory.hiddens[index]
                stored = F.rms_norm(x, (self.dim,)).to(hidden.dtype)
                if not self.config.write_gradient:
                    stored = stored.detach()
                hiddens.append(stored if place.whole else append(hidden, place.filled, stored, lengths))
                queries = self.read_norms[index](x)
                if collecting():
                    self._record(layer, queries, chunks, lengths)
                x = x + self.reads[index].read(  # type: ignore[operator]
                    queries, chunks.contents, chunks.summaries, lengths=chunks.lengths()
                )
            x = x + feedforward(x)
            caches.append(cache)
        segment = OpenSegment(filled=place.after, last=last, layers=tuple(caches))
        return self.trunk.norm(x), HTMMemory(segment=segment, hiddens=tuple(hiddens), layers=memory.layers)

    def write(self, memory: HTMMemory) -> HTMMemory:
        """Append the segment's hiddens to the chunks of their layers."""
        fresh = self.trunk.open_segment(memory.batch_size)
        filled = memory.segment.filled
        return HTMMemory(
            segment=fresh,
            hiddens=tuple(hidden.new_zeros(hidden.shape) for hidden in memory.hiddens),
            layers=tuple(
                chunks.append(with_previous(hidden) if read.matching else hidden, filled)
                for chunks, hidden, read in zip(memory.layers, memory.hiddens, self.reads, strict=True)
            ),
        )

    def _record(self, layer: int, queries: Tensor, chunks: ChunkMemory, lengths: Tensor | None) -> None:
        # Of each query: how old the chunks are that it reads, in tokens (-1: none), and the largest weight.
        # Of all queries of a row: how many chunks they read, counted by weight, and how far back that lies.
        read = self.reads[self.config.layers_with_memory.index(layer)]
        chosen, weights = read.choose(queries, chunks.summaries, lengths=chunks.lengths())  # type: ignore[operator]
        ages = chunks.ages()[:, None].expand(-1, chosen.shape[1], -1).gather(-1, chosen)
        record(f"htm/layer {layer}/hit age", ages)
        record(f"htm/layer {layer}/largest hit weight", weights.amax(-1))
        by_chunk = weights.new_zeros(chunks.summaries.shape[:2])
        by_chunk = by_chunk.scatter_add(1, chosen.flatten(1), weights.flatten(1))
        record(f"htm/layer {layer}/chunks used", effective_number(by_chunk.float()))
        record(f"htm/layer {layer}/tokens held", chunks.lengths().sum(-1))
        chosen, weights = read.place_weights(  # type: ignore[operator]
            queries, chunks.contents, chunks.summaries, lengths=chunks.lengths()
        )
        first = chunks.ages()[:, None].expand(-1, chosen.shape[1], -1).gather(-1, chosen)[..., None]
        # A place that nothing was written to yet has no weight.
        ages = first - torch.arange(self.config.chunk_size, device=first.device)
        found = weight_by_age(weights, ages, self.segment_length, lengths=lengths)
        record(f"htm/layer {layer}/weight by age", found)
