"""Reading and writing memory slots, as layers usable alone.

Wu et al., "Memformer" (arXiv 2010.06891): cross-attention of tokens to slots, a write in which each slot
attends to itself and to the segment's tokens, and forgetting by biased memory normalisation.

    write, read = SlotWrite(64, slots=32), SlotAttention(64)
    slots = write.initial().expand(batch, -1, -1)
    hiddens = hiddens + read(hiddens, slots)     # [batch, time, 64]
    slots = write(slots, hiddens)                # [batch, 32, 64]
"""

# b batch, t time, s slots, h heads, d width of a head

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memory_models.checks import check_flags, check_heads, check_sizes
from memory_models.stats import collecting, effective_number, record


class SlotAttention(nn.Module):
    """Cross-attention of tokens to slots: how a layer reads the memory (§2.2.3 of the first version).

    Tokens and slots are normalised before their projections: slots lie on the unit sphere, where entries
    are much smaller than those of a token. Slots have no positions.

    Args:
        dim: width of tokens and slots.
        heads: attention heads.
        dim_head: width of a head; None: dim // heads.
        dropout: on the attention's weights, in training.
        name: under which it records its diagnostics (`memory_models.collect_stats`).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        dim_head: int | None = None,
        dropout: float = 0.0,
        name: str = "memformer/read",
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, heads=heads, dim_head=1 if dim_head is None else dim_head)
        if dim_head is None and dim % heads:
            raise ValueError(f"dim ({dim}) must be divisible by heads ({heads}), or give dim_head")
        self.dim, self.heads, self.name, self.dropout = dim, heads, name, dropout
        inner = heads * (dim_head or dim // heads)
        self.norm = nn.RMSNorm(dim)
        self.slot_norm = nn.RMSNorm(dim)
        self.to_queries = nn.Linear(dim, inner, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """Attend from each token to the slots of its own row; the caller adds the residual.

        Args:
            x: `[batch, time, dim]`, the residual stream.
            slots: `[batch, slots, dim]`.

        Returns:
            `[batch, time, dim]`.

        Raises:
            ValueError: if shapes disagree.
        """
        _check_rows(self.dim, slots, x)
        [queries] = _split(self.to_queries(self.norm(x)), self.heads)
        keys, values = _split(self.to_keys_values(self.slot_norm(slots)), self.heads, parts=2)
        if collecting():
            scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
            shares = scores.float().softmax(-1)  # [b, h, t, slots]
            record(f"{self.name}/largest slot share", shares.amax(-1).transpose(1, 2))
            if slots.shape[1] > 1:
                # Over all tokens: each may look at one slot only, if they do not all look at the same.
                record(f"{self.name}/slots used", effective_number(shares.mean((1, 2))))
        read = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.dropout if self.training else 0.0
        )
        return self.to_out(rearrange(read, "b h t d -> b t (h d)"))


class SlotWrite(nn.Module):
    """The paper's write: slots attend to themselves and to tokens, and forget by normalisation.

    Slot `i` sees itself and the segment's tokens, never another slot. The softmax is sharpened by a
    temperature, and the slot's own value is the slot itself, so that one that attends only to itself keeps
    what it holds. Then biased memory normalisation: add the slot's learned bias `v` and go back to the unit
    sphere. A slot that takes nothing moves towards `v / |v|`, the state it began with, so that the initial
    state is what is left when all is forgotten.

    Args:
        dim: width of tokens and slots.
        slots: number of slots.
        heads: attention heads; each keeps or replaces its own part of a slot, so that more of them hold
            more things apart.
        temperature: divides the logits; below 1 the softmax is sharper.
        forgetting: initial norm of the biases; a slot that takes nothing comes nearer to `v / |v|` by a
            factor of `1 + forgetting` at each write.
        own_bias: initial value of what is added, learned per head, to a slot's sharpened logit for itself;
            at 0 a slot begins by exchanging most of what it holds at each write.
        iterations: times that the same tokens are written.
        name: under which it records its diagnostics (`memory_models.collect_stats`).
    """

    def __init__(
        self,
        dim: int,
        *,
        slots: int,
        heads: int = 4,
        temperature: float = 0.25,
        forgetting: float = 0.2,
        own_bias: float = 2.0,
        iterations: int = 1,
        name: str = "memformer/write",
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, slots=slots, heads=heads, iterations=iterations)
        check_heads(dim, heads=heads)
        for option, value in (("temperature", temperature), ("forgetting", forgetting)):
            if not 0 < value < math.inf:
                raise ValueError(f"{option} ({value}) must be positive")
        self.dim, self.heads, self.name = dim, heads, name
        self.temperature, self.iterations = temperature, iterations
        self.slot_norm = nn.RMSNorm(dim)
        # In this order slots use the first two thirds and tokens the last two, one product each.
        self.to_queries_keys_values = nn.Linear(dim, 3 * dim, bias=False)
        self.own_bias = nn.Parameter(torch.full((heads, 1, 1), float(own_bias)))
        self.bias = nn.Parameter(forgetting * _spread_apart(slots, dim))

    def initial(self) -> Tensor:
        """`[slots, dim]`: the slots of a new document, `v / |v|`."""
        return _to_sphere(self.bias)

    def forget(self, slots: Tensor) -> Tensor:
        """Biased memory normalisation of slots `[batch, slots, dim]`: `m + v` on the unit sphere."""
        return _to_sphere(slots + self.bias)

    def forward(self, slots: Tensor, hiddens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The slots after a segment.

        Args:
            slots: `[batch, slots, dim]`, of unit norm.
            hiddens: `[batch, time, dim]`, normalised hidden states of the segment's tokens.
            mask: bool `[batch, time]`, false at padding, which may hold anything; None: no padding.

        Returns:
            `[batch, slots, dim]` in the dtype of `slots`; a row without a real token keeps its slots.

        Raises:
            TypeError: if `mask` is not boolean.
            ValueError: if shapes disagree.
        """
        hiddens, mask = _prepare(self.bias, slots, hiddens, mask)
        if hiddens.shape[1] == 0:
            return slots
        weight = self.to_queries_keys_values.weight
        keys, values = _split(F.linear(hiddens, weight[self.dim :]), self.heads, parts=2)
        written = slots
        for _ in range(self.iterations):
            projected = F.linear(self.slot_norm(written), weight[: 2 * self.dim])
            queries, own_keys = _split(projected, self.heads, parts=2)
            own, taken = _attend_self_and_tokens(
                queries, own_keys, keys, values, mask, bias=self.own_bias, temperature=self.temperature
            )
            [held] = _split(written, self.heads)
            # A token of unit variance has norm sqrt(dim), a slot norm 1.
            moved = torch.addcmul(taken * self.dim**-0.5, own, held.to(own.dtype))
            written = self.forget(rearrange(moved, "b h s d -> b s (h d)")).to(slots.dtype)
        return _keep_unwritten(self.name, slots, written, own, mask)


class GatedSlotWrite(nn.Module):
    """The write of the package memformer 0.3.1: attention, a GRU cell, and a feed-forward layer.

    Slot `i` sees itself and the segment's tokens, as in the paper; but its own value is projected too, the
    result enters a GRU cell whose state is the slot, and slots are not normalised.

    Args:
        dim: width of tokens and slots.
        slots: number of slots.
        heads: attention heads.
        iterations: times that the same tokens are written.
        name: under which it records its diagnostics (`memory_models.collect_stats`).
    """

    def __init__(
        self, dim: int, *, slots: int, heads: int = 8, iterations: int = 1, name: str = "memformer/write"
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, slots=slots, heads=heads, iterations=iterations)
        check_heads(dim, heads=heads)
        self.dim, self.heads, self.name, self.iterations = dim, heads, name, iterations
        self.to_queries = nn.Linear(dim, dim)
        self.to_keys_values = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.start = nn.Parameter(torch.randn(slots, dim))

    def initial(self) -> Tensor:
        """`[slots, dim]`: the slots of a new document, learned."""
        return self.start

    def forward(self, slots: Tensor, hiddens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The slots after a segment; arguments, result and errors as in `SlotWrite`."""
        hiddens, mask = _prepare(self.start, slots, hiddens, mask)
        if hiddens.shape[1] == 0:
            return slots
        keys, values = _split(self.to_keys_values(hiddens), self.heads, parts=2)
        written = slots
        for _ in range(self.iterations):
            own_keys, own_values = _split(self.to_keys_values(written), self.heads, parts=2)
            [queries] = _split(self.to_queries(written), self.heads)
            own, taken = _attend_self_and_tokens(queries, own_keys, keys, values, mask)
            attended = own * own_values.to(own.dtype) + taken
            attended = self.to_out(rearrange(attended, "b h s d -> b s (h d)").to(slots.dtype))
            written = self.gru(attended.flatten(0, 1), written.flatten(0, 1)).view(slots.shape)
            written = (written + self.feedforward(self.norm(written))).to(slots.dtype)
        return _keep_unwritten(self.name, slots, written, own, mask)


def _attend_self_and_tokens(
    queries: Tensor,
    own_keys: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    # Of each slot: the weight on itself [b, h, s, 1], and what it takes from the tokens [b, h, s, d].
    exact = torch.promote_types(queries.dtype, torch.float32)
    queries, own_keys, keys, values = (each.to(exact) for each in (queries, own_keys, keys, values))
    with _without_autocast(queries.device):
        queries = queries * (queries.shape[-1] ** -0.5 / temperature)
        own = (queries * own_keys).sum(-1, keepdim=True)
        if bias is not None:
            own = own + bias.to(exact)
        others = queries @ keys.transpose(-1, -2)
        if mask is not None:
            others = others.masked_fill(~mask[:, None, None], -torch.inf)
        weights = torch.cat([own, others], -1).softmax(-1)
        return weights[..., :1], weights[..., 1:] @ values


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # Sharpened logits reach several tens, which half precision knows to a quarter. The meta device has no
    # autocast; asking about it raises.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _spread_apart(slots: int, dim: int) -> Tensor:
    # Unit vectors, orthogonal while they fit into the space: slots that begin alike ask for the same tokens,
    # and then overwrite what they should hold apart. In float32, for half precision has no such routine.
    vectors = nn.init.orthogonal_(torch.empty(slots, dim, dtype=torch.float32))
    return F.normalize(vectors, dim=-1).to(torch.get_default_dtype())


def _to_sphere(slots: Tensor) -> Tensor:
    exact = torch.promote_types(slots.dtype, torch.float32)
    return F.normalize(slots.to(exact), dim=-1).to(slots.dtype)


def _split(x: Tensor, heads: int, *, parts: int = 1) -> tuple[Tensor, ...]:
    # `[b, n, parts * h * d]` as so many tensors [b, h, n, d].
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(parts, -1))


def _prepare(
    own: Tensor, slots: Tensor, hiddens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    # The hiddens, finite at padding, and the mask, None if it is known that there is no padding.
    _check_rows(own.shape[1], slots, hiddens)
    if slots.shape[1] != own.shape[0]:
        raise ValueError(f"there are {slots.shape[1]} slots, not {own.shape[0]}")
    check_flags("mask", mask, (hiddens.shape[0], hiddens.shape[1]), hiddens.device)
    if mask is None or (_is_known(mask) and bool(mask.all())):
        return hiddens, None
    # where, not multiply: padding may hold NaN, and a weight of zero does not undo it.
    return torch.where(mask[..., None], hiddens, 0), mask


def _is_known(mask: Tensor) -> bool:
    # Reading a value back from an accelerator would wait for it, and a compiled graph has none.
    return mask.device.type == "cpu" and not torch.compiler.is_compiling()


def _keep_unwritten(name: str, slots: Tensor, written: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
    written = written if mask is None else torch.where(mask.any(1)[:, None, None], written, slots)
    if collecting():
        record(f"{name}/own share", own.mean(1)[..., 0])
        record(f"{name}/moved", (written - slots).norm(dim=-1))
        record(f"{name}/slot norm", written.norm(dim=-1))
    return written


def _check_rows(dim: int, slots: Tensor, tokens: Tensor) -> None:
    if slots.dim() != 3 or tokens.dim() != 3 or slots.shape[-1] != dim or tokens.shape[-1] != dim:
        raise ValueError(
            f"takes tokens [batch, time, {dim}] and slots [batch, slots, {dim}], got {tuple(tokens.shape)} "
            f"and {tuple(slots.shape)}"
        )
    if slots.shape[0] != tokens.shape[0]:
        raise ValueError(f"there are {tokens.shape[0]} rows of tokens but {slots.shape[0]} of slots")
