"""A memory taken apart into plain data and tensors, and put together again: for files, copies and pickles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from memorizing.knn.faiss_engine import FaissOptions

if TYPE_CHECKING:
    from memorizing.knn.memory import KNNMemory

M = TypeVar("M", bound="KNNMemory")


def pack(memory: KNNMemory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and counters as JSON has them; and what is held, oldest first, on the CPU."""
    ring = memory._ring
    options = {
        "dim": memory.dim,
        "max_memories": memory.max_memories,
        "num_indices": memory.num_indices,
        "value_dim": memory.value_dim,
        "metric": memory.metric,
        "index": memory.index,
        "dtype": str(memory.dtype).removeprefix("torch."),
        "track_hits": ring.hits is not None,
        "faiss_options": dataclasses.asdict(memory.faiss_options),
    }
    engines, tensors = memory._search.packed()
    for row in range(memory.num_indices):
        held = memory.contents(row)
        tensors |= {f"keys.{row}": held.keys.cpu(), f"values.{row}": held.values.cpu()}
        if held.hits is not None:
            tensors[f"hits.{row}"] = held.hits.cpu()
    return {"options": options, "total": ring.total, "first_id": ring.first_id, "engines": engines}, tensors


def unpack(
    cls: type[M],
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str | None = None,
) -> M:
    """The memory that `pack` described, on `device`."""
    options = dict(description["options"])
    options["dtype"] = getattr(torch, options["dtype"])
    options["faiss_options"] = FaissOptions(**options["faiss_options"])
    memory = cls(**options, device=device)
    ring = memory._ring
    for row in range(memory.num_indices):
        keys, values = (tensors[f"{name}.{row}"].to(memory.device) for name in ("keys", "values"))
        # Written as if they were the last to arrive, in the places they had.
        ring.first_id[row] = description["first_id"][row]
        ring.total[row] = description["total"][row] - len(keys)
        ring.write([row], keys.unsqueeze(0), values.unsqueeze(0))
        if ring.hits is not None:
            ring.hits[row, ring.slots(row)] = tensors[f"hits.{row}"].to(memory.device)
    memory._search.unpack(description["engines"], tensors)
    return memory


def fork(memory: M, before: int | None) -> M:
    """Another memory with the pairs whose id is below `before`, all of them for None."""
    source = memory._ring
    made = type(memory)(
        memory.dim,
        memory.max_memories,
        memory.num_indices,
        value_dim=memory.value_dim,
        metric=memory.metric,
        index=memory.index,
        dtype=memory.dtype,
        device=memory.device,
        track_hits=source.hits is not None,
        faiss_options=memory.faiss_options,
    )
    ring = made._ring
    for row in range(memory.num_indices):
        held = memory.contents(row)
        kept = len(held.ids) if before is None else int((held.ids < before).sum())
        # As after a clear just before the first of them: whatever came earlier is not held.
        ring.first_id[row] = source.oldest_id(row)
        changes = ring.write([row], held.keys[None, :kept], held.values[None, :kept])
        if held.hits is not None and ring.hits is not None:
            ring.hits[row, ring.slots(row)[:kept]] = held.hits[:kept]
        made._search.changed([row], changes)
    return made
