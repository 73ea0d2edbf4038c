"""What is suspicious about the memory of a finished run. Needs neither models nor tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Shares of attention or of a gate beyond these are as good as all or nothing.
_CLOSED, _OPEN = 0.01, 0.99
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
        if _is_share(name) and not _CLOSED <= summary["mean"] <= _OPEN:
            state = "closed" if summary["mean"] < _CLOSED else "all open"
            found.append(f"{name} is {state}: {summary['mean']:.4f} on average")
    dead = [name for name, norm in (record.get("memory_gradients") or {}).items() if norm == 0]
    if dead:
        found.append(f"no gradient reaches {_listed(dead)}")
    return found


def _is_share(name: str) -> bool:
    return name.endswith((" share", " gate", "/gate", "/share"))


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
