"""A whole member over one row `[time, dim]`, layer by layer, each token by itself.

Segments appear only in what a token may see; there is no cache, no ring and no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import causal_attention, rms_norm, swiglu

First = Callable[[int], int]


def segment_attention(part: Any, x: Tensor, *, first: First, **options: Any) -> Tensor:
    """`memory_models.transformer.SegmentAttention` over the residual stream of one row."""
    weights = {
        "queries": part.to_queries.weight,
        "keys": part.to_keys.weight,
        "values": part.to_values.weight,
        "out": part.to_out.weight,
    }
    if part.matching:
        options["mix"] = (part.mix_own, part.mix_previous)
        options["scales"] = list(part.log_scale.exp().flatten())
    normed = rms_norm(x, part.norm.weight)
    return causal_attention(normed, weights, part.config.heads, first=first, **options)


def token_shift(shift: Any, x: Tensor, segment: int) -> Tensor:
    """x_t + W x_{t-1} within each segment."""
    if shift is None:
        return x
    rows = [x[t] + (shift.mix.weight @ x[t - 1] if t % segment else 0) for t in range(len(x))]
    return torch.stack(rows)


def feedforward(part: Any, x: Tensor) -> Tensor:
    """`memory_models.transformer.FeedForward`."""
    return swiglu(x, part.norm.weight, part.to_inner.weight, part.to_out.weight)


def transformer(
    trunk: Any,
    x: Tensor,
    *,
    segment: int,
    first: First,
    side: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """A `Trunk` over one row.

    Args:
        trunk: the module.
        x: `[time, dim]`.
        segment: tokens of a segment, over whose border no token is shifted.
        first: the first token that the token at a time sees.
        side: what a memory adds to the residual stream `[time, dim]` after attention in a layer.
    """
    x = token_shift(trunk.shift, x, segment)
    for layer, (attention, inner) in enumerate(zip(trunk.attentions, trunk.feedforwards, strict=True)):
        # The matching layer's keys are made when their segment is read, so that its first has none before.
        x = x + segment_attention(
            attention, x, first=first, has_previous=lambda time, place: place % segment > 0
        )
        if side is not None:
            x = x + side(layer, x)
        x = x + feedforward(inner, x)
    return rms_norm(x, trunk.norm.weight)
