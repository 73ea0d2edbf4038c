"""How much faster and leaner than the published packages: `memory-bench speed`.

Both sides do the same work with the same weights and inputs, each in a process of its own, the published
package in the environment that `make peers` builds. They are timed in turn (ours, theirs, ours, theirs, ...),
so that whatever else the machine does falls on both, and what they return is compared.

A case may also be run against another way of ours (`OURS` as its package), measure how near a step comes to
what the machine can do, its longest step, or the recall of an approximate search.

To add a family, write one file like `cases_htm.py` and name it in `groups`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from memory_models.registry import Named, Registry, nearest

__all__ = ["OURS", "Case", "Work", "find_cases", "groups"]

OURS = "memory-models"
"""As the package of a case: the other side is ours too, run in this environment."""

groups: Registry[Named] = Registry("group of speed cases")
groups.register(Named("htm", "benchmarks.speed.cases_htm:cases"))
groups.register(Named("knn", "benchmarks.speed.cases_knn:cases"))
groups.register(Named("memorizing", "benchmarks.speed.cases_memorizing:cases"))
groups.register(Named("memformer", "benchmarks.speed.cases_memformer:cases"))
groups.register(Named("memxl", "benchmarks.speed.cases_memxl:cases"))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What any version of a step must do at the least."""

    operations: float
    """Floating-point operations, a multiplication and an addition counted as two."""
    bytes: float
    """Bytes that must be read or written at least once: inputs, weights, results."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison of a step of ours with the same step of a published package."""

    name: str
    """Group and what is measured, such as `htm/forward/q128/m20k`."""
    settings: Mapping[str, Any]
    """What the two builders of the case file are given; JSON."""
    package: str
    """Distribution that the other side belongs to: a published package, Faiss, or `OURS`."""
    work: Work
    """Operations and bytes that no version can do without."""
    faster: float | None = None
    """Target: so many times faster than the published package."""
    leaner: float | None = None
    """Target: extra peak memory is at most one so-many-th."""
    near_limit: float | None = None
    """Target: so large a share of our time is what the operations take at the speed of a matrix product,
    which is then timed in turn with the two sides."""
    pause: float | None = None
    """Target: seconds that the longest of `singly` steps may take."""
    singly: int = 0
    """Steps of each side that are timed one by one, for the longest."""
    quick: bool = False
    """Part of the `--quick` selection."""
    tolerance: float = 1e-4
    """Largest difference of a row of results, as a share of the largest value, that counts as equal."""
    stray_rows: float = 0.0
    """Share of rows that may differ by more, as where a choice between near-equal scores is rounded apart."""
    recall: float | None = None
    """For a search: our recall must reach this, instead of the same results on both sides. Both then return
    `found`, the true scores of the pairs returned, and `best`, those of the right ones, `[queries, k]`."""
    note: str = ""
    """What the reader should know about the case."""
    file: Path = field(default=Path(), repr=False)
    """The file with the builders `ours` and `theirs`; filled in by `find_cases`."""


def find_cases(pattern: str = "*", *, quick: bool = False) -> list[Case]:
    """The cases whose name matches a shell pattern, in order.

    Args:
        pattern: such as `htm/*` or `*/q128/m20k`.
        quick: only those that take seconds.

    Raises:
        LookupError: if none matches; the message names the nearest.
    """
    found: list[Case] = []
    for group in groups:
        make: Callable[[], list[Case]] = groups.load(group.name)
        file = Path(inspect.getfile(make)).resolve()
        found += [replace(case, file=file) for case in make()]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases have the same name"
    chosen = [case for case in found if fnmatchcase(case.name, pattern)]
    if not chosen:
        raise LookupError(f"no speed case matches {pattern!r}. {nearest(pattern, names)}")
    if quick:
        chosen = [case for case in chosen if case.quick]
        if not chosen:
            raise LookupError(f"none of the speed cases that match {pattern!r} is a quick one")
    return chosen
