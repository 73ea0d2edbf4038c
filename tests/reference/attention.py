"""Attention one query, one head, one key at a time, with rotary positions as complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rotary(vector: Tensor, position: int, *, neighbours: bool = False) -> Tensor:
    """Turn one head's vector `[width]` by its position; an odd last channel stays.

    Channel `i` is paired with channel `i + width // 2`, or with its neighbour.
    """
    half = len(vector) // 2
    if half == 0:
        return vector
    real, imaginary = (
        (vector[: 2 * half : 2], vector[1 : 2 * half : 2])
        if neighbours
        else (vector[:half], vector[half : 2 * half])
    )
    angles = torch.tensor([position * 10_000.0 ** (-i / half) for i in range(half)], dtype=vector.dtype)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    pairs = (
        torch.stack([turned.real, turned.imag], 1).flatten()
        if neighbours
        else torch.cat([turned.real, turned.imag])
    )
    return torch.cat([pairs, vector[2 * half :]])


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Each token divided by the root of its mean square, times a gain."""
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * gain


def swiglu(x: Tensor, gain: Tensor, inner: Tensor, out: Tensor) -> Tensor:
    """`W_o (silu(W_g n) * W_v n)` of the normalised input `n`."""
    normed = rms_norm(x, gain)
    gate, value = inner[: len(inner) // 2], inner[len(inner) // 2 :]
    gated = normed @ gate.T
    return (gated / (1 + torch.exp(-gated)) * (normed @ value.T)) @ out.T


def attend(
    queries: list[Tensor], keys: list[list[Tensor]], values: list[list[Tensor]], scale: float
) -> Tensor:
    """One token's attention: a query `[width]` for each head, and for each head keys and values."""
    heads = []
    for query, head_keys, head_values in zip(queries, keys, values, strict=True):
        scores = torch.stack([(query * key).sum() * scale for key in head_keys])
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        heads.append(sum(weight * value for weight, value in zip(weights, head_values, strict=True)))
    return torch.cat(heads)


def causal_attention(
    normed: Tensor,
    weights: dict[str, Tensor],
    heads: int,
    *,
    first: Callable[[int], int],
    neighbours: bool = False,
    mix: tuple[Tensor, Tensor] | None = None,
    scales: list[Tensor] | None = None,
    see: Callable[[int, int], Tensor] | None = None,
    has_previous: Callable[[int, int], bool] | None = None,
) -> Tensor:
    """Attention of one row, token by token.

    Args:
        normed: `[time, dim]`, the normalised input.
        weights: `queries`, `keys`, `values`, `out`, each `[out, in]`.
        heads: number of heads.
        first: the first token that the token at a time sees; the last is itself.
        neighbours: which channels rotary pairs.
        mix: for the matching layer, how much of a token and of the one before go into its key.
        scales: for the matching layer, the scale of each head's cosine.
        see: the token at a place as the query at a time sees it, if not simply `normed[place]`.
        has_previous: whether, for the query at a time, the token at a place knows the one before it.
    """
    see = see or (lambda time, place: normed[place])
    has_previous = has_previous or (lambda time, place: place > first(time))
    outputs = []
    for time in range(len(normed)):
        queries = list((weights["queries"] @ normed[time]).chunk(heads))
        keys: list[list[Tensor]] = [[] for _ in range(heads)]
        values: list[list[Tensor]] = [[] for _ in range(heads)]
        places = range(first(time), time + 1)
        for place in places:
            token = source = see(time, place)
            if mix is not None:
                before = see(time, place - 1) if has_previous(time, place) else torch.zeros_like(token)
                source = mix[0] * token + mix[1] * before
            projected = zip(
                (weights["keys"] @ source).chunk(heads), (weights["values"] @ token).chunk(heads), strict=True
            )
            for head, (key, value) in enumerate(projected):
                keys[head].append(key)
                values[head].append(value)
        scale = 1.0
        if mix is not None:
            assert scales is not None
            queries = [s * q / q.norm() for s, q in zip(scales, queries, strict=True)]
            keys = [[k / k.norm() for k in per_head] for per_head in keys]
        else:
            scale = len(queries[0]) ** -0.5
            queries = [rotary(q, time, neighbours=neighbours) for q in queries]
            keys = [
                [rotary(k, place, neighbours=neighbours) for place, k in zip(places, per_head, strict=True)]
                for per_head in keys
            ]
        outputs.append(weights["out"] @ attend(queries, keys, values, scale))
    return torch.stack(outputs)
