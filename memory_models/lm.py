"""A language model around any memory module: embedding, module, head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_models.checks import check_flags, check_ids, check_tensor
from memory_models.module import MemoryModule
from memory_models.pretrained import Pretrained
from memory_models.state import Memory
from memory_models.stats import collect_stats

IGNORED_LABEL = -100


class LMOutput(NamedTuple):
    """What a `MemoryLM` returns.

    Attributes:
        logits: `[batch, time, vocab_size]`.
        memory: the memory after these tokens.
        loss: mean cross-entropy in nats over the labels asked, or None without labels.
        stats: detached diagnostics of the members by name; empty unless asked for.
    """

    logits: Tensor
    memory: Any
    loss: Tensor | None
    stats: dict[str, Tensor]


class MemoryLM(Pretrained, nn.Module):
    """Token embedding, a memory module, and a head over the vocabulary.

    Args:
        module: any `MemoryModule`.
        vocab_size: number of token ids.
        tie_embeddings: whether the head is the embedding transposed.
        embedding_std: standard deviation of the initial embedding; None: `dim ** -0.5`.
        embedding_scale: factor on the embedding before the module; None: 1 / `embedding_std`, so that
            the module sees unit variance.
    """

    def __init__(
        self,
        module: MemoryModule[Any],
        *,
        vocab_size: int,
        tie_embeddings: bool = True,
        embedding_std: float | None = None,
        embedding_scale: float | None = None,
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size ({vocab_size}) must be at least 1")
        std = module.dim**-0.5 if embedding_std is None else embedding_std
        self.module = module
        self.vocab_size = vocab_size
        self.embedding_scale = (1 / std if std else 1.0) if embedding_scale is None else embedding_scale
        self.embedding = nn.Embedding(vocab_size, module.dim)
        nn.init.normal_(self.embedding.weight, std=std)
        self.head = nn.Linear(module.dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=module.dim**-0.5)

    @property
    def segment_length(self) -> int:
        """Most tokens of one segment."""
        return self.module.segment_length

    def init_memory(self, batch_size: int) -> Memory:
        """A fresh memory of `batch_size` rows."""
        return self.module.init_memory(batch_size)

    def commit(self, memory: Memory) -> Memory:
        """Flush writes that wait for a store outside the memory; between segments."""
        return self.module.commit(memory)

    def outside_bytes(self, memory: Memory) -> int:
        """Bytes that a store outside the memory sets aside for its rows."""
        return self.module.outside_bytes(memory)

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        close: bool | Tensor = True,
        labels: Tensor | None = None,
        stats: bool = False,
    ) -> LMOutput:
        """Predict at each token, and carry the memory on.

        Args:
            tokens: int64 `[batch, time]`, at most one segment (see `unroll` for longer input).
            memory: what the last call returned; None starts afresh.
            mask: bool `[batch, time]`, false at padding.
            reset: bool `[batch]` or `[batch, time]`, true where a new document begins.
            close: whether the segment ends with this call.
            labels: int64 `[batch, time]`, the right answer at each place (no shift is applied), -100
                where nothing is asked; nothing is asked at padding, whatever stands there. Without any label
                asked the loss is zero.
            stats: whether to gather the members' diagnostics.

        Raises:
            TypeError: if tokens or labels are no integer tensors, or as `MemoryModule.forward`.
            ValueError: if an id lies outside the vocabulary, or as `MemoryModule.forward`.
        """
        check_tensor("tokens", tokens)
        check_flags("mask", mask, tuple(tokens.shape), tokens.device)
        if mask is not None:
            # Padding may carry any id, -100 too; it must not reach the embedding.
            tokens = torch.where(mask, tokens, 0)
        check_ids("tokens", tokens, self.vocab_size)
        if labels is not None:
            check_tensor("labels", labels, tokens.device)
            if labels.shape != tokens.shape:
                raise ValueError(f"labels are {tuple(labels.shape)}, tokens are {tuple(tokens.shape)}")
            if mask is not None:
                # The logits of padding say nothing.
                labels = torch.where(mask, labels, IGNORED_LABEL)
            check_ids("labels", torch.where(labels == IGNORED_LABEL, 0, labels), self.vocab_size)
        x = self.embedding(tokens) * self.embedding_scale
        gathered: dict[str, Tensor] = {}
        if stats:
            with collect_stats() as gathered:
                y, memory = self.module(x, memory, mask=mask, reset=reset, close=close)
        else:
            y, memory = self.module(x, memory, mask=mask, reset=reset, close=close)
        logits = self.head(y)
        loss = None if labels is None else cross_entropy(logits, labels)
        return LMOutput(logits, memory, loss, gathered)

    if TYPE_CHECKING:
        # torch's own says Any of what comes out.
        def __call__(
            self,
            tokens: Tensor,
            memory: Memory | None = None,
            *,
            mask: Tensor | None = None,
            reset: Tensor | None = None,
            close: bool | Tensor = True,
            labels: Tensor | None = None,
            stats: bool = False,
        ) -> LMOutput: ...


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over labels that are not -100; zero, not NaN, when there are none."""
    # Half precision cannot sum thousands of terms.
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)
