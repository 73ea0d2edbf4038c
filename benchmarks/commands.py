"""What the commands of `memory-bench` do; `benchmarks.cli` has their options."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.endings import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK

if TYPE_CHECKING:
    from benchmarks.cli import CommonOptions, Compare, List, Report, Run, Study, Sweep
    from benchmarks.results import Results
    from benchmarks.settings import RunSpec
    from benchmarks.summary import Comparison
    from benchmarks.sweep import SweepPlan
    from benchmarks.sweep_summary import Sweep as SweepOfRuns
    from benchmarks.train import Progress


class UsageError(Exception):
    """Something that the user can put right; the message says how."""


def list_command(command: List, words: Sequence[str]) -> int:
    """Print the models and tasks."""
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    if command.what in ("all", "models"):
        from benchmarks.members import all_models, shown

        table = Table("model", "kind", "what it is", "what it carries", title="models", title_justify="left")
        for name in all_models():
            table.add_row(name, *map(escape, shown(name)))
        console.print(table)
    if command.what in ("all", "tasks"):
        from benchmarks.task import tasks

        table = Table("task", "what it is", title="tasks", title_justify="left")
        for name in tasks.names():
            table.add_row(name, tasks.load(name).summary)
        console.print(table)
    return EXIT_OK


def run_command(command: Run, words: Sequence[str]) -> int:
    """One run in this process."""
    from benchmarks.progress import display_for
    from benchmarks.results import FINISHED, Results, RunBusyError
    from benchmarks.train import run
    from benchmarks.worker import stop_on_signal, wait_until_free

    [spec] = _plan(command, {command.model: command.assignments()}, [command.seed])
    results = Results(command.folder())
    record: Any
    if results.is_finished(spec.id):
        print(f"run {spec.id} is finished already; its figures:")
        record = results.latest()[spec.id]
    else:
        display = display_for()
        title = f"{spec.label} seed {spec.seed}"
        display.start(total=1, done=0)
        display.job_started(title)

        def show(progress: Progress) -> None:
            display.job_progress(title, dataclasses.asdict(progress))
            display.time_left((progress.steps - progress.step) / progress.rate if progress.rate else None)

        try:
            with stop_on_signal() as stopped:
                record = None
                while record is None and not stopped():
                    try:
                        record = run(
                            spec,
                            results,
                            stopped=stopped,
                            progress=show,
                            checkpoint_seconds=command.checkpoint_seconds,
                        )
                    except RunBusyError:
                        display.job_waiting(title)
                        wait_until_free(results, spec.id, stopped)
            if record is not None:
                display.job_ended(title, record)
        finally:
            display.stop()
    if record is None:
        _say_how_to_go_on("Stopped; the run is saved.", words)
        return EXIT_INTERRUPTED
    if record["status"] != FINISHED:
        return EXIT_FAILED
    for name, value in record["scores"].items():
        print(f"  {name}: {'none' if value is None else f'{value:.4f}'}")
    print(f"kept in {results.folder} as run {spec.id}")
    return EXIT_OK


def compare_command(command: Compare, words: Sequence[str]) -> int:
    """The same terms for all, several runs, then the report."""
    from benchmarks.results import Results

    # Before the work, not after it: a plot that cannot be drawn is no way to end an hour's training.
    importlib.import_module("benchmarks.plots")
    _check_jobs(command.jobs)
    for name, given, needed in (
        ("--match-to", command.match_to is not None, "match"),
        ("--tune-steps", command.tune_steps is not None, "tune"),
    ):
        if given and not getattr(command, needed):
            raise UsageError(f"{name} does nothing without --{needed}; give both or neither")
    if command.tune and command.tune_seed in command.seeds:
        raise UsageError(f"--tune-seed {command.tune_seed} is reported too; choose another")
    models = _models(command.models)
    # What is wrong with the settings is best said first.
    assignments = {model: command.assignments() for model in models}
    specs = _plan(command, assignments, command.seeds)
    if not command.no_controls:
        added = _missing_controls(command, models)
        assignments |= added
        specs += _plan(command, added, command.seeds) if added else []
    terms = [command.match, command.match_to, command.tune, command.tune_seed, command.tune_steps]
    purpose = [[[spec.label, spec.id] for spec in specs], *terms, command.extrapolate]
    results = Results(command.folder())
    with results.hold("comparison", purpose):
        return _compare(command, assignments, results, words)


def _compare(
    command: Compare, assignments: Mapping[str, Sequence[str]], results: Results, words: Sequence[str]
) -> int:
    from benchmarks.compare import InterruptedComparison, compare, write_comparison
    from benchmarks.extrapolation import longer_points, to_json
    from benchmarks.fanout import launcher
    from benchmarks.progress import display_for
    from benchmarks.results import FINISHED
    from benchmarks.settings import plan
    from benchmarks.terms import Terms, make_equal, tune

    planned: list[RunSpec] = []

    def do(specs: Sequence[RunSpec]) -> list[Any]:
        planned.extend(spec for spec in specs if spec not in planned)
        return compare(
            specs,
            results,
            jobs=command.jobs,
            display=display_for(),
            checkpoint_seconds=command.checkpoint_seconds,
            launch=launch,
        )

    with launcher(command.on, command.jobs) as launch:
        try:
            with _wrong_use():
                terms = Terms(task=command.task, smoke=command.smoke, assignments=assignments)
                if command.extrapolate:
                    terms = terms.with_room(command.extrapolate)
                if command.match:
                    terms = make_equal(terms, command.match, to=command.match_to)
                if command.tune:
                    terms = tune(
                        terms,
                        results,
                        do,
                        grid=command.tune,
                        seed=command.tune_seed,
                        steps=command.tune_steps,
                    )
                specs = [
                    plan(model, command.task, seed, smoke=command.smoke, assignments=terms.assignments[model])
                    for model in assignments
                    for seed in dict.fromkeys(command.seeds)
                ]
                points = longer_points(specs, command.extrapolate) if command.extrapolate else []
            write_comparison(
                specs,
                results,
                shlex.join(["memory-bench", *words]),
                match=terms.match,
                tuning=terms.tuning,
                longer=to_json(points),
            )
            records = do(specs)
            trained = {record["id"] for record in records if record["status"] == FINISHED}
            able = [p.spec for p in points if p.spec.trained is not None and p.spec.trained.id in trained]
            records += do(able) if able else []
        except InterruptedComparison:
            latest = results.latest()
            done = sum(latest.get(spec.id, {}).get("status") == FINISHED for spec in planned)
            _say_how_to_go_on(
                f"Stopped; {done} of {len(planned)} runs are finished, the others saved.", words
            )
            return EXIT_INTERRUPTED
    _report(results.folder, results.folder, command.interval)
    return EXIT_OK if all(record["status"] == FINISHED for record in records) else EXIT_FAILED


def sweep_command(command: Sweep, words: Sequence[str]) -> int:
    """Runs over the values of options, then the report."""
    from benchmarks.results import Results
    from benchmarks.sweep import plan_sweep

    # Before the work, as in a comparison.
    importlib.import_module("benchmarks.plots")
    _check_jobs(command.jobs)
    with _wrong_use():
        plan = plan_sweep(
            command.model,
            command.task,
            list(itertools.chain(*command.vary)),
            command.seeds,
            mode=command.mode,
            smoke=command.smoke,
            assignments=command.assignments(),
        )
    results = Results(command.folder())
    with results.hold("sweep", [[point.spec.label, point.spec.id, point.place] for point in plan.points]):
        return _sweep(command, plan, results, words)


def _sweep(command: Sweep, plan: SweepPlan, results: Results, words: Sequence[str]) -> int:
    from benchmarks.compare import InterruptedComparison
    from benchmarks.progress import display_for
    from benchmarks.results import FINISHED
    from benchmarks.sweep import run_sweep, write_sweep

    write_sweep(plan, results, shlex.join(["memory-bench", *words]))
    specs = [*plan.trainings, *plan.evaluations]
    try:
        records = run_sweep(
            plan,
            results,
            jobs=command.jobs,
            display=display_for,
            checkpoint_seconds=command.checkpoint_seconds,
        )
    except InterruptedComparison:
        latest = results.latest()
        done = sum(latest.get(spec.id, {}).get("status") == FINISHED for spec in specs)
        _say_how_to_go_on(f"Stopped; {done} of {len(specs)} runs are finished, the others saved.", words)
        return EXIT_INTERRUPTED
    _report_sweep(results.folder, results.folder, command.interval)
    well = len(records) == len(specs) and all(record["status"] == FINISHED for record in records)
    return EXIT_OK if well else EXIT_FAILED


def report_command(command: Report, words: Sequence[str]) -> int:
    """The report of results that are there."""
    from benchmarks.results import Results

    results, out = Results(command.folder), command.out or command.folder
    if results.sweep.exists():
        _report_sweep(results.folder, out, command.interval)
    if results.comparison.exists() or not results.sweep.exists():
        _report(results.folder, out, command.interval)
    return EXIT_OK


def study_command(command: Study, words: Sequence[str], *, main: Callable[[Sequence[str]], int]) -> int:
    """Every part of the published comparison that is not done, by `main`; then the document."""
    from benchmarks.study import parts, run_study

    _check_jobs(command.jobs)
    with _wrong_use():
        chosen = parts(
            only=command.only,
            seeds=command.seeds,
            jobs=command.jobs,
            on=command.on,
            smoke=command.smoke,
            steps_scale=command.steps_scale,
            work=command.work,
        )
    if command.list:
        for part in chosen:
            print(f"{part.name}: {part.title}")
            print(f"  {shlex.join(['memory-bench', *part.command])}")
        return EXIT_OK
    code = run_study(chosen, main, publish=command.publish, document=command.document)
    if code == EXIT_INTERRUPTED:
        _say_how_to_go_on("The study stopped.", words)
    return code


def _check_jobs(jobs: int) -> None:
    if jobs < 1:
        raise UsageError(f"--jobs {jobs} must be at least 1")


def _missing_controls(command: Compare, models: Sequence[str]) -> dict[str, list[str]]:
    """The controls that no row is of, each with the settings that it has; says so."""
    from benchmarks.members import controls
    from benchmarks.settings import applicable

    there = {model.split()[0] for model in models}
    given = command.assignments()
    added = {name: applicable(name, command.task, given) for name in controls() if name not in there}
    if added:
        print(f"controls added: {', '.join(added)} (--no-controls leaves them out)")
    for name, chosen in added.items():
        without = [text for text in given if text not in chosen]
        if without:
            print(f"  {name} without {' '.join(without)}, which it does not have")
    return added


def _plan(
    command: CommonOptions, assignments: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> list[RunSpec]:
    from benchmarks.settings import plan

    with _wrong_use():
        specs = [
            plan(model, command.task, seed, smoke=command.smoke, assignments=chosen)
            for model, chosen in assignments.items()
            for seed in dict.fromkeys(seeds)
        ]
    if not specs:
        raise UsageError("nothing to do: give at least one model and one seed")
    return specs


@contextlib.contextmanager
def _wrong_use() -> Iterator[None]:
    """What a plan refuses is the user's to put right."""
    try:
        yield
    except LookupError as error:
        # A KeyError prints its message in quotes.
        raise UsageError(error.args[0] if error.args else error) from error
    except (TypeError, ValueError) as error:
        raise UsageError(error) from error


def _models(names: Sequence[str]) -> list[str]:
    from benchmarks.members import all_models

    found: list[str] = []
    for name in names:
        found += all_models() if name == "all" else [name]
    return list(dict.fromkeys(found))


def _report(folder: Path, out: Path, interval: str) -> None:
    from benchmarks.report import write_report
    from benchmarks.summary import NothingToReportError, load

    try:
        comparison = load(folder, interval=interval)
    except NothingToReportError as error:
        raise UsageError(error) from error
    files = write_report(comparison, out)
    _show(comparison)
    print("written: " + ", ".join(str(path) for path in files))


def _report_sweep(folder: Path, out: Path, interval: str) -> None:
    from benchmarks.report import main_metrics
    from benchmarks.summary import NothingToReportError
    from benchmarks.sweep_report import sweep_table, write_sweep_report
    from benchmarks.sweep_summary import load_sweep

    try:
        sweep = _with_interval(load_sweep(folder), interval)
    except NothingToReportError as error:
        raise UsageError(error) from error
    files = write_sweep_report(sweep, out)
    bad = {index for index, line in enumerate(sweep.lines) if line.row.status}
    _print_tables(functools.partial(sweep_table, sweep), main_metrics(sweep.runs), sweep.title, bad)
    _print_failures(sweep.runs)
    print("written: " + ", ".join(str(path) for path in files))


def _with_interval(sweep: SweepOfRuns, interval: str) -> SweepOfRuns:
    from benchmarks.summary import with_interval

    lines = [
        dataclasses.replace(line, row=dataclasses.replace(line.row, interval=interval))
        for line in sweep.lines
    ]
    return dataclasses.replace(sweep, lines=tuple(lines), runs=with_interval(sweep.runs, interval))


def _show(comparison: Comparison) -> None:
    from benchmarks.report import main_metrics, table

    bad = {index for index, row in enumerate(comparison.rows) if row.status}
    _print_tables(
        functools.partial(table, comparison), main_metrics(comparison), comparison.task, bad, first_width=16
    )
    _print_failures(comparison)


def _print_tables(
    make: Callable[..., list[list[str]]],
    metrics: Sequence[Mapping[str, Any]],
    title: str,
    bad: Collection[int],
    *,
    first_width: int | None = None,
) -> None:
    """Print `make(metrics=..., costs=...)`, the lines numbered in `bad` in red."""
    from rich.table import Table

    console = _console()
    parts = [make(metrics=metrics, costs=True)]
    widths = [max(map(len, column)) for column in zip(*parts[0], strict=True)]
    if sum(widths) + 3 * len(widths) > console.width:
        # Two tables that fit rather than one that folds every cell.
        parts = [make(metrics=part, costs=not part) for part in (metrics, [])]
    for header, *body in parts:
        shown = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            shown.add_column(
                name,
                justify="right" if index else "left",
                overflow="fold",
                min_width=None if index else first_width,
            )
        for number, line in enumerate(body):
            shown.add_row(*line, style="red" if number in bad else None)
        console.print(shown)


def _print_failures(comparison: Comparison) -> None:
    from benchmarks.summary import run_name

    for record in comparison.failures:
        print(f"{run_name(record)} {record['status']}: {record.get('error', '')}")


def _console() -> Any:
    from rich.console import Console

    # A file or a pipe has no width; a table cut at 80 columns would be of no use there.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _say_how_to_go_on(what: str, words: Sequence[str]) -> None:
    print(f"{what} Go on with:\n  {shlex.join(['memory-bench', *words])}")
