"""Attention whose logits depend on the distance between query and key, without a `[time, time]` bias.

A learned position bias needs a gradient, and with one the fused kernels fall back to keeping the whole
attention matrix of every layer (on the CPU; Memformer's segments make that the largest part of a step's
memory). Here the bias stays a table over distances, matrices exist for a few heads at a time, and the
backward pass computes them again.
"""

# b batch, h heads, i queries, j keys, d width of a head

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the attention matrices that exist at a time: 4 MiB in float32 stay in a core's cache, while an
# accelerator wants large products.
_CHUNK_CPU = 2**20
_CHUNK_ACCELERATOR = 2**26


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, *, bias: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """Softmax attention, scaled by `1 / sqrt(dim_head)`.

    Args:
        queries: `[batch, heads, queries, dim_head]`.
        keys: `[batch, heads, keys, dim_head]`; with a bias the queries are the last of the keys.
        values: `[batch, heads, keys, dim_head]`.
        bias: `[heads, queries + keys - 1]`, what is added to the logit of each distance `key - query`, from
            `1 - keys` up to `queries - 1`; minus infinity forbids a distance. The key itself (distance 0)
            must be allowed.
        keep: bool `[batch, keys]`, false where a key must not be seen.

    Returns:
        `[batch, heads, queries, dim_head]`; zero in rows of which no key is kept; finite but without meaning
        for a query that `keep` and `bias` together leave no key.
    """
    some = None
    if keep is not None:
        some = keep.any(1, keepdim=True)
        # A softmax over nothing is NaN, in the backward pass even where its result is thrown away.
        keep = keep | ~some
    if bias is None:
        mask = None if keep is None else keep[:, None, None]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    else:
        attended = _BiasedAttention.apply(queries, keys, values, bias.to(queries.dtype), keep)
    return attended if some is None else torch.where(some[..., None, None], attended, 0)


class _BiasedAttention(torch.autograd.Function):
    # Queries are taken in reverse, because then bias[i, j] = table[i + j], a view with strides (1, 1).

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, keep: Tensor | None
    ) -> Tensor:
        batch, heads, time, _ = queries.shape
        backwards = queries.flip(2)
        out = values.new_empty(batch, time, heads, values.shape[-1]).transpose(1, 2)
        for rows, group in _chunks(batch, heads, time * keys.shape[2], queries.device):
            weights = _weights(backwards[rows, group], keys[rows, group], table[group], _part(keep, rows))
            out[rows, group] = (weights @ values[rows, group]).flip(2)
        ctx.save_for_backward(queries, keys, values, table, keep, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, table, keep, out = ctx.saved_tensors
        batch, heads, time, width = queries.shape
        length, distances = keys.shape[2], table.shape[1]
        scale = width**-0.5
        backwards, gradient_back = queries.flip(2), gradient.flip(2)
        # softmax's backward needs sum_j dW_ij W_ij = dO_i . O_i
        inner = (gradient * out).sum(-1, keepdim=True).flip(2)
        to_queries, to_keys, to_values = (torch.empty_like(each) for each in (queries, keys, values))
        to_table = torch.zeros_like(table) if ctx.needs_input_grad[3] else None
        for rows, group in _chunks(batch, heads, time * length, queries.device):
            part = (rows, group)
            weights = _weights(backwards[part], keys[part], table[group], _part(keep, rows))
            to_values[part] = weights.transpose(-1, -2) @ gradient_back[part]
            to_logits = gradient_back[part] @ values[part].transpose(-1, -2)
            to_logits.sub_(inner[part]).mul_(weights)
            to_queries[part] = (to_logits @ keys[part]).mul_(scale).flip(2)
            to_keys[part] = (to_logits.transpose(-1, -2) @ backwards[part]).mul_(scale)
            if to_table is not None:
                # Rows one element longer than the table, read back with the table's length, are each
                # shifted by one more: columns become sums over i + j.
                skewed = F.pad(to_logits.sum(0), (0, distances + 1 - length)).flatten(1)
                skewed = skewed[:, : time * distances].unflatten(1, (time, distances))
                to_table[group] += skewed.sum(1)
        return to_queries, to_keys, to_values, to_table, None


def _weights(queries: Tensor, keys: Tensor, table: Tensor, keep: Tensor | None) -> Tensor:
    # [rows, heads, i, j], queries in reverse.
    logits = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    logits += table.unfold(1, keys.shape[2], 1)
    if keep is not None:
        # Finite, so that a query whose every allowed key is left out does not become NaN.
        logits.masked_fill_(~keep[:, None, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1)


def _part(keep: Tensor | None, rows: slice) -> Tensor | None:
    return None if keep is None else keep[rows]


def _chunks(batch: int, heads: int, size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    # All heads of some rows, or some heads of one row.
    budget = _CHUNK_CPU if device.type == "cpu" else _CHUNK_ACCELERATOR
    some_heads = min(heads, max(1, budget // max(size, 1)))
    some_rows = max(1, budget // max(size * heads, 1)) if some_heads == heads else 1
    for head in range(0, heads, some_heads):
        for row in range(0, batch, some_rows):
            yield slice(row, row + some_rows), slice(head, head + some_heads)
