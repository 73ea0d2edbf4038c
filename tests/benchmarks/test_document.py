"""Reports as blocks: the same content as Markdown and as one HTML page that a browser shows."""

from __future__ import annotations

import base64
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

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

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


def pixels(data: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and lines of an 8-bit RGB or RGBA picture, its filters undone."""
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    size, body, place = {2: 3, 6: 4}[kind], b"", 8
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body += data[place + 8 : place + 8 + length] if name == b"IDAT" else b""
        place += 12 + length
    raw, lines = zlib.decompress(body), []
    before = bytearray(width * size)
    for y in range(height):
        start = y * (width * size + 1)
        line = bytearray(raw[start + 1 : start + 1 + width * size])
        for x in range(len(line)):
            left, up = line[x - size] if x >= size else 0, before[x]
            corner = before[x - size] if x >= size else 0
            guess = left + up - corner
            near = min((left, up, corner), key=lambda value: abs(guess - value))
            line[x] = (line[x] + (0, left, up, (left + up) // 2, near)[raw[start]]) & 255
        lines.append(bytes(b for i, b in enumerate(line) if i % size < 3))
        before = line
    return width, height, lines


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
def test_a_browser_shows_the_page_and_its_picture(blocks: list[Block], tmp_path: Path) -> None:
    page, shot = tmp_path / "index.html", tmp_path / "shot.png"
    page.write_text(as_html(blocks), encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,900", f"--screenshot={shot}"]
    subprocess.run([*command, page.as_uri()], check=True, timeout=100, capture_output=True)
    width, height, lines = pixels(shot.read_bytes())
    assert (width, height) == (900, 900)
    red = sum(line.count(b"\xff\x00\x00") for line in lines)
    assert red > 0.9 * 300 * 200
    # The warning's bar and the text are there too.
    assert any(b"\xe0\x8e\x1b" in line for line in lines)
    assert sum(line.count(b"\x20\x24\x2a") for line in lines) > 100
