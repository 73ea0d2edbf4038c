"""The classic Memory Transformer-XL, obvious and slow: one row, no padding, query by query, head by head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memxl import MemoryTransformerXL, NBRCGate
from memxl.classic_layers import ClassicAttention
from memxl.classic_writer import ClassicWriter


def read_segments(
    model: MemoryTransformerXL, segments: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Read `[time]` tokens segment by segment.

    Returns:
        Logits `[time, tokens]` of each, each memory layer's short memory `[held, dim]`, and the slots.
    """
    short = [torch.zeros(0, model.dim, dtype=model.distances.dtype) for _ in model.memory_layers]
    slots = None
    logits = []
    for tokens in segments:
        x = model.from_embedding(model.embed(tokens))
        hiddens = []
        for number, layer in enumerate(model.layers, start=1):
            past = x[:0]
            if number in model.memory_layers:
                past = short[len(hiddens)]
                hiddens.append(x.detach())
            normed = [layer.attention_norm(vector) for vector in (*past, *x)]
            read = slots if number in model.memory_layers and slots is not None else x[:0]
            candidate = attend(layer.attention, normed, len(x), read, model.distances)
            x = residual(candidate, x, layer.attention_gate)
            x = residual(layer.feedforward(layer.feedforward_norm(x)), x, layer.feedforward_gate)
        logits.append(model.to_logits(model.to_embedding(x)))
        seen = [torch.cat(pair) for pair in zip(short, hiddens, strict=True)]
        if model.lmem_len:
            slots = write(model.writer, slots, seen)
        short = [every[max(0, len(every) - model.mem_len) :] for every in seen]
    return logits, short, slots


def attend(
    attention: ClassicAttention, tokens: list[Tensor], time: int, slots: Tensor, distances: Tensor
) -> Tensor:
    """The last `time` of the normalised `tokens` read all before them, `slots` and persistent inputs."""
    dim_head = attention.dim_head
    heads = distances.shape[0]
    free = [*attention.persistent, *slots]
    pairs = torch.stack([attention.to_keys_values(vector) for vector in [*free, *tokens]])
    keys, values = pairs.chunk(2, -1)
    rows = []
    for at in range(len(tokens) - time, len(tokens)):
        query = attention.to_queries(tokens[at])
        outputs = []
        for head in range(heads):
            mine = slice(head * dim_head, (head + 1) * dim_head)
            theirs = mine if keys.shape[1] > dim_head else slice(0, dim_head)
            scores = [query[mine] @ keys[place, theirs] for place in range(len(free))]
            scores += [
                query[mine] @ (keys[len(free) + token, theirs] + distances[head, -1 - (at - token)])
                for token in range(at + 1)
            ]
            weights = (torch.stack(scores) / dim_head**0.5).softmax(0)
            outputs.append(weights @ values[: len(scores), theirs])
        rows.append(attention.to_out(torch.cat(outputs)))
    return torch.stack(rows)


def write(writer: ClassicWriter, slots: Tensor | None, seen: list[Tensor]) -> Tensor:
    """The next slots, from the hiddens `[n, dim]` of each memory layer."""
    slots = writer.initial.expand(len(writer.places), -1) if slots is None else slots
    told = [hiddens + depth for hiddens, depth in zip(seen, writer.depths, strict=True)]
    for _ in range(writer.iterations):
        x = F.layer_norm(slots + writer.places, slots.shape[-1:])
        pairs = torch.cat([x, *told, writer.persistent]) @ writer.to_keys_values.weight.T
        keys, values = pairs.chunk(2, -1)
        queries = x @ writer.to_queries.weight.T
        outputs = []
        for query, key, value in zip(
            queries.chunk(4, -1), keys.chunk(4, -1), values.chunk(4, -1), strict=True
        ):
            outputs.append(query.softmax(1) @ (key.softmax(0).T @ value))
        slots = nbrc(writer.gate, torch.cat(outputs, -1) @ writer.to_out.weight.T, slots)
    return slots


def residual(candidate: Tensor, x: Tensor, gate: NBRCGate | None) -> Tensor:
    """A plain or a gated residual."""
    return x + candidate if gate is None else nbrc(gate, candidate, x)


def nbrc(gate: NBRCGate, x: Tensor, h: Tensor) -> Tensor:
    """Vecoven et al. 2021, equations 4 to 6, with biases."""
    u_a, u_c, u = gate.from_candidate.weight.chunk(3)
    b_a, b_c, b = gate.from_candidate.bias.chunk(3)
    w_a, w_c = gate.from_state.weight.chunk(2)
    a = 1 + torch.tanh(x @ u_a.T + h @ w_a.T + b_a)
    c = torch.sigmoid(x @ u_c.T + h @ w_c.T + b_c)
    return c * h + (1 - c) * torch.tanh(x @ u.T + a * h + b)
