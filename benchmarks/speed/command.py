"""`memory-bench speed`: measure the cases, show a table as it grows, keep every row."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.provenance import versions
from benchmarks.results import plain, write_atomically
from benchmarks.speed import OURS, Case, find_cases
from benchmarks.speed.limits import Limits, MatrixProduct, measure_limits
from benchmarks.speed.measure import Outcome, Ratio, measure, ratio
from benchmarks.speed.peer import PeersMissingError, Process, WorkerError, find_python

MIB = 1 << 20
BUSY = 0.1
"""Share of the machine from which other programs are mentioned."""
VERSIONS = ("python", "torch", "memory-models", "commit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options of `memory-bench speed` and run it; returns the exit code."""
    import tyro

    return tyro.cli(speed, args=arguments, prog="memory-bench speed", config=(tyro.conf.FlagCreatePairsOff,))


def speed(
    *,
    cases: str = "*",
    quick: bool = False,
    threads: tuple[int, ...] = (),
    rounds: int = 11,
    seconds: float = 8.0,
    peers: Path = Path(".peers"),
    out: Path = Path("results/speed"),
    timeout: float = 600.0,
) -> int:
    """Time our modules against the published packages, both doing the same work in turn.

    `make peers` builds the environment with the published packages. The table goes to the terminal and to
    table.md, every row with all its times to speed.jsonl. With one thread the ratio and the limit count CPU
    time, which other programs disturb least; with several threads they count wall time.

    Args:
        cases: shell pattern of case names, such as "htm/forward/*".
        quick: a few small cases with one thread, in seconds.
        threads: numbers of threads to measure with; by default 1 and all cores.
        rounds: turns of each side, at most.
        seconds: time for each case and number of threads after which no further round begins.
        peers: the environment with the published packages.
        out: folder for speed.jsonl and table.md.
        timeout: seconds after which a side that does not answer is given up.

    Returns:
        Exit code: 0; 1 if a case failed or the two sides disagree; 2 for wrong use or if the environment
        is missing; 130 after Ctrl-C.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=230)
    errors = Console(stderr=True)
    counts = threads or ((1,) if quick else tuple(sorted({1, os.cpu_count() or 1})))
    if min(counts) < 1:
        errors.print(f"[red]--threads ({' '.join(map(str, counts))}) must be at least 1[/red]")
        return 2
    if rounds < 1:
        errors.print(f"[red]--rounds ({rounds}) must be at least 1[/red]")
        return 2
    if quick:
        rounds, seconds = min(rounds, 5), min(seconds, 2.0)
    try:
        chosen = find_cases(cases, quick=quick)
        packages = sorted({case.package for case in chosen} - {OURS})
        # Ours against ours needs no other environment.
        python = find_python(peers) if packages else Path(sys.executable)
        peer_versions = _peer_versions(python, packages) if packages else {}
    except (LookupError, PeersMissingError, WorkerError) as error:
        errors.print(str(error), style="red", markup=False)
        return 2

    with console.status("measuring what the machine can do"):
        limits = {count: measure_limits(threads=count, seconds=0.1 if quick else 0.5) for count in counts}
    run = _describe_run(peer_versions, limits)
    rows: list[Row] = []
    failed: list[tuple[str, str]] = []
    stopped = False
    for number, case in enumerate(chosen, 1):
        place = f"{number} of {len(chosen)}: {case.name}"
        with console.status(place):
            try:
                outcome = measure(
                    case,
                    peers_python=python,
                    threads=counts,
                    rounds=rounds,
                    seconds=seconds,
                    timeout=timeout,
                )
                new = [make_row(outcome, limits[count]) for count in counts]
            except KeyboardInterrupt:
                stopped = True
                failed += [(other.name, "stopped before it was measured") for other in chosen[number - 1 :]]
                break
            except (WorkerError, ValueError) as error:
                failed.append((case.name, str(error)))
                errors.print(f"{case.name} failed: {error}", style="red", markup=False)
                continue
        rows += new
        _append(out / "speed.jsonl", [{"run": run, **row.record()} for row in new])
        write_atomically(out / "table.md", markdown(run, rows, failed).encode())
        faster = ", ".join(f"{row.ratio.medians:.1f}× (threads {row.threads})" for row in new)
        console.print(f"{place}  {faster}", markup=False, highlight=False)
    if rows:
        write_atomically(out / "table.md", markdown(run, rows, failed).encode())
        _print_table(console, rows)
        console.print(summary(rows), markup=False)
        console.print(f"kept in {out}", markup=False)
    if stopped:
        errors.print("stopped; what was measured is kept", style="red")
        return 130
    wrong = [row for row in rows if not row.agrees]
    return 1 if failed or wrong else 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a case with one number of threads."""

    case: Case
    threads: int
    clock: str
    """Which of the two times ratio and limit count: "cpu" or "wall"."""
    ours: dict[str, Any]
    theirs: dict[str, Any]
    cpu: Ratio
    wall: Ratio
    extra_bytes: tuple[int, int] | None
    """Ours and theirs; with the first number of threads only."""
    memory_method: str
    largest_difference: float
    stray_rows: float
    agrees: bool
    limit_seconds: float
    bound_by: str
    others: float | None
    """Share of the machine that other programs took meanwhile."""
    recall: tuple[float, float] | None = None
    """Of a search, ours and theirs."""
    longest: tuple[float, float] | None = None
    """Seconds of the longest single step by the row's clock, ours and theirs."""

    @property
    def ratio(self) -> Ratio:
        """Theirs over ours, by the row's clock."""
        return self.cpu if self.clock == "cpu" else self.wall

    @property
    def of_limit(self) -> float:
        """Share of our time that the physical limit would take."""
        return self.limit_seconds / _median(self.ours[self.clock])

    def reached(self) -> list[tuple[str, bool]]:
        """Each target of the case in words, and whether it is reached; a wrong answer reaches none."""
        found = []
        if self.case.faster is not None:
            reached = self.agrees and self.ratio.medians >= self.case.faster
            found.append((f"≥ {self.case.faster:.3g}×", reached))
        if self.case.leaner is not None and self.extra_bytes is not None:
            mine, other = self.extra_bytes
            reached = self.agrees and mine * self.case.leaner <= other
            found.append((f"memory ≤ 1/{self.case.leaner:.3g}", reached))
        if self.case.near_limit is not None:
            reached = self.agrees and self.of_limit >= self.case.near_limit
            found.append((f"≥ {self.case.near_limit:.0%} of limit", reached))
        if self.case.pause is not None and self.longest is not None:
            reached = self.agrees and self.longest[0] <= self.case.pause
            found.append((f"longest ≤ {self.case.pause * 1e3:g} ms", reached))
        return found

    def cells(self) -> list[str]:
        """What the table shows."""
        if self.extra_bytes is None:
            memory = ""
        else:
            mine, other = (value / MIB for value in self.extra_bytes)
            memory = f"{mine:.1f} / {other:.1f}"
            if min(mine, other) > 0:
                memory += f" = 1/{other / mine:.1f}"
        if self.recall is None:
            difference = f"{self.largest_difference:.0e}"
        else:
            difference = f"recall {self.recall[0]:.3f} / {self.recall[1]:.3f}"
        targets = [f"{words} {'reached' if done else 'NOT reached'}" for words, done in self.reached()]
        return [
            self.case.name,
            str(self.threads),
            f"{_milliseconds(self.ours[self.clock])}",
            f"{_milliseconds(self.theirs[self.clock])}",
            f"{self.ratio.medians:.1f}× ({self.ratio.low:.1f} to {self.ratio.high:.1f})",
            memory,
            f"{self.limit_seconds * 1e3:.3g} ({self.bound_by})",
            f"{self.of_limit:.0%}",
            difference + ("" if self.agrees else " WRONG"),
            "" if self.longest is None else " / ".join(f"{one * 1e3:.3g}" for one in self.longest),
            "" if self.others is None else f"{self.others:.0%}",
            "; ".join(targets),
        ]

    def record(self) -> dict[str, Any]:
        """Everything that was measured, as JSON."""
        found = asdict(self)
        found["case"]["file"] = self.case.file.name
        found["ratio"] = self.ratio.medians
        found["of_limit"] = self.of_limit
        found["targets"] = dict(self.reached())
        return plain(found)


HEADINGS = (
    "case",
    "threads",
    "ours ms",
    "theirs ms",
    "faster (80 % of pairs)",
    "extra MiB ours / theirs",
    "limit ms",
    "of limit",
    "difference",
    "longest ms ours / theirs",
    "others",
    "target",
)


def make_row(outcome: Outcome, limits: Limits) -> Row:
    """The row of `outcome` for as many threads as `limits` was measured with."""
    ours, theirs = outcome.times[limits.threads]
    clock = "cpu" if limits.threads == 1 else "wall"
    product = outcome.products.get(limits.threads)
    if product is not None:
        rate = MatrixProduct.operations / _median(asdict(product)[clock])
        limits = replace(limits, operations_per_second=rate)
    first = limits.threads == next(iter(outcome.times))
    return Row(
        case=outcome.case,
        threads=limits.threads,
        clock=clock,
        ours=asdict(ours),
        theirs=asdict(theirs),
        cpu=ratio(ours.cpu, theirs.cpu),
        wall=ratio(ours.wall, theirs.wall),
        extra_bytes=outcome.extra_bytes if first else None,
        memory_method=outcome.memory_method,
        largest_difference=outcome.agreement.largest,
        stray_rows=outcome.agreement.stray_rows,
        agrees=outcome.agreement.agrees,
        limit_seconds=limits.seconds(outcome.case.work),
        bound_by=limits.bound_by(outcome.case.work),
        others=outcome.others[limits.threads],
        recall=outcome.agreement.recall,
        longest=(
            (outcome.longest[0][clock], outcome.longest[1][clock]) if outcome.longest and first else None
        ),
    )


def summary(rows: Sequence[Row]) -> str:
    """One sentence: targets reached, and whether the two sides agree."""
    targets = [done for row in rows for _, done in row.reached()]
    wrong = [row.case.name for row in rows if not row.agrees]
    text = f"{sum(targets)} of {len(targets)} targets reached" if targets else "no case here has a target"
    busy = sum(row.others is not None and row.others > BUSY for row in rows)
    if busy:
        text += f"; other programs were at work during {busy} of {len(rows)} rows (column others)"
    if wrong:
        text += f"; the sides DISAGREE on {', '.join(dict.fromkeys(wrong))}"
    return text


def markdown(run: dict[str, Any], rows: Sequence[Row], failed: Sequence[tuple[str, str]] = ()) -> str:
    """The table with how it was made, as Markdown."""
    lines = [
        "# Speed against the published packages",
        "",
        f"Made by `{run['command']}` on {run['time']}.",
        "",
        f"- processor: {run['versions']['cpu']}, {run['cores']} cores, load {run['load']} at the start",
        "- ours: " + _listed({name: run["versions"][name] for name in VERSIONS if name in run["versions"]}),
        "- theirs: " + _listed(run["peers"]),
    ]
    for count, rates in run["limits"].items():
        lines.append(
            f"- with {count} thread{'s' if int(count) > 1 else ''}: matrix product "
            f"{rates['gflops']:.0f} GFLOP/s, copy {rates['copy_gb']:.1f} GB/s"
        )
    methods = sorted({row.memory_method for row in rows})
    lines += [
        "",
        "Both sides take turns in one run, each in its own process. Times are medians: CPU time with one "
        "thread, wall time with more. *Faster* is theirs over ours, with the range of the middle 80 % of the "
        "pairs of neighbouring turns. *Extra* is the peak resident memory of the first two steps above that "
        f"after set-up, in a fresh process ({', '.join(methods)}). *Limit* is the time that the operations "
        "and bytes which no version can avoid would take at the rates measured in this run, and *of limit* "
        "how much of our time that is; where it is a target, the matrix product takes turns with the sides. "
        "*Difference* is the largest one between the two sides' outputs and gradients, as a share of the "
        "largest value; for a search it is the recall of each side. *Longest* is the longest of many steps "
        "timed one by one. *Others* is how much of the machine other programs took meanwhile: with several "
        "threads, a row where it is not small says little.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    notes = {row.case.name: row.case.note for row in rows if row.case.note}
    if notes:
        lines += ["", *(f"- {name}: {note}" for name, note in notes.items())]
    if failed:
        lines += ["", *(f"- {name} FAILED: {reason.splitlines()[0]}" for name, reason in failed)]
    return "\n".join([*lines, "", summary(rows) + ".", ""])


def _describe_run(peers: dict[str, str | None], limits: dict[int, Limits]) -> dict[str, Any]:
    try:
        load = f"{os.getloadavg()[0]:.2f}"
    except (OSError, AttributeError):
        load = "unknown"
    program, *arguments = sys.argv
    name = Path(program).name
    return {
        "command": shlex.join(["memory-bench" if name in ("cli.py", "__main__.py") else name, *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "peers": peers,
        "cores": os.cpu_count(),
        "load": load,
        "limits": {
            count: {
                "gflops": found.operations_per_second / 1e9,
                "copy_gb": found.copy_bytes_per_second / 1e9,
            }
            for count, found in limits.items()
        },
    }


def _peer_versions(python: Path, packages: list[str]) -> dict[str, str | None]:
    with Process(python, timeout=120) as process:
        found: dict[str, str | None] = process.ask("versions", packages=packages)
    missing = [package for package in packages if found[package] is None]
    if missing:
        raise PeersMissingError(f"{python} lacks {', '.join(missing)}: run `make peers` again")
    return found


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(plain(record), separators=(",", ":")) + "\n")


def _print_table(console: Any, rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    longest = max(len(row.case.name) for row in rows)
    for heading in HEADINGS:
        table.add_column(
            heading,
            justify="left" if heading in ("case", "target") else "right",
            min_width=longest if heading == "case" else None,
        )
    for row in rows:
        style = None if row.agrees and all(done for _, done in row.reached()) else "red"
        table.add_row(*row.cells(), style=style)
    console.print(table)


def _listed(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _median(values: Sequence[float]) -> float:
    return max(statistics.median(values), 1e-9)


def _milliseconds(values: Sequence[float]) -> str:
    return f"{_median(values) * 1e3:.3g}"
