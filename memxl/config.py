"""Options of Memory Transformer-XL."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memory_models.transformer import TransformerConfig, resolve_layers
from memxl.gates import GateKind

GATES = ("gru", "nbrc")


@dataclass(frozen=True, kw_only=True)
class MemXLConfig(TransformerConfig):
    """Options of the `memxl` member (Transformer-XL, arXiv:1901.02860, with a gated long-term memory)."""

    memory_layers: tuple[int, ...] | None = None
    """Layers with a short memory, whose inputs are written; from 0, or from -1 for the last; None: all."""
    long_layers: tuple[int, ...] | None = None
    """Layers that read the long memory, counted likewise; None: the last."""
    mem_len: int | None = None
    """Tokens that each memory layer's short memory keeps; None: one segment."""
    lmem_len: int = 32
    """Slots of the long memory, which is one for all layers; 0 leaves Transformer-XL."""
    persistent: int = 0
    """Learned keys and values that memory layers attend to beside the tokens (all-attention)."""
    write_iterations: int = 2
    """Times that the long memory attends to the segment and is gated, at each write."""
    write_heads: int = 1
    """Heads of the write; each finds its tokens apart, so that with several a slot mixes tokens."""
    write_features: int | None = None
    """Places a write head can put tokens in, from which slots choose; None: dim // write_heads."""
    query_scale: float = 4.0
    """Learned sharpness, at the start, with which a slot chooses among the features."""
    key_scale: float = 4.0
    """Learned sharpness, at the start, with which a feature chooses among the tokens."""
    slot_scale: float = 3.0
    """Deviation of a slot's place, at the start, against its content of 1 in what the slot asks for."""
    gate: GateKind = "gru"
    """What blends the written into the long memory: "gru" (GTrXL's) or "nbrc" (bistable)."""
    gate_bias: float = 2.0
    """How far the gate is closed at the start; infinity: the long memory never changes."""
    mogrify: bool = False
    """Let the long memory modulate what is written before the gate."""
    write_gradient: bool = True
    """Let gradients into the segment's hiddens that are written; the published package stops them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mem_len", "lmem_len", "persistent"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")
        if self.write_iterations < 1:
            raise ValueError(f"write_iterations ({self.write_iterations}) must be at least 1")
        if self.write_heads < 1 or self.dim % self.write_heads:
            raise ValueError(f"dim ({self.dim}) must be divisible by write_heads ({self.write_heads})")
        if self.write_features is not None and self.write_features < 1:
            raise ValueError(f"write_features ({self.write_features}) must be at least 1")
        for name in ("query_scale", "key_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if not 0 <= self.slot_scale < math.inf:
            raise ValueError(f"slot_scale ({self.slot_scale}) must not be negative")
        if self.gate not in GATES:
            raise ValueError(f"gate ({self.gate!r}) must be one of {', '.join(map(repr, GATES))}")
        if math.isnan(self.gate_bias):
            raise ValueError("gate_bias is not a number")
        # A wrong layer is to be heard of here, not at the first call.
        _ = self.layers_with_memory, self.layers_with_long_memory

    @property
    def short_length(self) -> int:
        """Tokens that each memory layer's short memory keeps."""
        return self.segment_length if self.mem_len is None else self.mem_len

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """The layers with a short memory, whose inputs are written."""
        if self.memory_layers is None:
            return tuple(range(self.depth))
        return resolve_layers(self.memory_layers, self.depth)

    @property
    def layers_with_long_memory(self) -> tuple[int, ...]:
        """The layers that read the long memory; none without slots."""
        if self.lmem_len == 0:
            return ()
        if self.long_layers is None:
            return (self.depth - 1,)
        try:
            return resolve_layers(self.long_layers, self.depth)
        except ValueError as error:
            raise ValueError(str(error).replace("memory_layers", "long_layers")) from None
