"""Gated recurrent units: a memory of one vector a layer, written at every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from memory_models.module import MemoryModule
from memory_models.state import Memory, memory_state
from memory_models.transformer import last_token


@dataclass(frozen=True, kw_only=True)
class GRUConfig:
    """Options of the `gru` control."""

    dim: int = 256
    """Width of the embeddings."""
    depth: int = 2
    """Number of recurrent layers."""
    hidden: int | None = None
    """Width of a layer's state; None: twice dim."""
    segment_length: int = 64
    """Most tokens of one call; a recurrent network has no segments of its own."""
    dropout: float = 0.0
    """Dropout between layers."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must lie in [0, 1)")


@memory_state
class GRUMemory(Memory):
    """The state after the last token.

    Attributes:
        layers: one `[batch, hidden]` a layer.
    """

    layers: tuple[Tensor, ...]


class GRU(MemoryModule[GRUMemory]):
    """Stacked GRU layers with a projection to the width of the embeddings."""

    config_class: ClassVar[type] = GRUConfig
    differentiable_memory = True

    def __init__(self, config: GRUConfig) -> None:
        super().__init__()
        self.dim, self.segment_length = config.dim, config.segment_length
        self.hidden = config.hidden or 2 * config.dim
        self.layers = nn.ModuleList(
            nn.GRU(config.dim if layer == 0 else self.hidden, self.hidden, batch_first=True)
            for layer in range(config.depth)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.RMSNorm(self.hidden)
        self.to_out = nn.Linear(self.hidden, config.dim, bias=False)

    def init_memory(self, batch_size: int) -> GRUMemory:
        """All zeros."""
        weight = self.to_out.weight
        return GRUMemory(layers=tuple(weight.new_zeros(batch_size, self.hidden) for _ in self.layers))

    def read(self, x: Tensor, memory: GRUMemory, lengths: Tensor | None) -> tuple[Tensor, GRUMemory]:
        """Run over the tokens; the state is written at each one."""
        states = []
        for index, (layer, state) in enumerate(zip(self.layers, memory.layers, strict=True)):
            x, _ = layer(self.dropout(x) if index else x, state[None])
            states.append(last_token(x, state, lengths))
        return self.to_out(self.norm(x)), GRUMemory(layers=tuple(states))

    def write(self, memory: GRUMemory) -> GRUMemory:
        """Nothing waits to be written."""
        return memory
