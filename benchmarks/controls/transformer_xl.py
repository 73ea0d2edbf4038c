"""Transformer-XL: each layer attends to its own inputs of the segment before, without gradient.

The attention layers are those of x-transformers; the cache is normalised by the layer that reads it, as
in the reference code of Dai et al. 2019 (arXiv:1901.02860), with rotary in place of its relative terms.
"""

# b batch, t time, c context (cache and open segment), h heads, d width of a head

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory_models.module import MemoryModule
from memory_models.ring import append
from memory_models.state import Memory, memory_state
from memory_models.transformer import (
    ROTARY_BASE,
    FeedForward,
    Place,
    SegmentAttention,
    TokenShift,
    TransformerConfig,
    unit,
)


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(TransformerConfig):
    """Options of the `transformer-xl` control."""

    cache: int | None = None
    """Tokens each layer keeps from before the segment; None: one segment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None and self.cache < 0:
            raise ValueError(f"cache ({self.cache}) must not be negative")

    @property
    def cache_length(self) -> int:
        """Tokens each layer keeps."""
        return self.segment_length if self.cache is None else self.cache


@memory_state
class TransformerXLMemory(Memory):
    """Inputs of every layer: those cached, oldest first, and those of the open segment.

    Attributes:
        filled: int64 `[batch]`, tokens of the open segment.
        last: `[batch, dim]`, the last input, or `[batch, 0]` without token shift.
        held: int64 `[batch]`, cached tokens; they stand at the end of the cache.
        hiddens: one `[batch, segment_length, dim]` a layer.
        caches: one `[batch, cache, dim]` a layer.
    """

    filled: Tensor
    last: Tensor
    held: Tensor
    hiddens: tuple[Tensor, ...]
    caches: tuple[Tensor, ...]

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment."""
        return self.filled


class TransformerXL(MemoryModule[TransformerXLMemory]):
    """Segment recurrence; reaches back depth times cache tokens."""

    config_class: ClassVar[type] = TransformerXLConfig

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.segment_length = config.dim, config.segment_length
        self.shift = TokenShift(config.dim) if config.token_shift else None
        self.norms, self.attentions = nn.ModuleList(), nn.ModuleList()
        for layer in range(config.depth):
            matching = config.matching_layer and layer == config.depth - 1
            self.norms.append(nn.Identity() if matching else nn.RMSNorm(config.dim))
            self.attentions.append(
                SegmentAttention(config, matching=True) if matching else _plain_attention(config)
            )
        self.feedforwards = nn.ModuleList(
            FeedForward(config.dim, config.feedforward_width, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.dim)

    def init_memory(self, batch_size: int) -> TransformerXLMemory:
        """Empty caches."""
        weight, depth = self.norm.weight, self.config.depth
        count = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)

        def layers(length: int) -> tuple[Tensor, ...]:
            return tuple(weight.new_zeros(batch_size, length, self.dim) for _ in range(depth))

        return TransformerXLMemory(
            filled=count,
            last=weight.new_zeros(batch_size, self.dim if self.shift is not None else 0),
            held=count.clone(),
            hiddens=layers(self.segment_length),
            caches=layers(self.config.cache_length),
        )

    def read(
        self, x: Tensor, memory: TransformerXLMemory, lengths: Tensor | None
    ) -> tuple[Tensor, TransformerXLMemory]:
        """Attend to the cached inputs and the segment so far."""
        place = Place.of(memory.filled, x.shape[1], lengths, self.segment_length)
        last = memory.last
        if self.shift is not None:
            x, last = self.shift(x, last, place)
        seen = self._visible(memory, place)
        hiddens = []
        for layer, attention in enumerate(self.attentions):
            hidden = memory.hiddens[layer]
            hidden = x.to(hidden.dtype) if place.whole else append(hidden, place.filled, x, lengths)
            context = torch.cat([memory.caches[layer], hidden], 1).to(x.dtype)
            if isinstance(attention, SegmentAttention):
                x = x + _match(attention, x, context, seen)
            else:
                norm = self.norms[layer]
                x = x + self._attend(attention, norm(x), norm(context), place, seen)
            x = x + self.feedforwards[layer](x)
            hiddens.append(hidden)
        return self.norm(x), TransformerXLMemory(
            filled=place.after, last=last, held=memory.held, hiddens=tuple(hiddens), caches=memory.caches
        )

    def write(self, memory: TransformerXLMemory) -> TransformerXLMemory:
        """Move the segment's inputs into the caches, detached."""
        cache = self.config.cache_length
        fresh = self.init_memory(memory.batch_size)
        rows = torch.arange(memory.batch_size, device=memory.filled.device)[:, None]
        # The newest `cache` of [cache; segment]: the row's tokens end at cache + filled.
        index = memory.filled[:, None] + torch.arange(cache, device=memory.filled.device)
        caches = tuple(
            torch.cat([old, new], 1)[rows, index].detach()
            for old, new in zip(memory.caches, memory.hiddens, strict=True)
        )
        return TransformerXLMemory(
            filled=fresh.filled,
            last=fresh.last,
            held=(memory.held + memory.filled).clamp(max=cache),
            hiddens=fresh.hiddens,
            caches=caches,
        )

    def _visible(self, memory: TransformerXLMemory, place: Place) -> Tensor:
        # bool [batch, 1, time, cache + segment]: what is held, and the segment up to each token.
        time, cache = place.positions.shape[1], self.config.cache_length
        held = torch.arange(cache, device=memory.held.device) >= cache - memory.held[:, None]
        causal = place.causal
        if causal is None:
            causal = torch.ones(time, time, dtype=torch.bool, device=held.device).tril()[None, None]
        batch = memory.batch_size
        return torch.cat(
            [held[:, None, None].expand(batch, 1, time, cache), causal.expand(batch, 1, time, -1)], -1
        )

    def _attend(self, attention: Any, x: Tensor, context: Tensor, place: Place, seen: Tensor) -> Tensor:
        cache = self.config.cache_length
        positions = torch.arange(-cache, context.shape[1] - cache, device=x.device)
        return attention(
            x,
            context=context,
            attn_mask=seen,
            rotary_pos_emb=_angles(place.positions, self.config.head_width, x),
            context_rotary_pos_emb=_angles(positions[None], self.config.head_width, x),
        )


def _plain_attention(config: TransformerXLConfig) -> nn.Module:
    from x_transformers.x_transformers import Attention

    attention = Attention(
        config.dim, dim_head=config.head_width, heads=config.heads, dropout=config.dropout, flash=True
    )
    # x-transformers keeps members of an enumeration of torch's that cannot be pickled, and a model that holds
    # them could not be sent to another process.
    attention.attend.sdp_context_manager = _kernels
    return attention


def _kernels() -> AbstractContextManager[None]:
    # Those that x-transformers allows.
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])


def _angles(positions: Tensor, width: int, like: Tensor) -> tuple[Tensor, float]:
    # What x-transformers' attention takes: an angle for each channel of its neighbouring pairs, and no
    # xpos scale. Its RotaryEmbedding keeps the rates in the module's dtype, so that in bf16 distant
    # positions collapse, and fails for heads of odd width; here an odd last channel is not rotated.
    exact = torch.promote_types(like.dtype, torch.float32)
    half = width // 2
    rates = ROTARY_BASE ** (-torch.arange(half, device=like.device, dtype=exact) / max(half, 1))
    return (positions[..., None].to(exact) * rates).repeat_interleave(2, -1), 1.0


def _match(attention: SegmentAttention, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
    # The matching layer of the other members over the cached context.
    heads = attention.config.heads
    normed = attention.norm(context)
    keyed = attention.mix_own * normed + attention.mix_previous * F.pad(normed[:, :-1], (0, 0, 1, 0))
    queries = rearrange(attention.to_queries(attention.norm(x)), "b t (h d) -> b h t d", h=heads)
    keys = rearrange(attention.to_keys(keyed), "b c (h d) -> b h c d", h=heads)
    values = rearrange(attention.to_values(normed), "b c (h d) -> b h c d", h=heads)
    attended = F.scaled_dot_product_attention(
        unit(queries) * attention.log_scale.exp()[..., None],
        unit(keys),
        values,
        attn_mask=seen,
        dropout_p=attention.dropout.p if attention.training else 0.0,
        scale=1.0,
    )
    return attention.to_out(rearrange(attended, "b h t d -> b t (h d)"))
