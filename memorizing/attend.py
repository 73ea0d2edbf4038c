"""Attention from queries to the nearest pairs of a ring inside the state, without laying the pairs out.

A custom operator, so that `torch.compile` keeps the search and its tiles as they are. Only slots that hold a
pair are looked at, so that an empty one cannot win, whatever it holds. `attend_portably` is what
`torch.export` writes down: ordinary operations, all scores at once.
"""

# axes: b batch, h stores, p heads that share one, i queries, m memories, k pairs read, d dim,
# e dim of a value; g rows of one group times stores, n pairs held

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from memorizing.knn.attend import bag, dots
from memorizing.knn.exact import exact_top_k


@torch.library.custom_op(
    "memory_models::memorizing_attend",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor values, Tensor total, int topk, Tensor? bias=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def attend(
    queries: Tensor,  # [b, h, i, d], float32 or float64, scaled
    keys: Tensor,  # [b, h, m, d], of any floating dtype
    values: Tensor,  # [b, h, m, e]
    total: Tensor,  # int64 [b], pairs ever written
    topk: int,
    bias: Tensor | None = None,  # [h, p, m], added to the logits of a pair by its age
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention of each query over the `topk` pairs of its row and store with the largest product.

    The gradient reaches the queries and the bias, never the pairs. With a bias the queries of the `p` heads
    that share a store follow each other, `i / p` of each; it does not change which pairs are read.

    Returns:
        The output `[b, h, i, e]`, the log of the softmax' denominator `[b, h, i]`, and the slots and the
        weights `[b, h, i, k]` of the pairs read, where `k = min(topk, m)`. Where fewer pairs are held, the
        last weights are 0; where none is, the output is 0 and the logarithm minus infinity.
    """
    b, h, i, _ = queries.shape
    m, e, k = keys.shape[2], values.shape[3], min(topk, keys.shape[2])
    out = queries.new_zeros(b * h, i, e)
    log = queries.new_full((b * h, i), -torch.inf)
    slots = torch.zeros(b * h, i, k, dtype=torch.int64, device=queries.device)
    weights = queries.new_zeros(b * h, i, k)
    flat_queries, flat_keys, table = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 2)
    with torch.autocast(queries.device.type, enabled=False):
        for group, held in _groups(total, h, m):
            found = exact_top_k(flat_queries[group], flat_keys[group, :held], min(k, held), ordered=False)
            scores = found.scores
            if bias is not None:
                scores = scores + bias.flatten()[_ages(found.slots, total, group, bias)]
            denominator = scores.logsumexp(-1, keepdim=True)
            weight = (scores - denominator).exp()
            summed = bag(weight.flatten(0, 1), _places(found.slots, group, m), table)
            out[group] = summed.view(-1, i, e)
            log[group] = denominator.squeeze(-1)
            slots[group, :, : found.slots.shape[2]] = found.slots
            weights[group, :, : found.slots.shape[2]] = weight
    return out.view(b, h, i, e), log.view(b, h, i), slots.view(b, h, i, k), weights.view(b, h, i, k)


def attend_portably(
    queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, topk: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attend`, for graphs that run without this library, or without torch.

    The scores of all slots are there at once, `[b, h, i, m]`, and the values of all pairs read.
    """
    b, h, i, _ = queries.shape
    m, k = keys.shape[2], min(topk, keys.shape[2])
    if m == 0:
        none = queries.new_zeros(b, h, i, 0)
        out = queries.new_zeros(b, h, i, values.shape[3])
        return out, queries.new_full((b, h, i), -torch.inf), none.to(torch.int64), none
    held = (torch.arange(m, device=total.device) < total[:, None])[:, None, None]
    some = (total > 0)[:, None, None]
    with torch.autocast(queries.device.type, enabled=False):
        found = (queries @ keys.to(queries.dtype).mT).masked_fill(~held, -torch.inf).topk(k)
        slots, scores = found.indices, found.values
        if bias is not None:
            ages = (total[:, None, None, None] - 1 - slots) % m
            each = bias[:, :, None].expand(-1, -1, i // bias.shape[1], -1).flatten(1, 2)
            scores = scores + each.expand(b, -1, -1, -1).gather(-1, ages)
        real = scores > -torch.inf
        # A row without any pair takes part as zeros: a softmax over nothing is NaN, in its gradient too.
        scores = torch.where(real | some[..., None], scores, 0)
        log = scores.logsumexp(-1)
        weights = torch.where(real, (scores - log[..., None]).exp(), 0)
        rows = torch.arange(b, device=slots.device)[:, None, None, None]
        stores = torch.arange(h, device=slots.device)[:, None, None]
        read = torch.where(real[..., None], values[rows, stores, slots].to(queries.dtype), 0)
        out = (weights[..., None, :] @ read).squeeze(-2)
    return out, torch.where(some, log, -torch.inf), slots, weights


@torch.library.custom_op(
    "memory_models::memorizing_attend_backward",
    mutates_args=(),
    schema="(Tensor? grad, Tensor? log_grad, Tensor keys, Tensor values, Tensor total, Tensor? bias, "
    "Tensor slots, Tensor weights) -> (Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor | None,
    log_grad: Tensor | None,
    keys: Tensor,
    values: Tensor,
    total: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of `attend` for the queries, `[b, h, i, d]`, and for the bias (`[0]` without one)."""
    (b, h, i, k), m, d = slots.shape, keys.shape[2], keys.shape[3]
    flat_slots, flat_weights = slots.flatten(0, 1), weights.flatten(0, 1)
    query_grad = weights.new_zeros(b * h, i, d)
    bias_grad = weights.new_zeros(0 if bias is None else bias.numel())
    key_table, value_table = keys.flatten(0, 2), values.flatten(0, 2)
    with torch.autocast(weights.device.type, enabled=False):
        for group, held in _groups(total, h, m):
            read = min(k, held)
            places = _places(flat_slots[group, :, :read], group, m)
            weight = flat_weights[group, :, :read].flatten(0, 1)
            score_grad = torch.zeros_like(weight)
            if grad is not None:
                weight_grad = dots(grad.flatten(0, 1)[group].flatten(0, 1), places, value_table)
                score_grad = weight * weight_grad
                score_grad = score_grad - weight * score_grad.sum(-1, keepdim=True)
            if log_grad is not None:
                score_grad = score_grad + weight * log_grad.flatten(0, 1)[group].flatten()[:, None]
            query_grad[group] = bag(score_grad, places, key_table).view(-1, i, d)
            if bias is not None:
                ages = _ages(flat_slots[group, :, :read], total, group, bias)
                bias_grad.index_add_(0, ages.flatten(), score_grad.flatten())
    if bias is not None:
        bias_grad = bias_grad.view(bias.shape)
    return query_grad.view(b, h, i, d), bias_grad


def _groups(total: Tensor, heads: int, memories: int) -> Iterator[tuple[slice, int]]:
    """Neighbouring rows that hold equally many pairs, as a slice of `b * h`; rows without are left out."""
    first = 0
    for held, rows in groupby(total.clamp(max=memories).tolist()):
        last = first + len(list(rows)) * heads
        if held > 0:
            yield slice(first, last), held
        first = last


def _places(slots: Tensor, group: slice, memories: int) -> Tensor:
    """Slots `[g, i, k]` as rows of a table `[b h m, ...]`, `[g i, k]`."""
    start = torch.arange(group.start, group.stop, device=slots.device) * memories
    return (slots + start[:, None, None]).flatten(0, 1)


def _ages(slots: Tensor, total: Tensor, group: slice, bias: Tensor) -> Tensor:
    """Where the bias of the pairs in `slots` `[g, i, k]` stands among those of all stores, heads and ages."""
    (h, p, m), i = bias.shape, slots.shape[1]
    rows = torch.arange(group.start, group.stop, device=slots.device)
    newest = total[rows // h] - 1
    head = (rows % h * p)[:, None] + torch.arange(i, device=slots.device) // (i // p)
    return head[..., None] * m + (newest[:, None, None] - slots) % m


@attend.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, topk: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*queries.shape[:3], min(topk, keys.shape[2]))
    out = queries.new_empty(*queries.shape[:3], values.shape[3])
    log = queries.new_empty(queries.shape[:3])
    return out, log, queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape)


@_attend_backward.register_fake
def _(
    grad: Tensor | None,
    log_grad: Tensor | None,
    keys: Tensor,
    values: Tensor,
    total: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    query_grad = weights.new_empty(*weights.shape[:3], keys.shape[3])
    return query_grad, weights.new_empty((0,) if bias is None else bias.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, keys, values, total, _, bias = inputs
    ctx.save_for_backward(keys, values, total, bias, output[2], output[3])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, log_grad: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None and log_grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # within a checkpoint they can be asked for but once
    query_grad, bias_grad = _attend_backward(grad, log_grad, *saved)
    return query_grad, None, None, None, None, None if saved[3] is None else bias_grad


attend.register_autograd(_differentiate, setup_context=_save_for_backward)
