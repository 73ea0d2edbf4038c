"""`HTMAttention` alone: what was in that room? Takes about 3 seconds.

An agent walks through rooms and sees some things in each, every thing in one of four colours. Later it is
asked for the colour of one thing in one room. The memory is a plain tensor of what was seen; the read chooses
the two rooms whose mean is most like the question, and looks at nothing else. Then the same weights answer
step by step, against a memory that grows by one observation at a time, as an agent needs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htm import ChunkMemory, HTMAttention

ROOMS, THINGS, COLOURS, WALLPAPER = 16, 8, 4, 20
DIM = WALLPAPER + THINGS + COLOURS
STEPS, ROWS = 200, 32


def walks(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What was seen `[rows, ROOMS * THINGS, DIM]`, questions `[rows, 8, DIM]`, colours `[rows, 8]`."""
    wallpaper = torch.randn(rows, ROOMS, 1, WALLPAPER).expand(-1, -1, THINGS, -1)
    things = torch.rand(rows, ROOMS, THINGS).argsort(-1)
    colours = torch.randint(COLOURS, (rows, ROOMS, THINGS))
    seen = torch.cat([wallpaper, F.one_hot(things, THINGS) * 4, F.one_hot(colours, COLOURS) * 4], -1)
    asked = torch.randint(ROOMS * THINGS, (rows, 8))
    questions = seen.flatten(1, 2)[torch.arange(rows)[:, None], asked].clone()
    questions[..., -COLOURS:] = 0
    return seen.flatten(1, 2), questions, colours.flatten(1).gather(1, asked)


def main(steps: int = STEPS) -> dict[str, float]:
    """Train the read, ask it; then again step by step."""
    torch.manual_seed(0)
    attention = HTMAttention(dim=DIM, heads=4, topk_mems=2, mem_chunk_size=THINGS, dim_head=16)
    head = nn.Linear(DIM, COLOURS)
    optimizer = torch.optim.AdamW([*attention.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(steps):
        seen, questions, colours = walks(ROWS)
        scores = head(attention(questions, seen))
        loss = F.cross_entropy(scores.flatten(0, 1), colours.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seen, questions, colours = walks(256)
    with torch.no_grad():
        together = attention(questions, seen)
        elsewhere = attention(questions, seen.roll(1, dims=0))

        # The same, as an agent meets it: one observation at a time, one question at any moment.
        memory = ChunkMemory.empty(len(seen), chunks=ROOMS, chunk_size=THINGS, dim=DIM, like=seen)
        for observation in seen.unbind(1):
            memory = memory.append(observation[:, None])
        alone = attention.read(questions[:, :1], memory.contents, memory.summaries, lengths=memory.lengths())
        found = {
            "accuracy": (head(together).argmax(-1) == colours).float().mean().item(),
            "with another walk's memory": (head(elsewhere).argmax(-1) == colours).float().mean().item(),
            "share of the memory read": attention.topk_mems / ROOMS,
            "difference of the stream": (alone - together[:, :1]).abs().max().item(),
        }
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    return found


if __name__ == "__main__":
    main()
