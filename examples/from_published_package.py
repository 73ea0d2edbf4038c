"""Code written against the four published packages: the same classes and calls, imported from here.

Takes about 6 seconds. Each part is as the package's own instructions have it, with small sizes; only the
import is another. Weights saved by a package come in with that family's `load_published(model, state_dict)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from htm import HTMBlock  # in place of htm_pytorch
from memformer import Memformer, memory_replay_backprop  # in place of memformer
from memorizing import MemorizingTransformer  # in place of memorizing_transformers_pytorch
from memxl import AutoregressiveWrapper, MemoryTransformerXL  # in place of memory_transformer_xl

STEPS = 20
TOKENS, SEGMENT, ROWS = 32, 16, 4
Part = tuple[nn.Module, Callable[[], Iterator[Tensor]]]


def htm_pytorch() -> Part:
    """Queries read what masked memories hold."""
    block = HTMBlock(dim=32, topk_mems=2, mem_chunk_size=8, heads=4, dim_head=16)
    queries, memories = torch.randn(ROWS, 8, 32), torch.randn(ROWS, 100, 32)
    mask = torch.ones(ROWS, 100).bool()

    def step() -> Iterator[Tensor]:
        yield (block(queries, memories, mask=mask) - memories[:, :8]).square().mean()

    return block, step


def memformer() -> Part:
    """A source of four segments goes into the memory, then comes the target; replay takes the gradient."""
    encoder = {"enc_num_tokens": TOKENS, "enc_depth": 2, "enc_heads": 4, "enc_max_seq_len": SEGMENT}
    decoder = {"dec_num_tokens": TOKENS, "dec_depth": 2, "dec_heads": 4, "dec_max_seq_len": SEGMENT}
    model = Memformer(dim=32, num_memory_slots=8, **encoder, **decoder)
    source, target = torch.randint(TOKENS, (ROWS, 4 * SEGMENT)), torch.randint(TOKENS, (ROWS, SEGMENT))
    mask = torch.ones(source.shape).bool()

    def step() -> Iterator[Tensor]:
        yield memory_replay_backprop(model, source, target, src_mask=mask)

    return model, step


def memorizing_transformers_pytorch() -> Part:
    """Segment after segment, with stores of keys and values for each row."""
    sizes = {"num_tokens": TOKENS, "dim": 32, "dim_head": 16, "depth": 2, "max_knn_memories": 256}
    model = MemorizingTransformer(memorizing_layers=2, **sizes)
    data = torch.randint(TOKENS, (ROWS, 4 * SEGMENT + 1))
    segments = zip(data[:, :-1].chunk(4, dim=-1), data[:, 1:].chunk(4, dim=-1), strict=True)
    inputs_and_labels = list(segments)

    def step() -> Iterator[Tensor]:
        xl_memories = None
        with model.knn_memories_context(batch_size=ROWS) as knn_memories:
            for x, labels in inputs_and_labels:
                loss, xl_memories = model(
                    x, knn_memories=knn_memories, xl_memories=xl_memories, labels=labels
                )
                yield loss / 4

    return model, step


def memory_transformer_xl() -> Part:
    """The wrapper yields a loss for each segment and carries the memories."""
    sizes = {"num_tokens": TOKENS, "dim": 32, "heads": 4, "depth": 2, "seq_len": SEGMENT, "lmem_len": 8}
    model = AutoregressiveWrapper(MemoryTransformerXL(**sizes))
    data = torch.randint(TOKENS, (ROWS, 4 * SEGMENT + 1))

    def step() -> Iterator[Tensor]:
        for loss, _ in model(data, max_batch_size=ROWS, truncate_every=1, return_loss=True):
            yield loss / 4

    return model, step


def train(model: nn.Module, step: Callable[[], Iterator[Tensor]], steps: int) -> list[float]:
    """Adam on the losses of each step; their sums."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sums = []
    for _ in range(steps):
        total = 0.0
        for loss in step():
            if loss.requires_grad:  # memory replay has taken its gradient already
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        sums.append(total)
    return sums


def main(steps: int = STEPS) -> dict[str, list[float]]:
    """Some steps on one batch with each; the losses."""
    found = {}
    for part in (htm_pytorch, memformer, memorizing_transformers_pytorch, memory_transformer_xl):
        torch.manual_seed(0)
        found[part.__name__] = losses = train(*part(), steps)
        print(f"{part.__name__}: loss {losses[0]:.3f}, after {steps} steps {losses[-1]:.3f}")
    return found


if __name__ == "__main__":
    main()
