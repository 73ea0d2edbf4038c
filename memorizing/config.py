"""Options of the Memorizing Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memory_models.transformer import TransformerConfig, resolve_layers

COMBINE = ("gate", "softmax")


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig(TransformerConfig):
    """Options of the `memorizing` member (Wu et al. 2022, arXiv:2203.08913)."""

    memories: int = 4096
    """Key/value pairs that each (key/value) head of a row keeps; the oldest leave."""
    topk: int = 32
    """Pairs each query reads; fewer where there are fewer."""
    memory_layers: tuple[int, ...] | None = None
    """Layers with a memory, from 0, or from -1 for the last; None: the matching one, or 3/4 of the depth."""
    combine: str = "gate"
    """How memory and local attention are joined: "gate" (a learned share per head) or "softmax" (one)."""
    kv_heads: int | None = None
    """Heads of keys and values in memory layers, each shared by as many query heads; None: heads."""
    shift_keys: bool | None = None
    """Keys of memory layers from the token before; None: in a matching layer only."""
    tie_keys: bool | None = None
    """Start key weights of memory layers equal to the query weights; None: in a matching layer only."""
    xl_cache: int = 0
    """Tokens from before the segment that every layer attends to; the memory gets what leaves them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memories", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads ({self.heads}) must be divisible by kv_heads ({self.kv_heads})")
        if self.xl_cache < 0:
            raise ValueError(f"xl_cache ({self.xl_cache}) must not be negative")
        if self.combine not in COMBINE:
            raise ValueError(f"combine ({self.combine!r}) must be one of {', '.join(map(repr, COMBINE))}")
        # A wrong layer is to be heard of here, not at the first call.
        _ = self.layers_with_memory

    @property
    def stores(self) -> int:
        """Stores of pairs in a memory layer, one for each head of keys and values."""
        return self.kv_heads or self.heads

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """The layers that keep and read a memory (in the paper layer 9 of 12, §4.1)."""
        if self.memory_layers is not None:
            return resolve_layers(self.memory_layers, self.depth)
        if self.matching_layer:
            return (self.depth - 1,)
        return (max(0, math.floor(0.75 * self.depth + 0.5) - 1),)
