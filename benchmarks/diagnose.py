"""What a trained model does with its memory: the members' diagnostics, and the gradient their memory gets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.evaluate import segments
from benchmarks.learning import loss_of
from benchmarks.members import build_model, known_options, tags_of
from benchmarks.task import Batch, Task
from memory_models.stats import AGE_BUCKETS

BY_AGE = "weight by age"
"""How the name of a diagnostic ends that sums weights in `AGE_BUCKETS`."""
PLAIN = "window"
"""The member whose parameters are not those of a memory."""


class Diagnosis(NamedTuple):
    """What the members' diagnostics say, over all segments of a sequence but the first, which reads nothing.

    Attributes:
        summaries: for each diagnostic its `mean` and its 5 % and 95 % points, `low` and `high`. Ages below 0
            stand for nothing found and do not count.
        weight_by_age: for each layer that tells it, the shares of the weight with which the memory is read
            that lie so many segments back (`AGE_BUCKETS`).
    """

    summaries: dict[str, dict[str, float]]
    weight_by_age: dict[str, dict[str, float]]


def diagnose(model: Any, task: Task, *, rows: int, batches: int) -> Diagnosis:
    """The members' diagnostics over the first evaluation batches (`memory_models.collect_stats`).

    Args:
        model: called like a `MemoryLM`; left in the mode it was in.
        task: gives the data.
        rows: rows of a batch.
        batches: how many.
    """
    by_age: dict[str, Tensor] = {}
    values: dict[str, list[Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            memory = None
            for batch in itertools.islice(task.evaluation(batch_size=rows), batches):
                if not task.streaming or (memory is not None and memory.batch_size != len(batch.tokens)):
                    memory = None
                for segment in segments(batch, model.segment_length):
                    first = memory is None
                    out = model(segment.tokens, memory, mask=segment.mask, reset=segment.reset, stats=True)
                    memory = model.commit(out.memory)
                    for name, value in {} if first else out.stats.items():
                        if name.endswith(BY_AGE):
                            found = value.double().cpu().nan_to_num(0).sum(0)
                            by_age[name] = by_age[name] + found if name in by_age else found
                        else:
                            values.setdefault(name, []).append(_counted(name, value))
    finally:
        model.train(was_training)
    return Diagnosis(
        summaries={n: _summary(torch.cat(found)) for n, found in values.items() if sum(map(len, found))},
        weight_by_age={
            name.removesuffix(BY_AGE).rstrip("/"): dict(
                zip(AGE_BUCKETS, (found / found.sum()).tolist(), strict=True)
            )
            for name, found in by_age.items()
            if found.sum() > 0
        },
    )


def summarise_stats(model: Any, task: Task, *, rows: int, batches: int) -> dict[str, dict[str, float]]:
    """The `summaries` of `diagnose`."""
    return diagnose(model, task, rows=rows, batches=batches).summaries


def memory_gradients(
    model: Any,
    name: str,
    options: Mapping[str, Any],
    batches: Sequence[Batch],
    memory: Any = None,
) -> dict[str, float]:
    """Norm of the gradient that a step sends to each parameter that the plain transformer does not have.

    Args:
        model: the language model around member `name`.
        name: of a member, or package.module:Class; controls have no memory parameters.
        options: with which it was built.
        batches: what an optimiser step reads, one after the other.
        memory: that the step starts with. A stream trained a segment at a time reads nothing but what is in
            it: from an empty one no gradient would reach what reads.

    Returns:
        Norms by the parameter's name; a parameter that no gradient reaches has 0.
    """
    own = memory_parameters(model, name, options)
    if not own:
        return {}
    was_training = model.training
    model.eval()
    try:
        loss, _ = loss_of(model, batches, memory)
        gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    finally:
        model.train(was_training)
    return {
        key: 0.0 if gradient is None else float(gradient.norm())
        for key, gradient in zip(own, gradients, strict=True)
    }


def memory_parameters(model: Any, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained parameters that the same transformer without memory does not have."""
    if "control" in tags_of(name):
        return {}
    known = known_options(PLAIN)
    try:
        plain = build_model(
            PLAIN, {key: value for key, value in options.items() if key in known}, model.vocab_size
        )
    except (TypeError, ValueError):
        # In a model from elsewhere an option of the same name may mean something else.
        plain = build_model(PLAIN, {}, model.vocab_size)
    shared = {key for key, _ in plain.named_parameters()}
    return {key: p for key, p in model.named_parameters() if key not in shared and p.requires_grad}


def _counted(name: str, value: Tensor) -> Tensor:
    flat = value.detach().flatten().double().cpu()
    flat = flat[flat.isfinite()]
    return flat[flat >= 0] if name.endswith("age") else flat


def _summary(values: Tensor) -> dict[str, float]:
    ordered = values.sort().values
    last = len(ordered) - 1
    return {
        "mean": float(values.mean()),
        "low": float(ordered[round(0.05 * last)]),
        "high": float(ordered[round(0.95 * last)]),
    }
