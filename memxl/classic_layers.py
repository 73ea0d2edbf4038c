"""The layers of the classic `MemoryTransformerXL`: attention over its memories, feed-forward, residuals."""

# b batch, t time, n keys, h heads, d width of a head

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memxl.classic_recompute import attend, linear_of_gelu
from memxl.products import apply_map, are_plain


class Context(NamedTuple):
    """Keys and values that one layer reads beside those of new tokens.

    Attributes:
        keys: `[batch, heads or 1, n, dim_head]`: persistent ones, long-memory slots, then tokens.
        values: as `keys`.
        tokens: how many of them, the last ones, are tokens: these have a distance.
        absent: bool `[batch, n]`, true where a row has nothing; None if there is no such place.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    absent: Tensor | None


def empty_slots(memory: Tensor) -> Tensor:
    """Where a memory `[..., slots, dim]` holds nothing, that is all zeros: bool `[..., slots]`."""
    return (memory == 0).all(-1)


class ClassicAttention(nn.Module):
    """Causal attention over persistent key/values, long-memory slots, short memory and the segment.

    Tokens, and nothing else, get a learned term by distance, the same for a distance in every call.

    Args:
        dim: width of the stream, divisible by `heads`.
        heads: attention heads.
        one_kv_head: one head of keys and values for all heads of queries.
        persistent: learned key/value inputs that every query sees (all-attention).
        attn_dropout: dropout of the attention weights.
        dropout: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        one_kv_head: bool = False,
        persistent: int = 0,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim_head = dim // heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * (self.dim_head if one_kv_head else dim), bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.persistent = nn.Parameter(uniform(persistent, dim))
        self.attn_dropout = attn_dropout
        self.dropout = nn.Dropout(dropout)

    def open(self, short: Tensor, long: Tensor, absent: Tensor | None) -> Context:
        """Keys and values of what lies before the segment.

        Args:
            short: `[batch, tokens held, dim]`, normalised.
            long: `[batch, slots, dim]`.
            absent: bool `[batch, slots + tokens held]`; None if nothing is.
        """
        batch = short.shape[0]
        persistent = self.persistent.to(short.dtype).expand(batch, -1, -1)
        keys, values = self._keys_values(torch.cat([persistent, long, short], 1))
        if absent is not None:
            absent = F.pad(absent, (persistent.shape[1], 0), value=False)
        return Context(keys, values, short.shape[1], absent)

    def forward(self, x: Tensor, context: Context, table: Tensor) -> tuple[Tensor, Context]:
        """Attend from normalised `x` `[batch, time, dim]` to `context` and, causally, to `x`.

        Args:
            table: `[heads, distances, dim_head]`, the row of distance 0 last.

        Returns:
            `[batch, time, dim]`, and the context with the new tokens' keys and values.
        """
        time = x.shape[1]
        keys, values = self._keys_values(x)
        context = Context(
            torch.cat([context.keys, keys], 2),
            torch.cat([context.values, values], 2),
            context.tokens + time,
            None if context.absent is None else F.pad(context.absent, (0, time), value=False),
        )
        queries = self._heads(apply_map(self.to_queries, x)) * self.dim_head**-0.5
        attended = attend(
            queries,
            context.keys,
            context.values,
            table.to(queries.dtype),
            tokens=context.tokens,
            absent=context.absent,
            dropout=self.attn_dropout if self.training else 0.0,
        )
        return self.dropout(apply_map(self.to_out, rearrange(attended, "b h t d -> b t (h d)"))), context

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = apply_map(self.to_keys_values, x).chunk(2, -1)
        return self._heads(keys), self._heads(values)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", d=self.dim_head)


class ClassicFeedForward(nn.Module):
    """Two linear maps with GELU between, four times as wide inside; `glu` gates the inner width."""

    def __init__(self, dim: int, *, glu: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.glu = glu
        self.to_inner = nn.Linear(dim, 4 * dim * (2 if glu else 1))
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        inner = apply_map(self.to_inner, x)
        if self.glu:
            gate, value = inner.chunk(2, -1)
            return apply_map(self.to_out, self.dropout(F.gelu(gate) * value))
        if (self.training and self.dropout.p) or not are_plain(self.to_out):
            return self.to_out(self.dropout(F.gelu(inner)))
        return linear_of_gelu(inner, self.to_out.weight, self.to_out.bias)


class ClassicBlock(nn.Module):
    """One layer of the stream: normalised attention, then feed-forward, each with its residual.

    Args:
        dim: width of the stream.
        attention: what reads the memory.
        feedforward: what follows it.
        gates: gates of the two residuals; None for plain ones.
    """

    def __init__(
        self,
        dim: int,
        attention: ClassicAttention,
        feedforward: ClassicFeedForward,
        gates: tuple[nn.Module, nn.Module] | None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = feedforward
        self.attention_gate = gates[0] if gates else None
        self.feedforward_gate = gates[1] if gates else None

    def open(self, short: Tensor, long: Tensor, absent: Tensor | None) -> Context:
        """What `attention` reads before the segment; `short` as held, normalised here like the stream."""
        normed = self.attention_norm(short) if short.shape[1] else short
        return self.attention.open(normed, long, absent)

    def forward(self, x: Tensor, context: Context, table: Tensor) -> tuple[Tensor, Context]:
        """`[batch, time, dim]` to `[batch, time, dim]`; the rest as in `ClassicAttention`."""
        candidate, context = self.attention(self.attention_norm(x), context, table)
        x = _join(candidate, x, self.attention_gate)
        return _join(self.feedforward(self.feedforward_norm(x)), x, self.feedforward_gate), context


def _join(candidate: Tensor, x: Tensor, gate: nn.Module | None) -> Tensor:
    return x + candidate if gate is None else gate(candidate, x)


def uniform(rows: int, dim: int) -> Tensor:
    """Start of a learned input `[rows, dim]`: uniform within one over the square root of `dim`."""
    return torch.empty(rows, dim).uniform_(-(dim**-0.5), dim**-0.5)
