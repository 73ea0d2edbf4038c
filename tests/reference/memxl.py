"""Memory Transformer-XL over one row, segment by segment, each token, slot and feature by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import rms_norm, rotary
from tests.reference.transformer import feedforward, token_shift


def linear_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One row and one head: queries `[n, features]`, keys `[tokens, features]`, values `[tokens, width]`."""
    places = []
    for feature in range(keys.shape[1]):
        weights = torch.exp(keys[:, feature] - keys[:, feature].max())
        weights = weights / weights.sum()
        places.append(sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0])))
    outputs = []
    for query in queries:
        shares = torch.exp(query - query.max())
        shares = shares / shares.sum()
        outputs.append(sum((s * p for s, p in zip(shares, places, strict=True)), torch.zeros_like(places[0])))
    return torch.stack(outputs)


def write(writer: Any, slots: Tensor, hiddens: list[list[Tensor]]) -> Tensor:
    """`memxl.MemoryWriter` on the slots `[n, dim]` of one row; the tokens of each memory layer."""
    tokens = [
        rms_norm(token, writer.hidden_norm.weight) + depth
        for layer, depth in zip(hiddens, writer.depth, strict=True)
        for token in layer
    ]
    for _ in range(writer.iterations):
        asked = rms_norm(slots, writer.slot_norm.weight) + writer.slot_places
        found = []
        for head in range(writer.heads):

            def part(linear: Any, x: Tensor, head: int = head) -> Tensor:
                return x @ linear.weight.chunk(writer.heads)[head].T

            queries = part(writer.to_queries, asked) * writer.log_query_scale.exp()[head]
            keys = torch.stack([part(writer.to_keys, t) for t in tokens]) * writer.log_key_scale.exp()[head]
            values = torch.stack([part(writer.to_values, token) for token in tokens])
            found.append(linear_attention(queries, keys, values))
        candidates = torch.cat(found, 1) @ writer.to_out.weight.T
        if writer.mogrifier is not None:
            candidates, _ = writer.mogrifier(candidates, slots)
        slots = torch.stack([writer.gate(c, slot) for c, slot in zip(candidates, slots, strict=True)])
    return slots


def attention(part: Any, segment: list[Tensor], earlier: list[Tensor], slots: Tensor) -> list[Tensor]:
    """A layer's attention over one segment.

    Args:
        part: a `SegmentAttention` or a `memxl.MemXLAttention`.
        segment: the residual stream at each token.
        earlier: this layer's inputs at the tokens before, as far as they are remembered.
        slots: `[n, dim]`, the long memory.
    """
    heads = part.config.heads
    tokens = [rms_norm(token, part.norm.weight) for token in [*earlier, *segment]]
    sources = tokens
    if part.shift_keys:
        before = [torch.zeros_like(tokens[0]), *tokens[:-1]]
        sources = [
            part.mix_own * token + part.mix_previous * last
            for token, last in zip(tokens, before, strict=True)
        ]

    def cut(linear: Any, token: Tensor) -> list[Tensor]:
        return list((linear.weight @ token).chunk(heads))

    def placed(vector: Tensor, place: int) -> Tensor:
        return vector / vector.norm() if part.cosine else rotary(vector, place)

    def unplaced(vector: Tensor) -> Tensor:
        return vector / vector.norm() if part.cosine else vector

    # Pairs that have no place, by head.
    free: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(heads)]
    for head in range(heads):
        if getattr(part, "persistent_keys", None) is not None:
            pairs = zip(part.persistent_keys[:, head], part.persistent_values[:, head], strict=True)
            free[head] += [(unplaced(key), value) for key, value in pairs]
        if getattr(part, "slot_places", None) is not None:
            for slot, own in zip(slots, part.slot_places, strict=True):
                content = rms_norm(slot, part.slot_norm.weight)
                key = cut(part.slot_to_keys, content + own)[head]
                free[head].append((unplaced(key), cut(part.slot_to_values, content)[head]))

    outputs = []
    for time in range(len(segment)):
        place = len(earlier) + time
        joined = []
        for head in range(heads):
            query = cut(part.to_queries, tokens[place])[head]
            scale = part.log_scale.exp()[head] if part.cosine else len(query) ** -0.5
            far, near = unplaced(query), placed(query, place)
            logits = [(far * key).sum() * scale for key, _ in free[head]]
            values = [value for _, value in free[head]]
            for other in range(place + 1):
                key = placed(cut(part.to_keys, sources[other])[head], other)
                logits.append((near * key).sum() * scale)
                values.append(cut(part.to_values, tokens[other])[head])
            weights = torch.stack(logits).softmax(0)
            joined.append(sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(query)))
        outputs.append(part.to_out.weight @ torch.cat(joined))
    return outputs


def memxl(made: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`memxl.MemXL` over one row `[time, dim]`, cut into whole segments and a rest.

    Returns:
        The output `[time, dim]`, and the slots after the last segment.
    """
    config, trunk = made.config, made.trunk
    length, keep = config.segment_length, config.short_length
    shifted = token_shift(trunk.shift, x, length)
    history: dict[int, list[Tensor]] = {layer: [] for layer in config.layers_with_memory}
    slots = x.new_zeros(0, x.shape[1]) if made.writer is None else made.writer.initial
    outputs: list[Tensor] = []
    for begin in range(0, len(x), length):
        stream = list(shifted[begin : begin + length])
        hiddens: dict[int, list[Tensor]] = {}
        for layer, (part, inner) in enumerate(zip(trunk.attentions, trunk.feedforwards, strict=True)):
            earlier: list[Tensor] = []
            if layer in history:
                seen = history[layer]
                earlier = [token.detach() for token in seen[max(0, len(seen) - keep) :]]
                new = stream if config.write_gradient else [token.detach() for token in stream]
                hiddens[layer] = [*earlier, *new]
                history[layer] = seen + stream
            attended = attention(part, stream, earlier, slots)
            stream = [token + out for token, out in zip(stream, attended, strict=True)]
            stream = [token + feedforward(inner, token) for token in stream]
        outputs += [rms_norm(token, trunk.norm.weight) for token in stream]
        if made.writer is not None:
            slots = write(made.writer, slots, [hiddens[layer] for layer in config.layers_with_memory])
    return torch.stack(outputs), slots
