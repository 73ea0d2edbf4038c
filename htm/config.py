"""Options of Hierarchical Transformer Memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memory_models.transformer import TransformerConfig, resolve_layers


@dataclass(frozen=True, kw_only=True)
class HTMConfig(TransformerConfig):
    """Options of the `htm` member (Lampinen et al. 2021, arXiv:2105.14039)."""

    chunk_size: int = 32
    """Tokens of a memory chunk; best a divisor of segment_length, or of the events to be remembered."""
    chunks: int = 64
    """Most chunks a row keeps; the oldest leaves when a new one begins."""
    topk: int = 8
    """Chunks each query reads; fewer where there are fewer."""
    memory_layers: tuple[int, ...] | None = None
    """Layers that read a memory of their own, from 0, or from -1 for the last; None: all, as in the paper."""
    memory_heads: int | None = None
    """Heads of the attention inside a chunk; None: heads."""
    memory_dim_head: int | None = None
    """Width of such a head; None: that of the other heads."""
    positions: bool = True
    """Add sinusoidal positions inside a chunk."""
    init_scale: float | None = 2.0
    """Variance scaling of the read's query and key weights, as in the original; None: torch's default."""
    write_gradient: bool = False
    """Let gradients through what is stored; the paper stops them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "chunks", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("memory_heads", "memory_dim_head"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.init_scale is not None and not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale ({self.init_scale}) must be positive, or None for torch's default")
        # A wrong layer is to be heard of here, not at the first call.
        _ = self.layers_with_memory

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """The layers that read a memory, from 0."""
        if self.memory_layers is None:
            return tuple(range(self.depth))
        return resolve_layers(self.memory_layers, self.depth)
