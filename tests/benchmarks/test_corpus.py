"""Documents are found the same way everywhere, and training and held-out share nothing."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.corpus import PIECE_BYTES, Corpus, load_corpus


def words(size: int, seed: int) -> str:
    draw = random.Random(seed)
    lines: list[str] = []
    while size > 0:
        lines.append(" ".join(f"w{draw.randrange(10_000)}" for _ in range(8)) + "\n")
        size -= len(lines[-1])
    return "".join(lines)


def folder_of(root: Path, count: int, size: int = 2000) -> Path:
    for index in range(count):
        path = root / f"part{index % 3}" / f"file{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words(size, index))
    return root


def contents(corpus: Corpus) -> tuple[list[bytes], list[bytes]]:
    return [d.content for d in corpus.training], [d.content for d in corpus.held_out]


def assert_disjoint(corpus: Corpus) -> None:
    training, held_out = contents(corpus)
    assert training
    assert held_out
    assert len({*training, *held_out}) == len(training) + len(held_out)


@pytest.fixture(scope="module")
def library() -> Corpus:
    return load_corpus()


def test_the_default_is_the_source_of_the_standard_library(library: Corpus) -> None:
    assert_disjoint(library)
    names = [d.name for d in library.training + library.held_out]
    assert "argparse.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not [n for n in names if {"test", "tests", "encodings", "site-packages"} & set(n.split("/")[:-1])]
    assert not [n for n in names if "sysconfigdata" in n]
    assert all(len(d.content) >= 1500 and d.content.isascii() for d in library.training + library.held_out)
    assert len(library.training) > 300
    assert len(library.held_out) == 32
    assert all(12_000 <= len(d.content) <= 60_000 for d in library.held_out)


def test_the_split_is_the_same_every_time_and_a_limit_leaves_the_held_out_alone(library: Corpus) -> None:
    few = load_corpus(documents=10)
    assert few.held_out == library.held_out
    assert len(few.training) == 10
    assert set(few.training) < set(library.training)
    assert load_corpus().fingerprint == library.fingerprint != few.fingerprint


def test_a_folder_is_split_by_file_whatever_the_place(tmp_path: Path) -> None:
    here = load_corpus(str(folder_of(tmp_path / "a", 20)))
    there = load_corpus(str(folder_of(tmp_path / "b", 20)))
    assert_disjoint(here)
    assert len(here.held_out) == 2  # one in eight at most
    assert len(here.training) == 18
    assert contents(here) == contents(there)
    assert here.fingerprint == there.fingerprint
    assert [d.name for d in here.training] == sorted(d.name for d in here.training)


def test_the_fingerprint_tells_contents_and_split_apart(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 20)
    before = load_corpus(str(root))
    fewer = load_corpus(str(root), held_out=1)
    changed = root / before.training[0].name
    changed.write_text(changed.read_text().replace("w", "v", 1))
    after = load_corpus(str(root))
    assert len({before.fingerprint, fewer.fingerprint, after.fingerprint}) == 3


def test_copies_hidden_binary_and_short_files_are_left_out(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 10)
    (root / "copy.txt").write_bytes((root / "part0" / "file0.txt").read_bytes())
    (root / ".hidden").write_text(words(2000, 98))
    (root / ".git").mkdir()
    (root / ".git" / "packed").write_text(words(2000, 99))
    (root / "image").write_bytes(b"\x89PNG\0" * 1000)
    (root / "short.txt").write_text("short")
    (root / "broken.gz").write_bytes(b"not gzip" * 500)
    (root / "nowhere.txt").symlink_to(root / "gone")
    corpus = load_corpus(str(root))
    assert_disjoint(corpus)
    assert len(corpus.training) + len(corpus.held_out) == 10
    assert load_corpus(str(root), min_bytes=2).training != corpus.training  # the short one joins


def test_medium_files_are_held_out_first(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 30)
    (root / "medium.txt").write_text(words(20_000, 50))
    assert "medium.txt" in [d.name for d in load_corpus(str(root), held_out=1).held_out]


def test_a_single_file_is_cut_into_pieces_with_a_gap_before_the_tail(tmp_path: Path) -> None:
    text = words(2_000_000, 0).encode()
    (tmp_path / "book").write_bytes(text)
    corpus = load_corpus(str(tmp_path / "book"))
    assert_disjoint(corpus)
    training, held_out = contents(corpus)
    assert all(c.endswith(b"\n") and PIECE_BYTES <= len(c) < PIECE_BYTES + 100 for c in training)
    body = b"".join(training)
    assert text.startswith(body)
    first_held_out = text.index(held_out[0])
    assert first_held_out - len(body) >= 64_000
    assert len(text) - first_held_out <= len(text) / 16 + PIECE_BYTES


def test_held_out_pieces_are_spread_over_the_tail(tmp_path: Path) -> None:
    text = words(2_000_000, 0).encode()
    (tmp_path / "book").write_bytes(text)
    one = load_corpus(str(tmp_path / "book"), held_out=2)
    assert len(one.held_out) == 2
    assert text.index(one.held_out[1].content) - text.index(one.held_out[0].content) > PIECE_BYTES


def test_short_files_and_long_lines_can_be_cut_too(tmp_path: Path) -> None:
    (tmp_path / "short").write_text(words(30_000, 0))
    assert_disjoint(load_corpus(str(tmp_path / "short")))
    text = "".join(chr(0x400 + random.Random(0).randrange(200)) * (i % 7) for i in range(100_000))
    (tmp_path / "one line").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "one line"))
    for document in corpus.training + corpus.held_out:
        document.content.decode()  # no character is cut in two


def test_gz_is_the_same_as_plain(tmp_path: Path) -> None:
    text = words(200_000, 0).encode()
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text))
    plain, packed = load_corpus(str(tmp_path / "plain")), load_corpus(str(tmp_path / "packed.gz"))
    assert contents(plain) == contents(packed)
    assert plain.fingerprint == packed.fingerprint


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "book").write_text(words(100_000, 0))
    assert contents(load_corpus(str(tmp_path / "folder"))) == contents(
        load_corpus(str(tmp_path / "folder" / "book"))
    )


def test_lines_may_begin_documents(tmp_path: Path) -> None:
    pages = [f"<page>\n{words(1600 + 10 * i, i)}" for i in range(40)]
    (tmp_path / "wiki").write_text("header\n" * 500 + "".join(pages))
    corpus = load_corpus(str(tmp_path / "wiki"), document_start="<page>")
    assert_disjoint(corpus)
    found = sorted(d.content.decode() for d in corpus.training + corpus.held_out)
    assert found == sorted(pages)
    assert len(corpus.held_out) == 5


def test_bad_utf8_is_replaced(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 10)
    (root / "latin").write_bytes("caf\xe9 ".encode("latin-1") * 400)
    corpus = load_corpus(str(root))
    found = [document.content.decode() for document in corpus.training + corpus.held_out]
    assert sum(text.startswith("caf\ufffd ") for text in found) == 1


def test_errors_tell_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        load_corpus(str(tmp_path / "gone"))
    (tmp_path / "binary").write_bytes(b"\0" * 5000)
    with pytest.raises(ValueError, match=r"zero byte; .*tokens=bytes"):
        load_corpus(str(tmp_path / "binary"))
    (tmp_path / "tiny").write_text("tiny")
    with pytest.raises(ValueError, match="too little text"):
        load_corpus(str(tmp_path / "tiny"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"too little text.*lower min_bytes"):
        load_corpus(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"no line in .* starts with document_start"):
        load_corpus(str(tmp_path / "tiny"), document_start="<page>")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "empty")})
    with pytest.raises(FileNotFoundError, match="--data"):
        load_corpus()


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_raw_file_is_read_as_it_is(tmp_path: Path, end: str) -> None:
    content = np.random.default_rng(0).bytes(40_000)
    path = tmp_path / f"image{end}"
    path.write_bytes(gzip.compress(content) if end else content)
    corpus = load_corpus(str(path), raw=True)
    kept = b"".join(document.content for document in corpus.training)
    assert kept
    assert content.startswith(kept)
    assert content.endswith(corpus.held_out[-1].content)


def test_raw_text_is_what_text_is(tmp_path: Path) -> None:
    (tmp_path / "book").write_text(words(40_000, 1) + "\u00e9", encoding="utf-8")
    assert load_corpus(str(tmp_path / "book"), raw=True) == load_corpus(str(tmp_path / "book"))
