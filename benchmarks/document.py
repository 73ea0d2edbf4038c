"""A report as a list of blocks, written as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = Path(__file__).with_name("templates") / "report.html"
_NUMBER = re.compile(
    r"^[−-]?\d[\d.,]*(e[+-]?\d+)?( ?[A-Za-z%×]{1,3})?( ± [\d.]+| \[−?[\d.]+ −?[\d.]+\])?"
    r"( \(\d+ of \d+\))?$|^–?$"
)


@dataclass(frozen=True)
class Heading:
    """A title; the first block of a document has level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text; words in backticks are set as code."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text, the first line being the header; columns after the first are aligned to the right."""

    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Bullets:
    """A list; `warning` for what the reader must not overlook."""

    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Code:
    """Commands, one a line."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture that lies beside the report."""

    path: Path
    caption: str


Block = Heading | Paragraph | Table | Bullets | Code | Picture


def as_markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown; pictures are linked by name."""
    return "\n\n".join(filter(None, map(_markdown, blocks))) + "\n"


def as_html(blocks: Sequence[Block]) -> str:
    """The document as one HTML page that needs no other file and no network.

    Raises:
        ImportError: if jinja2 is missing.
        OSError: if a picture cannot be read.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the HTML report needs jinja2: pip install 'memory-models[bench]'") from error

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "inline": _inline,
        "data_url": _data_url,
        "kind": lambda block: type(block).__name__,
    }
    environment.filters["is_number"] = lambda cell: bool(_NUMBER.match(cell))
    title = next((block.text for block in blocks if isinstance(block, Heading)), "report")
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, blocks=blocks, sections=sections)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table(lines):
            header, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
            rule = ["---", *("---:" for _ in header[1:])]
            return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))
        case Bullets(items, warning):
            return "\n".join(f"- {'**Warning:** ' if warning else ''}{item}" for item in items)
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(path, caption):
            return f"![{caption}]({path.name})"


def _inline(text: str) -> object:
    """Escaped, with words in backticks as code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False)))


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
