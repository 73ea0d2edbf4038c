"""The standard transformer parts that all members share, so that a comparison compares memories.

Pre-norm residual layers with RMSNorm, rotary positions and SwiGLU. Attention is causal inside the open
segment, whose keys and values travel in a `SegmentCache`; members put their memory beside it.
"""

# b batch, t time, s slots of the open segment, h heads, d width of a head

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memory_models.options import check_types
from memory_models.ring import append
from memory_models.state import Memory, memory_state

ROTARY_BASE = 10_000.0
# Cosine logits lie in [-1, 1]; a softmax over them is nearly uniform unless they are scaled.
MATCHING_SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Options of the transformer that carries a memory; the same for every member."""

    dim: int = 256
    """Width of the embeddings."""
    depth: int = 4
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    dim_head: int | None = None
    """Width of a head; None: dim // heads."""
    ff_dim: int | None = None
    """Inner width of the SwiGLU feed-forward; None: 8/3 of dim, rounded up to a multiple of 8."""
    segment_length: int = 64
    """Most tokens of one segment, within which attention is exact."""
    dropout: float = 0.0
    """Dropout of attention's weights and inside the feed-forward."""
    token_shift: bool = False
    """Mix each input with the one before it: x_t + W x_{t-1}."""
    matching_layer: bool = False
    """Build the last layer for matching: cosine, no positions, keys from the previous token."""

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for name in ("dim", "depth", "heads", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.dim_head is None and self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be divisible by heads ({self.heads}), or give dim_head")
        for name in ("dim_head", "ff_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must lie in [0, 1)")

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.dim_head or self.dim // self.heads

    @property
    def feedforward_width(self) -> int:
        """Inner width of the feed-forward."""
        return self.ff_dim or math.ceil(self.dim * 8 / 3 / 8) * 8


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layer numbers counted from 0; given from 0, or from -1 for the last.

    Raises:
        ValueError: if there is none, one twice, or one that does not exist.
    """
    fits = all(-depth <= layer < depth for layer in layers)
    resolved = tuple(layer % depth for layer in layers)
    if not fits or not resolved or len(set(resolved)) != len(resolved):
        raise ValueError(
            f"memory_layers ({tuple(layers)}) must name different layers of 0 to {depth - 1}, "
            f"or of -1 to {-depth}"
        )
    return resolved


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the tokens of one call lie in the open segment; computed once, used by every layer.

    Attributes:
        filled: int64 `[batch]`, tokens of the open segment before this call.
        lengths: int64 `[batch]`, real tokens of this call; None means all.
        positions: int64 `[batch or 1, time]`, place of each token in the segment.
        whole: whether the call is the whole segment, so that nothing came before.
        causal: bool `[batch, 1, time, segment_length]`, which slots each token may see; None if `whole`.
    """

    filled: Tensor
    lengths: Tensor | None
    positions: Tensor
    whole: bool
    causal: Tensor | None

    @classmethod
    def of(cls, filled: Tensor, time: int, lengths: Tensor | None, segment_length: int) -> Place:
        """The place of `time` tokens after `filled` ones."""
        steps = torch.arange(time, device=filled.device)
        if lengths is None and time == segment_length:
            return cls(filled=filled, lengths=None, positions=steps[None], whole=True, causal=None)
        positions = filled[:, None] + steps
        slots = torch.arange(segment_length, device=filled.device)
        causal = slots <= positions[:, None, :, None]
        # A padded token lies past the end; it must not ask for a position that does not exist.
        positions = positions.clamp(max=segment_length - 1)
        return cls(filled=filled, lengths=lengths, positions=positions, whole=False, causal=causal)

    @property
    def after(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment after this call."""
        return self.filled + (self.positions.shape[1] if self.lengths is None else self.lengths)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, §3.2) on `[batch, time, heads, dim_head]`.

    Args:
        x: queries or keys; an odd last channel is left as it is.
        positions: int64 `[batch or 1, time]`; only differences matter, so any origin will do.
    """
    half = x.shape[-1] // 2
    # Angles in float64 where there is one: far into a stream neighbouring positions would collapse.
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    rates = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=exact) / max(half, 1))
    angles = positions[..., None, None].to(exact) * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def previous(x: Tensor, last: Tensor, filled: Tensor) -> Tensor:
    """The token before each one of `x` `[batch, time, dim]`, zero before the segment's first.

    Args:
        last: `[batch, dim]`, the open segment's last token.
        filled: int64 `[batch]`, tokens in the open segment.
    """
    before = torch.where((filled > 0)[:, None], last.to(x.dtype), 0)
    return torch.cat([before[:, None], x[:, :-1]], 1)


def last_token(x: Tensor, last: Tensor, lengths: Tensor | None) -> Tensor:
    """`[batch, dim]`: the last real token of `x`, or `last` for a row that has none."""
    if lengths is None:
        return x[:, -1].to(last.dtype)
    index = (lengths - 1).clamp(min=0)
    newest = x[torch.arange(x.shape[0], device=x.device), index].to(last.dtype)
    return torch.where((lengths > 0)[:, None], newest, last)


def unit(x: Tensor) -> Tensor:
    """`x` `[..., dim]` scaled to unit length in its dtype; zero stays zero."""
    if x.dtype != torch.float16:
        return F.normalize(x, dim=-1)
    # The epsilon of F.normalize is 0 in float16, where squares soon overflow besides. What has no direction
    # gets no gradient: it would be infinite.
    exact = x.float()
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return (exact / length.masked_fill(length == 0, torch.inf)).to(x.dtype)


class TokenShift(nn.Module):
    """x_t + W x_{t-1}: the previous token becomes readable without an attention hop."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, last: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Shift `[batch, time, dim]`; `last` `[batch, dim]` is the open segment's last token."""
        return x + self.mix(previous(x, last, place.filled)), last_token(x, last, place.lengths)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): `W_o (silu(W_g x) * W_v x)`."""

    def __init__(self, dim: int, inner: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.to_inner = nn.Linear(dim, 2 * inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`; the caller adds the residual."""
        gate, value = self.to_inner(self.norm(x)).chunk(2, -1)
        return self.to_out(self.dropout(F.silu(gate) * value))


@memory_state
class SegmentCache(Memory):
    """What one layer's attention keeps of the open segment.

    Attributes:
        keys: `[batch, segment_length, heads, dim_head]`, rotated where the layer rotates.
        values: `[batch, segment_length, heads, dim_head]`.
        last: `[batch, dim]`, the last token's normalised input, or `[batch, 0]` where keys do not need it.
    """

    keys: Tensor
    values: Tensor
    last: Tensor


class SegmentAttention(nn.Module):
    """Causal multi-head attention within the open segment, optionally with keys put before it.

    With `matching` it finds places whose context looked like this one, an induction head from the first
    step: cosine similarity with a learned scale, no positions, keys from the token before (a learned mix
    per channel), key weights started equal to the query weights.

    Args:
        config: widths, heads, segment length, dropout.
        matching: whether this is the matching layer, that is all of the following.
        cosine: cosine similarity with a learned scale, no positions; None: as `matching` says.
        shift_keys: keys from the token before, mixed per channel; None: as `matching` says.
        tie_keys: start key weights equal to the query weights; None: as `matching` says.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        matching: bool = False,
        cosine: bool | None = None,
        shift_keys: bool | None = None,
        tie_keys: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.matching = matching
        self.cosine = matching if cosine is None else cosine
        self.shift_keys = matching if shift_keys is None else shift_keys
        inner = config.heads * config.head_width
        self.norm = nn.RMSNorm(config.dim)
        self.to_queries = nn.Linear(config.dim, inner, bias=False)
        self.to_keys = nn.Linear(config.dim, inner, bias=False)
        self.to_values = nn.Linear(config.dim, inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        if self.cosine:
            self.log_scale = nn.Parameter(torch.full((config.heads, 1), math.log(MATCHING_SCALE)))
        if self.shift_keys:
            self.mix_own = nn.Parameter(torch.full((config.dim,), 0.1))
            self.mix_previous = nn.Parameter(torch.ones(config.dim))
        if matching if tie_keys is None else tie_keys:
            with torch.no_grad():
                self.to_keys.weight.copy_(self.to_queries.weight)

    def init_cache(self, batch_size: int) -> SegmentCache:
        """An empty open segment of `batch_size` rows."""
        weight = self.to_queries.weight
        slots = weight.new_zeros(
            batch_size, self.config.segment_length, self.config.heads, self.config.head_width
        )
        last = weight.new_zeros(batch_size, self.config.dim if self.shift_keys else 0)
        return SegmentCache(keys=slots, values=slots.clone(), last=last)

    def project(self, x: Tensor, cache: SegmentCache, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values `[batch, time, heads, dim_head]` before positions, and the new `last`.

        Args:
            x: the layer's normalised input `[batch, time, dim]`.
        """
        keyed, last = x, cache.last
        if self.shift_keys:
            keyed = self.mix_own * x + self.mix_previous * previous(x, cache.last, place.filled)
            last = last_token(x, cache.last, place.lengths)
        split = "b t (h d) -> b t h d"
        queries = rearrange(self.to_queries(x), split, h=self.config.heads)
        keys = rearrange(self.to_keys(keyed), split, h=self.config.heads)
        values = rearrange(self.to_values(x), split, h=self.config.heads)
        if self.cosine:
            queries = unit(queries) * self.log_scale.exp()
            keys = unit(keys)
        return queries, keys, values, last

    def forward(
        self, x: Tensor, cache: SegmentCache, place: Place, *, past: Past | None = None
    ) -> tuple[Tensor, SegmentCache]:
        """Attend to the open segment, and to `past` if given; the caller adds the residual.

        Args:
            x: `[batch, time, dim]`, the residual stream.
            cache: the layer's part of the open segment.
            place: where these tokens lie.
            past: keys and values from before the segment.

        Returns:
            `[batch, time, dim]` and the cache with these tokens appended.
        """
        queries, keys, values, last = self.project(self.norm(x), cache, place)
        if not self.cosine:
            queries, keys = rotate(queries, place.positions), rotate(keys, place.positions)
        cache = append_to_cache(cache, keys, values, last, place)
        attended = self.attend(queries, cache, place, past=past)
        return self.to_out(rearrange(attended, "b t h d -> b t (h d)")), cache

    def attend(
        self, queries: Tensor, cache: SegmentCache, place: Place, *, past: Past | None = None
    ) -> Tensor:
        """Softmax attention `[batch, time, heads, dim_head]` over the cache and the past."""
        keys, values, mask = cache.keys.to(queries.dtype), cache.values.to(queries.dtype), place.causal
        if past is not None:
            time = queries.shape[1]
            keys = torch.cat([past.keys.to(keys.dtype), keys], 1)
            values = torch.cat([past.values.to(values.dtype), values], 1)
            if mask is None:
                mask = torch.ones(time, time, dtype=torch.bool, device=queries.device).tril()
                mask = mask.expand(queries.shape[0], 1, time, time)
            seen = past.held[:, None, None, :].expand(-1, 1, time, -1)
            mask = torch.cat([seen, mask.expand(seen.shape[0], -1, -1, -1)], -1)
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=mask is None,
            scale=1.0 if self.cosine else None,
        )
        return attended.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values from before the open segment, already placed.

    Attributes:
        keys: `[batch, past, heads, dim_head]`, rotated with the same origin as the segment's.
        values: `[batch, past, heads, dim_head]`.
        held: bool `[batch, past]`, false where there is nothing.
    """

    keys: Tensor
    values: Tensor
    held: Tensor


def append_to_cache(
    cache: SegmentCache, keys: Tensor, values: Tensor, last: Tensor, place: Place
) -> SegmentCache:
    """The open segment with these tokens appended; a whole segment simply takes the place."""
    if place.whole:
        return SegmentCache(keys=keys.to(cache.keys.dtype), values=values.to(cache.values.dtype), last=last)
    return SegmentCache(
        keys=append(cache.keys, place.filled, keys, place.lengths),
        values=append(cache.values, place.filled, values, place.lengths),
        last=last,
    )


@memory_state
class OpenSegment(Memory):
    """What a `Trunk` keeps between the pieces of one segment.

    Attributes:
        filled: int64 `[batch]`, tokens so far.
        last: `[batch, dim]`, the last input, or `[batch, 0]` without token shift.
        layers: one `SegmentCache` a layer.
    """

    filled: Tensor
    last: Tensor
    layers: tuple[SegmentCache, ...]

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens so far."""
        return self.filled


class Trunk(nn.Module):
    """The transformer around a memory: token shift, attention and feed-forward layers, final norm.

    A member walks through `zip(trunk.attentions, trunk.feedforwards)` itself and puts its memory where
    its paper does.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.shift = TokenShift(config.dim) if config.token_shift else None
        self.attentions = nn.ModuleList(
            SegmentAttention(config, matching=config.matching_layer and layer == config.depth - 1)
            for layer in range(config.depth)
        )
        self.feedforwards = nn.ModuleList(
            FeedForward(config.dim, config.feedforward_width, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.dim)

    def open_segment(self, batch_size: int) -> OpenSegment:
        """A segment without tokens."""
        weight = self.norm.weight
        return OpenSegment(
            filled=torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
            last=weight.new_zeros(batch_size, self.config.dim if self.shift is not None else 0),
            layers=tuple(attention.init_cache(batch_size) for attention in self.attentions),  # type: ignore[operator]
        )

    def enter(self, x: Tensor, segment: OpenSegment, lengths: Tensor | None) -> tuple[Tensor, Tensor, Place]:
        """Place the tokens of one call and shift them.

        Args:
            x: `[batch, time, dim]`.
            segment: the open segment so far.
            lengths: int64 `[batch]`, real tokens of each row; None means all.

        Returns:
            The first layer's input, the new `last`, and the tokens' place.
        """
        place = Place.of(segment.filled, x.shape[1], lengths, self.config.segment_length)
        if self.shift is None:
            return x, segment.last, place
        x, last = self.shift(x, segment.last, place)
        return x, last, place
