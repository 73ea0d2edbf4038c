"""Learning rates from a grid, on a seed that is not reported: the same search for every model.

The runs are like any other, kept in the results folder and gone on with after an interruption; `tuning.json`
names them, so that no report takes them for results. Rates are judged by the headline on the evaluation set,
as there is no other; what is reported has other weights and other training data, the same for all models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.results import FINISHED, Record, Results, read_json, write_json
from benchmarks.settings import RunSpec, plan


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that tries one rate."""

    model: str
    rate: float
    spec: RunSpec


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The rate chosen for one model.

    Attributes:
        model: its name.
        rate: the rate with the best score; None if no trial ended well.
        scores: the headline by rate; None for a trial that failed or diverged.
        edge: whether the rate is the smallest or the largest of several and better than all others, so that
            a better one may lie beyond.
    """

    model: str
    rate: float | None
    scores: Mapping[float, float | None] = field(default_factory=dict)
    edge: bool = False

    @property
    def assignments(self) -> list[str]:
        """As for `--set`; nothing if no rate was found, so that the one of the settings stands."""
        return [] if self.rate is None else [f"train.learning_rate={self.rate!r}"]


def plan_trials(
    task: str,
    grid: Sequence[float],
    seed: int,
    assignments: Mapping[str, Sequence[str]],
    *,
    steps: int | None = None,
    smoke: bool = False,
) -> list[Trial]:
    """A trial for each model and rate.

    Args:
        task: name of the task.
        grid: learning rates.
        seed: seed of all trials.
        assignments: by model, the name as on the command line, what its reported runs are made with.
        steps: steps of a trial; None: as many as a reported run.
        smoke: tiny sizes and few steps.

    Raises:
        ValueError: if the grid is empty or a rate is not positive.
        LookupError, TypeError: as `plan`.
    """
    rates = sorted(set(grid))
    if not rates or rates[0] <= 0 or not math.isfinite(rates[-1]):
        raise ValueError(f"the grid of learning rates ({list(grid)}) must hold positive numbers")
    shorter = [] if steps is None else [f"train.steps={steps}"]

    def trial(model: str, rate: float) -> Trial:
        chosen = [*assignments[model], *shorter, f"train.learning_rate={rate!r}"]
        return Trial(model=model, rate=rate, spec=plan(model, task, seed, smoke=smoke, assignments=chosen))

    return [trial(model, rate) for model in assignments for rate in rates]


def note_trials(trials: Sequence[Trial], results: Results) -> None:
    """Name the runs that are no results, beside those named before."""
    before = (read_json(results.tuning) or {}).get("runs", [])
    runs = {run["id"]: run for run in before}
    runs |= {t.spec.id: {"id": t.spec.id, "model": t.model, "learning_rate": t.rate} for t in trials}
    write_json(results.tuning, {"runs": list(runs.values())})


def choose(trials: Sequence[Trial], records: Mapping[str, Record]) -> dict[str, Choice]:
    """The rate with the best headline for each model; of equal ones the smallest.

    Args:
        trials: from `plan_trials`.
        records: by run id, the last line of each trial.
    """
    scores: dict[str, dict[float, float | None]] = {}
    higher: dict[str, bool] = {}
    for trial in trials:
        record = records.get(trial.spec.id, {})
        score = None
        if record.get("status") == FINISHED:
            facts = record["task_facts"]
            score = record["scores"].get(facts["headline"])
            higher[trial.model] = next(
                m["higher_is_better"] for m in facts["metrics"] if m["name"] == facts["headline"]
            )
        scores.setdefault(trial.model, {})[trial.rate] = score
    return {model: _best(model, found, higher.get(model, True)) for model, found in scores.items()}


def summary(
    choices: Mapping[str, Choice], trials: Sequence[Trial], *, seed: int, steps: int | None
) -> dict[str, Any]:
    """For the report: what was chosen, from what, by which runs."""
    chosen = {
        name: {
            "rate": choice.rate,
            "edge": choice.edge,
            "scores": [{"rate": rate, "score": score} for rate, score in choice.scores.items()],
        }
        for name, choice in choices.items()
    }
    runs = [{"id": t.spec.id, "model": t.model, "rate": t.rate, "seed": t.spec.seed} for t in trials]
    return {"seed": seed, "steps": steps, "chosen": chosen, "trials": runs}


def _best(model: str, scores: Mapping[float, float | None], higher: bool) -> Choice:
    known = {rate: score for rate, score in scores.items() if score is not None and math.isfinite(score)}
    if not known:
        return Choice(model=model, rate=None, scores=scores)
    sign = -1 if higher else 1
    rate = min(known, key=lambda rate: (sign * known[rate], rate))
    alone = list(known.values()).count(known[rate]) == 1
    edge = len(scores) > 2 and rate in (min(scores), max(scores)) and alone
    return Choice(model=model, rate=rate, scores=scores, edge=edge)
