"""What is suspicious about the memory of a finished run. Needs neither models nor tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Diagnostics that say how much comes from the memory, or stays in it, rather than from elsewhere; those of
# members from elsewhere end in "gate". A share among slots is not one of them: its mean is 1 / slots.
_GATES = ("gate", "memory share", "long share", "short share", "own share")
# Beyond these a gate is as good as closed or open.
_CLOSED, _OPEN = 0.01, 0.99
# How many slots are read, counted by weight; in place of fewer than two a single vector would do.
_USED, _FEW = "slots used", 2.0
# Of what a memory can add to an accuracy, from the floor to 1, this is little. Evaluations of a few hundred
# questions are no more exact.
_LITTLE = 0.05
# A score without a best value that changes by less than this share does not come from the memory.
_UNUSED = 0.01


def warnings(record: Mapping[str, Any], *, headline: str) -> list[str]:
    """What is suspicious about the memory of a finished run, in words.

    Args:
        record: the run's line of the results.
        headline: name of the metric that `drop` is about.
    """
    if "control" in record.get("tags", ()):
        return []
    found = _of_scores(record, headline)
    for name, summary in (record.get("diagnostics") or {}).items():
        mean = summary["mean"]
        if name.endswith(_GATES) and not _CLOSED <= mean <= _OPEN:
            found.append(f"{name} is {'closed' if mean < _CLOSED else 'all open'}: {mean:.4f} on average")
        if name.endswith(_USED) and mean < _FEW:
            found.append(f"few slots are read: {name} is {mean:.2f} on average")
    dead = [name for name, norm in (record.get("memory_gradients") or {}).items() if norm == 0]
    if dead:
        found.append(f"no gradient reaches {_listed(dead)}")
    return found


def _of_scores(record: Mapping[str, Any], headline: str) -> list[str]:
    """Whether the score is that of a model without memory, and whether it suffers without."""
    found = []
    facts = record.get("task_facts") or {}
    metric: Mapping[str, Any] = next((m for m in facts.get("metrics", ()) if m["name"] == headline), {})
    floor: Any = (facts.get("floor") or {}).get(headline)
    score: Any = (record.get("scores") or {}).get(headline)
    up, gain = metric.get("higher_is_better", True), None
    if metric.get("unit") == "accuracy":
        gain = 1 - (floor or 0.0)
    if _known(floor, score):
        above = score - floor if up else floor - score
        if above < (_UNUSED * abs(floor) if gain is None else _LITTLE * gain):
            found.append(
                f"hardly better than without memory: {headline} is {score:.3f}, the floor {floor:.3f}"
            )
    use = record.get("memory_use") or {}
    scores = use.get("scores", {})
    carried, without = (scores.get(mode, {}).get(headline) for mode in ("carried", "none"))
    drop = use.get("drop", {}).get("none")
    if _known(carried, without, drop) and drop < (_UNUSED * abs(carried) if gain is None else _LITTLE * gain):
        word = "not" if drop < _UNUSED * abs(carried) else "hardly"
        found.append(
            f"the memory is {word} used: without it {headline} is {without:.3f} instead of {carried:.3f}"
        )
    return found


def _known(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
