"""The classic Memorizing Transformer over one row, a token and a head at a time; memories are lists."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.memorizing import nearest, softmax_sum

Pair = tuple[Tensor, Tensor]


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def bucket(distance: int) -> int:
    """T5's bucket of a distance into the past: 16 of one each, 16 growing ones up to 128."""
    if distance < 16:
        return distance
    return min(31, 16 + int(16 * math.log(distance / 16) / math.log(128 / 16)))


def document_numbers(model: Any, tokens: list[int]) -> list[int]:
    """How many documents have begun up to each token, and up to the place behind the last."""
    sos, eos = model.clear_memories_on_sos_token_id, model.clear_memories_on_eos_token_id
    numbers, number = [], 0
    for index, token in enumerate([*tokens, None]):
        ended = index > 0 and eos is not None and tokens[index - 1] == eos
        number += ended or (sos is not None and token == sos)
        numbers.append(number)
    return numbers


def classic(model: Any, segments: list[list[int]]) -> list[Tensor]:
    """Logits `[time, num_tokens]` of each segment of one row's stream."""
    stores: dict[int, list[Pair]] = {layer: [] for layer in model.memorizing_layers}
    caches: dict[int, list[Pair]] = {layer: [] for layer in model.xl_memory_layers}
    outputs = []
    for tokens in segments:
        numbers = document_numbers(model, tokens)
        read_stores = shifted(stores, model.shift_knn_memories_down)
        read_caches = shifted(caches, model.shift_xl_memories_down)
        written: dict[int, list[Pair]] = {}
        hidden = [model.token_emb.weight[token] for token in tokens]
        for layer, (attention, feedforward) in enumerate(model.layers, 1):
            normed = [layer_norm(x, attention.norm) for x in hidden]
            cosine = layer in stores
            bias = (model.knn_rel_pos_bias if cosine else model.rel_pos_bias).relative_attention_bias.weight
            pairs = [key_and_value(attention.fn, x, cosine=cosine) for x in normed]
            cache, store = read_caches.get(layer, []), read_stores.get(layer, [])
            for index, x in enumerate(normed):
                # Distance, key and value of all that this token sees by position.
                seen = [
                    (index - place, *pairs[place])
                    for place in range(index + 1)
                    if numbers[place] == numbers[index]
                ]
                goes_on = numbers[index] == 0
                if goes_on:
                    seen += [(index + len(cache) - place, *pair) for place, pair in enumerate(cache)]
                heads = []
                for head, query in enumerate((attention.fn.to_q.weight @ x).chunk(attention.fn.heads)):
                    scale = model.dim_head**-0.5
                    if cosine:
                        query, scale = query / query.norm(), attention.fn.scale[head, 0, 0].exp()
                    logits = [
                        query @ key * scale + bias[bucket(away), head] * model.dim_head**0.5
                        for away, key, _ in seen
                    ]
                    values = [value for _, _, value in seen]
                    if cosine and goes_on:
                        keys = [key for key, _ in store]
                        found = nearest(query, list(range(len(store))), keys, attention.fn.retrieved)
                        logits += [query @ keys[place] * scale for place in found]
                        values += [store[place][1] for place in found]
                    # A sum of logits given as products with one.
                    heads.append(softmax_sum(query.new_ones(()), logits, values))
                out = attention.fn.to_out.weight @ torch.cat(heads)
                hidden[index] = hidden[index] + (out if cosine else out + attention.fn.to_out.bias)
            inner, outer = feedforward.fn.net[0], feedforward.fn.net[3]
            for index, x in enumerate(hidden):
                made = inner.weight @ layer_norm(x, feedforward.norm) + inner.bias
                made = made * (1 + torch.erf(made / math.sqrt(2))) / 2
                hidden[index] = x + outer.weight @ made + outer.bias
            written[layer] = [(key.detach(), value.detach()) for key, value in pairs]
        norm, head = model.to_logits
        outputs.append(torch.stack([head.weight @ layer_norm(x, norm) + head.bias for x in hidden]))
        for layer, new in written.items():
            write(model, layer, new, numbers, stores, caches)
    return outputs


def key_and_value(attention: Any, x: Tensor, *, cosine: bool) -> Pair:
    key, value = (attention.to_kv.weight @ x).chunk(2)
    return (key / key.norm() if cosine else key), value


def shifted(memories: dict[int, list[Pair]], shift: int) -> dict[int, list[Pair]]:
    items = list(memories.values())
    return dict(zip(memories, items[shift:] + items[:shift], strict=True))


def write(
    model: Any,
    layer: int,
    new: list[Pair],
    numbers: list[int],
    stores: dict[int, list[Pair]],
    caches: dict[int, list[Pair]],
) -> None:
    """What leaves the cache goes into the store; what a document that is over left behind goes nowhere."""
    last = numbers[-1]
    if last > 0:
        if layer in stores:
            stores[layer] = []
        new = [pair for pair, number in zip(new, numbers, strict=False) if number == last]
    waiting = (caches.get(layer, []) if last == 0 else []) + new
    keep = model.xl_max_memories if layer in caches else 0
    leave = max(0, len(waiting) - keep)
    if layer in caches:
        caches[layer] = waiting[leave:]
    if layer in stores:
        stores[layer] = (stores[layer] + waiting[:leave])[-model.max_knn_memories :]
