"""Documents as batches, and text as tokens: each read once, in order, in its own row."""

from __future__ import annotations

import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.training.data import Documents, Stream, load_text
from benchmarks.training.tokenizer import Tokenizer, TokenizerError, load_tokenizer, tokenizer_of
from memory_models.hub import TOKENIZER_FILE
from tests.benchmarks.training import TEXT, tiny, write_corpus, write_tokenizer

LENGTHS = (2, 9, 8, 17, 30, 3, 25, 10)


def documents(segment_length: int = 4) -> Documents:
    # Each token tells its document and its place.
    ids = [100 * number + np.arange(length) for number, length in enumerate(LENGTHS)]
    return Documents(ids, segment_length)


def rows_read(rows: int, steps: int, *, share: range | None = None) -> dict[int, list[list[int]]]:
    """For each row the tokens of each document in the order read, the label of the last one included."""
    stream = Stream(documents(), rows=rows, segments=3, seed=5)
    found: dict[int, list[list[int]]] = defaultdict(list)
    share = range(rows) if share is None else share
    for step in range(steps):
        for piece in stream.window(step, share):
            for row, tokens, labels, mask, reset in zip(share, *piece, strict=True):
                if reset:
                    found[row].append([])
                read = tokens[mask].tolist()
                document = found[row][-1]
                # What is read is what was asked for before.
                assert not document or document[-1] == read[0]
                document += [*([] if document else read[:1]), *labels[mask].tolist()]
                assert read[1:] == labels[mask].tolist()[:-1]
                assert (labels[~mask] == -100).all()
                assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    return found


def test_each_row_reads_whole_documents_one_after_the_other() -> None:
    read = rows_read(3, 40)
    times = defaultdict(int)
    for row in read.values():
        # A row starts inside its first document, and the last one is under way.
        for document in row[1:-1]:
            number = document[0] // 100
            assert document == [100 * number + place for place in range(LENGTHS[number])]
            times[number] += 1
    assert set(times) == set(range(len(LENGTHS)))
    assert max(times.values()) - min(times.values()) <= 2


@pytest.mark.parametrize("processes", [2, 4])
def test_a_share_of_the_rows_is_those_rows_of_all(processes: int) -> None:
    whole = rows_read(4, 10)
    each = 4 // processes
    for rank in range(processes):
        share = range(rank * each, (rank + 1) * each)
        assert rows_read(4, 10, share=share) == {row: whole[row] for row in share}


@pytest.mark.parametrize("rows", [1, 3, 8, 12])
def test_an_evaluation_asks_for_every_token_but_the_first_once(rows: int) -> None:
    text = documents()
    asked: list[int] = []
    for start in range(0, rows, max(1, rows // 3)):
        part = slice(start, min(rows, start + max(1, rows // 3)))
        pieces = list(text.evaluation(rows=rows, share=part))
        # All shares take as many steps, those that have nothing to read too.
        assert len(pieces) == len(list(text.evaluation(rows=rows, share=slice(0, 1))))
        asked += [label for piece in pieces for label in piece.labels[piece.mask].tolist()]
    assert sorted(asked) == [
        100 * number + place for number, length in enumerate(LENGTHS) for place in range(1, length)
    ]


def test_an_end_token_stands_behind_each_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.json"))
    config = tiny(tmp_path, tokenizer=str(tmp_path / "t.json"), end_token="<|endoftext|>", held_out_tokens=5)
    text = load_text(config, tokenizer, 8)
    end = tokenizer.id_of("<|endoftext|>")
    last = text.training.starts + text.training.asked
    assert (text.training.tokens[last] == end).all()
    assert (text.training.tokens == end).sum() == len(text.training.starts)
    assert (text.held_out.asked == 4).all()
    with pytest.raises(TokenizerError, match="no token '<eos>'"):
        load_text(tiny(tmp_path, tokenizer="x", end_token="<eos>"), tokenizer, 8)


@pytest.mark.parametrize("kind", ["image.png", "packed.gz", "latin-1.txt"])
def test_the_bytes_of_any_file_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(256, size=40_000, dtype=np.uint8).tobytes()
    if kind == "latin-1.txt":
        content = content.replace(b"\0", b"\xe4")
    path = tmp_path / kind
    path.write_bytes(gzip.compress(content) if kind == "packed.gz" else content)
    text = load_text(tiny(tmp_path, data=path, held_out_tokens=10_000), Tokenizer(), 8)
    # The last sixteenth is held out, and about as much before it is left out.
    read = text.training.tokens.tobytes()
    assert content.startswith(read)
    held_out = text.held_out.tokens.tobytes()
    assert content.endswith(held_out)
    assert len(held_out) > 500
    assert 0.8 * len(content) < len(read) < len(content) - len(held_out) - len(content) // 16


def test_bytes_are_cut_where_documents_begin(tmp_path: Path) -> None:
    path = tmp_path / "records"
    records = [b"@" + bytes([number]) * (30 + number) + b"\xff\n" for number in range(20)]
    path.write_bytes(b"header\n" + b"".join(records))
    text = load_text(tiny(tmp_path, data=path, document_start="@"), Tokenizer(), 8)
    sides = [text.training, text.held_out]
    cut = [np.split(side.tokens, side.starts[1:]) for side in sides]
    assert sorted(one.tobytes() for side in cut for one in side) == sorted(records)
    assert [len(side) for side in cut] == [18, 2]
    with pytest.raises(ValueError, match=r"no line in .*records starts with document_start \('#'\)"):
        load_text(tiny(tmp_path, data=path, document_start="#"), Tokenizer(), 8)
    path.write_bytes(b"\0")
    with pytest.raises(ValueError, match="too little text"):
        load_text(tiny(tmp_path, data=path), Tokenizer(), 8)


def test_too_little_text_is_said_to_be_so(tmp_path: Path) -> None:
    for name, content in (("empty", ""), ("short", "ab")):
        folder = tmp_path / name
        write_corpus(folder, 0)
        (folder / "one.txt").write_text(content)
        with pytest.raises(ValueError, match="too little text"):
            load_text(tiny(tmp_path, data=folder), Tokenizer(), 8)
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        load_text(tiny(tmp_path, data=tmp_path / "nothing"), Tokenizer(), 8)


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_text_comes_back_from_a_stream_of_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else write_tokenizer(tmp_path / "t.json"))
    ids = tokenizer.encode(TEXT.encode()).tolist()
    decode = tokenizer.stream()
    pieces = [decode(token) for token in ids]
    assert "".join(pieces) == TEXT
    # Streamed: most of it is there long before the end, and a character is whole or not there.
    assert len("".join(pieces[: len(ids) // 2])) > len(TEXT) // 3
    assert "�" not in "".join(pieces)


def test_spaces_that_a_decoder_strips_at_the_start_are_kept_between_words() -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(made.to_str())
    decode = tokenizer.stream()
    assert "".join(decode(token) for token in tokenizer.encode(b"a b a").tolist()) == "a b a"


def test_a_tokenizer_made_for_fixed_lengths_neither_cuts_nor_fills_up(tmp_path: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(write_tokenizer(tmp_path / "t.json")))
    wanted = made.encode(TEXT).ids
    made.enable_truncation(4)
    made.enable_padding(length=900)
    made.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").encode(TEXT.encode()).tolist() == wanted


def test_the_vocabulary_holds_the_largest_id() -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 41}, unk_token="a"))
    assert Tokenizer(made.to_str()).vocab_size == 42


def test_wrong_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*nothing"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    for content in ("", "{}", "no json"):
        (tmp_path / TOKENIZER_FILE).write_text(content)
        with pytest.raises(TokenizerError, match="no tokenizer file of Hugging Face"):
            load_tokenizer(tmp_path)


def test_a_models_folder_tells_its_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path, 256).is_bytes
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and the model has 300 tokens"):
        tokenizer_of(tmp_path, 300)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.json"))
    tokenizer.save(tmp_path / "model")
    assert tokenizer_of(tmp_path / "model", 300).fingerprint == tokenizer.fingerprint
    with pytest.raises(TokenizerError, match="not the one that the model was trained with"):
        tokenizer_of(tmp_path / "model", 256)
    Tokenizer().save(tmp_path / "model")
    assert tokenizer_of(tmp_path / "model", 256).is_bytes


def test_pieces_are_what_models_take(tmp_path: Path) -> None:
    text = load_text(tiny(tmp_path), Tokenizer(), 8)
    [piece, _] = Stream(text.training, rows=2, segments=2, seed=0).window(0, range(2))
    assert piece.tokens.dtype == piece.labels.dtype == torch.int64
    assert piece.mask.dtype == piece.reset.dtype == torch.bool
    assert piece.tokens.shape == piece.labels.shape == piece.mask.shape == (2, 8)
    assert piece.reset.tolist() == [True, True]
