"""Memformer over one row, each slot, head and token by itself; padding and batches do not exist here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import rms_norm
from tests.reference.transformer import transformer


def softmax(logits: list[Tensor]) -> list[Tensor]:
    """Weights that add up to one."""
    largest = max(float(logit.detach()) for logit in logits)
    powers = [torch.exp(logit - largest) for logit in logits]
    total = sum(powers[1:], powers[0])
    return [power / total for power in powers]


def slot_attention(part: Any, x: Tensor, slots: Tensor) -> Tensor:
    """`memformer.SlotAttention` of tokens `[time, dim]` to slots `[slots, dim]`."""
    key_weight, value_weight = part.to_keys_values.weight.chunk(2)
    read = []
    for token in rms_norm(x, part.norm.weight):
        heads = []
        for head in range(part.heads):
            rows = [weight.chunk(part.heads)[head] for weight in (part.to_queries.weight, key_weight)]
            query = rows[0] @ token
            normed = list(rms_norm(slots, part.slot_norm.weight))
            weights = softmax([query @ (rows[1] @ slot) / math.sqrt(len(query)) for slot in normed])
            values = [value_weight.chunk(part.heads)[head] @ slot for slot in normed]
            heads.append(torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0))
        read.append(part.to_out.weight @ torch.cat(heads))
    return torch.stack(read)


def slot_write(part: Any, slots: Tensor, hiddens: Tensor) -> Tensor:
    """`memformer.SlotWrite`: slots `[slots, dim]` after the tokens `[time, dim]`."""
    width = slots.shape[1] // part.heads
    to_query, to_key, to_value = part.to_queries_keys_values.weight.chunk(3)
    for _ in range(part.iterations):
        written = []
        for slot, bias in zip(slots, part.bias, strict=True):
            normed = rms_norm(slot, part.slot_norm.weight)
            heads = []
            for head in range(part.heads):
                span = slice(head * width, (head + 1) * width)
                query = to_query[span] @ normed
                own = query @ (to_key[span] @ normed) / math.sqrt(width)
                logits = [own / part.temperature + part.own_bias[head, 0, 0]]
                values = [slot[span]]
                for token in hiddens:
                    key = to_key[span] @ token
                    logits.append(query @ key / math.sqrt(width) / part.temperature)
                    values.append(to_value[span] @ token / math.sqrt(slots.shape[1]))
                weights = softmax(logits)
                heads.append(torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0))
            moved = torch.cat(heads) + bias
            written.append(moved / moved.pow(2).sum().sqrt())
        slots = torch.stack(written)
    return slots


def gated_slot_write(part: Any, slots: Tensor, hiddens: Tensor) -> Tensor:
    """`memformer.GatedSlotWrite`: slots `[slots, dim]` after the tokens `[time, dim]`."""
    dim = slots.shape[1]
    width = dim // part.heads
    for _ in range(part.iterations):
        written = []
        for slot in slots:
            query = part.to_queries.weight @ slot + part.to_queries.bias
            pairs = [
                part.to_keys_values.weight @ seen + part.to_keys_values.bias for seen in (slot, *hiddens)
            ]
            heads = []
            for head in range(part.heads):
                span = slice(head * width, (head + 1) * width)
                weights = softmax([query[span] @ pair[:dim][span] / math.sqrt(width) for pair in pairs])
                values = [pair[dim:][span] for pair in pairs]
                heads.append(torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0))
            attended = part.to_out.weight @ torch.cat(heads) + part.to_out.bias
            gated = gru_cell(part.gru, attended, slot)
            centred = gated - gated.mean()
            normed = centred / (centred.pow(2).mean() + 1e-5).sqrt() * part.norm.weight + part.norm.bias
            inner = part.feedforward[0].weight @ normed + part.feedforward[0].bias
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
            written.append(gated + part.feedforward[2].weight @ inner + part.feedforward[2].bias)
        slots = torch.stack(written)
    return slots


def gru_cell(cell: Any, x: Tensor, state: Tensor) -> Tensor:
    """Cho et al. 2014, in the form of `torch.nn.GRUCell`."""
    from_x = (cell.weight_ih @ x + cell.bias_ih).chunk(3)
    from_state = (cell.weight_hh @ state + cell.bias_hh).chunk(3)
    reset = 1 / (1 + torch.exp(-from_x[0] - from_state[0]))
    update = 1 / (1 + torch.exp(-from_x[1] - from_state[1]))
    new = torch.tanh(from_x[2] + reset * from_state[2])
    return (1 - update) * new + update * state


def memformer(made: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`memformer.MemformerDecoder` over one row `[time, dim]`: the outputs, and the slots at the end."""
    config, outputs = made.config, []
    if config.write == "gru":
        slots, write = made.writer.start, gated_slot_write
    else:
        slots, write = torch.stack([bias / bias.pow(2).sum().sqrt() for bias in made.writer.bias]), slot_write
    for segment in x.split(config.segment_length):

        def read(layer: int, stream: Tensor, slots: Tensor = slots) -> Any:
            if layer not in config.layers_with_memory:
                return 0
            return slot_attention(made.reads[config.layers_with_memory.index(layer)], stream, slots)

        out = transformer(made.trunk, segment, segment=config.segment_length, first=lambda time: 0, side=read)
        outputs.append(out)
        slots = write(made.writer, slots, out)
    return torch.cat(outputs), slots
