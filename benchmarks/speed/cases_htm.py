"""Reading a hierarchical memory, against htm-pytorch: the attention call, its gradients, and an agent's step.

Both processes load this file, and in one of them this project does not exist: outside functions it imports
only the standard library and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.speed import Case, Work

DIM, HEADS, DIM_HEAD, TOPK, CHUNK = 512, 8, 64, 8, 32
QUERIES = (1, 16, 128, 512)
# 2,048 rather than 2,000: the published package pads a ragged memory at its old end, ours leaves the newest
# chunk short, so that only whole chunks give both the same answer.
MEMORIES = {"2k": 2_048, "20k": 20_000, "100k": 100_000}
_INPUTS = 16


def cases() -> list[Case]:
    """The grid of queries and memories, forward and with gradients, then one query at a time on a stream."""
    found = []
    for backward in (False, True):
        kind = "forward+backward" if backward else "forward"
        for size, memories in MEMORIES.items():
            for queries in QUERIES:
                targeted = (queries, size) == (128, "20k")
                found.append(
                    _case(
                        f"htm/{kind}/q{queries}/m{size}",
                        queries=queries,
                        memories=memories,
                        backward=backward,
                        faster=(8.0 if backward else 12.0) if targeted else None,
                        leaner=5.0 if targeted else None,
                        quick=(queries, size) == (16, "2k"),
                    )
                )
        found.append(
            _case(
                f"htm/{kind} without mask/q128/m20k",
                queries=128,
                memories=MEMORIES["20k"],
                backward=backward,
                mask=False,
                note="the published package skips a pass over the memory when no mask is given",
            )
        )
    streams = (
        _case(
            f"htm/streaming{'' if mask else ' without mask'}/q1/m20k",
            queries=1,
            memories=MEMORIES["20k"],
            streaming=True,
            mask=mask,
            faster=40.0 if mask else None,
            quick=mask,
            note="ours reads the summaries it keeps; the published package sums the memory in each call",
        )
        for mask in (True, False)
    )
    return [*found, *streams]


def _case(
    name: str,
    *,
    queries: int,
    memories: int,
    backward: bool = False,
    streaming: bool = False,
    mask: bool = True,
    faster: float | None = None,
    leaner: float | None = None,
    quick: bool = False,
    note: str = "",
) -> Case:
    from benchmarks.speed import Case

    return Case(
        name=name,
        package="htm-pytorch",
        settings={
            "queries": queries,
            "memories": memories,
            "backward": backward,
            "streaming": streaming,
            "mask": mask,
            "seed": 0,
        },
        work=least_work(queries=queries, memories=memories, backward=backward, streaming=streaming),
        faster=faster,
        leaner=leaner,
        quick=quick,
        # Two chunks may have scores so near that rounding decides which of them is the last to be read.
        stray_rows=0.01,
        note=note,
    )


def least_work(*, queries: int, memories: int, backward: bool, streaming: bool) -> Work:
    """Operations and bytes of the cheapest ways known to compute a read, each part taken at its best.

    The keys and values of a chunk can be projected once for all queries that read it, or not at all:
    the projections are then applied to the query and to the weighted mean of the memories instead.
    """
    from benchmarks.speed import Work

    inner, chunks = HEADS * DIM_HEAD, memories / CHUNK
    read = queries * TOPK * CHUNK
    # Chunks that are read by at least one query, were each query to choose freely.
    touched = CHUNK * chunks * (1 - (1 - TOPK / chunks) ** queries)
    passes = 3 if backward else 1  # a linear map costs the same again for its input and for its weights

    search = 2 * queries * DIM * DIM * passes + 2 * queries * chunks * DIM
    if not streaming:
        search += memories * DIM + 2 * min(queries, chunks) * DIM * DIM * passes
    ends = 2 * 2 * queries * DIM * inner * passes
    # The memories take no gradient, so a pass back over them costs what the pass forward did.
    folded = 2 * 2 * queries * DIM * inner * passes + 2 * 2 * HEADS * read * DIM * (2 if backward else 1)
    projected = 2 * 2 * touched * DIM * inner * (2 if backward else 1) + 2 * 2 * read * inner * passes

    weights = DIM * DIM * (1 if streaming else 2) + 4 * DIM * inner
    stored = chunks * DIM + touched * DIM if streaming else memories * DIM
    ends_bytes = 2 * queries * DIM
    moved = stored + (weights + ends_bytes) * (2 if backward else 1)
    return Work(operations=search + ends + min(folded, projected), bytes=4 * moved)


def theirs(settings: Mapping[str, Any], weights: str) -> Reading:
    """The published attention, its weights written to `weights`."""
    from htm_pytorch import HTMAttention  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(settings["seed"])
    attention = HTMAttention(DIM, heads=HEADS, dim_head=DIM_HEAD, topk_mems=TOPK, mem_chunk_size=CHUNK)
    torch.save(attention.state_dict(), weights)
    return Reading(attention, settings, named=_our_names)


def ours(settings: Mapping[str, Any], weights: str) -> Reading:
    """Our attention with the published one's weights."""
    from htm import HTMAttention, load_published

    attention = HTMAttention(
        DIM, heads=HEADS, dim_head=DIM_HEAD, topk_mems=TOPK, mem_chunk_size=CHUNK, summary_bias=True
    )
    load_published(attention, torch.load(weights, weights_only=True))
    return (StreamReading if settings["streaming"] else Reading)(attention, settings)


def _our_names(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published package's gradients under the names that ours go by."""
    # Its bias on the summary keys adds the same to every score of a query: ours has none.
    key, value = gradients["attn.to_kv.weight"].chunk(2)
    return {
        "summary_query.weight": gradients["to_summary_queries.weight"],
        "summary_query.bias": gradients["to_summary_queries.bias"],
        "summary_key.weight": gradients["to_summary_keys.weight"],
        "query.weight": gradients["attn.to_q.weight"],
        "key.weight": key,
        "value.weight": value,
        "out.weight": gradients["attn.to_out.weight"],
        "out.bias": gradients["attn.to_out.bias"],
    }


class Reading:
    """A step that reads: the call `attention(queries, memories, mask=...)` on inputs made from the seed.

    Args:
        attention: the module; with gradients, all of its parameters must get one.
        settings: what `_case` put into the case.
        named: gives the gradients of the parameters the names by which the two sides are compared.
    """

    def __init__(
        self,
        attention: nn.Module,
        settings: Mapping[str, Any],
        *,
        named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        self.attention = attention
        self.named = named
        self.backward: bool = settings["backward"]
        generator = torch.Generator().manual_seed(settings["seed"] + 1)
        count, number = settings["queries"], settings["memories"]
        # A step of one query sees another query each time, as in an agent: a chunk that the step before
        # left in the cache would flatter.
        self.queries = [
            torch.randn(1, count, DIM, generator=generator) for _ in range(max(1, _INPUTS // count))
        ]
        self.direction = torch.randn(1, count, DIM, generator=generator)
        # Neighbours in a stream are alike, and chunks differ: scores lie clear of each other.
        themes = torch.randn(1, -(-number // CHUNK), DIM, generator=generator).repeat_interleave(CHUNK, dim=1)
        self.memories = themes[:, :number] + torch.randn(1, number, DIM, generator=generator)
        self.mask = torch.ones(1, number, dtype=torch.bool) if settings["mask"] else None

    def step(self, index: int) -> Tensor:
        """One call, and its gradients if asked for."""
        return self._read(self.queries[index % len(self.queries)], self.memories, self.mask, self.direction)

    def warm_up(self) -> None:
        """The same on two queries and a few chunks."""
        number = 2 * TOPK * CHUNK
        mask = None if self.mask is None else self.mask[:, :number]
        self._read(torch.randn(1, 2, DIM), torch.randn(1, number, DIM), mask, torch.randn(1, 2, DIM))

    def results(self) -> dict[str, Tensor]:
        """The output of every input, and of the first one the gradients."""
        found = {"output": torch.cat([self.step(index) for index in range(len(self.queries))], dim=1)}
        if self.backward:
            self.step(0)
            gradient = self.queries[0].grad
            assert gradient is not None
            found["gradient of queries"] = gradient
            gradients = {}
            for name, parameter in self.attention.named_parameters():
                if parameter.grad is None:
                    raise RuntimeError(f"no gradient reached {name}")
                gradients[name] = parameter.grad
            found |= {f"gradient of {name}": tensor for name, tensor in self.named(gradients).items()}
        return found

    def _read(self, queries: Tensor, memories: Tensor, mask: Tensor | None, direction: Tensor) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return self.attention(queries, memories, mask=mask)
        self.attention.zero_grad(set_to_none=True)
        queries.requires_grad_()
        queries.grad = None
        output = self.attention(queries, memories, mask=mask)
        (output * direction).sum().backward()
        return output.detach()


class StreamReading(Reading):
    """A step of an agent: our read of a memory that was written as a stream, whose summaries lie ready."""

    def __init__(self, attention: nn.Module, settings: Mapping[str, Any]) -> None:
        super().__init__(attention, settings)
        from htm.memory import ChunkMemory

        batch, time, dim = self.memories.shape
        memory = ChunkMemory.empty(batch, time // CHUNK, CHUNK, dim, like=self.memories)
        self.memory = memory.append(self.memories)
        self.start = ChunkMemory.empty(batch, 2 * TOPK, CHUNK, dim, like=self.memories)
        self.start = self.start.append(self.memories[:, : 2 * TOPK * CHUNK])

    def step(self, index: int) -> Tensor:
        """One query against the whole memory."""
        return self._read_stream(self.queries[index % len(self.queries)], self.memory)

    def warm_up(self) -> None:
        """The same on the first chunks."""
        self._read_stream(self.queries[0], self.start)

    def _read_stream(self, queries: Tensor, memory: Any) -> Tensor:
        with torch.no_grad():
            return self.attention.read(  # type: ignore[operator]
                queries, memory.contents, memory.summaries, lengths=memory.lengths()
            )
