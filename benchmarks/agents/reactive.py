"""The agent without memory: the transformer's feed-forward layers on the present token alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memory_models.module import MemoryModule
from memory_models.state import Memory, memory_state
from memory_models.transformer import FeedForward, TransformerConfig

TARGET = "benchmarks.agents.reactive:Reactive"


@dataclass(frozen=True, kw_only=True)
class ReactiveConfig:
    """Options of an agent without memory."""

    dim: int = 256
    """Width of the embeddings."""
    depth: int = 4
    """Number of layers."""
    ff_dim: int | None = None
    """Inner width of the SwiGLU feed-forward; None: 8/3 of dim, rounded up to a multiple of 8."""
    segment_length: int = 64
    """Most tokens of one call."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.ff_dim is not None and self.ff_dim < 1:
            raise ValueError(f"ff_dim ({self.ff_dim}) must be at least 1")


@memory_state
class NoMemory(Memory):
    """Nothing, of as many rows as there are.

    Attributes:
        nothing: `[batch, 0]`.
    """

    nothing: Tensor


class Reactive(MemoryModule[NoMemory]):
    """Feed-forward layers; the output at a step depends on that step's input only."""

    config_class: ClassVar[type] = ReactiveConfig

    def __init__(self, config: ReactiveConfig) -> None:
        super().__init__()
        self.dim, self.segment_length = config.dim, config.segment_length
        inner = TransformerConfig(dim=config.dim, heads=1, ff_dim=config.ff_dim).feedforward_width
        self.layers = nn.ModuleList(FeedForward(config.dim, inner) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim)

    def init_memory(self, batch_size: int) -> NoMemory:
        """Nothing."""
        weight = self.norm.weight
        return NoMemory(nothing=torch.zeros(batch_size, 0, device=weight.device, dtype=weight.dtype))

    def read(self, x: Tensor, memory: NoMemory, lengths: Tensor | None) -> tuple[Tensor, NoMemory]:
        """Each token by itself."""
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x), memory

    def write(self, memory: NoMemory) -> NoMemory:
        """Nothing to write."""
        return memory
