"""Attention with a memory of pairs beside it, usable alone.

Wu et al., "Memorizing Transformers" (arXiv 2203.08913), §3.1 and §3.2: normalised queries and keys, the
nearest pairs of the memory, and a learned share of what they give.
"""

# b batch, t time, s slots of past and open segment (in what is read from a memory: stores), h heads (that
# share a store), d width of a head, k pairs read

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from memorizing.attend import attend, attend_portably
from memorizing.config import MemorizingConfig
from memorizing.find import find_pairs
from memorizing.gate import AgeBias, MemoryGate
from memorizing.memory import PairMemory
from memorizing.store import OutsideView
from memory_models.checks import check_sizes
from memory_models.stats import collecting, record, weight_by_age
from memory_models.transformer import Past, Place, SegmentAttention, SegmentCache, append_to_cache
from memory_models.transforms import needs_plain_operators


class Retrieved(NamedTuple):
    """What queries read from a memory.

    Attributes:
        output: `[batch, time, heads, dim_head]`, 0 for a row that holds nothing.
        total: `[batch, time, heads]`, the log of the softmax' denominator, minus infinity there.
        weights: `[batch, time, heads, k]` of the pairs read, detached; 0 where fewer than `k` are held.
        ages: int64, the same shape: pairs written after each, -1 where there is none.
    """

    output: Tensor
    total: Tensor
    weights: Tensor
    ages: Tensor


def retrieve(
    queries: Tensor, memory: PairMemory | OutsideView, *, topk: int, age_bias: AgeBias | None = None
) -> Retrieved:
    """Attend from each query to the nearest pairs of its row and of its head's store.

    The search is exact, or as good as the outside store's index. The gradient reaches the queries, and
    through them their scale, and the bias, never the memory. Pairs in the state are read where they lie;
    of an outside store those found are copied.

    Args:
        queries: `[batch, time, heads, dim_head]`, normalised and scaled like those of `KNNAttention`;
            a logit is the product with a key.
        memory: the pairs.
        topk: pairs read; fewer where fewer are held.
        age_bias: what to add to the logits of the pairs read; it does not change which are.

    Returns:
        In float32 or better, whatever the dtype of the queries.

    Raises:
        StoreError: if the outside store lacks what the memory refers to.
        ValueError: if `topk` is below 1, rows or widths differ, or the stores do not divide the heads.
    """
    check_sizes(topk=topk)
    batch, time, heads, width = queries.shape
    pairs = memory if isinstance(memory, PairMemory) else memory.pairs.recent
    stores = pairs.keys.shape[1]
    if (batch, width) != (pairs.keys.shape[0], pairs.keys.shape[3]) or heads % stores:
        raise ValueError(
            f"queries {tuple(queries.shape)} [batch, time, heads, dim_head] do not fit the memory's keys "
            f"{tuple(pairs.keys.shape)} [batch, stores, memories, dim_head]"
        )
    exact = torch.promote_types(queries.dtype, torch.float32)
    # The heads that share a store ask it together.
    asked = rearrange(queries.to(exact), "b t (s h) d -> b s (h t) d", s=stores).contiguous()
    if isinstance(memory, PairMemory):
        output, total, weights, ages = _read_state(asked, memory, topk, age_bias)
    else:
        output, total, weights, ages = _read_outside(asked, memory, topk, age_bias)
    return Retrieved(
        rearrange(output, "b s (h t) d -> b t (s h) d", t=time),
        rearrange(total, "b s (h t) -> b t (s h)", t=time),
        rearrange(weights, "b s (h t) k -> b t (s h) k", t=time),
        rearrange(ages, "b s (h t) k -> b t (s h) k", t=time),
    )


def read_pairs(queries: Tensor, memory: PairMemory | OutsideView, *, topk: int) -> tuple[Tensor, Tensor]:
    """The first two of what `retrieve` returns, the output and the log of the denominator."""
    return retrieve(queries, memory, topk=topk)[:2]


def _read_state(asked: Tensor, memory: PairMemory, topk: int, age_bias: AgeBias | None) -> Retrieved:
    held = memory.keys.shape[2]
    bias = None
    if age_bias is not None and held:
        # One number for each age there can be costs less than one for each pair read.
        bias = age_bias(torch.arange(held, device=asked.device)).to(asked.dtype)
        bias = bias.unflatten(0, (memory.keys.shape[1], -1))
    keys, values = memory.keys.detach(), memory.values.detach()
    read = attend_portably if needs_plain_operators() else attend
    output, total, slots, weights = read(asked, keys, values, memory.total, topk, bias)
    ages = (memory.total[:, None, None, None] - 1 - slots) % max(held, 1)
    none = torch.arange(slots.shape[-1], device=slots.device) >= memory.held()[:, None, None, None]
    return Retrieved(output, total, weights, ages.masked_fill(none, -1))


def _read_outside(asked: Tensor, memory: OutsideView, topk: int, age_bias: AgeBias | None) -> Retrieved:
    pairs, store = memory.pairs, memory.store.number
    recent, stores = pairs.recent, pairs.recent.keys.shape[1]
    counters = recent.total, pairs.committed, pairs.stream
    keys, values, ages = find_pairs(
        asked.detach(), recent.keys, recent.values, *counters, topk, store, memory.layer
    )
    # Row times matrix: the same product as matrix times column runs several times slower.
    scores = (asked[..., None, :] @ keys.mT).squeeze(-2)
    if age_bias is not None:
        sizes = {"s": stores, "h": age_bias.leave.weight.shape[0] // stores}
        each = age_bias.of_each(rearrange(ages, "b s (h t) k -> b t (s h) k", h=sizes["h"]))
        scores = scores + rearrange(each.to(scores.dtype), "b t (s h) k -> b s (h t) k", **sizes)
    # A row without any pair takes part as zeros and is put right at the end: a softmax over nothing but
    # minus infinity would poison the gradient with NaN.
    held, some = ages >= 0, (recent.total > 0)[:, None, None]
    scores = scores.masked_fill(~held & some[..., None], -torch.inf)
    total = scores.logsumexp(-1)
    weights = (scores - total[..., None]).exp().masked_fill(~held, 0)
    output = (weights[..., None, :] @ values).squeeze(-2)
    return Retrieved(output, torch.where(some, total, -torch.inf), weights.detach(), ages)


class _SharedHeads(nn.Linear):
    # A projection to fewer heads, each of which stands in the place of several.
    def __init__(self, dim: int, *, heads: int, stores: int, width: int) -> None:
        super().__init__(dim, stores * width, bias=False)
        self.width, self.shared = width, heads // stores

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x).unflatten(-1, (-1, self.width))
        return made.repeat_interleave(self.shared, -2).flatten(-2)


class KNNAttention(SegmentAttention):
    """Causal attention within a segment, joined with attention to the nearest pairs of a memory.

    Cosine similarity with a learned scale per head (10 at first), shared by memory and segment, and no
    positions in this layer. Its weights are those of `SegmentAttention`, with one gate per head.

        attention = KNNAttention(MemorizingConfig(dim=64, heads=4))
        y, memory = attention.segment(x)             # x [batch, time, dim]; y is to be added to x
        y, memory = attention.segment(x, memory)     # sees all pairs of the segment before

    Args:
        config: widths, `topk`, `memories`, `kv_heads`, `combine`, `shift_keys`, `tie_keys`, `age_bias`,
            `gate_network`. With `combine="gate"` the result is `g * memory + (1 - g) * local`, with `g` the
            sigmoid of a learned number per head (§3.1, 0 at first), and local attention alone in a row that
            holds nothing. With "softmax" it is one softmax over the pairs found and the segment. With
            `age_bias` a pair's logit depends on its age (`AgeBias`), with `gate_network` the gate on how
            many pairs are held and how old those found are (`MemoryGate`); both begin without effect.
        matching: keys from the token before and key weights started equal to the query weights, where
            the config leaves these open.
        name: under which it records its diagnostics (`memory_models.collect_stats`).
    """

    def __init__(self, config: MemorizingConfig, *, matching: bool = False, name: str = "memorizing") -> None:
        super().__init__(
            config, matching=matching, cosine=True, shift_keys=config.shift_keys, tie_keys=config.tie_keys
        )
        self.name = name
        self.topk, self.combine = config.topk, config.combine
        self.memories, self.stores = config.memories, config.stores
        if config.stores < config.heads:
            sizes = {"heads": config.heads, "stores": config.stores, "width": config.head_width}
            self.to_keys = _SharedHeads(config.dim, **sizes)
            self.to_values = _SharedHeads(config.dim, **sizes)
            if matching if config.tie_keys is None else config.tie_keys:
                # Each key head starts as the first of the query heads that share it.
                first = self.to_queries.weight.view(config.stores, -1, config.head_width, config.dim)[:, 0]
                with torch.no_grad():
                    self.to_keys.weight.copy_(first.flatten(0, 1))
        if config.combine == "gate":
            self.gate = nn.Parameter(torch.zeros(config.heads, 1))
        self.age_bias = AgeBias(config.heads) if config.age_bias else None
        self.gate_network = MemoryGate(config.heads) if config.gate_network else None

    def init_memory(self, batch_size: int) -> PairMemory:
        """A memory that holds nothing."""
        config, weight = self.config, self.to_queries.weight
        return PairMemory.empty(batch_size, self.memories, self.stores, config.head_width, like=weight)

    def segment(
        self, x: Tensor, memory: PairMemory | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, PairMemory]:
        """One whole segment of any length: read, then write.

        Args:
            x: `[batch, time, dim]`, the residual stream.
            memory: what the segment before returned; None starts afresh.
            lengths: int64 `[batch]`: row `b`'s first `lengths[b]` tokens are real; None means all.

        Returns:
            `[batch, time, dim]` without the residual, anything at padding, and the memory with the
            segment's pairs.
        """
        batch, time, _ = x.shape
        if memory is None:
            memory = self.init_memory(batch)
        if time == 0:
            return x, memory
        place = Place.of(torch.zeros_like(memory.total), time, None, time)
        if lengths is not None:
            # Padding comes last and is not written; causal attention hides it from what is real, but by a
            # factor of zero, which a NaN would survive.
            real = torch.arange(time, device=x.device) < lengths[:, None]
            x = torch.where(real[..., None], x, 0)
        attended, cache = self(x, self.init_cache(batch), place, memory=memory)
        return attended, memory.append(cache.keys, cache.values, lengths)

    def forward(
        self,
        x: Tensor,
        cache: SegmentCache,
        place: Place,
        *,
        past: Past | None = None,
        memory: PairMemory | OutsideView | None = None,
    ) -> tuple[Tensor, SegmentCache]:
        """Attend to the open segment, to `past` and to the memory; the caller adds the residual.

        Args:
            x: `[batch, time, dim]`, the residual stream.
            cache: the layer's part of the open segment.
            place: where these tokens lie.
            past: keys and values from before the segment that are not in the memory.
            memory: the pairs; nothing is written to them.

        Returns:
            `[batch, time, dim]` and the cache with these tokens appended.
        """
        queries, keys, values, last = self.project(self.norm(x), cache, place)
        cache = append_to_cache(cache, keys, values, last, place)
        if memory is None:
            attended = self.attend(queries, cache, place, past=past)
        elif self.combine == "gate":
            local = self.attend(queries, cache, place, past=past)
            found = retrieve(queries, memory, topk=self.topk, age_bias=self.age_bias)
            pairs = memory if isinstance(memory, PairMemory) else memory.pairs
            held = pairs.total.clamp(max=self.memories)
            logit = self.gate
            if self.gate_network is not None:
                logit = logit + self.gate_network(held, found.ages, found.weights)
            # A row that holds nothing must not lose half of its attention.
            gate = torch.where((held > 0)[:, None, None, None], logit.sigmoid(), 0).to(local.dtype)
            self._record(gate.expand(*local.shape[:3], 1), found, place, past)
            attended = gate * found.output.to(local.dtype) + (1 - gate) * local
        else:
            local, local_total = self._attend_with_total(queries, cache, place, past)
            found = retrieve(queries, memory, topk=self.topk, age_bias=self.age_bias)
            # Two softmaxes make one when each gets its share of the common denominator.
            share = (found.total - local_total).sigmoid()[..., None].to(local.dtype)
            self._record(share, found, place, past)
            attended = share * found.output.to(local.dtype) + (1 - share) * local
        return self.to_out(rearrange(attended, "b t h d -> b t (h d)")), cache

    def _record(self, share: Tensor, found: Retrieved, place: Place, past: Past | None) -> None:
        # How much comes from the memory, and how far back lies what does.
        record(f"{self.name}/memory share", share)
        if not collecting():
            return
        # The cache lies between the pairs and the segment.
        between = 0 if past is None else past.held.sum(-1)[:, None, None, None]
        ages = torch.where(found.ages >= 0, found.ages + between, -1)
        read = weight_by_age(share * found.weights, ages, self.config.segment_length, lengths=place.lengths)
        record(f"{self.name}/weight by age", read)

    def _attend_with_total(
        self, queries: Tensor, cache: SegmentCache, place: Place, past: Past | None
    ) -> tuple[Tensor, Tensor]:
        # Like `attend`, and the log of the softmax' denominator, which F.scaled_dot_product_attention
        # keeps to itself. Dropout thins what is summed and leaves the denominator.
        keys, values = cache.keys.to(queries.dtype), cache.values.to(queries.dtype)
        time = queries.shape[1]
        mask = place.causal
        if mask is None:
            mask = torch.ones(time, time, dtype=torch.bool, device=queries.device).tril()[None, None]
        if past is not None:
            keys = torch.cat([past.keys.to(keys.dtype), keys], 1)
            values = torch.cat([past.values.to(values.dtype), values], 1)
            seen = past.held[:, None, None, :].expand(-1, 1, time, -1)
            mask = torch.cat([seen, mask.expand(seen.shape[0], -1, -1, -1)], -1)
        exact = torch.promote_types(queries.dtype, torch.float32)
        device = queries.device.type
        # Logits reach several tens, which half precision knows to a quarter. The meta device has no
        # autocast; asking about it raises.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            scores = torch.einsum("bthd,bshd->bhts", queries.to(exact), keys.to(exact))
        scores = scores.masked_fill(~mask, -torch.inf)
        total = scores.logsumexp(-1)
        weights = self.dropout((scores - total[..., None]).exp().to(values.dtype))
        return torch.einsum("bhts,bshd->bthd", weights, values), total.transpose(1, 2)
