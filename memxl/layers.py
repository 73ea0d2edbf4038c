"""Attention over the open segment, the short memory, the long memory and persistent pairs; usable alone."""

# b batch, t time, c short memory, s slots, h heads, d width of a head

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memory_models.stats import collecting, record
from memory_models.transformer import (
    Past,
    Place,
    SegmentAttention,
    SegmentCache,
    append_to_cache,
    last_token,
    rotate,
    unit,
)
from memxl.config import MemXLConfig


class MemXLAttention(SegmentAttention):
    """One softmax over [persistent pairs; long memory; short memory; open segment so far].

    The short memory is that of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, §3.2): the inputs of this
    layer at earlier tokens, normalised and projected here, at their distance from the query. Persistent pairs
    (Sukhbaatar et al. 2019, arXiv:1907.01470, §3.2) and slots have no place: their logits do not depend on
    where the query stands. A slot's key is made of its content and of a learned vector of its own.

        attention = MemXLAttention(MemXLConfig(dim=64, heads=4, segment_length=16))
        place = Place.of(torch.zeros(batch, dtype=torch.int64), 16, None, 16)
        y, cache = attention(x, attention.init_cache(batch), place, long=slots)    # y is to be added to x

    Args:
        config: widths, `persistent`, `lmem_len`.
        matching: whether this is the matching layer (see `SegmentAttention`).
        reads_long: whether this layer reads the long memory.
        name: under which it records its diagnostics (`memory_models.collect_stats`).
    """

    def __init__(
        self,
        config: MemXLConfig,
        *,
        matching: bool = False,
        reads_long: bool = True,
        name: str = "memxl",
    ) -> None:
        super().__init__(config, matching=matching)
        self.name = name
        inner = config.heads * config.head_width
        self.persistent_keys: nn.Parameter | None = None
        self.slot_places: nn.Parameter | None = None
        if config.persistent:
            # As large as the keys and values of normalised tokens are at the start.
            shape = (config.persistent, config.heads, config.head_width)
            self.persistent_keys = nn.Parameter(torch.randn(shape) / math.sqrt(3))
            self.persistent_values = nn.Parameter(torch.randn(shape) / math.sqrt(3))
        if reads_long:
            self.slot_norm = nn.RMSNorm(config.dim)
            self.slot_places = nn.Parameter(torch.randn(config.lmem_len, config.dim))
            self.slot_to_keys = nn.Linear(config.dim, inner, bias=False)
            self.slot_to_values = nn.Linear(config.dim, inner, bias=False)

    def forward(
        self,
        x: Tensor,
        cache: SegmentCache,
        place: Place,
        *,
        past: Past | None = None,
        short: Tensor | None = None,
        held: Tensor | None = None,
        long: Tensor | None = None,
    ) -> tuple[Tensor, SegmentCache]:
        """Attend to everything that is given; the caller adds the residual.

        Args:
            x: `[batch, time, dim]`, the residual stream.
            cache: the layer's part of the open segment.
            place: where these tokens lie.
            past: further keys and values from before the segment, as wide as the layer's own.
            short: `[batch, mem_len, dim]`, inputs of this layer at the tokens before the segment, oldest
                first, ending with the newest; 0 where there is none.
            held: bool `[batch, mem_len]`, which of them there are; with `short`.
            long: `[batch, lmem_len, dim]`, the slots; needed if the layer `reads_long`.

        Returns:
            `[batch, time, dim]` and the cache with these tokens appended.

        Raises:
            ValueError: if `short` comes without `held`, or the long memory is missing.
        """
        if (short is None) != (held is None):
            raise ValueError("short and held go together: give both or neither")
        if long is None and self.slot_places is not None:
            raise ValueError("this layer reads the long memory: give long, or build it with reads_long=False")
        earlier = None if short is None or short.shape[1] == 0 else self.norm(short.to(x.dtype))
        queries, keys, values, last = self._project_after(self.norm(x), cache, place, earlier)
        unplaced = queries
        if not self.cosine:
            queries, keys = rotate(queries, place.positions), rotate(keys, place.positions)
        cache = append_to_cache(cache, keys, values, last, place)
        placed = [] if past is None else [past]
        if earlier is not None and held is not None:
            placed.append(Past(keys=self._keys_of(earlier), values=self._values_of(earlier), held=held))
        free, shown = self._free(x, long), cache
        if free and not self.cosine:
            # Half of the channels for what has a place, half for what has none: one softmax over both.
            free = [_widen(pairs, before=self.config.head_width) for pairs in free]
            placed = [_widen(pairs, after=self.config.head_width) for pairs in placed]
            shown = SegmentCache(
                keys=F.pad(cache.keys, (0, self.config.head_width)),
                values=F.pad(cache.values, (0, self.config.head_width)),
                last=cache.last,
            )
            # Attention divides by the root of the width, which is now twice as large.
            queries = torch.cat([queries, unplaced], -1) * math.sqrt(2)
        attended = self.attend(queries, shown, place, past=_join([*free, *placed]))
        attended = attended[..., : self.config.head_width]
        if collecting():
            self._record(queries, shown, place, free, placed)
        return self.to_out(rearrange(attended, "b t h d -> b t (h d)")), cache

    def _project_after(
        self, x: Tensor, cache: SegmentCache, place: Place, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Like `project`, where the token before the segment's first is the newest of the short memory.
        if earlier is None or not self.shift_keys:
            return self.project(x, cache, place)
        begun = place.filled > 0
        before = torch.where(begun[:, None], cache.last.to(x.dtype), earlier[:, -1])
        primed = SegmentCache(keys=cache.keys, values=cache.values, last=before)
        follows = Place(
            filled=place.filled.clamp(min=1),
            lengths=place.lengths,
            positions=place.positions,
            whole=place.whole,
            causal=place.causal,
        )
        queries, keys, values, _ = self.project(x, primed, follows)
        return queries, keys, values, last_token(x, cache.last, place.lengths)

    def _keys_of(self, earlier: Tensor) -> Tensor:
        # Keys of the normalised short memory, placed before the open segment, whose first token is at 0.
        keyed = earlier
        if self.shift_keys:
            keyed = self.mix_own * earlier + self.mix_previous * F.pad(earlier[:, :-1], (0, 0, 1, 0))
        keys = rearrange(self.to_keys(keyed), "b c (h d) -> b c h d", h=self.config.heads)
        if self.cosine:
            return unit(keys)
        return rotate(keys, torch.arange(-earlier.shape[1], 0, device=earlier.device)[None])

    def _values_of(self, earlier: Tensor) -> Tensor:
        return rearrange(self.to_values(earlier), "b c (h d) -> b c h d", h=self.config.heads)

    def _free(self, x: Tensor, long: Tensor | None) -> list[Past]:
        # Keys and values without a place: persistent ones, then the slots.
        batch, heads = x.shape[0], self.config.heads
        pairs = []
        if self.persistent_keys is not None:
            pairs.append(
                (
                    self.persistent_keys.to(x.dtype).expand(batch, -1, -1, -1),
                    self.persistent_values.to(x.dtype).expand(batch, -1, -1, -1),
                )
            )
        if self.slot_places is not None and long is not None:
            content = self.slot_norm(long.to(x.dtype))
            keys = rearrange(self.slot_to_keys(content + self.slot_places), "b s (h d) -> b s h d", h=heads)
            pairs.append((keys, rearrange(self.slot_to_values(content), "b s (h d) -> b s h d", h=heads)))
        return [
            Past(
                keys=unit(keys) if self.cosine else keys,
                values=values,
                held=torch.ones(keys.shape[:2], dtype=torch.bool, device=x.device),
            )
            for keys, values in pairs
        ]

    def _record(
        self, queries: Tensor, shown: SegmentCache, place: Place, free: list[Past], placed: list[Past]
    ) -> None:
        # The share of each query's attention that goes to the slots and to the short memory. Found by
        # attending to indicators in place of values, so that it is the attention itself that is measured.
        def indicate(pasts: list[Past], marked: Past | None) -> list[Past]:
            return [
                Past(
                    keys=p.keys,
                    values=torch.full_like(p.values, 1.0 if p is marked else 0.0),
                    held=p.held,
                )
                for p in pasts
            ]

        blank = SegmentCache(keys=shown.keys, values=torch.zeros_like(shown.values), last=shown.last)
        names = {"long": free[-1] if self.slot_places is not None else None}
        names["short"] = placed[-1] if placed else None
        for name, marked in names.items():
            if marked is not None:
                share = self.attend(queries, blank, place, past=_join(indicate([*free, *placed], marked)))
                record(f"{self.name}/{name} share", share[..., :1])


def _widen(pairs: Past, *, before: int = 0, after: int = 0) -> Past:
    # Values as wide as keys, though the rest is zero: fused kernels take no others.
    return Past(
        keys=F.pad(pairs.keys, (before, after)),
        values=F.pad(pairs.values, (0, before + after)),
        held=pairs.held,
    )


def _join(pasts: list[Past]) -> Past | None:
    if not pasts:
        return None
    return Past(
        keys=torch.cat([p.keys for p in pasts], 1),
        values=torch.cat([p.values for p in pasts], 1),
        held=torch.cat([p.held for p in pasts], 1),
    )
