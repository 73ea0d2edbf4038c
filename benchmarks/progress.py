"""What a comparison shows while it works: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import IO, Any, Protocol

from benchmarks.results import FINISHED, Record

LINE_SECONDS = 30.0
WAITING = "another process is at work on it; waiting"


class Display(Protocol):
    """Told of everything that happens in a comparison."""

    def start(self, *, total: int, done: int) -> None:
        """`total` runs, of which `done` were finished before."""

    def job_started(self, title: str) -> None:
        """A run begins."""

    def job_progress(self, title: str, progress: dict[str, Any]) -> None:
        """A run goes on; `progress` as in `benchmarks.train.Progress`, empty at first."""

    def job_waiting(self, title: str) -> None:
        """A run that began is done by another process, which is waited for; told again and again."""

    def job_ended(self, title: str, record: Record) -> None:
        """A run ended, well or not."""

    def time_left(self, seconds: float | None) -> None:
        """For the whole comparison; None: not known yet."""

    def stop(self) -> None:
        """Nothing more comes."""


def display_for(stream: IO[str] | None = None) -> Display:
    """Bars if `stream` (standard output by default) is a terminal, lines otherwise."""
    stream = stream or sys.stdout
    return BarDisplay() if stream.isatty() else LineDisplay(stream)


class LineDisplay:
    """A line when something begins or ends, and one every half minute between."""

    def __init__(self, stream: IO[str], *, every: float = LINE_SECONDS) -> None:
        self._stream = stream
        self._every = every
        self._ended = self._total = 0
        self._last = time.monotonic()
        self._jobs: dict[str, dict[str, Any]] = {}
        self._waiting: set[str] = set()

    def start(self, *, total: int, done: int) -> None:
        self._total, self._ended = total, done
        skipped = f", {done} of them finished before" if done else ""
        self._say(f"{total} run{'' if total == 1 else 's'}{skipped}")

    def job_started(self, title: str) -> None:
        self._jobs[title] = {}
        self._say(f"{title}: started")

    def job_progress(self, title: str, progress: dict[str, Any]) -> None:
        self._jobs[title] = progress

    def job_waiting(self, title: str) -> None:
        if title not in self._waiting:
            self._waiting.add(title)
            self._say(f"{title}: {WAITING}")

    def job_ended(self, title: str, record: Record) -> None:
        self._jobs.pop(title, None)
        self._ended += 1
        self._say(f"{outcome(title, record)}  [{self._ended} of {self._total}]")

    def time_left(self, seconds: float | None) -> None:
        if time.monotonic() - self._last < self._every:
            return
        states = [
            f"{title} {p['step']}/{p['steps']} ({p['rate']:.1f} steps/s)"
            for title, p in self._jobs.items()
            if p
        ]
        self._say(f"{', '.join(states) or 'starting'}; {duration(seconds)} left")

    def stop(self) -> None:
        self._stream.flush()

    def _say(self, line: str) -> None:
        self._last = time.monotonic()
        print(line, file=self._stream, flush=True)


class BarDisplay:
    """A bar for the comparison and one for each run under way."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[figures]}", style="dim"),
        )
        self._all: Any = None
        self._jobs: dict[str, Any] = {}
        self._ended = self._total = 0

    def start(self, *, total: int, done: int) -> None:
        self._total, self._ended = total, done
        self._bars.start()
        self._all = self._bars.add_task("[bold]all runs", total=total, completed=done, figures="")

    def job_started(self, title: str) -> None:
        self._jobs[title] = self._bars.add_task(title, total=None, figures="starting")

    def job_progress(self, title: str, progress: dict[str, Any]) -> None:
        if not progress:
            return
        figures = f"{progress['step']}/{progress['steps']}  {progress['rate']:.1f} steps/s"
        if progress["phase"] != "training":
            figures = progress["phase"]
        elif progress["loss"] is not None:
            figures += f"  loss {progress['loss']:.3f}"
        self._bars.update(
            self._jobs[title], total=progress["steps"], completed=progress["step"], figures=figures
        )

    def job_waiting(self, title: str) -> None:
        self._bars.update(self._jobs[title], figures=WAITING)

    def job_ended(self, title: str, record: Record) -> None:
        self._bars.remove_task(self._jobs.pop(title))
        self._ended += 1
        style = "green" if record["status"] == FINISHED else "bold red"
        self._bars.console.print(outcome(title, record), style=style, highlight=False, markup=False)
        self._bars.update(self._all, completed=self._ended)

    def time_left(self, seconds: float | None) -> None:
        figures = f"{self._ended}/{self._total}  {duration(seconds)} left"
        self._bars.update(self._all, figures=figures)

    def stop(self) -> None:
        self._bars.stop()


def outcome(title: str, record: Record) -> str:
    """One line on how a run ended; the worker's last words if it died."""
    if record["status"] != FINISHED:
        words = "".join(f"\n    {line}" for line in record.get("stderr", []))
        return f"{title}: {record['status'].upper()}: {record.get('error', '')}{words}"
    if "task_facts" not in record:
        return title
    headline = record["task_facts"]["headline"]
    seconds = record["seconds"]["training"] + record["seconds"]["evaluation"]
    score = record["scores"].get(headline)
    shown = "none" if score is None else f"{score:.3f}"
    return f"{title}: {headline} {shown} after {duration(seconds)}"


def duration(seconds: float | None) -> str:
    """`95` as `1 min 35 s`; `?` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
