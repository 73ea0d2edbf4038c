"""Hierarchical Transformer Memory, the read: choose chunks by their summaries, then attend inside them.

Lampinen et al., "Towards mental time travel: a hierarchical memory for reinforcement learning agents"
(arXiv 2105.14039); formulas as in the authors' released code.

The gathered memories are never projected. With one key and one value projection per head,
`(x Wq)(y Wk)^T = (x Wq Wk^T) y^T` and `sum_j a_j (y_j Wv) = (sum_j a_j y_j) Wv`, so the key projection
moves into the query and the value projection behind the weighted sum: two products with `heads` rows per
chunk instead of one with `2 * heads * dim_head` columns per token. The sinusoidal positions, which the
formula adds to every memory, become one product with the position table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htm import attend as inner
from htm.checks import check_floating, check_mask
from htm.choose import all_of, best_chunks, chunk_weights, readable_places
from htm.chunks import positions_like, summarize, with_previous
from memory_models.checks import check_counts, check_sizes, check_tensor
from memory_models.transformer import MATCHING_SCALE, unit
from memory_models.transforms import needs_plain_operators

__all__ = ["HTMAttention", "HTMBlock"]


class HTMAttention(nn.Module):
    """Attention from queries to a chunked memory, in two levels (HTM, arXiv 2105.14039).

    Each query scores the chunks by their summaries (the mean of the chunk), takes the best `topk_mems`,
    attends inside each of them with one multi-head attention, and sums the results weighted by the softmax
    over the chosen scores. Positions inside the chunk are added to keys and values (`chunk_positions`).

    A query that can see nothing (empty memory, every token masked, every chunk forbidden) gets exactly
    zero: neither memory nor output bias. No gradient reaches the memories, as in the original; queries and
    weights get theirs. There is no causal mask inside a chunk: hide a chunk that a query may not see.

    Args:
        dim: width of queries and memories.
        heads: heads of the attention inside a chunk.
        topk_mems: chunks read per query; fewer where there are fewer.
        mem_chunk_size: tokens in a chunk.
        dim_head: width of a head.
        add_pos_enc: add sinusoidal positions inside the chunk.
        eps: accepted for the published signature, without effect: means divide by the exact count.
        detach_memories: false lets gradients through to the memories.
        summary_bias: learn a bias on the summary queries, as the published package has it. (Its bias on
            the summary keys adds the same to every score of a query and so changes nothing.)
        matching: build the read for finding places whose context looked like the query's (an option of
            ours): queries of learned length, one softmax over all places of the chosen chunks, keys from
            the token before (a learned mix per channel), key weights started equal to the query weights.
            Wants memories of unit mean square; positions are not added. `read` then takes each token
            together with the one before it (`with_previous`), so that chunk borders hide no pair.
        init_scale: variance scaling of the query and key projections; the original has 2.0. None keeps
            torch's default for `nn.Linear`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        topk_mems: int = 2,
        mem_chunk_size: int = 32,
        dim_head: int = 64,
        add_pos_enc: bool = True,
        eps: float = 1e-5,
        *,
        detach_memories: bool = True,
        summary_bias: bool = False,
        matching: bool = False,
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            dim=dim, heads=heads, topk_mems=topk_mems, mem_chunk_size=mem_chunk_size, dim_head=dim_head
        )
        self.dim = dim
        self.heads = heads
        self.topk_mems = topk_mems
        self.mem_chunk_size = mem_chunk_size
        self.dim_head = dim_head
        self.add_pos_enc = add_pos_enc and not matching
        self.matching = matching
        self.detach_memories = detach_memories
        inner = heads * dim_head
        self.summary_query = nn.Linear(dim, dim, bias=summary_bias)
        self.summary_key = nn.Linear(dim, dim, bias=False)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key = nn.Linear(dim, inner, bias=False)
        self.value = nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim)
        if init_scale is not None:
            for layer in (self.summary_query, self.summary_key, self.query, self.key):
                std = math.sqrt(init_scale / dim)
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        if matching:
            self.log_scale = nn.Parameter(torch.full((heads, 1), math.log(MATCHING_SCALE)))
            self.summary_log_scale = nn.Parameter(torch.tensor(math.log(MATCHING_SCALE)))
            self.mix_own = nn.Parameter(torch.full((dim,), 0.1))
            self.mix_previous = nn.Parameter(torch.ones(dim))
            with torch.no_grad():
                self.key.weight.copy_(self.query.weight)
                self.summary_key.weight.copy_(self.summary_query.weight)

    @property
    def memory_dim(self) -> int:
        """Width of the chunks that `read` takes: `dim`, or twice that with `matching`."""
        return 2 * self.dim if self.matching else self.dim

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, topk_mems={self.topk_mems}, "
            f"mem_chunk_size={self.mem_chunk_size}, dim_head={self.dim_head}, add_pos_enc={self.add_pos_enc}"
        )

    def forward(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Read `memories`, oldest first, cut into chunks from the oldest (the last may be partial).

        Chunk borders stay where they are as the memory grows. Passing no mask equals one that is all true.

        Args:
            queries: `[batch, queries, dim]`.
            memories: `[batch, time, dim]`, any length, none too.
            mask: bool `[batch, time]`, false at tokens that must not be read, whatever they hold.
            chunk_attn_mask: bool `[batch, queries, chunks]`, false where a query must not read a chunk;
                `chunks = ceil(time / mem_chunk_size)`.

        Returns:
            `[batch, queries, dim]`, exactly zero for a query that can see nothing.

        Raises:
            ValueError: if a rank, width, batch size, mask shape or mask dtype does not fit.
        """
        self._check_queries(queries)
        check_floating("memories", memories, ("batch", "time", "dim"), (queries.shape[0], None, self.dim))
        batch, time, _ = memories.shape
        chunks = -(-time // self.mem_chunk_size)
        if mask is not None:
            check_mask("mask", mask, ("batch", "time"), (batch, time))
        if chunk_attn_mask is not None:
            expected = (batch, queries.shape[1], chunks)
            check_mask("chunk_attn_mask", chunk_attn_mask, ("batch", "queries", "chunks"), expected)
        if self.detach_memories:
            memories = memories.detach()
        if self.matching:
            memories = with_previous(memories, mask=mask)
        summaries = summarize(memories, self.mem_chunk_size, mask=mask)
        lengths = None
        if mask is not None:
            pad = chunks * self.mem_chunk_size - time
            mask = F.pad(mask, (0, pad)).unflatten(1, (chunks, self.mem_chunk_size))
        elif time % self.mem_chunk_size:
            first = torch.arange(0, time, self.mem_chunk_size, device=memories.device)
            lengths = (time - first).clamp(max=self.mem_chunk_size).expand(batch, -1)
        return self._read(queries, memories, summaries, lengths, mask, chunk_attn_mask)

    def read(
        self,
        queries: Tensor,
        contents: Tensor,
        summaries: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        chunk_mask: Tensor | None = None,
    ) -> Tensor:
        """Read chunks whose summaries are at hand: what one step against a streaming memory costs.

        Touches the summaries and the chosen chunks, nothing else of the memory. The order of the chunks
        does not matter, so a ring buffer can be passed as it lies.

        Args:
            queries: `[batch, queries, dim]`.
            contents: `[batch, chunks, mem_chunk_size, memory_dim]`, contiguous (anything else is copied).
            summaries: `[batch, chunks, memory_dim]`, the means of the chunks (`summarize`).
            lengths: integer `[batch, chunks]`, the tokens that a chunk holds, from its first place on; 0 for
                a chunk not yet written. None: all are full.
            mask: bool `[batch, chunks, mem_chunk_size]`, false at tokens that must not be read.
            chunk_mask: bool `[batch, queries or 1, chunks]`, false where a query must not read a chunk.

        Returns:
            `[batch, queries, dim]`, exactly zero for a query that can see nothing.

        Raises:
            ValueError: if a rank, width, batch size, mask shape or mask dtype does not fit, or, on a CPU, a
                length does not lie in 0 to `mem_chunk_size`.
        """
        self._check_queries(queries)
        batch, size, dim = queries.shape[0], self.mem_chunk_size, self.memory_dim
        axes = ("batch", "chunks", "mem_chunk_size", "dim")
        check_floating("contents", contents, axes, (batch, None, size, dim))
        chunks = contents.shape[1]
        check_floating("summaries", summaries, ("batch", "chunks", "dim"), (batch, chunks, dim))
        if lengths is not None:
            check_counts("lengths", lengths, ("batch", "chunks"), (batch, chunks), most=size)
        if mask is not None:
            check_mask("mask", mask, ("batch", "chunks", "mem_chunk_size"), (batch, chunks, size))
        if chunk_mask is not None:
            check_tensor("chunk_mask", chunk_mask)
            rows = 1 if chunk_mask.ndim == 3 and chunk_mask.shape[1] == 1 else queries.shape[1]
            check_mask("chunk_mask", chunk_mask, ("batch", "queries", "chunks"), (batch, rows, chunks))
        if lengths is not None and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            # Asking is cheap on a CPU, and a memory of full chunks, the usual one, needs no masks at all.
            lengths = None if bool((lengths == size).all()) else lengths
        if lengths is not None and mask is not None:
            place = torch.arange(size, device=lengths.device)
            mask, lengths = mask & (place < lengths[..., None]), None
        if self.detach_memories:
            contents, summaries = contents.detach(), summaries.detach()
        return self._read(queries, contents.flatten(1, 2), summaries, lengths, mask, chunk_mask)

    def choose(
        self, queries: Tensor, summaries: Tensor, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Which chunks `read` would read, for diagnostics; without gradient.

        Args:
            queries: `[batch, queries, dim]`.
            summaries: `[batch, chunks, memory_dim]`.
            lengths: integer `[batch, chunks]`, tokens that each chunk holds; None: all are full.

        Returns:
            Indices of the chunks, int64 `[batch, queries, k]`, and the softmax over their scores, zero for a
            chunk that holds nothing.

        Raises:
            ValueError: as `read`.
        """
        self._check_queries(queries)
        batch, axes = queries.shape[0], ("batch", "chunks", "dim")
        check_floating("summaries", summaries, axes, (batch, None, self.memory_dim))
        if lengths is not None:
            expected = (batch, summaries.shape[1])
            check_counts("lengths", lengths, ("batch", "chunks"), expected, most=self.mem_chunk_size)
        with torch.no_grad():
            available = None if lengths is None else (lengths > 0)[:, None]
            asked = self._summary_queries(queries)
            chosen, scores, allowed = best_chunks(asked, summaries, available, self.topk_mems)
            return chosen, chunk_weights(scores, allowed)

    def place_weights(
        self, queries: Tensor, contents: Tensor, summaries: Tensor, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """With what weight `read` reads each place of the chunks it chooses, for diagnostics; no gradient.

        Args:
            queries: `[batch, queries, dim]`.
            contents: `[batch, chunks, mem_chunk_size, memory_dim]`.
            summaries: `[batch, chunks, memory_dim]`.
            lengths: integer `[batch, chunks]`, tokens that each chunk holds; None: all are full.

        Returns:
            Indices of the chunks, int64 `[batch, queries, k]`, and the weights, means over the heads,
            `[batch, queries, k, mem_chunk_size]`: of sum 1, or all zero for a query that can see nothing.
        """
        with torch.no_grad():
            available = None if lengths is None else (lengths > 0)[:, None]
            tokens = contents.flatten(1, 2)
            given, _ = self._prepared(queries, tokens, summaries, available, lengths, None, keep=True)
            outer, chosen, places = given[1], given[2], given[5]
            _, kept = inner.attend_without_gradient(*given)
            weights = kept.view(*chosen.shape[:2], self.heads, chosen.shape[2], -1).mean(2)
            if not self.matching:
                weights = weights * outer[..., None]
            # Where nothing may be read the softmax is even over what is not there.
            return chosen, weights if places is None else torch.where(places, weights, 0)

    # axes below: b batch, i queries, m chunks, k chosen chunks, c places in a chunk, n tokens,
    # h heads, e width of a head, d dim
    def _read(
        self,
        queries: Tensor,  # [b, i, d]
        tokens: Tensor,  # [b, n, d], chunk after chunk, the last may be cut short
        summaries: Tensor,  # [b, m, d]
        lengths: Tensor | None,  # [b, m], at most one of these two
        mask: Tensor | None,  # [b, m, c]
        chunk_mask: Tensor | None,  # [b, 1 or i, m]
    ) -> Tensor:
        b, i, _ = queries.shape
        available = all_of(
            None if lengths is None else (lengths > 0)[:, None],
            None if mask is None else mask.any(dim=-1)[:, None],
            chunk_mask,
        )
        if summaries.shape[1] == 0:
            available = summaries.new_ones(b, i, 0, dtype=torch.bool)
        gradient = torch.is_grad_enabled()
        given, allowed = self._prepared(queries, tokens, summaries, available, lengths, mask, keep=gradient)
        mixed, _ = _attend_here()(*given)  # [b, i, h, d]
        values = self.value.weight.view(self.heads, self.dim_head, self.dim).mT  # [h, d, e]
        by_head = mixed.flatten(0, 1).transpose(0, 1) @ values
        out = self.out(by_head.transpose(0, 1).reshape(b, i, self.heads * self.dim_head))
        if allowed is not None:
            # where, not multiply; and the output bias goes too: nothing read, nothing said
            out = torch.where(allowed.any(dim=-1, keepdim=True), out, 0)
        return out

    def _prepared(
        self,
        queries: Tensor,
        tokens: Tensor,
        summaries: Tensor,
        available: Tensor | None,  # [b, 1 or i, m]
        lengths: Tensor | None,
        mask: Tensor | None,
        *,
        keep: bool,
    ) -> tuple[tuple[Any, ...], Tensor | None]:
        """What the attention inside the chunks is given, and which chunks may be read."""
        c = self.mem_chunk_size
        chosen, scores, allowed = best_chunks(
            self._summary_queries(queries), summaries, available, self.topk_mems
        )
        folded = self._folded_queries(queries)
        return (
            folded,
            scores.to(folded.dtype) if self.matching else chunk_weights(scores, allowed).to(folded.dtype),
            chosen,
            tokens,
            positions_like(c, folded) if self.add_pos_enc else None,
            readable_places(chosen, allowed, lengths, mask, c),
            c,
            self.dim,
            self.matching,
            keep,
        ), allowed

    def _summary_queries(self, queries: Tensor) -> Tensor:
        # [b, i, memory_dim], to be multiplied with the summaries: the key projection folded in
        asked = self.summary_query(queries)
        if not self.matching:
            return (asked * self.dim**-0.5) @ self.summary_key.weight
        asked = unit(asked) * (self.summary_log_scale.exp() / _key_length(self.dim))
        return self._mixed(asked @ self.summary_key.weight)

    def _folded_queries(self, queries: Tensor) -> Tensor:
        # [b, i, h, memory_dim], to be multiplied with memories: the key projection folded in
        b, i, _ = queries.shape
        asked = self.query(queries).view(b * i, self.heads, self.dim_head)
        if self.matching:
            asked = unit(asked) * (self.log_scale.exp() / _key_length(self.dim_head))
        else:
            asked = asked * self.dim_head**-0.5
        folded = asked.transpose(0, 1) @ self.key.weight.view(self.heads, self.dim_head, self.dim)
        folded = folded.transpose(0, 1)
        if self.matching:
            folded = self._mixed(folded)
        return folded.reshape(b, i, self.heads, self.memory_dim)

    def _mixed(self, folded: Tensor) -> Tensor:
        # (x Wk) . (own * y + previous * z) = (own * (x Wk), previous * (x Wk)) . (y, z)
        return torch.cat((folded * self.mix_own, folded * self.mix_previous), dim=-1)

    def _check_queries(self, queries: Tensor) -> None:
        check_floating("queries", queries, ("batch", "queries", "dim"), (None, None, self.dim))


class HTMBlock(nn.Module):
    """Pre-norm residual read: `queries + attention(norm(queries), memories)` (arXiv 2105.14039, fig. 1).

    Args:
        dim: width of queries and memories.
        options: the other arguments of `HTMAttention`.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = HTMAttention(dim, **options)

    def forward(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """As `HTMAttention.forward`; a query that can see nothing comes back unchanged."""
        return queries + self.attn(self.norm(queries), memories, mask, chunk_attn_mask)


def _attend_here() -> Callable[..., tuple[Tensor, Tensor]]:
    # The fastest form of the inner attention that serves the caller.
    if needs_plain_operators():
        return inner.attend_portably
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return inner.attend
    return inner.attend_without_gradient


def _key_length(width: int) -> float:
    # the length of a key as torch's default weights make it from a memory of unit mean square
    return math.sqrt(width / 3)
