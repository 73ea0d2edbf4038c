"""The nearest pairs among those in the state and those in an outside store, as one operator.

A custom operator, so that `torch.compile` keeps the search as it is. It reads the store and changes nothing:
within a graph the store is what it was, for `commit` runs between segments.
"""

# axes: b batch, h stores, i queries, n pairs in the state, k pairs read, d width of a head

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.knn import exact_top_k
from memorizing.memory import OutsidePairs, PairMemory
from memorizing.store import store_of


@torch.library.custom_op(
    "memory_models::memorizing_find",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor values, Tensor total, Tensor committed, Tensor stream, "
    "int topk, int store, int layer) -> (Tensor, Tensor, Tensor)",
)
def find_pairs(
    queries: Tensor,  # [b, h, i, d], float32 or float64, scaled
    keys: Tensor,  # [b, h, n, d], the newest, in a ring
    values: Tensor,
    total: Tensor,  # int64 [b]
    committed: Tensor,
    stream: Tensor,
    topk: int,
    store: int,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest pairs of each query among those in the state and those in the store, without a gradient.

    They are copied, `i k (d + d)` numbers a row and store: a later commit may write over them before the
    backward pass.

    Returns:
        Keys and values `[b, h, i, k, d]` in the queries' dtype, in no order, and the pairs' ages
        `[b, h, i, k]` int64, -1 where fewer than `k = topk` are held.
    """
    b, h, i, d = queries.shape
    found_keys, found_values = queries.new_zeros(b, h, i, topk, d), queries.new_zeros(b, h, i, topk, d)
    ages = torch.full((b, h, i, topk), -1, dtype=torch.int64, device=queries.device)
    recent = PairMemory(keys=keys, values=values, total=total)
    outside = OutsidePairs(recent=recent, committed=committed, stream=stream)
    stores = torch.arange(h, device=queries.device)[:, None, None]
    with torch.autocast(queries.device.type, enabled=False):
        beyond = store_of(store).read(queries, outside, layer, topk)
        for row, held in enumerate(recent.held().tolist()):
            near = exact_top_k(queries[row], keys[row, :, :held], min(topk, held), ordered=False)
            slots, far = near.slots, None
            age = (total[row] - 1 - slots) % max(held, 1)
            if row in beyond:
                memory, scores, ids = beyond[row]
                best = torch.cat([near.scores, scores.to(near.scores)], -1).topk(topk, sorted=False).indices
                slots, age, ids = _merged(best, slots, age, ids)
                age = torch.where(ids >= 0, total[row] - 1 - ids, age)
                far = memory.gather(ids)
            count = slots.shape[-1]
            taken = keys[row][stores, slots].to(queries.dtype), values[row][stores, slots].to(queries.dtype)
            if far is not None:
                there = far.mask[..., None]
                taken = (
                    torch.where(there, far.keys.to(queries.dtype), taken[0]),
                    torch.where(there, far.values.to(queries.dtype), taken[1]),
                )
            found_keys[row, :, :, :count], found_values[row, :, :, :count] = taken
            ages[row, :, :, :count] = age
    return found_keys, found_values, ages


def _merged(best: Tensor, slots: Tensor, ages: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, ages and ids `[h, i, k]` at the places `best` among pairs of the state, then of the store.

    Where the pair is the state's the id is -1; where it is the store's, slot and age are anything. The
    state's ring is full where the store has pairs, so that nothing is not among the best.
    """
    first = slots.shape[-1]
    here = best.clamp(max=first - 1)
    ids = ids.gather(-1, (best - first).clamp(min=0)).masked_fill(best < first, -1)
    ages = torch.where((best >= first) & (ids < 0), -1, ages.gather(-1, here))
    return slots.gather(-1, here), ages, ids


@find_pairs.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    total: Tensor,
    committed: Tensor,
    stream: Tensor,
    topk: int,
    store: int,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*queries.shape[:3], topk)
    found = queries.new_empty(*shape, queries.shape[3])
    return found, torch.empty_like(found), queries.new_empty(shape, dtype=torch.int64)
