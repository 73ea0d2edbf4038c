"""The picture of several agents' learning, drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.agents.settings import NONE

# What an agent without memory is drawn in; the members have the colours of every other picture.
NONE_COLOUR = "#b0b7bd"


def draw_curves(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    path: Path,
    *,
    title: str,
    random: float | None = None,
    best: float | None = None,
) -> None:
    """Mean return by steps and by CPU time, a line for each memory: mean over the seeds, with their range.

    Args:
        curves: for each memory the learning curve of each seed, as in `curve.jsonl`.
        path: of the PNG.
        title: above it.
        random: return of an agent that acts at random.
        best: the highest possible return.
    """
    # Here, because matplotlib takes a second to import.
    from benchmarks.drawing import COLOURS, SPARE, STYLE, Canvas, label_ends, mpl, write_pictures

    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(11.5, 4.4), dpi=130, layout="constrained")
        panels = canvas.subplots(1, 2, sharey=True)
        for axes, key, label in zip(
            panels, ("step", "cpu_seconds"), ("environment steps", "CPU seconds, one thread"), strict=True
        ):
            ends = []
            for number, (memory, seeds) in enumerate(curves.items()):
                points = _over_seeds(seeds, key)
                if not points:
                    continue
                spare = NONE_COLOUR if memory == NONE else SPARE[number % len(SPARE)]
                colour = COLOURS.get(memory, spare)
                places, low, mean, high = zip(*points, strict=True)
                axes.plot(places, mean, color=colour, linewidth=1.8)
                axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
                ends.append((memory, mean[-1], colour))
            for value, name in ((random, "random"), (best, "best")):
                if value is not None:
                    axes.axhline(value, color="#9aa3ab", linestyle=":", linewidth=1.2)
                    axes.annotate(
                        name,
                        (0.99, value),
                        xycoords=("axes fraction", "data"),
                        ha="right",
                        va="bottom",
                        fontsize=8.5,
                        color="#6b747b",
                    )
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=6)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            label_ends(axes, ends)
        panels[0].set_ylabel("mean return of the last 100 episodes")
        canvas.suptitle(title, x=0.01, ha="left", fontweight="bold")
        write_pictures({path.name: canvas}, path.parent)


def _over_seeds(
    seeds: Sequence[Sequence[Mapping[str, Any]]], key: str
) -> list[tuple[float, float, float, float]]:
    # Place, lowest, mean, highest, at every update that all seeds have reached.
    points = []
    for lines in zip(*seeds, strict=False):
        values = [line["return"] for line in lines]
        if None not in values:
            place = sum(line[key] for line in lines) / len(lines)
            points.append((place, min(values), sum(values) / len(values), max(values)))
    return points
