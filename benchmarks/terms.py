"""On what terms models are compared: the settings of each, made equal and tuned in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.extrapolation import training_assignments
from benchmarks.match import match
from benchmarks.results import Record, Results
from benchmarks.settings import RunSpec, plan
from benchmarks.tuning import choose, note_trials, plan_trials, summary


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the runs of a comparison are made with.

    Attributes:
        task: its name.
        smoke: tiny sizes and few steps.
        assignments: by model, the name as on the command line, settings as for `--set`.
        match: what was made equal, for the report; None: nothing.
        tuning: how the learning rates were chosen, for the report; None: they were not.
    """

    task: str
    smoke: bool
    assignments: Mapping[str, Sequence[str]]
    match: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, task: str, models: Sequence[str], assignments: Sequence[str], *, smoke: bool = False
    ) -> Terms:
        """The settings, with the same assignments for all models."""
        return cls(task=task, smoke=smoke, assignments={model: list(assignments) for model in models})

    def specs(self, seed: int = 0) -> list[RunSpec]:
        """A run for each model."""
        return [
            plan(model, self.task, seed, smoke=self.smoke, assignments=chosen)
            for model, chosen in self.assignments.items()
        ]

    def with_room(self, factors: Sequence[int]) -> Terms:
        """The same, the task being such that its sequences can be `factors` times longer.

        Raises:
            ValueError: as `training_assignments`.
        """
        more = training_assignments(self.task, factors, self.specs()[0].task_options)
        return self._adding(dict.fromkeys(self.assignments, more))

    def _adding(self, more: Mapping[str, Sequence[str]]) -> Terms:
        # The user's own words come last, and stand; only what was searched for comes after them.
        return dataclasses.replace(
            self, assignments={model: [*own, *more[model]] for model, own in self.assignments.items()}
        )


def make_equal(terms: Terms, by: str, *, to: str | None = None) -> Terms:
    """Give all models equally many parameters, or equally large memories (see `match`).

    Args:
        terms: the settings so far.
        by: `params` or `state`.
        to: a model's name, or a number as text; None: as `match` chooses.

    Raises:
        LookupError: if there is no such model.
        ValueError: as `match`.
    """
    reference: RunSpec | int | None = None
    if to is not None and to.replace("_", "").isdigit():
        reference = int(to)
    elif to is not None:
        given = next((spec for spec in terms.specs() if spec.label == to), None)
        reference = given or plan(to, terms.task, 0, smoke=terms.smoke)
    found = match(terms.specs(), by, reference=reference)
    equal = terms._adding({model: one.assignments for model, one in found.models.items()})
    return dataclasses.replace(equal, match=found.to_json())


def tune(
    terms: Terms,
    results: Results,
    do: Callable[[Sequence[RunSpec]], Sequence[Record]],
    *,
    grid: Sequence[float],
    seed: int,
    steps: int | None = None,
) -> Terms:
    """Choose each model's learning rate by trials (see `benchmarks.tuning`).

    Args:
        terms: the settings so far.
        results: where the trials are noted.
        do: does runs and gives their last lines.
        grid: learning rates.
        seed: seed of the trials.
        steps: their steps; None: as many as a reported run.

    Raises:
        LookupError, TypeError, ValueError: as `plan_trials`.
    """
    trials = plan_trials(terms.task, grid, seed, terms.assignments, steps=steps, smoke=terms.smoke)
    note_trials(trials, results)
    records = {record["id"]: record for record in do([trial.spec for trial in trials])}
    choices = choose(trials, records)
    tuned = terms._adding({model: choice.assignments for model, choice in choices.items()})
    return dataclasses.replace(tuned, tuning=summary(choices, trials, seed=seed, steps=steps))
