"""What Memory Transformer-XL carries, and the memory attention network that writes the long part of it."""

# b batch, n slots, t tokens, h heads, f features of a head, d values of a head

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from memory_models.state import Memory, memory_state
from memory_models.stats import collecting, record
from memory_models.transformer import OpenSegment
from memxl.config import MemXLConfig
from memxl.gates import Mogrifier, make_gate


@memory_state
class ShortMemory(Memory):
    """The inputs of each memory layer at the newest tokens before the open segment, as in Transformer-XL.

    Detached, and not normalised: the layer that reads them does that with its own norm (Dai et al. 2019,
    §3.2, in its pre-norm form).

    Attributes:
        hiddens: one `[batch, mem_len, dim]` a memory layer, oldest first, ending with the newest.
        held: int64 `[batch]`, tokens held; they stand at the end.
    """

    hiddens: tuple[Tensor, ...]
    held: Tensor

    @classmethod
    def empty(cls, batch_size: int, length: int, layers: int, dim: int, *, like: Tensor) -> Self:
        """Nothing held, with the dtype and device of `like`."""
        return cls(
            hiddens=tuple(like.new_zeros(batch_size, length, dim) for _ in range(layers)),
            held=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    @property
    def length(self) -> int:
        """Tokens that each layer keeps."""
        return self.hiddens[0].shape[1]

    def places(self) -> Tensor:
        """bool `[batch, mem_len]`, true where a token is held."""
        return torch.arange(self.length, device=self.held.device) >= self.length - self.held[:, None]

    def push(self, segment: Sequence[Tensor], filled: Tensor) -> Self:
        """The memory after a segment; the oldest leave.

        Args:
            segment: one `[batch, time, dim]` a memory layer; row `b` counts the first `filled[b]` tokens.
            filled: int64 `[batch]`.

        Returns:
            The next memory, detached.
        """
        rows = torch.arange(filled.shape[0], device=filled.device)[:, None]
        # The newest of [memory; segment]: the row's tokens end at length + filled.
        index = filled[:, None] + torch.arange(self.length, device=filled.device)
        return type(self)(
            hiddens=tuple(
                torch.cat([old, new.to(old.dtype)], 1).detach()[rows, index]
                for old, new in zip(self.hiddens, segment, strict=True)
            ),
            held=(self.held + filled).clamp(max=self.length),
        )


@memory_state
class MemXLMemory(Memory):
    """What the `memxl` member carries.

    Attributes:
        segment: the open segment's keys and values.
        hiddens: `[batch, segment_length, dim]` for each memory layer, its inputs in the open segment, which
            are to be written.
        short: the newest such inputs from before the segment.
        long: `[batch, lmem_len, dim]`, the slots, in float32 or better: they add up what many segments
            bring.
    """

    segment: OpenSegment
    hiddens: tuple[Tensor, ...]
    short: ShortMemory
    long: Tensor

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`, tokens of the open segment."""
        return self.segment.filled


def linear_attention(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Efficient attention (Shen et al. 2018, arXiv:1812.01243, §3.2), in float32 or better.

    Softmax of each query over its features, softmax of each feature's keys over the tokens, no other
    normaliser: `softmax(Q) (softmax(K)^T V)`. Each feature is a place that holds a weighted mean of the
    values, and each query mixes these places.

    Args:
        queries: `[batch, n, heads, features]`.
        keys: `[batch, tokens, heads, features]`.
        values: `[batch, tokens, heads, dim_head]`.
        valid: bool `[batch, tokens]`, false for a token that does not count.

    Returns:
        `[batch, n, heads, dim_head]`; zero in a row without a valid token.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    queries, keys, values = queries.to(exact), keys.to(exact), values.to(exact)
    counts = valid[:, :, None, None]
    device = queries.device.type
    # The meta device has no autocast; asking about it raises.
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        # Not minus infinity: a row without tokens would give NaN, in its gradient too.
        weights = keys.masked_fill(~counts, torch.finfo(exact).min).softmax(1)
        weights = weights.masked_fill(~counts, 0)
        places = torch.einsum("bthf,bthd->bhfd", weights, values)
        return torch.einsum("bnhf,bhfd->bnhd", queries.softmax(-1), places)


class MemoryWriter(nn.Module):
    """The memory attention network: writes a segment into the long memory.

    The slots attend to the short memory and the new hiddens of all memory layers, each with its layer's
    depth embedding, by linear attention; a gate blends what they find into them; several times over. A
    slot asks with its content and its place, a learned vector that is no part of what is carried. Tokens
    have no order.

    Slots are not among the keys, and one head is the default: a slot's key competes in every feature's
    softmax over the tokens, and heads choose apart, so that a slot would get parts of several tokens.

    Args:
        config: `lmem_len`, `write_iterations`, `write_heads`, `write_features`, the scales and the gate.
    """

    def __init__(self, config: MemXLConfig) -> None:
        super().__init__()
        dim, slots, heads = config.dim, config.lmem_len, config.write_heads
        features = config.write_features or dim // heads
        self.heads, self.iterations = heads, config.write_iterations
        self.initial = nn.Parameter(torch.randn(slots, dim))
        self.slot_places = nn.Parameter(config.slot_scale * torch.randn(slots, dim))
        self.depth = nn.Parameter(torch.randn(len(config.layers_with_memory), dim) / math.sqrt(dim))
        self.slot_norm = nn.RMSNorm(dim)
        self.hidden_norm = nn.RMSNorm(dim)
        self.to_queries = nn.Linear(dim, heads * features, bias=False)
        self.to_keys = nn.Linear(dim, heads * features, bias=False)
        self.to_values = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.log_query_scale = nn.Parameter(torch.full((heads, 1), math.log(config.query_scale)))
        self.log_key_scale = nn.Parameter(torch.full((heads, 1), math.log(config.key_scale)))
        self.mogrifier = Mogrifier(dim, rank=max(1, dim // 4)) if config.mogrify else None
        self.gate = make_gate(config.gate, dim, bias=config.gate_bias)

    def init_slots(self, batch_size: int) -> Tensor:
        """Fresh slots `[batch, lmem_len, dim]`, learned, in float32 or better."""
        exact = torch.promote_types(self.initial.dtype, torch.float32)
        return self.initial.to(exact).repeat(batch_size, 1, 1)

    def forward(self, long: Tensor, hiddens: Sequence[Tensor], valid: Tensor) -> Tensor:
        """The long memory after a segment.

        Args:
            long: `[batch, lmem_len, dim]`, in float32 or better.
            hiddens: one `[batch, tokens, dim]` a memory layer: short memory, then segment.
            valid: bool `[batch, tokens]`, which of them are real.

        Returns:
            `[batch, lmem_len, dim]`: each component between the old one and -1 or 1, and so bounded for
            ever. A row without a real token is as it was.
        """
        if self.initial.dtype != long.dtype:
            # In half precision a nearly closed gate would change nothing at all.
            weights = {name: weight.to(long.dtype) for name, weight in self.named_parameters()}
            return functional_call(
                self, weights, (long, [hidden.to(long.dtype) for hidden in hiddens], valid)
            )
        written = torch.cat(
            [self.hidden_norm(h) + depth for h, depth in zip(hiddens, self.depth, strict=True)], 1
        )
        everywhere = valid.repeat(1, len(hiddens))
        keys = self._split(self.to_keys(written)) * self.log_key_scale.exp()
        values = self._split(self.to_values(written))
        slots = long
        for _ in range(self.iterations):
            queries = self._split(self.to_queries(self.slot_norm(slots) + self.slot_places))
            queries = queries * self.log_query_scale.exp()
            found = self.to_out(linear_attention(queries, keys, values, everywhere).flatten(2))
            if self.mogrifier is not None:
                # The slots it modulates serve to modulate `found`; carried on, they could grow without end.
                found, _ = self.mogrifier(found, slots)
            slots = self.gate(found, slots)
        slots = torch.where(valid.any(1)[:, None, None], slots, long)
        if collecting():
            record("memxl/slot norm", slots.norm(dim=-1))
            record("memxl/slot change", (slots - long).norm(dim=-1) / long.norm(dim=-1))
            record("memxl/feature sharpness", queries.softmax(-1).amax(-1))
            seen = keys.masked_fill(~everywhere[:, :, None, None], -torch.inf)
            record("memxl/token sharpness", seen.softmax(1).amax(1))
        return slots

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h f) -> b t h f", h=self.heads)
