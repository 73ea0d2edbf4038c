"""Attention and feed-forward of the classic layers that keep little for the way back, and compute it again.

Both are exact: what is computed again is what was computed first. A backward pass that is itself
differentiated (`create_graph=True`) goes through the plain expressions.
"""

# b batch, t time, n keys, h heads, d width of a head

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from memxl.products import gradients_again, linear, linear_gradients, product

# Scores that stay in the cache while they are worked on.
_SCORES = 1 << 18


def position_scores(queries: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """Each query's product with the row of each token's distance, in one product and no copy.

    Args:
        queries: `[b, h, t, d]`, the last `t` of `tokens` tokens.
        rows: `[h, tokens + 1, d]` from `distance_rows`.
        tokens: how many tokens there are, at most as many as distances.

    Returns:
        `[b, h, t, tokens]`; anything where a token lies after the query.
    """
    # Of the last `tokens` rows, query i meets token j at row j + (t - 1 - i). In products one longer than
    # that (with a row that is read for no token) the next query's begin exactly where the shift wants them,
    # so that reading on across the queries is the shift.
    time = queries.shape[-2]
    products = queries @ rows.mT
    return products.flatten(-2)[..., time:].unflatten(-1, (time, tokens))


def distance_rows(table: Tensor, tokens: int) -> Tensor:
    """The last `tokens + 1` rows of `[h, distances, d]`, before them a row of zeros if there are too few."""
    missing = max(0, tokens + 1 - table.shape[1])
    return F.pad(table, (0, 0, missing, 0)) if missing else table[:, table.shape[1] - tokens - 1 :]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    *,
    tokens: int,
    absent: Tensor | None,
    dropout: float,
) -> Tensor:
    """Causal softmax attention with a learned term for the distance of each token.

    Args:
        queries: `[b, h, t, d]`, scaled; those of the last `t` keys.
        keys: `[b, h or 1, n, d]`.
        values: as `keys`.
        table: `[h, distances, d]`, the row of distance 0 last.
        tokens: how many of the keys, the last ones, are tokens: these have a distance.
        absent: bool `[b, n]`, true at keys that a row does not have; None if there are none.
        dropout: of the attention weights.

    Returns:
        `[b, h, t, d]`.
    """
    inputs = _Inputs(queries, keys, values, table, tokens, absent, dropout)
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in (queries, keys, values, table))
    if queries.device.type != "cpu" or torch.compiler.is_compiling():
        # Compilers and other devices have their own ways.
        return _attend_fused(inputs)
    if not learns:
        return _attend_by_parts(inputs)
    if dropout:
        # Another draw would be another result.
        return _attend_plainly(inputs)
    # No fused kernel here has a gradient for the bias, and the plain expression keeps its weights, which are
    # by far the largest thing a layer keeps.
    return _Attention.apply(queries, keys, values, table, tokens, absent)


class _Inputs(NamedTuple):
    """What `attend` is given."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    tokens: int
    absent: Tensor | None
    dropout: float = 0.0

    def bias(self) -> Tensor:
        rows = distance_rows(self.table, self.tokens)
        return _bias(self.queries, rows, self.keys.shape[2], self.tokens, self.absent)


class _Attention(torch.autograd.Function):
    """`_attend_by_parts`, and back part by part."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        tokens: int,
        absent: Tensor | None,
    ) -> Tensor:
        found = _attend_by_parts(_Inputs(queries, keys, values, table, tokens, absent))
        ctx.save_for_backward(queries, keys, values, table, absent, found)  # type: ignore[arg-type]
        ctx.tokens = tokens  # type: ignore[attr-defined]
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, table, absent, found = ctx.saved_tensors
        inputs, needed = [queries, keys, values, table], ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def again(queries: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> Tensor:
                return _attend_plainly(_Inputs(queries, keys, values, table, ctx.tokens, absent))

            return *gradients_again(again, inputs, needed, gradient), None, None
        rows = distance_rows(table, ctx.tokens)
        of_queries, of_keys, of_values, of_rows = (
            torch.zeros_like(part) for part in (queries, keys, values, rows)
        )
        # What the softmax takes off all scores of a query: the mean of their gradients, by its output.
        means = (gradient * found).sum(-1, keepdim=True)
        for batch, heads, shared in _parts(queries, keys):
            asked, far, own = queries[batch, heads], rows[heads], keys[batch, shared]
            of_output = gradient[batch, heads]
            missing = None if absent is None else absent[batch]
            scores = _bias(asked, far, own.shape[2], ctx.tokens, missing)
            weights = scores.add_(asked @ own.mT).softmax(-1)
            _collect(of_values[batch, shared], weights.mT @ of_output)
            of_scores = (of_output @ values[batch, shared].mT).sub_(means[batch, heads]).mul_(weights)
            _collect(of_keys[batch, shared], of_scores.mT @ asked)
            of_products = _shifted_back(of_scores, ctx.tokens)
            of_queries[batch, heads] = (of_scores @ own).add_(of_products @ far)
            of_rows[heads] += (of_products.mT @ asked).sum(0)
        # Of the table only the rows that are in use, and not the one that was put before them.
        unused = table.shape[1] - min(ctx.tokens + 1, table.shape[1])
        of_table = F.pad(of_rows[:, max(0, rows.shape[1] - table.shape[1]) :], (0, 0, unused, 0))
        gradients = (of_queries, of_keys, of_values, of_table)
        return *(part if need else None for part, need in zip(gradients, needed, strict=True)), None, None


def _parts(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of the batch, heads, and heads of their keys, that are worked on together."""
    batch, heads, time, _ = queries.shape
    scores = time * keys.shape[2]
    # Fewer heads than threads would leave some idle.
    together = max(1, torch.get_num_threads(), _SCORES // max(1, scores))
    rows = max(1, min(batch, together // heads))
    for row in range(0, batch, rows):
        for head in range(0, heads, min(heads, together)):
            of_heads = slice(head, min(heads, head + together))
            yield slice(row, row + rows), of_heads, of_heads if keys.shape[1] > 1 else slice(0, 1)


def _collect(total: Tensor, part: Tensor) -> None:
    # One head of keys takes what all heads of queries have for it.
    total += part if total.shape[1] == part.shape[1] else part.sum(1, keepdim=True)


def _shifted_back(of_scores: Tensor, tokens: int) -> Tensor:
    """Gradient of the products in `position_scores`, from that of all scores."""
    time = of_scores.shape[-2]
    products = of_scores.new_empty(*of_scores.shape[:-2], time * (tokens + 1))
    products[..., :time] = 0
    products[..., time:].unflatten(-1, (time, tokens)).copy_(of_scores[..., of_scores.shape[-1] - tokens :])
    return products.unflatten(-1, (time, tokens + 1))


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(F.gelu(x), weight, bias)` of `x` `[..., inner]`."""
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return linear(F.gelu(x), weight, bias)
    return _LinearOfGELU.apply(x, weight, bias)


class _LinearOfGELU(torch.autograd.Function):
    """Keeps the input of the GELU alone: its result is as wide, and cheap to compute again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return product(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():

            def again(*parts: Tensor) -> Tensor:
                return F.linear(F.gelu(parts[0]), parts[1], parts[2])

            return gradients_again(again, [x, weight, bias], needed, gradient)
        of_inner, of_weight, of_bias = linear_gradients(gradient, F.gelu(x), weight, needed)
        of_x = None if of_inner is None else torch.ops.aten.gelu_backward(of_inner, x)
        return of_x, of_weight, of_bias


def _attend_by_parts(inputs: _Inputs) -> Tensor:
    """`_attend_fused` whose bias is never there as a whole."""
    queries, keys, values, table, tokens, absent, dropout = inputs
    batch, heads, time, width = queries.shape
    found = queries.new_empty(batch, time, heads, width).transpose(1, 2)
    for row, of_heads, shared in _parts(queries, keys):
        part = _Inputs(
            queries[row, of_heads],
            keys[row, shared],
            values[row, shared],
            table[of_heads],
            tokens,
            None if absent is None else absent[row],
            dropout,
        )
        found[row, of_heads] = _attend_fused(part)
    return found


def _attend_fused(inputs: _Inputs) -> Tensor:
    heads = inputs.queries.shape[1]
    return F.scaled_dot_product_attention(
        inputs.queries,
        inputs.keys.expand(-1, heads, -1, -1),
        inputs.values.expand(-1, heads, -1, -1),
        attn_mask=inputs.bias(),
        dropout_p=inputs.dropout,
        scale=1.0,
    )


def _attend_plainly(inputs: _Inputs) -> Tensor:
    scores = inputs.queries @ inputs.keys.mT
    scores += inputs.bias()
    return F.dropout(scores.softmax(-1), inputs.dropout) @ inputs.values


def _bias(queries: Tensor, rows: Tensor, keys: int, tokens: int, absent: Tensor | None) -> Tensor:
    """What to add to the scores `[b, h, t, keys]`: the term by distance, minus infinity at what is unseen."""
    time = queries.shape[2]
    bias = queries.new_empty(*queries.shape[:3], keys)
    bias[..., : keys - tokens] = 0
    bias[..., keys - tokens :] = position_scores(queries, rows, tokens)
    later = torch.ones(time, time, dtype=torch.bool, device=queries.device).triu(1)
    bias[..., keys - time :].masked_fill_(later, -torch.inf)
    if absent is not None:
        bias.masked_fill_(absent[:, None, None], -torch.inf)
    return bias
