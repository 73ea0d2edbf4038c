"""Attention and feed-forward of the classic layers that keep little for the way back, and compute it again.

Both are exact: what is computed again is what was computed first. A backward pass that is itself
differentiated (`create_graph=True`) goes through the plain expressions.
"""

# b batch, t time, n keys, h heads, d width of a head

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def position_scores(queries: Tensor, table: Tensor, tokens: int) -> Tensor:
    """Each query's product with the row of each token's distance, in one product and no copy.

    Args:
        queries: `[b, h, t, d]`, the last `t` of `tokens` tokens.
        table: `[h, distances, d]`, the row of distance 0 last.
        tokens: how many tokens there are, at most as many as distances.

    Returns:
        `[b, h, t, tokens]`; anything where a token lies after the query.
    """
    batch, heads, time, _ = queries.shape
    # Of the table's last `tokens` rows, query i meets token j at row j + (t - 1 - i). In products one longer
    # than that (with a row that is read for no token) the next query's begin exactly where the shift wants
    # them, so that reading on across the queries is the shift.
    missing = max(0, tokens + 1 - table.shape[1])
    rows = F.pad(table, (0, 0, missing, 0)) if missing else table[:, table.shape[1] - tokens - 1 :]
    products = queries @ rows.transpose(-1, -2)
    return products.flatten(-2)[..., time:].view(batch, heads, time, tokens)


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
    inputs = (queries, keys, values, table)
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in inputs)
    if not learns:
        return _attend_fused(*inputs, tokens=tokens, absent=absent, dropout=dropout)
    if dropout or queries.device.type != "cpu" or torch.compiler.is_compiling():
        # Another draw would be another result; compilers and other devices have their own ways.
        plain = _attend_plainly if queries.device.type == "cpu" else _attend_fused
        return plain(*inputs, tokens=tokens, absent=absent, dropout=dropout)
    # No fused kernel here has a gradient for the bias, and the plain expression keeps its weights, which are
    # by far the largest thing a layer keeps.
    return _Attention.apply(*inputs, tokens, absent)


class _Attention(torch.autograd.Function):
    """`_attend_fused`, and back through `_attend_plainly`."""

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
        ctx.save_for_backward(queries, keys, values, table, absent)  # type: ignore[arg-type]
        ctx.tokens = tokens  # type: ignore[attr-defined]
        return _attend_fused(queries, keys, values, table, tokens=tokens, absent=absent, dropout=0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, absent = ctx.saved_tensors

        def again(*parts: Tensor) -> Tensor:
            return _attend_plainly(*parts, tokens=ctx.tokens, absent=absent, dropout=0.0)

        return *gradients_again(again, inputs, ctx.needs_input_grad[:4], gradient), None, None


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(F.gelu(x), weight, bias)` of `x` `[..., inner]`."""
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return F.linear(F.gelu(x), weight, bias)
    return _LinearOfGELU.apply(x, weight, bias)


class _LinearOfGELU(torch.autograd.Function):
    """Keeps the input of the GELU alone: its result is as wide, and cheap to compute again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():

            def again(*parts: Tensor) -> Tensor:
                return F.linear(F.gelu(parts[0]), parts[1], parts[2])

            return gradients_again(again, [x, weight, bias], needed, gradient)
        rows = gradient.flatten(0, -2)
        of_weight = rows.mT @ F.gelu(x).flatten(0, -2) if needed[1] else None
        of_bias = rows.sum(0) if needed[2] else None
        of_x = torch.ops.aten.gelu_backward(gradient @ weight, x) if needed[0] else None
        return of_x, of_weight, of_bias


def gradients_again(
    function: Callable[..., Tensor], inputs: list[Tensor], needed: tuple[bool, ...], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)`, which is computed once more; None where not `needed`."""
    twice = torch.is_grad_enabled()
    if not twice:
        inputs = [part.detach().requires_grad_(need) for part, need in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        result = function(*inputs)
    wanted = [part for part, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=twice))
    return tuple(next(found) if need else None for need in needed)


def _attend_fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    *,
    tokens: int,
    absent: Tensor | None,
    dropout: float,
) -> Tensor:
    heads = queries.shape[1]
    return F.scaled_dot_product_attention(
        queries,
        keys.expand(-1, heads, -1, -1),
        values.expand(-1, heads, -1, -1),
        attn_mask=_bias(queries, table, keys.shape[2], tokens, absent),
        dropout_p=dropout,
        scale=1.0,
    )


def _attend_plainly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    *,
    tokens: int,
    absent: Tensor | None,
    dropout: float,
) -> Tensor:
    scores = queries @ keys.transpose(-1, -2)
    scores += _bias(queries, table, keys.shape[2], tokens, absent)
    return F.dropout(scores.softmax(-1), dropout) @ values


def _bias(queries: Tensor, table: Tensor, keys: int, tokens: int, absent: Tensor | None) -> Tensor:
    """What to add to the scores `[b, h, t, keys]`: the term by distance, minus infinity at what is unseen."""
    time = queries.shape[2]
    bias = F.pad(position_scores(queries, table, tokens), (keys - tokens, 0))
    blocked = torch.full((time, keys), -torch.inf, device=queries.device, dtype=queries.dtype)
    blocked = blocked.triu(keys - time + 1)
    if absent is not None:
        blocked = blocked.masked_fill(absent[:, None, None], -torch.inf)
    bias += blocked
    return bias
