"""Embeddings of many segments looked up at once, so that their table has one gradient in a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from memxl.products import without_hooks


class Embeddings:
    """The embeddings of one segment after the other.

    The gradient of a lookup is as large as the table. Segments that are learnt from together share one,
    as long as the table is as it was; after a step of an optimiser the rest is looked up again.

    Args:
        table: the module that embeds.
        tokens: int64 `[batch, time]`.
        length: tokens of a segment.
    """

    def __init__(self, table: nn.Module, tokens: Tensor, length: int) -> None:
        self._table, self._length, self._tokens = table, length, tokens
        self._found: tuple[Tensor, ...] = ()
        self._seen: tuple[Tensor, int] | None = None

    def segment(self, index: int) -> Tensor:
        """`[batch, up to length, emb_dim]` of segment `index`."""
        table = self._table
        begin = index * self._length
        # Anything but a plain table may do more than look up, or leave its gradient in another form.
        plain = type(table) is nn.Embedding and without_hooks(table)
        if not plain or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
            return table(self._tokens[:, begin : begin + self._length])
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not table.weight.requires_grad:
            return table(self._tokens[:, begin : begin + self._length])
        weight = table.weight
        if self._seen is None or self._seen[0] is not weight or self._seen[1] != weight._version:
            self._seen = weight, weight._version
            rest = self._tokens[:, begin:]
            padding = -1 if table.padding_idx is None else table.padding_idx
            self._found = (
                *[rest] * index,
                *_Lookup.apply(weight, rest, padding).split(self._length, 1),
            )
        return self._found[index]


class _Lookup(torch.autograd.Function):
    """Rows of a table. It keeps nothing that a backward pass would free: each segment may have its own."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, tokens: Tensor, padding: int) -> Tensor:
        ctx.tokens, ctx.rows, ctx.padding = tokens, len(table), padding  # type: ignore[attr-defined]
        return table[tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_table = torch.ops.aten.embedding_dense_backward(gradient, ctx.tokens, ctx.rows, ctx.padding, False)
        return of_table, None, None
