"""On what terms the models of a comparison met: widths that were matched, learning rates that were chosen.

Needs neither models nor tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.document import Block, Bullets, Heading, Paragraph, Table
from benchmarks.results import FINISHED
from benchmarks.summary import Comparison, title

UNITS = {"params": "parameters", "state": "bytes of state"}


def terms_columns(comparison: Comparison) -> dict[str, Mapping[str, str]]:
    """Columns for the main table: by header, a cell for each model."""
    columns: dict[str, Mapping[str, str]] = {}
    if comparison.match:
        columns["matched by"] = {name: _width(found) for name, found in comparison.match["models"].items()}
    if comparison.tuning:
        chosen = comparison.tuning["chosen"]
        columns["learning rate"] = {name: _rate(choice["rate"]) for name, choice in chosen.items()}
    return columns


def terms_section(comparison: Comparison) -> list[Block]:
    """What was made equal and how, and which learning rates were tried; nothing if neither was done."""
    return [*_match_section(comparison), *_tuning_section(comparison)]


def _match_section(comparison: Comparison) -> list[Block]:
    found = comparison.match
    if not found:
        return []
    unit, target = UNITS[found["by"]], found["target"]
    lines = [["model", unit, "off", "options"]]
    for name, one in found["models"].items():
        off = "" if one["note"] else f"{one['value'] / target - 1:+.1%}".replace("-", "−").replace("%", " %")
        lines.append([name, f"{one['value']:,.0f}", off, one["note"] or _width(one)])
    return [
        Heading(f"Equal {unit}"),
        Paragraph(
            f"Every model was given as nearly as may be the {target:,.0f} {unit} of {found['reference']}, by "
            "a search over its width; the other options are those of the settings."
        ),
        Table(lines),
    ]


def _tuning_section(comparison: Comparison) -> list[Block]:
    tuning = comparison.tuning
    if not tuning:
        return []
    chosen = tuning["chosen"]
    rates = sorted({trial["rate"] for choice in chosen.values() for trial in choice["scores"]})
    lines = [["model", *map(_rate, rates), "chosen"]]
    ended = {(trial["model"], trial["rate"]): trial["status"] for trial in comparison.trials}
    for name, choice in chosen.items():
        scores = {trial["rate"]: trial["score"] for trial in choice["scores"]}
        cells = [
            f"{scores[rate]:.3f}" if scores.get(rate) is not None else _badly(ended.get((name, rate)))
            for rate in rates
        ]
        lines.append([name, *cells, _rate(choice["rate"])])
    steps = "as many steps as" if tuning["steps"] is None else f"{tuning['steps']} steps instead of those of"
    words = (
        f"{title(comparison.headline).capitalize() or 'Headline'} by learning rate, with seed "
        f"{tuning['seed']}, which is not among the reported ones, and {steps} a reported run. The best was "
        "taken; of equal ones the smallest. It is judged on the same evaluation set as the results."
    )
    blocks: list[Block] = [Heading("Learning rates"), Paragraph(words), Table(lines)]
    edges = [name for name, choice in chosen.items() if choice["edge"]]
    none = [name for name, choice in chosen.items() if choice["rate"] is None]
    remarks = []
    if edges:
        remarks.append(
            f"{', '.join(edges)}: the best rate is at the edge of the grid; a better may lie beyond"
        )
    if none:
        remarks.append(
            f"{', '.join(none)}: no trial ended well; the reported runs have the settings' own rate"
        )
    return [*blocks, *([Bullets(remarks, warning=True)] if remarks else [])]


def _width(found: Mapping[str, Any]) -> str:
    if found["note"]:
        return found["note"].partition(":")[0]
    return ", ".join(f"{name} {value}" for name, value in found["options"].items()) or "as in the settings"


def _badly(status: str | None) -> str:
    return "–" if status in (None, FINISHED) else str(status)


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:g}"
