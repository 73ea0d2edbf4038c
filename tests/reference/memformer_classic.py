"""The classic Memformer's encoder and decoder over one row, a head and a query at a time, without padding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm


def bucket(distance: int, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> int:
    """T5's bucket of a distance `key - query`, in integers (Raffel et al. 2020, §2.1).

    Half of a direction's buckets are for one distance each; the others divide the way from there to
    `max_distance` evenly in the logarithm: the k-th begins at exact * (max_distance / exact)^(k / wide).
    """
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    wide, ratio = buckets - exact, max_distance // exact
    begun = [k for k in range(wide) if distance**wide >= exact**wide * ratio**k]
    return first + exact + begun[-1]


def norm(x: Tensor, part: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], part.weight, part.bias)


def linear(x: Tensor, part: Any) -> Tensor:
    return x @ part.weight.T + part.bias


def attention(
    part: Any, x: Tensor, context: Tensor, table: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Of normalised `x` `[time, dim]` to `context` `[length, dim]`; `table` `[buckets, heads]`."""
    keys, values = linear(context, part.to_keys_values).chunk(2, -1)
    queries = linear(x, part.to_queries)
    width = x.shape[-1] // part.heads
    rows = []
    for place in range(len(x)):
        seen = place + 1 if causal else len(context)
        heads = []
        for head in range(part.heads):
            own = slice(head * width, (head + 1) * width)
            logits = [queries[place, own] @ keys[other, own] / math.sqrt(width) for other in range(seen)]
            if table is not None:
                logits = [
                    logit + table[bucket(other - place, bidirectional=not causal), head]
                    for other, logit in enumerate(logits)
                ]
            heads.append(torch.stack(logits).softmax(0) @ values[:seen, own])
        rows.append(torch.cat(heads))
    return linear(torch.stack(rows), part.to_out)


def hiddens(model: Any, tokens: Tensor, context: Tensor, *, causal: bool) -> Tensor:
    """What the encoder or decoder makes of ids `[time]` and slots or encoder outputs `[length, dim]`."""
    x = model.embedding.weight[tokens]
    for layer in model.layers:
        normed = norm(x, layer.attention.norm)
        x = x + attention(layer.attention, normed, normed, model.positions.weight, causal=causal)
        x = x + attention(layer.cross, norm(x, layer.cross.norm), context)
        first, inner, _, last = layer.feedforward
        x = x + linear(gelu(linear(norm(x, first), inner)), last)
    return norm(x, model.norm)


def encode(encoder: Any, tokens: Tensor, slots: Tensor) -> Tensor:
    """`[time, dim]` of one row."""
    return hiddens(encoder, tokens, slots, causal=False)


def decode(decoder: Any, tokens: Tensor, context: Tensor) -> Tensor:
    """Logits `[time, num_tokens]` of one row."""
    return linear(hiddens(decoder, tokens, context, causal=True), decoder.to_logits)


def target_loss(decoder: Any, target: Tensor, context: Tensor) -> tuple[Tensor, int]:
    """Sum of the negative log-likelihoods of ids `[time]` but the first, and how many they are."""
    if len(target) < 2:
        return context.sum() * 0, 0
    likelihoods = decode(decoder, target[:-1], context).log_softmax(-1)
    return -torch.stack([row[token] for row, token in zip(likelihoods, target[1:], strict=True)]).sum(), len(
        target
    ) - 1
