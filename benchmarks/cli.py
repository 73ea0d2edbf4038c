"""The command `memory-bench`: list, run, compare, sweep, report, study, cost, speed, train, generate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import logging
import operator
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from benchmarks.settings import RunSpec
    from benchmarks.summary import Comparison
    from benchmarks.sweep_summary import Sweep as SweepOfRuns
    from benchmarks.train import Progress

EXIT_OK, EXIT_FAILED_RUN, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

try:
    import rich  # noqa: F401
    import tyro
    from tyro.conf import Positional
except ImportError as error:
    raise SystemExit(
        f"memory-bench needs more packages than the library: pip install 'memory-models[bench]' ({error})"
    ) from error


class UsageError(Exception):
    """Something that the user can put right; the message says how."""


@dataclass(frozen=True, kw_only=True)
class List:
    """What there is: models and tasks."""

    what: Positional[Literal["all", "models", "tasks"]] = "all"
    """Which of them."""


@dataclass(frozen=True, kw_only=True)
class _Common:
    task: str
    """Name of the task, as `memory-bench list` shows it, or package.module:Class."""
    steps: int | None = None
    """Optimiser steps, in place of the task's usual number."""
    set: tuple[str, ...] = ()
    """Settings as key=value: of the training, the task or the model (train.KEY, task.KEY, model.KEY)."""
    data: str | None = None
    """File, folder or .gz that the task shall read, for tasks on real data."""
    smoke: bool = False
    """Tiny sizes and few steps: the whole way in seconds, to see that it works."""
    out: Path | None = None
    """Folder for the results; default results/TASK. The same folder goes on where it was interrupted."""

    checkpoint_seconds: float = 20.0
    """Most seconds of work that an interruption may cost."""

    def assignments(self) -> list[str]:
        """All settings in the form of `--set`."""
        extra = [] if self.steps is None else [f"train.steps={self.steps}"]
        if self.data is not None:
            extra.append(f"task.data={self.data!r}")
        return [*extra, *self.set]

    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("results") / self.task.replace(":", ".")


@dataclass(frozen=True, kw_only=True)
class Run(_Common):
    """Train and evaluate one model on one task, here and now."""

    model: str
    """Name of the model, as `memory-bench list` shows it, or package.module:Class."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""


@dataclass(frozen=True, kw_only=True)
class Compare(_Common):
    """Train and evaluate several models on one task under the same budget; table, plots and report."""

    models: tuple[str, ...] = ("all",)
    """Names of models; all is every family and every control."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; three or more give intervals."""
    jobs: int = 2
    """Runs at once, each a process with one thread."""
    on: Literal["local", "ray"] = "local"
    """Where: processes here, or tasks of Ray, which is started here unless RAY_ADDRESS names a cluster."""
    match: Literal["params", "state"] | None = None
    """Give all models equally many parameters, or equally large memories, by a search over a width."""
    match_to: str | None = None
    """Model, or number, that the others shall match; default the smallest (state: the smallest family's)."""
    tune: tuple[float, ...] = ()
    """Learning rates to try for every model before its reported runs; the best is taken."""
    tune_seed: int = 1000
    """Seed of the runs that try them; they are not reported."""
    tune_steps: int | None = None
    """Their optimiser steps; default as many as in a reported run."""
    extrapolate: tuple[int, ...] = ()
    """Evaluate the trained models on sequences of so many times the segments too, as in 2 4 8 16."""
    interval: Literal["bootstrap", "t"] = "bootstrap"
    """95 % interval to show: percentile bootstrap over the seeds, or Student's t."""


@dataclass(frozen=True, kw_only=True)
class Sweep(_Common):
    """One model over the values of options: a curve, a grid or an ablation, as table, pictures and report."""

    model: str
    """Name of the model, as `memory-bench list` shows it, or package.module:Class."""
    vary: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
    """Options and their values, as in memories=0,64,256; the first runs along the axis, others give lines."""
    mode: Literal["train", "evaluate", "both"] = "train"
    """Train a model with each value, evaluate one trained model with each, or both."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; three or more give intervals."""
    jobs: int = 2
    """Runs at once, each a process with one thread."""
    interval: Literal["bootstrap", "t"] = "bootstrap"
    """95 % interval to show: percentile bootstrap over the seeds, or Student's t."""
    out: Path | None = None
    """Folder for the results; default results/sweep/TASK-MODEL-OPTIONS. That of a comparison shares runs."""

    def folder(self) -> Path:
        """Where the results go: a folder for what is varied."""
        names = [text.partition("=")[0].rpartition(".")[2] for text in itertools.chain(*self.vary)]
        parts = [self.task.replace(":", "."), self.model.replace(":", "."), *names]
        return self.out or Path("results") / "sweep" / "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Table and plots from results that are there: of the last sweep and the last comparison, or of all."""

    folder: Positional[Path]
    """Folder of the results, such as results/recall."""
    out: Path | None = None
    """Folder to write to; default the folder of the results."""
    interval: Literal["bootstrap", "t"] = "bootstrap"
    """95 % interval to show: percentile bootstrap over the seeds, or Student's t."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The whole published comparison: tasks, sweeps, lengths, costs. Hours; stopped and gone on at will."""

    only: tuple[str, ...] = ()
    """Parts to do, by name; default all of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every run."""
    steps_scale: float = 1.0
    """Share of the usual optimiser steps, for a quick look; what it finds is not comparable."""
    jobs: int = 2
    """Runs at once, each a process with one thread."""
    on: Literal["local", "ray"] = "local"
    """Where: processes here, or tasks of Ray."""
    smoke: bool = False
    """Tiny sizes and few steps, to see that everything runs."""
    list: bool = False
    """Only say which parts there are, and with which commands."""
    work: Path = Path("results/study")
    """Folder for the runs, with weights and checkpoints."""
    publish: Path = Path("benchmarks/results")
    """Folder for what is published: tables, pictures and results.jsonl of each part."""
    document: Path = Path("docs/RESULTS.md")
    """Document whose tables, between its markers, are written anew."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time, memory, state and operations against length (memory-bench cost --help tells more)."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Time our modules against the published packages (memory-bench speed --help tells more)."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model on your own text (memory-bench train --help tells more)."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Go on from a prompt with a trained model (memory-bench generate --help tells more)."""


_APART = {
    "cost": "benchmarks.cost.command",
    "speed": "benchmarks.speed.command",
    "train": "benchmarks.training.command",
    "generate": "benchmarks.training.generate_command",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 if a run failed, 2 for wrong use, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if words and words[0] in _APART:
        # They have options of their own; only here are they looked at.
        return importlib.import_module(_APART[words[0]]).main(words[1:]) or EXIT_OK
    # Without the pairs, a flag is --smoke and nothing else.
    command: Any = tyro.cli(
        _commands(),
        args=words,
        prog="memory-bench",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return _ACTIONS[type(command)](command, words)
    except (UsageError, ImportError) as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return EXIT_FAILED_RUN
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def list_command(command: List, words: Sequence[str]) -> int:
    """Print the models and tasks."""
    from rich.table import Table

    console = _console()
    if command.what in ("all", "models"):
        from benchmarks.members import all_models
        from memory_models.models import info

        table = Table("model", "kind", "what it is", "what it carries", title="models", title_justify="left")
        for name in all_models():
            entry = info(name)
            table.add_row(name, ", ".join(entry.tags), entry.summary, entry.carries)
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
    from benchmarks.results import FINISHED, Results
    from benchmarks.train import run
    from benchmarks.worker import stop_on_signal

    [spec] = _plan(command, [command.model], [command.seed])
    results = Results(command.folder())
    record: Any
    if results.is_finished(spec.id):
        print(f"run {spec.id} is finished already; its figures:")
        record = results.latest()[spec.id]
    else:
        display = display_for()
        title = f"{spec.model} seed {spec.seed}"
        display.start(total=1, done=0)
        display.job_started(title)

        def show(progress: Progress) -> None:
            display.job_progress(title, dataclasses.asdict(progress))
            display.time_left((progress.steps - progress.step) / progress.rate if progress.rate else None)

        try:
            with stop_on_signal() as stopped:
                record = run(
                    spec,
                    results,
                    stopped=stopped,
                    progress=show,
                    checkpoint_seconds=command.checkpoint_seconds,
                )
            if record is not None:
                display.job_ended(title, record)
        finally:
            display.stop()
    if record is None:
        _say_how_to_go_on("Stopped; the run is saved.", words)
        return EXIT_INTERRUPTED
    if record["status"] != FINISHED:
        return EXIT_FAILED_RUN
    for name, value in record["scores"].items():
        print(f"  {name}: {'none' if value is None else f'{value:.4f}'}")
    print(f"kept in {results.folder} as run {spec.id}")
    return EXIT_OK


def compare_command(command: Compare, words: Sequence[str]) -> int:
    """The same terms for all, several runs, then the report."""
    from benchmarks.compare import InterruptedComparison, compare, write_comparison
    from benchmarks.extrapolation import longer_points, to_json
    from benchmarks.fanout import launcher
    from benchmarks.progress import display_for
    from benchmarks.results import FINISHED, Results
    from benchmarks.settings import plan
    from benchmarks.terms import Terms, make_equal, tune

    # Before the work, not after it: a plot that cannot be drawn is no way to end an hour's training.
    importlib.import_module("benchmarks.plots")
    if command.tune and command.tune_seed in command.seeds:
        raise UsageError(f"--tune-seed {command.tune_seed} is reported too; choose another")
    models = _models(command.models)
    # What is wrong with the settings is best said first.
    _plan(command, models, command.seeds)
    results = Results(command.folder())
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
                terms = Terms.of(command.task, models, command.assignments(), smoke=command.smoke)
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
                    for model in models
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
    return EXIT_OK if all(record["status"] == FINISHED for record in records) else EXIT_FAILED_RUN


def sweep_command(command: Sweep, words: Sequence[str]) -> int:
    """Runs over the values of options, then the report."""
    from benchmarks.compare import InterruptedComparison
    from benchmarks.progress import display_for
    from benchmarks.results import FINISHED, Results
    from benchmarks.sweep import plan_sweep, run_sweep, write_sweep

    # Before the work, as in a comparison.
    importlib.import_module("benchmarks.plots")
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
    return EXIT_OK if well else EXIT_FAILED_RUN


def report_command(command: Report, words: Sequence[str]) -> int:
    """The report of results that are there."""
    from benchmarks.results import Results

    results, out = Results(command.folder), command.out or command.folder
    if results.sweep.exists():
        _report_sweep(results.folder, out, command.interval)
    if results.comparison.exists() or not results.sweep.exists():
        _report(results.folder, out, command.interval)
    return EXIT_OK


def study_command(command: Study, words: Sequence[str]) -> int:
    """Every part of the published comparison that is not done, then the document."""
    from benchmarks.study import parts, run_study

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
            for line in part.commands:
                print(f"  {shlex.join(['memory-bench', *line])}")
        return EXIT_OK
    code = run_study(chosen, main, publish=command.publish, document=command.document)
    if code == EXIT_INTERRUPTED:
        _say_how_to_go_on("The study stopped.", words)
    return code


def _commands() -> Any:
    named = {
        "list": List,
        "run": Run,
        "compare": Compare,
        "sweep": Sweep,
        "report": Report,
        "study": Study,
        "cost": Cost,
        "speed": Speed,
        "train": Train,
        "generate": Generate,
    }
    kinds = [Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in named.items()]
    return functools.reduce(operator.or_, kinds)


_ACTIONS: dict[type, Any] = {
    List: list_command,
    Run: run_command,
    Compare: compare_command,
    Sweep: sweep_command,
    Report: report_command,
    Study: study_command,
}


def _plan(command: _Common, models: Sequence[str], seeds: Sequence[int]) -> list[RunSpec]:
    from benchmarks.settings import plan

    with _wrong_use():
        specs = [
            plan(model, command.task, seed, smoke=command.smoke, assignments=command.assignments())
            for model in models
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
    for record in comparison.failures:
        print(f"{record['model']} seed {record['seed']} {record['status']}: {record.get('error', '')}")


def _console() -> Any:
    from rich.console import Console

    # A file or a pipe has no width; a table cut at 80 columns would be of no use there.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _say_how_to_go_on(what: str, words: Sequence[str]) -> None:
    print(f"{what} Go on with:\n  {shlex.join(['memory-bench', *words])}")


if __name__ == "__main__":
    sys.exit(main())
