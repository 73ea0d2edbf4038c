"""What is suspicious about the memory of a finished run. Needs neither models nor tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Diagnostics that say how much comes from the memory, or stays in it, rather than from elsewhere; those of
# members from elsewhere end in "gate". A share among slots is not one of them: its mean is 1 / slots.
_GATES = ("gate", "memory share", "long share", "short share", "own share")
# Beyond these a gate is as good as closed or open.
_CLOSED, _OPEN = 0.01, 0.99
# How many slots are read, counted by weight; in place of fewer than two a single vector would do.
_USED, _FEW = "slots used", 2.0
# A score that changes by less than this share when the memory is taken away does not come from it.
_UNUSED = 0.01


def warnings(record: Mapping[str, Any], *, headline: str) -> list[str]:
    """What is suspicious about the memory of a finished run, in words.

    Args:
        record: the run's line of the results.
        headline: name of the metric that `drop` is about.
    """
    if "family" not in record.get("tags", ()):
        return []
    found = []
    use = record.get("memory_use") or {}
    scores = use.get("scores", {})
    carried, without = (scores.get(mode, {}).get(headline) for mode in ("carried", "none"))
    drop = use.get("drop", {}).get("none")
    if carried is not None and without is not None and drop is not None and drop < _UNUSED * abs(carried):
        found.append(
            f"the memory is not used: without it {headline} is {without:.3f} instead of {carried:.3f}"
        )
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


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
