"""Memory replay for a recurrent module of your own: the gradients of BPTT, a fraction of the bytes.

Takes about 2 seconds. `Notebook` has nothing of this library but the form of its call, `output, memory =
model(x, memory)`; its memory is a plain dict of tensors. `memory_replay` reads all segments once and keeps
the memories between them, then computes each again, from the last to the first, for its part of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memory_models import Segment, memory_replay

ROWS, SEGMENTS, SEGMENT_LENGTH, DIM, PAGES = 4, 24, 16, 32, 4


class Notebook(nn.Module):
    """Tokens attend to their segment and a few pages; the pages attend to the tokens, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.randn(1, PAGES, DIM))
        self.reading = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.writing = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.gate = nn.GRUCell(DIM, DIM)
        self.out = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)
        )

    def forward(self, x: Tensor, memory: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        pages = self.blank.expand(x.shape[0], -1, -1) if memory is None else memory["pages"]
        around = torch.cat([pages, x], dim=1)
        x = x + self.reading(x, around, around, need_weights=False)[0]
        noted = self.writing(pages, x, x, need_weights=False)[0]
        pages = self.gate(noted.flatten(0, 1), pages.flatten(0, 1)).view_as(pages)
        return x + self.out(x), {"pages": pages}


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Most bytes that autograd holds for the backward pass at one time, parameters left out."""
    held, most = 0, [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held
            self.tensor, self.size = tensor, 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
            held += self.size
            most[0] = max(most[0], held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield most


def main() -> dict[str, float]:
    """Both ways on the same input; how far the gradients differ, and what each way held."""
    torch.manual_seed(0)
    model = Notebook().double()
    x = torch.randn(ROWS, SEGMENTS * SEGMENT_LENGTH, DIM, dtype=torch.float64)
    # The loss of the last segment alone: all that the earlier ones learn comes through the memory.
    target = x[:, :SEGMENT_LENGTH]

    with counted_bytes() as by_bptt:
        memory = None
        for segment in x.split(SEGMENT_LENGTH, dim=1):
            output, memory = model(segment, memory)
        (output - target).square().mean().backward()
        del output, memory
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    def loss(output: Tensor, index: int) -> Tensor | None:
        return (output - target).square().mean() if index == SEGMENTS - 1 else None

    with counted_bytes() as by_replay:
        done = memory_replay(model, Segment.cut(x, SEGMENT_LENGTH), loss)
    memories = SEGMENTS * done.memory["pages"].nbytes
    difference = max(
        ((parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()).item()
        for name, parameter in model.named_parameters()
    )
    print(f"{SEGMENTS} segments; largest difference of a gradient, relative: {difference:.1e}")
    print(
        f"activations held: BPTT {by_bptt[0]:,} bytes; memory replay {by_replay[0]:,}, memories {memories:,}"
    )
    return {"difference": difference, "bptt": by_bptt[0], "replay": by_replay[0] + memories}


if __name__ == "__main__":
    main()
