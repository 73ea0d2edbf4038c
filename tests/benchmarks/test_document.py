"""Reports as blocks: the same content as Markdown and as one HTML page that a browser shows."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

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
from benchmarks.report import write_report
from benchmarks.results import Results
from benchmarks.summary import load
from tests.benchmarks.browser import BROWSER, look_at
from tests.benchmarks.made_up import record, scores


def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = b"\0" + bytes(colour) * width
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(line * height))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def blocks(tmp_path: Path) -> list[Block]:
    (tmp_path / "red.png").write_bytes(png(300, 200, (255, 0, 0)))
    return [
        Heading("recall & <more>", 1),
        Paragraph("Steps are set with `train.steps=10`."),
        Bullets(["htm: the memory is not used"], warning=True),
        Table([["model", "a|b", "state"], ["htm", "0.999 ± 0.001", "8.2 KiB"], ["gru (failed)", "–", ""]]),
        Heading("Pictures"),
        Picture(tmp_path / "red.png", "all red"),
        Code("memory-bench compare --task recall"),
    ]


def test_markdown_has_every_block(blocks: list[Block]) -> None:
    assert as_markdown(blocks) == (
        "# recall & <more>\n\nSteps are set with `train.steps=10`.\n\n"
        "- **Warning:** htm: the memory is not used\n\n"
        "| model | a\\|b | state |\n| --- | ---: | ---: |\n| htm | 0.999 ± 0.001 | 8.2 KiB |\n"
        "| gru (failed) | – |  |\n\n## Pictures\n\n![all red](red.png)\n\n"
        "```\nmemory-bench compare --task recall\n```\n"
    )


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.numbers = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.numbers += tag == "td" and ("class", "number") in attrs

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []


def test_the_page_stands_alone_and_escapes_what_it_shows(blocks: list[Block], tmp_path: Path) -> None:
    reader = _Reader()
    reader.feed(as_html(blocks))
    assert "recall & <more>" in reader.words
    for words in (
        "train.steps=10",
        "htm: the memory is not used",
        "0.999 ± 0.001",
        "memory-bench compare --task recall",
    ):
        assert words in reader.words
    data = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    assert reader.links == ["#Pictures", f"data:image/png;base64,{data}"]
    assert reader.numbers == 4
    assert not re.search(r"https?://", as_html(blocks))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_a_report_and_its_pictures(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed, value in enumerate((0.9, 0.95, 1.0)):
        results.append(record("htm", seed, scores(value)))
        results.append(record("window", seed, scores(value / 4)))
    # Warned of, for its memory is not used.
    modes = ("carried", "none", "shuffled", "frozen")
    unused = {"drop": dict.fromkeys(modes[1:], 0.0), "scores": dict.fromkeys(modes, scores(0.5))}
    results.append(record("gru", 0, scores(0.5), memory_use=unused))
    _, page, _, *pictures = write_report(load(tmp_path), tmp_path / "report")
    drawn = [picture.read_bytes() for picture in pictures]
    # The page must do without the files beside it.
    for picture in pictures:
        picture.unlink()
    seen = look_at(page, tmp_path / "profile", width=900, height=2400)
    assert seen.complaints == []
    assert seen.requests == [page.as_uri()]
    assert len(pictures) == 7
    assert seen.images == [(True, *struct.unpack(">II", data[16:24])) for data in drawn]
    shown = (matplotlib.image.imread(io.BytesIO(seen.shot))[..., :3] * 255).round()
    assert shown.shape == (2400, 900, 3)
    # The warning's bar and the text are to be seen.
    assert (shown == (0xE0, 0x8E, 0x1B)).all(-1).sum() > 50
    assert (shown == (0x20, 0x24, 0x2A)).all(-1).sum() > 100
