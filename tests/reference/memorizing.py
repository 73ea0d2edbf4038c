"""The Memorizing Transformer over one row, each query by itself; memory and cache are ranges of the past."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import rms_norm
from tests.reference.transformer import feedforward, segment_attention, token_shift


def softmax_sum(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Softmax attention of one query `[width]`."""
    scores = torch.stack([(query * key).sum() for key in keys])
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0]))


def nearest(query: Tensor, places: list[int], keys: list[Tensor], topk: int) -> list[int]:
    """The `topk` places whose key has the largest product with the query."""
    return sorted(places, key=lambda place: -float((query * keys[place]).sum().detach()))[:topk]


def knn_attention(part: Any, x: Tensor, *, segment: int, cache: int = 0) -> Tensor:
    """`memorizing.KNNAttention` over the residual stream `[time, dim]` of one row, cut into segments."""
    normed = rms_norm(x, part.norm.weight)
    heads, scales = part.config.heads, part.log_scale.exp().flatten()
    keys: list[list[Tensor]] = [[] for _ in range(heads)]
    values: list[list[Tensor]] = [[] for _ in range(heads)]
    for place, token in enumerate(normed):
        source = token
        if part.shift_keys:
            before = normed[place - 1] if place % segment else torch.zeros_like(token)
            source = part.mix_own * token + part.mix_previous * before
        projected_keys = (part.to_keys.weight @ source).chunk(part.stores)
        projected_values = (part.to_values.weight @ token).chunk(part.stores)
        for head in range(heads):
            store = head * part.stores // heads
            keys[head].append(projected_keys[store] / projected_keys[store].norm())
            values[head].append(projected_values[store])
    outputs = []
    for time, token in enumerate(normed):
        begin = time // segment * segment
        cached = max(0, begin - cache)
        stored = list(range(max(0, cached - part.memories), cached))
        joined = []
        for head, projected in enumerate((part.to_queries.weight @ token).chunk(heads)):
            query = scales[head] * projected / projected.norm()
            # What lies before the segment carries no gradient.
            key = [k if place >= begin else k.detach() for place, k in enumerate(keys[head])]
            value = [v if place >= begin else v.detach() for place, v in enumerate(values[head])]
            found = nearest(query, stored, key, part.topk)
            near = list(range(cached, time + 1))
            if part.combine == "softmax":
                both = found + near
                out = softmax_sum(query, [key[p] for p in both], [value[p] for p in both])
            else:
                out = softmax_sum(query, [key[p] for p in near], [value[p] for p in near])
                if found:
                    gate = 1 / (1 + torch.exp(-part.gate[head, 0]))
                    far = softmax_sum(query, [key[p] for p in found], [value[p] for p in found])
                    out = gate * far + (1 - gate) * out
            joined.append(out)
        outputs.append(part.to_out.weight @ torch.cat(joined))
    return torch.stack(outputs)


def memorizing(made: Any, x: Tensor) -> Tensor:
    """`memorizing.Memorizing` over one row `[time, dim]`, cut into whole segments and a rest."""
    config, trunk = made.config, made.trunk
    length, cache = config.segment_length, config.xl_cache
    x = token_shift(trunk.shift, x, length)
    for layer, (attention, inner) in enumerate(zip(trunk.attentions, trunk.feedforwards, strict=True)):
        if layer in config.layers_with_memory:
            x = x + knn_attention(attention, x, segment=length, cache=cache)
        else:
            x = x + segment_attention(
                attention,
                x,
                first=lambda time: max(0, time // length * length - cache),
                has_previous=lambda time, place: place % length > 0,
            )
        x = x + feedforward(inner, x)
    return rms_norm(x, trunk.norm.weight)
