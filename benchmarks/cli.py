"""The command `memory-bench`: list, run, compare, sweep, report, study, cost, speed, train, generate."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.commands import (
    UsageError,
    compare_command,
    list_command,
    report_command,
    run_command,
    study_command,
    sweep_command,
)
from benchmarks.endings import EXIT_BUSY, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from benchmarks.results import FolderBusyError

try:
    import rich  # noqa: F401
    import tyro
    from tyro.conf import Positional
except ImportError as error:
    raise SystemExit(
        f"memory-bench needs more packages than the library: pip install 'memory-models[bench]' ({error})"
    ) from error


@dataclass(frozen=True, kw_only=True)
class List:
    """What there is: models and tasks."""

    what: Positional[Literal["all", "models", "tasks"]] = "all"
    """Which of them."""


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
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
class Run(CommonOptions):
    """Train and evaluate one model on one task, here and now."""

    model: str
    """Name of the model, as `memory-bench list` shows it, or package.module:Class."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""


@dataclass(frozen=True, kw_only=True)
class Compare(CommonOptions):
    """Train and evaluate several models on one task under the same budget; table, plots and report."""

    models: tuple[str, ...] = ("all",)
    """Names of models; all is every family and control. One with settings of its own is a row of its own, in
    quotes: 'memformer gradient=replay'."""
    no_controls: bool = False
    """Leave out the controls that are not named: without them the table says little of the memories."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; three or more give intervals."""
    jobs: int = 2
    """Runs at once, each a process with one thread."""
    on: Literal["local", "ray"] = "local"
    """Where: processes here, or tasks of Ray, which is started here unless RAY_ADDRESS names a cluster."""
    match: Literal["params", "state"] | None = None
    """Give all models equally many parameters, or equally large memories, by a search over a width."""
    match_to: str | None = None
    """Model, or number, that the others shall match; default the smallest (state: but for controls)."""
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
class Sweep(CommonOptions):
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
    """Run the command; returns the exit code: 1 if a run failed, 2 for wrong use, 3 if another
    command is at work in the folder, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
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
        return _ACTIONS[type(command)](command, words)
    except (UsageError, ImportError) as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    except FolderBusyError as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return EXIT_BUSY
    except OSError as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


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
    Study: functools.partial(study_command, main=main),
}


if __name__ == "__main__":
    sys.exit(main())
