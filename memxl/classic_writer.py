"""The write of the classic `MemoryTransformerXL`'s long memory."""

# b batch, n tokens, s slots, l memory layers, p keys and values, h heads, d width of a head

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from memxl.classic_layers import empty_slots, uniform
from memxl.gates import NBRCGate
from memxl.products import apply_map, are_plain, linear

WRITE_HEADS = 4


class ClassicWriter(nn.Module):
    """Write the long memory: slots read themselves and the hiddens by linear attention, and are gated.

    Attention is that of Shen et al. 2018 (arXiv 1812.01243): softmax over the features of a query, over
    the sequence for each feature of the keys. Slots have a learned place which the attention sees and the
    state does not, so that it does not add up from segment to segment.

    Args:
        dim: width of slots and hiddens, divisible by the four heads.
        slots: number of long-memory slots.
        layers: number of memory layers, each with an embedding added to its hiddens.
        persistent: learned inputs read beside the hiddens.
        iterations: reads and gated updates a write.
    """

    def __init__(self, dim: int, *, slots: int, layers: int, persistent: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.initial = nn.Parameter(uniform(1, dim))
        self.places = nn.Parameter(uniform(slots, dim))
        self.depths = nn.Parameter(uniform(layers, dim))
        self.persistent = nn.Parameter(uniform(persistent, dim))
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.gate = NBRCGate(dim, bias=0.0)

    def forward(self, long: Tensor, hiddens: Tensor, absent: Tensor | None) -> Tensor:
        """The next slots `[batch, slots, dim]`.

        Args:
            long: the slots so far; those that hold nothing start from the learned state.
            hiddens: `[layers, batch, n, dim]`, inputs of the memory layers, short memory included.
            absent: bool `[batch, n]`, true at what must not be written; None if all is to be.
        """
        long = torch.where(empty_slots(long)[..., None], self.initial.to(long.dtype), long)
        seen, weight = self._read_hiddens(hiddens, absent)
        for _ in range(self.iterations):
            x = F.layer_norm(long + self.places.to(long.dtype), long.shape[-1:])
            own, own_weight = _summary(apply_map(self.to_keys_values, x))
            # Two softmaxes over parts of a sequence join by their log-sum-exps to one over the whole.
            context = torch.lerp(own, seen, torch.sigmoid(weight - own_weight)[..., None])
            queries = apply_map(self.to_queries, x)
            queries = rearrange(queries, "b s (h d) -> b h s d", h=WRITE_HEADS).softmax(-1)
            read = rearrange(queries @ context, "b h s d -> b s (h d)")
            long = self.gate(apply_map(self.to_out, read), long)
        return long

    def _read_hiddens(self, hiddens: Tensor, absent: Tensor | None) -> tuple[Tensor, Tensor]:
        # W (hidden + depth), taken apart: hiddens need no gradient, so that only the depths pay for one.
        parts = [
            linear(hidden, self.to_keys_values.weight, offset)
            if are_plain(self.to_keys_values)
            else self.to_keys_values(hidden) + offset
            for hidden, offset in zip(hiddens, self.to_keys_values(self.depths), strict=True)
        ]
        if absent is not None:
            # Finite, so that a row with nothing to write has no NaN in what it then throws away.
            least = torch.finfo(parts[0].dtype).min
            for index, part in enumerate(parts):
                keys, values = part.chunk(2, -1)
                parts[index] = torch.cat([keys.masked_fill(absent[..., None], least), values], -1)
        if len(self.persistent):
            own = self.to_keys_values(self.persistent.to(hiddens.dtype))
            parts.append(own.expand(hiddens.shape[1], -1, -1))
        pairs = torch.cat(parts, 1)
        return _summary(pairs)


def _summary(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """What a sequence's keys and values `[b, n, 2 dim]` hold for linear attention.

    Returns:
        For each feature of the keys the mean of the values under a softmax over the sequence,
        `[b, h, d, d]`, and that softmax's log-sum-exp `[b, h, d]`.
    """
    keys, values = (rearrange(part, "b n (h d) -> b h n d", h=WRITE_HEADS) for part in pairs.chunk(2, -1))
    # One exponential serves both; its gradient does not depend on what was subtracted before.
    largest = keys.detach().amax(-2, keepdim=True)
    weights = (keys - largest).exp()
    total = weights.sum(-2)
    means = weights.transpose(-1, -2) @ values / total[..., None]
    return means, total.log() + largest.squeeze(-2)


# What each long memory was written with, for as long as it lives.
_WRITTEN_WITH = WeakTensorKeyDictionary()


def keep_weights(long: Tensor, weights: dict[str, Tensor]) -> None:
    """Remember that `long` was written with the copies `weights`."""
    if not torch.compiler.is_compiling():
        _WRITTEN_WITH[long] = weights


def copied_weights(writer: ClassicWriter, long: Tensor) -> dict[str, Tensor]:
    """Differentiable copies of the writer's parameters, by name.

    They are those that `long` was written with while the parameters still have their values, so that the
    segments of one graph share them; on a GPU, where comparing values would wait for it, always new ones.
    """
    parameters = dict(writer.named_parameters())
    if not torch.compiler.is_compiling() and long.device.type == "cpu":
        kept = _WRITTEN_WITH.get(long)
        if kept is not None and all(_is_copy(kept[name], weight) for name, weight in parameters.items()):
            return kept
    return {name: weight.clone() for name, weight in parameters.items()}


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    same_graph = copy.requires_grad == weight.requires_grad and (
        not copy.requires_grad or _leaf(copy) is weight
    )
    return same_graph and copy.dtype == weight.dtype and torch.equal(copy, weight)


def _leaf(copy: Tensor) -> Tensor | None:
    """The parameter that a clone hands its gradient to."""
    node = copy.grad_fn.next_functions[0][0] if copy.grad_fn is not None else None
    return getattr(node, "variable", None)
