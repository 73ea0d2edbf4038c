"""A file of bytes that are not text: an image, a program, a dump, read as it is."""

from __future__ import annotations

import gzip
from pathlib import Path

from benchmarks.corpus import (
    Corpus,
    Document,
    cut_at_starts,
    cut_into_pieces,
    split_documents,
    split_pieces,
    unique,
)


def bytes_of(path: Path) -> bytes | None:
    """The bytes of a single file, unpacked, if they are not text; None for text and for folders."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        content.decode()
    except UnicodeDecodeError:
        return content
    return content if b"\0" in content else None


def load_bytes(
    content: bytes, description: str, *, held_out: int, min_bytes: int, document_start: str
) -> Corpus:
    """Cut and split bytes as `load_corpus` does a single file of text; no byte is changed.

    Raises:
        ValueError: if there is too little to split, or nothing begins with `document_start`.
    """
    if document_start:
        pieces = list(cut_at_starts(Document("", content), document_start))
        if not pieces:
            raise ValueError(f"no line in {description} starts with document_start ({document_start!r})")
        documents = list(unique(pieces, min_bytes))
        training, tail = split_documents(documents, held_out=held_out)
    else:
        documents = list(cut_into_pieces(content, min_bytes))
        training, tail = split_pieces(documents, held_out=held_out)
    if not training or not tail:
        raise ValueError(
            f"{description} is too short to split into training and held-out ({len(documents)} documents of "
            f"{min_bytes} bytes or more); give more, or lower min_bytes"
        )
    return Corpus(description, tuple(training), tuple(tail))
