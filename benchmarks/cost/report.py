"""The report of `memory-bench cost`: tables by length, scaling exponents, pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    as_html,
    as_markdown,
)
from benchmarks.formatting import count, size
from benchmarks.results import FINISHED, Record, write_atomically
from benchmarks.summary import Figure


@dataclass(frozen=True)
class Quantity:
    """One figure of the cases, and how to show it."""

    name: str
    explanation: str
    path: tuple[str, ...]
    show: Callable[[Figure | None], str]
    exponent: str = ""
    """What grows with the length, so that the exponent means something; empty: none is given."""
    per_token: bool = False
    """Whether the figure is shared out among the tokens of a row."""

    def of(self, record: Record) -> float | None:
        """The figure of a case, if it has it."""
        value: Any = record
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is None or not self.per_token:
            return value
        return value / record["case"]["length"]


def _duration(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    # What rounds to a second is one.
    return f"{figure.mean:.3g} s" if figure.mean >= 0.9995 else f"{figure.mean * 1000:.3g} ms"


def _bytes_per_token(figure: Figure | None) -> str:
    # A slot's share may be less than one byte.
    return f"{figure.mean:.2g} B" if figure is not None and 0 < figure.mean < 10 else size(figure)


TRAINING = (
    Quantity("training tokens/s", "of a step with gradients", ("training", "tokens_per_second"), count),
    Quantity("step", "seconds of a step over the whole length", ("training", "seconds"), _duration, "time"),
    Quantity(
        "peak memory", "above the model itself, during a step", ("training", "peak_bytes"), size, "memory"
    ),
    Quantity(
        "held by autograd", "most bytes in its graphs at once", ("training", "saved_bytes"), size, "memory"
    ),
    Quantity(
        "operations",
        "floating-point, of a step; a multiplication and an addition are two",
        ("training", "operations"),
        count,
        "operations",
    ),
)
DECODING = (
    Quantity("decoding tokens/s", "after so many tokens", ("decoding", "tokens_per_second"), count),
    Quantity("token", "for one more token after so many", ("decoding", "seconds"), _duration, "time"),
    Quantity("state per row", "carried from segment to segment", ("state_bytes",), size, "state"),
    Quantity(
        "state per token",
        "state per row by the tokens read until then, whether it still knows of each or not: a memory of a "
        "fixed size has room that a short text does not fill, and less for each token of a long one",
        ("state_bytes",),
        _bytes_per_token,
        "state",
        per_token=True,
    ),
)


def write_report(records: Sequence[Record], out: Path, *, command: str) -> list[Path]:
    """Write `table.md`, `table.csv`, `index.html` and the pictures; returns the files.

    Raises:
        OSError: if a file cannot be written.
        ImportError: if matplotlib or jinja2 is missing.
    """
    from benchmarks.cost.plots import draw_all

    pictures = draw_all([record for record in records if record["status"] == FINISHED], out)
    blocks = document(records, pictures, command=command)
    files = {
        "table.md": as_markdown(blocks).encode(),
        "table.csv": as_csv(records).encode(),
        "index.html": as_html(blocks).encode(),
    }
    for name, data in files.items():
        write_atomically(out / name, data)
    return [*(out / name for name in files), *(picture.path for picture in pictures)]


def document(records: Sequence[Record], pictures: Sequence[Picture], *, command: str) -> list[Block]:
    """The report as blocks."""
    good = [record for record in records if record["status"] == FINISHED]
    blocks: list[Block] = [Heading("Cost", 1), Paragraph(_circumstances(records))]
    bad = [record for record in records if record["status"] != FINISHED]
    if bad:
        names = [f"{_name(r)} at {r['case']['length']} tokens failed: {r['error']}" for r in bad]
        blocks.append(Bullets(names, warning=True))
    if good:
        blocks += [
            Heading("Training and decoding"),
            Paragraph(
                "Exponent: with which power of the length a figure grows, from the least squares of the "
                "logarithms. 1 is proportional to the tokens, 0 is constant."
            ),
        ]
    for quantity in (*TRAINING, *DECODING):
        lines = table(good, quantity)
        if len(lines) > 1:
            blocks += [
                Heading(quantity.name[0].upper() + quantity.name[1:], 3),
                Paragraph(f"{quantity.explanation[0].upper()}{quantity.explanation[1:]}."),
                Table(lines),
            ]
    blocks += [*pictures, Heading("To do it again"), Code(command)]
    return blocks


def table(records: Sequence[Record], quantity: Quantity) -> list[list[str]]:
    """Models by lengths, with the number of parameters and the exponent."""
    lengths = sorted({record["case"]["length"] for record in records})
    header = ["model", "parameters", *(f"{length:,}" for length in lengths)]
    lines = [header + (["exponent"] if quantity.exponent and len(lengths) > 1 else [])]
    for name in dict.fromkeys(_name(record) for record in records):
        own = {record["case"]["length"]: record for record in records if _name(record) == name}
        values = [quantity.of(own[length]) if length in own else None for length in lengths]
        if all(value is None for value in values):
            continue
        first = next(iter(own.values()))
        line = [name, count(Figure.of([first["parameters"]]))]
        line += [quantity.show(Figure.of([value])) for value in values]
        if len(lines[0]) > len(line):
            slope = exponent(lengths, values)
            line.append("–" if slope is None else f"{slope:.2f}")
        lines.append(line)
    return lines


def exponent(lengths: Sequence[int], values: Sequence[float | None]) -> float | None:
    """The slope of the logarithm of the values over that of the lengths; None below two positive values."""
    points = [(math.log(x), math.log(y)) for x, y in zip(lengths, values, strict=True) if y]
    if len(points) < 2:
        return None
    middle = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    across = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return across / sum((x - middle[0]) ** 2 for x, _ in points)


def as_csv(records: Sequence[Record]) -> str:
    """One line for each case, numbers in full."""
    quantities = (*TRAINING, *DECODING)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "gradient", "length", "rows", "threads", "parameters", *(q.name for q in quantities)]
    )
    for record in records:
        case = record["case"]
        figures = [quantity.of(record) for quantity in quantities]
        writer.writerow(
            [
                case["model"],
                case["gradient"],
                case["length"],
                case["rows"],
                case["threads"],
                record.get("parameters", ""),
                *("" if value is None else value for value in figures),
            ]
        )
    return text.getvalue()


def _name(record: Record) -> str:
    case = record["case"]
    return case["model"] if case["gradient"] == "bptt" else f"{case['model']}, {case['gradient']}"


def _circumstances(records: Sequence[Record]) -> str:
    case, found = records[0]["case"], records[0]["versions"]
    shared = {
        key: value
        for key, value in case["options"].items()
        if key in ("dim", "depth", "heads", "segment_length")
    }
    sizes = ", ".join(f"{key} {value}" for key, value in shared.items())
    clock = "CPU time of one thread" if case["threads"] == 1 else f"wall time of {case['threads']} threads"
    commit = f", commit {found['commit']}" if "commit" in found else ""
    return (
        f"Language models with random weights: {sizes}; {case['rows']} row at once; a loss at every token; "
        f"medians, {clock}, every case in a process of its own. On {found['cpu']}; torch "
        f"{found['torch']}, Python {found['python']}, memory-models {found['memory-models']}{commit}."
    )
