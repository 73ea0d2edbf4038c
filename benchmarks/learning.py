"""How a model learns: its loss over segments, the gradient through them, optimiser and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evaluate import segments
from benchmarks.settings import TrainSettings
from benchmarks.task import IGNORED, Batch
from memory_models.replay import memory_replay
from memory_models.segments import Segment


def loss_of(model: Any, batches: Sequence[Batch], memory: Any) -> tuple[Tensor, Any]:
    """Mean cross-entropy in nats over all that the batches ask in turn, and the memory after them.

    The gradient flows through the memory over all segments, as far as the model lets it.
    """
    asked = max(sum(batch.asked for batch in batches), 1)
    total: Any = 0
    for segment in _segments(model, batches):
        out = model(segment.tokens, memory, mask=segment.mask, reset=segment.reset)
        memory = model.commit(out.memory)
        total = total + _summed(out.logits, segment)
    return total / asked, memory


def accumulate_gradients(
    model: Any, batches: Sequence[Batch], memory: Any, *, through: str = "bptt"
) -> tuple[float, Any]:
    """Add the gradient of `loss_of` to the parameters; gives the loss and the memory after it, detached.

    Args:
        model: called like a `MemoryLM`.
        batches: read one after the other.
        memory: where to go on; None starts afresh.
        through: "bptt" (all segments' activations are held), or "replay" (memory replay: one segment's).
    """
    if through == "bptt":
        loss, memory = loss_of(model, batches, memory)
        value = loss.item()
        # A loss that is not finite has no gradient that anybody wants.
        if math.isfinite(value):
            loss.backward()
        return value, memory.detach()
    parts = _segments(model, batches)
    asked = max(sum(batch.asked for batch in batches), 1)
    replayed = memory_replay(
        model,
        [Segment(x=part.tokens, mask=part.mask, reset=part.reset) for part in parts],
        lambda logits, index: _summed(logits, parts[index]) / asked,
        memory,
    )
    return replayed.loss.item(), replayed.memory


def _segments(model: Any, batches: Sequence[Batch]) -> list[Batch]:
    return [segment for batch in batches for segment in segments(batch, model.segment_length)]


def _summed(logits: Tensor, segment: Batch) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), segment.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: no embeddings, no norms, no scales or biases."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = sum(size > 1 for size in parameter.shape) >= 2
        (decayed if is_matrix and id(parameter) not in embeddings else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # Fused: small models on a processor are bound by the number of calls.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of step number `step`, counted from zero: linear warm-up, constant, cosine decay."""
    warmup = min(settings.warmup, settings.steps // 4)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    start = max(warmup, round(settings.steps * (1 - settings.decay)))
    if step < start:
        return settings.learning_rate
    done = (step - start) / max(settings.steps - 1 - start, 1)
    share = settings.final + (1 - settings.final) * (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * share
