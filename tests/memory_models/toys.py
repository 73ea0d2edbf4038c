"""Two small memories that keep the contract: one built on `MemoryModule`, one that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memory_models import Memory, MemoryModule, memory_state, record


@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    """Options of `Mean`."""

    dim: int = 4
    segment_length: int = 5
    layers: tuple[int, ...] = (0,)


@memory_state
class MeanMemory(Memory):
    """Sums over written tokens, and over those of the open segment."""

    count: Tensor
    total: Tensor
    filled: Tensor
    open_total: Tensor

    @property
    def open_length(self) -> Tensor:
        return self.filled


class Mean(MemoryModule[Any]):
    """y_t = mean of W x over the segment so far + mean of W x over all earlier segments."""

    config_class: ClassVar[type] = MeanConfig
    differentiable_memory = True

    def __init__(self, config: MeanConfig | None = None) -> None:
        super().__init__()
        self.config = config or MeanConfig()
        self.dim, self.segment_length = self.config.dim, self.config.segment_length
        self.mix = nn.Linear(self.dim, self.dim)

    def init_memory(self, batch_size: int) -> Any:
        zeros = self.mix.weight.new_zeros(batch_size, self.dim)
        count = torch.zeros(batch_size, dtype=torch.int64, device=zeros.device)
        return MeanMemory(count=count, total=zeros, filled=count.clone(), open_total=zeros.clone())

    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        hidden = self.mix(x)
        added = torch.full_like(memory.filled, x.shape[1]) if lengths is None else lengths
        steps = torch.arange(x.shape[1], device=x.device)
        hidden = torch.where((steps < added[:, None])[..., None], hidden, 0)
        sums = memory.open_total[:, None] + hidden.cumsum(1)
        seen = memory.filled[:, None] + steps + 1
        past = memory.total / memory.count.clamp(min=1)[:, None]
        record("mean/past", past.norm(dim=-1))
        memory = replace(memory, filled=memory.filled + added, open_total=sums[:, -1].to(memory.total.dtype))
        return sums / seen[..., None] + past[:, None], memory

    def write(self, memory: Any) -> Any:
        return replace(
            memory,
            count=memory.count + memory.filled,
            total=memory.total + memory.open_total,
            filled=torch.zeros_like(memory.filled),
            open_total=torch.zeros_like(memory.open_total),
        )


@memory_state
class AverageMemory(Memory):
    """A decaying average, written at each token."""

    average: Tensor


class Average(nn.Module):
    """The contract without the base class: a loop over tokens, as somebody else might write it."""

    dim, segment_length, differentiable_memory = 3, 4, True

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(self.dim, self.dim)

    def init_memory(self, batch_size: int) -> AverageMemory:
        return AverageMemory(average=self.mix.weight.new_zeros(batch_size, self.dim))

    def reset_memory(self, memory: AverageMemory, rows: Tensor) -> AverageMemory:
        return self.init_memory(memory.batch_size).where(rows, memory)

    def commit(self, memory: AverageMemory) -> AverageMemory:
        return memory

    def forward(
        self,
        x: Tensor,
        memory: AverageMemory | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        close: bool | Tensor = True,
    ) -> tuple[Tensor, AverageMemory]:
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] > self.segment_length:
            raise ValueError(f"x is {tuple(x.shape)}")
        memory = self.init_memory(x.shape[0]) if memory is None else memory
        if not isinstance(memory, AverageMemory) or not x.is_floating_point():
            raise TypeError("wrong kind of memory or embeddings")
        if memory.batch_size != x.shape[0] or (reset is not None and reset.shape[0] != x.shape[0]):
            raise ValueError("the rows differ")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"mask is {mask.dtype}{tuple(mask.shape)}")
        state, outputs = memory.average, []
        for time in range(x.shape[1]):
            if reset is not None and (reset.dim() == 2 or time == 0):
                begins = reset if reset.dim() == 1 else reset[:, time]
                state = torch.where(begins[:, None], 0, state)
            moved = (state + self.mix(x[:, time])) / 2
            real = torch.ones_like(x[:, time, :1], dtype=torch.bool) if mask is None else mask[:, time, None]
            state = torch.where(real, moved, state)
            outputs.append(torch.where(real, moved, 0))
        return torch.stack(outputs, 1) if outputs else x, AverageMemory(average=state)
