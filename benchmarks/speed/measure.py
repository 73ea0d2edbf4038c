"""The measurement: two sides in turn, medians, ratios with their spread, extra memory, and agreement."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.speed import OURS, Case
from benchmarks.speed.limits import MatrixProduct
from benchmarks.speed.peer import Process

TURN_SECONDS = 0.03
"""A turn repeats a short step for about so long: clocks and cold caches weigh little then."""
PAUSE_SECONDS = 0.01
"""Between turns, so that the threads of the side that waits have gone to sleep."""

RECALL_SLACK = 1e-5
"""Scores that lie so close, as a share of the largest of a query, are equal: they were rounded apart."""


class Side(Protocol):
    """A step that can be timed; `peer.Process` is one."""

    def ask(self, do: str, **arguments: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step in each turn."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    """CPU time of the whole process, all its threads, in user and system mode."""
    calls: int
    """Steps in a turn."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times less the first side takes than the second."""

    medians: float
    """Median of theirs over median of ours."""
    low: float
    """Tenth percentile of the ratios of neighbouring turns."""
    high: float
    """Ninetieth percentile of them."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two sides' results lie apart, in shares of the largest value of each result."""

    largest: float
    """Largest difference of all."""
    stray_rows: float
    """Share of rows (all but the last dimension) that differ by more than the tolerance."""
    compared: tuple[str, ...]
    """Names of the results that were compared."""
    agrees: bool
    recall: tuple[float, float] | None = None
    """Of a search, ours and theirs: then `largest` and `stray_rows` say what ours misses."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was measured of one case; times by number of threads."""

    case: Case
    times: dict[int, tuple[Times, Times]]
    """Ours and theirs."""
    extra_bytes: tuple[int, int]
    """Extra peak memory of a step, ours and theirs, with the first number of threads."""
    memory_method: str
    agreement: Agreement
    others: dict[int, float | None]
    """Share of the machine's CPU time that other programs took meanwhile; None where it cannot be told."""
    products: dict[int, Times] = field(default_factory=dict)
    """Of the matrix product that took turns with the sides, where the case asks for it; else empty."""
    longest: tuple[dict[str, float], dict[str, float]] | None = None
    """Seconds of the longest single step by "wall" and "cpu", ours and theirs, if the case asks for it."""


def alternate(*sides: Side, rounds: int, seconds: float) -> tuple[Times, ...]:
    """Time two or more sides in turn, the first one first.

    Args:
        sides: prepared.
        rounds: turns of each side at most.
        seconds: wall time after which no further round begins, at least three having been made.

    Returns:
        The times of each side, turn by turn; what comes before the first turn (a step each to warm up and to
        choose the length of a turn) is not in them.
    """
    if rounds < 1:
        raise ValueError(f"rounds ({rounds}) must be at least 1")
    calls = [_calls_per_turn(side) for side in sides]
    turns: tuple[list[dict[str, float]], ...] = tuple([] for _ in sides)
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 3 and time.monotonic() > end:
            break
        for side, number, taken in zip(sides, calls, turns, strict=True):
            time.sleep(PAUSE_SECONDS)
            taken.append(side.ask("run", calls=number))
    return tuple(
        Times(wall=tuple(turn["wall"] for turn in taken), cpu=tuple(turn["cpu"] for turn in taken), calls=n)
        for taken, n in zip(turns, calls, strict=True)
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Median of `theirs` over median of `ours`, and the spread over the pairs of neighbouring turns.

    Raises:
        ValueError: if the numbers of turns differ, or there is none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"the sides must have taken equally many turns, not {len(ours)} and {len(theirs)}")
    pairs = sorted(_over(b, a) for a, b in zip(ours, theirs, strict=True))
    return Ratio(
        medians=_over(statistics.median(theirs), statistics.median(ours)),
        low=_quantile(pairs, 0.1),
        high=_quantile(pairs, 0.9),
    )


def compare_results(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, tolerance: float, stray_rows: float
) -> Agreement:
    """Compare the results of the two sides, name by name; only theirs that ours lack may be missing.

    A result that only one side has cannot be compared (parameters may be laid out differently); `output`
    must be on both. Values that are not finite never agree.

    Raises:
        ValueError: if a shape differs or `output` is missing.
    """
    common = sorted(set(ours) & set(theirs))
    if "output" not in common:
        raise ValueError(f"both sides must return 'output'; ours: {sorted(ours)}, theirs: {sorted(theirs)}")
    largest, stray = 0.0, 0.0
    for name in common:
        mine, other = ours[name].double(), theirs[name].double()
        if mine.shape != other.shape:
            raise ValueError(f"{name}: shape {tuple(mine.shape)} of ours, {tuple(other.shape)} of theirs")
        scale = max(float(other.abs().max()), torch.finfo(torch.float32).tiny)
        difference = (mine - other).abs() / scale
        # NaN compares false with everything, so ask for what is within, not for what is beyond.
        rows = difference.reshape(-1, difference.shape[-1]) if difference.ndim else difference.reshape(1, 1)
        within = (rows <= tolerance).all(dim=-1)
        stray = max(stray, 1.0 - float(within.double().mean()))
        worst = float(difference.nan_to_num(nan=math.inf).max())
        largest = max(largest, worst)
    return Agreement(
        largest=largest, stray_rows=stray, compared=tuple(common), agrees=stray <= stray_rows + 1e-12
    )


def compare_recall(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, floor: float) -> Agreement:
    """Compare two searches, either of which may be approximate, with the right answers.

    Args:
        ours: `found`, the true scores of the pairs returned (-inf where none or a wrong pair was), and
            `best`, the scores of the right ones, largest first; both `[queries, k]`.
        theirs: likewise; what is held may differ.
        floor: recall that ours must reach.

    Raises:
        ValueError: if a result is missing or the shapes differ.
    """
    recalls = (recall(ours), recall(theirs))
    return Agreement(
        largest=1 - recalls[0],
        stray_rows=1 - recalls[0],
        compared=("best", "found"),
        agrees=recalls[0] >= floor,
        recall=recalls,
    )


def recall(results: Mapping[str, Tensor]) -> float:
    """Share of the pairs returned whose score reaches the last of the right ones; see `compare_recall`.

    By score, not by id: of pairs with equal scores any is right. Nothing that is not finite counts.

    Raises:
        ValueError: if a result is missing or the shapes differ.
    """
    if not {"found", "best"} <= results.keys():
        raise ValueError(f"a search must return 'found' and 'best', got {sorted(results)}")
    found, best = results["found"].double(), results["best"].double()
    if found.shape != best.shape:
        raise ValueError(f"found is {tuple(found.shape)}, best is {tuple(best.shape)}")
    slack = RECALL_SLACK * best.abs().amax(-1, keepdim=True)
    return float((found.isfinite() & (found >= best[..., -1:] - slack)).double().mean())


def measure(
    case: Case,
    *,
    peers_python: Path,
    threads: Sequence[int],
    rounds: int,
    seconds: float,
    timeout: float = 600.0,
) -> Outcome:
    """Measure one case, each side in a fresh process; memory first, then results, then times.

    Args:
        case: what to measure.
        peers_python: interpreter of the environment that holds the published package.
        threads: numbers of threads to time with, one after the other.
        rounds: turns of each side at most.
        seconds: wall time for each number of threads after which no further round begins.
        timeout: seconds after which a silent side is given up.

    Raises:
        WorkerError: if a side fails.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        Process(timeout=timeout) as ours,
        Process(None if case.package == OURS else peers_python, timeout=timeout) as theirs,
    ):
        weights = str(Path(folder) / "weights.pt")
        # Theirs first: it writes the weights that ours reads.
        for side, name in ((theirs, "theirs"), (ours, "ours")):
            side.ask(
                "prepare",
                file=str(case.file),
                side=name,
                settings=dict(case.settings),
                weights=weights,
                threads=threads[0],
            )
        peaks = [side.ask("peak") for side in (ours, theirs)]
        agreement = _agreement(case, ours, theirs, Path(folder))
        times: dict[int, tuple[Times, Times]] = {}
        products: dict[int, Times] = {}
        others: dict[int, float | None] = {}
        for count in threads:
            for side in (ours, theirs):
                side.ask("threads", count=count)
            limit = [] if case.near_limit is None else [MatrixProduct(threads=count)]
            before = _machine_seconds(), _own_seconds(ours, theirs)
            mine, other, *product = alternate(ours, theirs, *limit, rounds=rounds, seconds=seconds)
            times[count] = mine, other
            if product:
                (products[count],) = product
            others[count] = _others(before, (_machine_seconds(), _own_seconds(ours, theirs)))
        longest = None
        if case.singly:
            for side in (ours, theirs):
                side.ask("threads", count=threads[0])
            longest = ours.ask("longest", calls=case.singly), theirs.ask("longest", calls=case.singly)
    return Outcome(
        case=case,
        times=times,
        extra_bytes=(peaks[0]["bytes"], peaks[1]["bytes"]),
        memory_method=peaks[0]["method"],
        agreement=agreement,
        others=others,
        products=products,
        longest=longest,
    )


def _machine_seconds() -> tuple[float, float] | None:
    """CPU seconds of all cores since the start of the system: those in use, and all."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError, AttributeError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) / ticks for field in fields)
    used = user + nice + system + irq + softirq + steal
    return used, used + idle + iowait


def _own_seconds(*sides: Side) -> float:
    return sum(side.ask("cpu_seconds") for side in sides) + time.process_time()


def _others(
    before: tuple[tuple[float, float] | None, float], after: tuple[tuple[float, float] | None, float]
) -> float | None:
    """Share of the machine's time between two readings that went to neither side nor to this process."""
    (start, own_start), (end, own_end) = before, after
    if start is None or end is None or end[1] <= start[1]:
        return None
    foreign = (end[0] - start[0]) - (own_end - own_start)
    return min(max(foreign / (end[1] - start[1]), 0.0), 1.0)


def _agreement(case: Case, ours: Side, theirs: Side, folder: Path) -> Agreement:
    results = []
    for side, name in ((ours, "ours"), (theirs, "theirs")):
        path = folder / f"{name}.pt"
        side.ask("results", path=str(path))
        results.append(torch.load(path, weights_only=True))
        path.unlink()
    if case.recall is not None:
        return compare_recall(*results, floor=case.recall)
    return compare_results(*results, tolerance=case.tolerance, stray_rows=case.stray_rows)


def _calls_per_turn(side: Side) -> int:
    first = side.ask("run", calls=1)["wall"]
    if first >= TURN_SECONDS:
        return 1
    # The first step is slower than the rest; a short run tells how long they take.
    again = side.ask("run", calls=max(1, min(10, int(TURN_SECONDS / max(first, 1e-6)))))["wall"]
    return max(1, min(1000, round(TURN_SECONDS / max(again, 1e-6))))


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low) if high > low else ordered[low]
