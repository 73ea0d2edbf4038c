"""The Memorizing Transformer over one row, each query by itself; memory and cache are ranges of the past."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import rms_norm, rotary
from tests.reference.transformer import feedforward, segment_attention, token_shift

Places = tuple[list[int], list[int]]


def softmax(query: Tensor, keys: list[Tensor], biases: list[Tensor] | None = None) -> Tensor:
    """The weights of one query `[width]` on some keys, each with something added to its logit."""
    scores = torch.stack([(query * key).sum() for key in keys])
    if biases is not None:
        scores = scores + torch.stack(biases)
    weights = torch.exp(scores - scores.max())
    return weights / weights.sum()


def softmax_sum(
    query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor] | None = None
) -> Tensor:
    """Softmax attention of one query `[width]`."""
    weights = softmax(query, keys, biases)
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0]))


def scaled_log(age: float) -> float:
    """What the networks over ages and counts are given."""
    return math.log(1 + age) / 4


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def age_bias(part: Any, head: int, age: int) -> Tensor:
    """What a head adds to the logit of a pair of that age."""
    network = part.age_bias
    if network is None:
        return torch.zeros((), dtype=torch.float64)
    hidden = silu(network.enter.weight[:, 0] * scaled_log(age) + network.enter.bias)
    return (network.leave.weight[head] * hidden).sum()


def gate_share(part: Any, head: int, held: int, ages: list[int], weights: Tensor) -> Tensor:
    """The memory's share in a head, from what is held and the ages of what was attended to."""
    logit, network = part.gate[head, 0], part.gate_network
    if network is not None:
        mean = sum(float(w) * scaled_log(age) for w, age in zip(weights.detach(), ages, strict=True))
        features = torch.tensor([scaled_log(held), mean], dtype=torch.float64)
        logit = (
            logit + (network.leave[head] * silu(network.enter.weight @ features + network.enter.bias)).sum()
        )
    return 1 / (1 + torch.exp(-logit))


def joined(
    part: Any, head: int, query: Tensor, keys: list[Tensor], values: list[Tensor], places: Places
) -> Tensor:
    """One head's attention to the memory and to what is near, by gate or in one softmax."""
    stored, near = places
    found = nearest(query, stored, keys, part.topk)
    ages = [stored[-1] - place for place in found]
    biases = [age_bias(part, head, age) for age in ages]
    if part.combine == "softmax":
        both, none = found + near, torch.zeros((), dtype=torch.float64)
        return softmax_sum(
            query, [keys[p] for p in both], [values[p] for p in both], biases + [none] * len(near)
        )
    out = softmax_sum(query, [keys[p] for p in near], [values[p] for p in near])
    if found:
        far_keys = [keys[p] for p in found]
        share = gate_share(part, head, len(stored), ages, softmax(query, far_keys, biases))
        out = share * softmax_sum(query, far_keys, [values[p] for p in found], biases) + (1 - share) * out
    return out


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
        heard = []
        for head, projected in enumerate((part.to_queries.weight @ token).chunk(heads)):
            query = scales[head] * projected / projected.norm()
            # What lies before the segment carries no gradient.
            key = [k if place >= begin else k.detach() for place, k in enumerate(keys[head])]
            value = [v if place >= begin else v.detach() for place, v in enumerate(values[head])]
            near = list(range(cached, time + 1))
            heard.append(joined(part, head, query, key, value, (stored, near)))
        outputs.append(part.to_out.weight @ torch.cat(heard))
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


def shifted_recurrence(made: Any, x: Tensor) -> Tensor:
    """`memorizing.Memorizing` with `xl_shift` over one row `[time, dim]`, segment by segment.

    What a layer sees from before the segment are keys and values of its own outputs there, by places in the
    stream; nothing is moved, shifted or turned twice.
    """
    config, trunk = made.config, made.trunk
    length = config.segment_length
    x = token_shift(trunk.shift, x, length)
    outputs: list[list[Tensor]] = [[] for _ in trunk.attentions]
    finals = []
    for begin in range(0, len(x), length):
        hidden = x[begin : begin + length]
        cached = max(0, begin - config.xl_cache)
        stored = list(range(max(0, cached - config.memories), cached))
        for layer, (attention, inner) in enumerate(zip(trunk.attentions, trunk.feedforwards, strict=True)):
            normed = rms_norm(hidden, attention.norm.weight)
            past = [rms_norm(output, attention.norm.weight) for output in outputs[layer]]
            stream = past + list(normed)
            pairs = [
                _pair(attention, stream, place, segment=length, detach=place < begin)
                for place in range(len(stream))
            ]
            heard = []
            for time in range(begin, begin + len(hidden)):
                heads = []
                for head, query in enumerate(
                    (attention.to_queries.weight @ stream[time]).chunk(config.heads)
                ):
                    keys, values = [k[head] for k, _ in pairs], [v[head] for _, v in pairs]
                    near = list(range(cached, time + 1))
                    if attention.cosine:
                        query = attention.log_scale[head].exp() * query / query.norm()
                    else:
                        query = rotary(query, time) / math.sqrt(len(query))
                    if layer in config.layers_with_memory:
                        heads.append(joined(attention, head, query, keys, values, (stored, near)))
                    else:
                        heads.append(softmax_sum(query, [keys[p] for p in near], [values[p] for p in near]))
                heard.append(attention.to_out.weight @ torch.cat(heads))
            hidden = hidden + torch.stack(heard)
            hidden = hidden + feedforward(inner, hidden)
            outputs[layer] += list(hidden.detach())
        finals.append(rms_norm(hidden, trunk.norm.weight))
    return torch.cat(finals)


def _pair(
    attention: Any, stream: list[Tensor], place: int, *, segment: int, detach: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Key and value of each head at a place, placed there."""
    heads, source = attention.config.heads, stream[place]
    if attention.shift_keys:
        before = stream[place - 1] if place % segment else torch.zeros_like(source)
        source = attention.mix_own * source + attention.mix_previous * before
    stores = getattr(attention, "stores", heads)
    keys = [
        key / key.norm() if attention.cosine else rotary(key, place)
        for key in (attention.to_keys.weight @ source).chunk(stores)
        for _ in range(heads // stores)
    ]
    values = [
        value
        for value in (attention.to_values.weight @ stream[place]).chunk(stores)
        for _ in range(heads // stores)
    ]
    return ([k.detach() for k in keys], [v.detach() for v in values]) if detach else (keys, values)
