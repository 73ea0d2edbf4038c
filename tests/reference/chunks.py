"""HTM's chunks as Python lists: one token after the other goes into the newest chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Chunks:
    """The chunks of one row, oldest first; only the newest `slots` are kept."""

    def __init__(self, slots: int, size: int) -> None:
        self.slots, self.size = slots, size
        self.chunks: list[list[Tensor]] = []
        self.begun = 0

    def write(self, token: Tensor) -> None:
        """Add a token; a full chunk is followed by a new one."""
        if not self.chunks or len(self.chunks[-1]) == self.size:
            self.chunks.append([])
            self.begun += 1
        self.chunks[-1].append(token)
        self.chunks = self.chunks[-self.slots :]

    def by_slot(self) -> dict[int, list[Tensor]]:
        """The chunks by the slot they lie in: number `q` in slot `q % slots`."""
        oldest = self.begun - len(self.chunks)
        return {(oldest + i) % self.slots: chunk for i, chunk in enumerate(self.chunks)}

    def ages(self) -> dict[int, int]:
        """Tokens between each chunk's first and the newest, by slot."""
        ages, after = {}, 0
        for slot, chunk in reversed(self.by_slot().items()):
            after += len(chunk)
            ages[slot] = after - 1
        return ages


def mean(tokens: list[Tensor]) -> Tensor:
    """The sum over the number."""
    return torch.stack(tokens).sum(0) / len(tokens)
