"""What a model makes of some segments: the loss, summed, and the memory after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.data import Piece
from memory_models.lm import IGNORED_LABEL, MemoryLM
from memory_models.replay import memory_replay
from memory_models.segments import Segment

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Window(nn.Module):
    """A language model over several segments at once, so that DDP and FSDP2 see one forward pass a step.

    Args:
        model: the language model.
        dtype: of autocast in the forward pass; float32: none.
    """

    def __init__(self, model: MemoryLM, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, pieces: Sequence[Piece], memory: Any) -> tuple[Tensor, Any]:
        """Read segments one after the other.

        Args:
            pieces: at least one segment.
            memory: where to go on; None starts afresh.

        Returns:
            The cross-entropy in nats summed over all labels asked, and the memory.
        """
        total: Tensor | None = None
        for piece in pieces:
            with autocast(piece.tokens.device, self.dtype):
                out = self.model(piece.tokens, memory, mask=piece.mask, reset=piece.reset)
            memory = self.model.commit(out.memory)
            nats = summed(out.logits, piece.labels)
            total = nats if total is None else total + nats
        assert total is not None
        if torch.is_grad_enabled():
            # Whatever no loss depends on, such as the write of the last segment, has a gradient of zero: the
            # processes wait for one from each weight.
            total = total + 0 * torch.stack([p.reshape(-1)[0] for p in self._trained()]).float().sum()
        return total, memory

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad and parameter.numel()]


def replay(
    model: Any,
    pieces: Sequence[Piece],
    memory: Any,
    *,
    scale: float,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler | None,
) -> tuple[Tensor, Any]:
    """Add the gradient of `Window`'s loss times `scale` to the weights by memory replay.

    Returns:
        As `Window`; the loss is not scaled.
    """
    with autocast(pieces[0].tokens.device, dtype):
        done = memory_replay(
            model,
            [Segment(x=piece.tokens, mask=piece.mask, reset=piece.reset) for piece in pieces],
            lambda logits, index: summed(logits, pieces[index].labels) * scale,
            memory,
            scaler=scaler,
        )
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return done.loss / scale, done.memory


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Numbers of the forward pass; off for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, `[batch, time, vocab_size]` and int64 `[batch, time]` to a scalar."""
    # Half precision cannot sum thousands of terms.
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
