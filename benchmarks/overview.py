"""All models on all tasks in one table and one picture, from what the study has published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.document import Block, Paragraph, Picture, Table
from benchmarks.formatting import number
from benchmarks.summary import BOOTSTRAP, Comparison, Figure, NothingToReportError, load, title

PICTURE = "all-models-on-all-tasks.png"


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The headlines of some comparisons.

    Attributes:
        tasks: the comparisons, each with a run that ended well.
        models: names of their rows, with whether they are controls; families first.
    """

    tasks: tuple[Comparison, ...]
    models: dict[str, bool]

    def figure(self, model: str, task: Comparison) -> Figure | None:
        """A model's headline on a task, over its seeds; None where there is none."""
        row = next((row for row in task.rows if row.model == model), None)
        return None if row is None else row.figure("scores", task.headline)

    def share(self, model: str, task: Comparison) -> float:
        """How far a model gets from what is possible without a memory (0) to the best model (1); or NaN.

        Accuracies only; other scores are counted from the worst model, for which nothing is too bad.
        """
        means = {name: found.mean for name in self.models if (found := self.figure(name, task)) is not None}
        if model not in means:
            return math.nan
        metric = _headline(task)
        best, worst = max(means.values()), min(means.values())
        if not metric["higher_is_better"]:
            best, worst = worst, best
        floor = _floor(task) if metric["unit"] == "accuracy" else None
        start = worst if floor is None else floor
        if best == start:
            return 1.0
        return min(1.0, max(0.0, (means[model] - start) / (best - start)))


def gather(published: Path, names: Sequence[str]) -> Overview | None:
    """The comparisons that lie in the folders `names` of `published`; None if there are none."""
    tasks = []
    for name in names:
        try:
            comparison = load(published / name, interval=BOOTSTRAP)
        except NothingToReportError:
            continue
        if comparison.facts:
            tasks.append(comparison)
    if not tasks:
        return None
    models = {row.model: row.control for task in tasks for row in task.rows}
    return Overview(tasks=tuple(tasks), models=dict(sorted(models.items(), key=lambda model: model[1])))


def document(overview: Overview, picture: Path) -> list[Block]:
    """The table, the picture that `draw` made, and how to read them."""
    tasks = overview.tasks
    lines = [["model", *(f"`{task.task}`" for task in tasks)]]
    lines += [[model, *(number(overview.figure(model, task)) for task in tasks)] for model in overview.models]
    lines.append(["best possible without memory", *(number(Figure.of([_floor(task)])) for task in tasks)])
    lines.append(["seeds", *(str(max(len(row.finished) for row in task.rows)) for task in tasks)])
    return [
        Table(lines),
        Paragraph(
            f"{_meaning(tasks)} Means over the seeds, from three seeds on with the ends of a percentile "
            "bootstrap, which for three seeds are the lowest and the highest; the commands stand at the "
            "tasks' own tables."
        ),
        Picture(picture, "All models on all tasks"),
        Paragraph(
            "Dark is good: from what is possible without a memory, or from the worst model where accuracy is "
            "not what counts, to the best model of the column. Above the line memories, below it controls."
        ),
    ]


def draw(overview: Overview, out: Path) -> Path:
    """Models by tasks as a heat map, in `out`; returns the file."""
    from benchmarks.drawing import STYLE, Canvas, draw_cells, mpl, write_pictures

    tasks, models = overview.tasks, overview.models
    with mpl.rc_context(STYLE):
        size = (2.0 + 0.92 * len(tasks), 1.7 + 0.42 * len(models))
        canvas = Canvas(figsize=size, dpi=130, layout="constrained")
        axes = canvas.add_subplot()
        shares = [[overview.share(model, task) for task in tasks] for model in models]
        texts = [[_short(overview.figure(model, task)) for task in tasks] for model in models]
        draw_cells(axes, shares, texts, list(models))
        axes.set_xticks(range(len(tasks)), [_label(task) for task in tasks], rotation=30, ha="right")
        families = len(models) - sum(models.values())
        if 0 < families < len(models):
            axes.axhline(families - 0.5, color="white", linewidth=3)
        axes.set_title("All models on all tasks (dark is good)")
        return write_pictures({PICTURE: canvas}, out)[0]


def _headline(task: Comparison) -> dict[str, Any]:
    """What the records say of the task's headline."""
    found: dict[str, Any] = next(m for m in task.facts["metrics"] if m["name"] == task.headline)
    return found


def _floor(task: Comparison) -> float | None:
    floor: float | None = task.facts.get("floor", {}).get(task.headline)
    return floor


def _short(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.mean:.2f}" if abs(figure.mean) < 10 else f"{figure.mean:.1f}"


def _label(task: Comparison) -> str:
    unit = _headline(task)["unit"]
    return task.task if unit == "accuracy" else f"{task.task}\n({unit})"


def _meaning(tasks: Sequence[Comparison]) -> str:
    kinds: dict[str, list[str]] = {}
    for task in tasks:
        better = "higher" if _headline(task)["higher_is_better"] else "lower"
        kinds.setdefault(f"{title(task.headline)} ({better} is better)", []).append(f"`{task.task}`")
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in kinds.items()) + "."
