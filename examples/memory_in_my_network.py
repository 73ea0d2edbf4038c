"""A memory inside a network of your own, over numbers rather than tokens. Takes about 5 seconds.

Each row watches a sensor for four segments. At some moment of the first one a lamp lights up in one of four
colours; at the end of every segment the network is asked which it was. `Watcher` is an ordinary `nn.Module`:
the memory is one line of its constructor, goes in with a segment and comes out for the next. After training
the same weights are asked again with the memory emptied between segments, and can then only guess.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memory_models

COLOURS, SEGMENTS, SEGMENT_LENGTH, ROWS = 4, 4, 8, 32
STEPS = 100


class Watcher(nn.Module):
    """Readings `[batch, time, 2 + COLOURS]` of a segment to scores `[batch, time, COLOURS]`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Linear(2 + COLOURS, width)
        # Any other name of `memory-bench list` works as well.
        self.memory = memory_models.create(
            "memformer", dim=width, depth=1, heads=2, slots=4, segment_length=SEGMENT_LENGTH
        )
        self.head = nn.Linear(width, COLOURS)

    def forward(
        self, readings: Tensor, memory: memory_models.Memory | None = None
    ) -> tuple[Tensor, memory_models.Memory]:
        hidden, memory = self.memory(self.encoder(readings), memory)
        return self.head(hidden), memory


def episodes(rows: int) -> tuple[Tensor, Tensor]:
    """Noise, a lamp and questions `[rows, time, 2 + COLOURS]`, and the lamps' colours `[rows]`."""
    readings = torch.zeros(rows, SEGMENTS * SEGMENT_LENGTH, 2 + COLOURS)
    readings[..., 0] = torch.randn(readings.shape[:2])
    colours, moments = torch.randint(COLOURS, (rows,)), torch.randint(SEGMENT_LENGTH, (rows,))
    readings[torch.arange(rows), moments, 2 + colours] = 1
    readings[:, SEGMENT_LENGTH - 1 :: SEGMENT_LENGTH, 1] = 1
    return readings, colours


def answers(network: Watcher, readings: Tensor, *, remember: bool = True) -> Tensor:
    """Scores at the end of each segment, `[rows, SEGMENTS, COLOURS]`."""
    memory, found = None, []
    for segment in readings.split(SEGMENT_LENGTH, dim=1):
        scores, memory = network(segment, memory if remember else None)
        found.append(scores[:, -1])
    return torch.stack(found, dim=1)


def main(steps: int = STEPS) -> dict[str, list[float]]:
    """Train; the accuracy at the end of each segment with the memory and without it."""
    torch.manual_seed(0)
    network = Watcher()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        readings, colours = episodes(ROWS)
        scores = answers(network, readings)
        # The loss of a late segment reaches, through the memory, what an early one wrote.
        loss = F.cross_entropy(scores.flatten(0, 1), colours.repeat_interleave(SEGMENTS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    readings, colours = episodes(512)
    accuracy: dict[str, list[float]] = {}
    print(f"accuracy by segments since the lamp (guessing: {1 / COLOURS:.3f})")
    for name, remember in (("with memory", True), ("memory emptied", False)):
        with torch.no_grad():
            right = answers(network, readings, remember=remember).argmax(-1) == colours[:, None]
        accuracy[name] = right.float().mean(0).tolist()
        print(f"  {name:15}", *(f"{share:.3f}" for share in accuracy[name]))
    return accuracy


if __name__ == "__main__":
    main()
