"""A member from outside: averages of the past that fade at rates which are learned.

`h_t = a h_(t-1) + (1 - a) W x_t` for each channel, `a` between 0 and 1; the output is read from `h_t`. The
base class does the rest: resets, padding, segments in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memory_models import Memory, MemoryModule, memory_state
from memory_models.transformer import last_token


@dataclass(frozen=True, kw_only=True)
class FadingConfig:
    """Options of the `fading` member."""

    dim: int = 256
    """Width of the embeddings."""
    averages: int = 256
    """Averages kept of each row."""
    slowest: float = 1000.0
    """Tokens after which the slowest average has faded to a third, at the start of training."""
    segment_length: int = 64
    """Most tokens of one call."""

    def __post_init__(self) -> None:
        for name in ("dim", "averages", "slowest", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")


@memory_state
class FadingMemory(Memory):
    """The averages `[batch, averages]` after the last token."""

    averages: Tensor


class Fading(MemoryModule[FadingMemory]):
    """One layer of fading averages with a residual."""

    config_class: ClassVar[type] = FadingConfig
    differentiable_memory = True

    def __init__(self, config: FadingConfig) -> None:
        super().__init__()
        self.dim, self.segment_length = config.dim, config.segment_length
        self.norm = nn.RMSNorm(config.dim)
        self.write_weights = nn.Linear(config.dim, config.averages, bias=False)
        self.read_weights = nn.Linear(config.averages, config.dim, bias=False)
        # Logarithms of the tokens until an average has faded to a third, from one token on.
        self.log_time = nn.Parameter(
            torch.linspace(0, 1, config.averages) * torch.tensor(config.slowest).log()
        )

    def init_memory(self, batch_size: int) -> FadingMemory:
        """All zeros."""
        weight = self.read_weights.weight
        return FadingMemory(averages=weight.new_zeros(batch_size, weight.shape[1]))

    def read(self, x: Tensor, memory: FadingMemory, lengths: Tensor | None) -> tuple[Tensor, FadingMemory]:
        """All tokens of a piece at once: token `t` has faded by `a^(t - s)` what token `s` wrote."""
        # b batch, t and s time, n averages
        log_decay = -(-self.log_time).exp()
        written = self.write_weights(self.norm(x)) * -torch.expm1(log_decay)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[:, None] - steps).clamp(min=0)
        fading = (distance[..., None] * log_decay).exp() * (steps[:, None] >= steps)[..., None]
        averages = torch.einsum("tsn, bsn -> btn", fading, written)
        averages = averages + ((steps + 1)[:, None] * log_decay).exp() * memory.averages[:, None]
        y = x + self.read_weights(averages)
        return y, FadingMemory(averages=last_token(averages, memory.averages, lengths))

    def write(self, memory: FadingMemory) -> FadingMemory:
        """Nothing waits for the end of a segment: each token has been written when it was read."""
        return memory
