"""Text documents from this machine, split by document into training and held-out.

Without a path the corpus is the source of Python's own standard library, which every machine with Python
has. A path may name a folder (each file is a document), a file, or a `.gz` such as `enwik8.gz`.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import logging
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.task import stable_seed

_log = logging.getLogger(__name__)

# Folders of the standard library that hold tests, tables or other people's code.
_NOT_LIBRARY = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip

PIECE_BYTES = 32_000
"""Length of the documents that a single long file is cut into."""
_TAIL_SHARE = 16
_GAP_BYTES = 64_000
# Held-out documents of this length fill the score groups of far distances, and waste little.
_GOOD_BYTES = range(12_000, 60_001)
_LARGEST_SHARE = 8


@dataclass(frozen=True)
class Document:
    """One text; `content` is valid UTF-8, but for a raw file's."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; no content is on both sides."""

    description: str
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the contents and their split; names and places on the disk do not count."""
        digest = hashlib.sha256()
        for side in (self.training, self.held_out):
            digest.update(b"%d;" % len(side))
            for document in side:
                digest.update(b"%d;" % len(document.content))
                digest.update(document.content)
        return digest.hexdigest()[:16]


def load_corpus(
    data: str = "",
    *,
    held_out: int = 32,
    min_bytes: int = 1500,
    document_start: str = "",
    documents: int = 0,
    raw: bool = False,
) -> Corpus:
    """Find documents and split them.

    Several documents are split at random by document: the order in which they are held out is a hash of
    their names, those of 12 to 60 kB first. At most one in eight is held out. Of documents with the same
    content one is kept. A single file is cut at line ends into documents of 32 kB (shorter if it is short);
    its last sixteenth is held out (evenly spaced documents of it are used), and 64 kB before that are dropped
    (or a sixteenth, if that is less), so that an article that runs across the cut is on one side only.

    Args:
        data: file, folder or `.gz`; empty: Python's standard library.
        held_out: documents to hold out, if there are enough.
        min_bytes: shorter documents are left out.
        document_start: a line that starts with this text begins a new document, as `"  <page>"` does in
            enwik8; such documents are then split like files.
        documents: train on only so many, chosen by a hash of their names; 0: all.
        raw: read a single file as it is, whatever its bytes (an image, a program). Of a folder the files
            that are not text are left out all the same.

    Raises:
        FileNotFoundError: if the path, or the standard library's source, is not there.
        ValueError: if there is too little text to split, or a single file is not text and not `raw`.
    """
    found, description, cut = _find(data, min_bytes=min_bytes, document_start=document_start, raw=raw)
    split = split_pieces if cut else split_documents
    training, tail = split(found, held_out=held_out)
    if not training or not tail:
        raise ValueError(
            f"{description} has too little text to split into training and held-out ({len(found)} documents "
            f"of {min_bytes} bytes or more); give more, or lower min_bytes"
        )
    if documents:
        chosen = sorted(training, key=_draw)[:documents]
        training = sorted(chosen, key=lambda document: document.name)
    return Corpus(description, tuple(training), tuple(tail))


def _find(data: str, *, min_bytes: int, document_start: str, raw: bool) -> tuple[list[Document], str, bool]:
    """The documents, what they are in words, and whether they are pieces of one text."""
    if not data:
        return (
            _standard_library(min_bytes),
            f"Python {sysconfig.get_python_version()} standard library",
            False,
        )
    path = Path(data).expanduser()
    if path.is_dir():
        files = list(_folder(path))
    elif path.is_file():
        text = _unpacked(path) if raw else _text(path)
        if text is None:
            raise ValueError(
                f"{path} is not text: it holds a zero byte; byte tokens (tokens=bytes) can read it as it is"
            )
        files = [Document("", text)]
    else:
        raise FileNotFoundError(f"data {data!r} is neither a file nor a folder")
    if document_start:
        pieces = [piece for file in files for piece in cut_at_starts(file, document_start)]
        if not pieces:
            raise ValueError(f"no line in {path} starts with document_start ({document_start!r})")
        return list(unique(pieces, min_bytes)), path.name, False
    found = list(unique(files, min_bytes))
    if len(found) != 1:
        return found, path.name, False
    return list(cut_into_pieces(found[0].content, min_bytes)), path.name, True


def _standard_library(min_bytes: int) -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])

    def fits(name: str, content: bytes) -> bool:
        # this one is written when Python is built, and tells the builder's paths
        return name.endswith(".py") and "_sysconfigdata" not in name and content.isascii()

    files = (d for d in _folder(root, suffix=".py", skip=_NOT_LIBRARY) if fits(d.name, d.content))
    found = list(unique(files, min_bytes))
    if not found:
        raise FileNotFoundError(
            f"no source of the standard library in {root}; name other text, as in --data some/folder"
        )
    return found


def _folder(root: Path, *, suffix: str = "", skip: Iterable[str] = ("__pycache__",)) -> Iterator[Document]:
    """The text files below `root`, hidden ones left out, in order of their names."""
    paths: list[tuple[str, Path]] = []
    left_out = set(skip)
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for file in files:
            if file.endswith(suffix) and not file.startswith("."):
                path = Path(folder, file)
                paths.append((path.relative_to(root).as_posix(), path))
    for name, path in sorted(paths):
        try:
            content = _text(path)
        except (OSError, EOFError, zlib.error) as error:
            _log.warning("left out %s: %s", path, error)
            continue
        if content is not None:
            yield Document(name, content)


def _text(path: Path) -> bytes | None:
    """The file's content, unpacked and with bad UTF-8 replaced; None if it is not text."""
    content = _unpacked(path)
    if b"\0" in content:
        return None
    return content if content.isascii() else content.decode("utf-8", errors="replace").encode()


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def unique(documents: Iterable[Document], min_bytes: int) -> Iterator[Document]:
    """Those of `min_bytes` or more; of several with the same content the first."""
    seen = set()
    for document in documents:
        digest = hashlib.sha256(document.content).digest()
        if len(document.content) >= min_bytes and digest not in seen:
            seen.add(digest)
            yield document


def cut_at_starts(file: Document, start: str) -> Iterator[Document]:
    """The documents of a file in which a line that starts with `start` begins a new one.

    What stands before the first such line is a header, and left out; without one there is no document.
    """
    content = file.content
    borders = [match.start() for match in re.finditer(rb"(?m)^" + re.escape(start.encode()), content)]
    for begin, end in itertools.pairwise([*borders, len(content)]):
        yield Document(f"{file.name}@{begin:012}", content[begin:end])


def cut_into_pieces(content: bytes, min_bytes: int) -> Iterator[Document]:
    """Documents of `PIECE_BYTES`, shorter ones if there is little, but of `min_bytes` at least.

    They end at line ends, if lines are shorter than they, and never within a character of UTF-8; the last
    may be shorter. Together they are `content`.
    """
    size = max(min_bytes, min(PIECE_BYTES, len(content) // (2 * _TAIL_SHARE)))
    begin = 0
    while begin < len(content):
        end = min(begin + size, len(content))
        # after the next line end, unless lines are so long that this would not be a piece any more
        newline = content.find(b"\n", end - 1, end + size)
        if newline >= 0:
            end = newline + 1
        while end < len(content) and content[end] & 0xC0 == 0x80:
            end += 1  # not within a character
        yield Document(f"@{begin:012}", content[begin:end])
        begin = end


def split_pieces(pieces: Sequence[Document], *, held_out: int) -> tuple[list[Document], list[Document]]:
    """Training and held-out pieces of one text: its beginning, and up to `held_out` of its last sixteenth.

    Pieces before that sixteenth are dropped, so that little of what runs across the border is on both sides
    (see `load_corpus`).
    """
    tail = max(1, len(pieces) // _TAIL_SHARE)
    border = last = len(pieces) - tail
    gap = min(_GAP_BYTES, sum(len(piece.content) for piece in pieces) // _TAIL_SHARE)
    while last > 0 and gap > 0:
        last -= 1
        gap -= len(pieces[last].content)
    taken = min(held_out, tail)
    return list(pieces[:last]), [pieces[border + i * tail // taken] for i in range(taken)]


def split_documents(documents: Sequence[Document], *, held_out: int) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, chosen by a hash of their names (see `load_corpus`).

    Held out are at most `held_out`, at most one in eight, and at least one.
    """
    taken = min(held_out, max(1, len(documents) // _LARGEST_SHARE))
    order = sorted(documents, key=lambda d: (len(d.content) not in _GOOD_BYTES, _draw(d)))
    tail = set(order[:taken])
    return [d for d in documents if d not in tail], [d for d in documents if d in tail]


def _draw(document: Document) -> int:
    return stable_seed("held out", document.name)
