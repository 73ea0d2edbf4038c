"""How `text` encodes its documents: whole names, byte for byte, learned and kept once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tokens as encoding
from benchmarks.corpus import Corpus, Document
from benchmarks.tasks.text import Text
from tests.benchmarks.programs import KINDS, corpus_of, make, pieces, write_programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_programs(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    return make(folder, tmp_path_factory.mktemp("cache"), **KINDS[request.param])


def test_names_are_never_glued_to_anything(folder: Path, tmp_path: Path) -> None:
    task = make(folder, tmp_path, **KINDS["bpe"])
    assert task.vocab_size == 300
    for document in corpus_of(folder).held_out:
        texts = pieces(task, document)[1]
        assert "".join(texts).encode() == document.content
        for text in texts:
            assert all(c.isalnum() or c == "_" for c in text) or not any(
                c.isalnum() or c == "_" for c in text
            )


def test_the_encoding_is_learned_from_training_documents_only(folder: Path, tmp_path: Path) -> None:
    corpus = corpus_of(folder)
    other = tuple(Document(d.name, b"zzzzqqqq zzzzqqqq\n" * 100 + d.content) for d in corpus.held_out)
    changed = Corpus(corpus.description, corpus.training, other)
    a, b = (
        encoding.tokenise(c, kind="bpe", vocab_size=300, cache=tmp_path / name)
        for name, c in [("a", corpus), ("b", changed)]
    )
    assert a.tokenizer == b.tokenizer
    assert a.fingerprint == b.fingerprint


def test_any_text_is_encoded_byte_for_byte(tmp_path: Path) -> None:
    text = "naïve café\r\n\t\x0b\x0c 中文 名前_x1 🙂🙂\n\n\n  end  \u2028 \u00a0x"
    corpus = Corpus("", (Document("a", text.encode() * 20),), (Document("b", text.encode()),))
    found = encoding.tokenise(corpus, kind="bpe", vocab_size=280, cache=tmp_path)
    assert found.lengths[found.held_out[0]].sum() == len(text.encode())
    assert found.lengths[found.training[0]].sum() == 20 * len(text.encode())
    import tokenizers

    assert tokenizers.Tokenizer.from_str(found.tokenizer).decode(found.held_out[0].tolist()) == text


def test_the_encoding_is_made_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(folder, tmp_path, **KINDS["bpe"])
    (kept,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_byte_pairs", lambda *_: pytest.fail("trained again"))
        second = make(folder, tmp_path, **KINDS["bpe"])
    assert second.fingerprint() == first.fingerprint()
    batches = (task.batch(seed=0, step=3, batch_size=4).tokens for task in (first, second))
    assert torch.equal(*batches)
    # a file that was cut short is made anew
    kept.write_bytes(kept.read_bytes()[:1000])
    assert make(folder, tmp_path, **KINDS["bpe"]).fingerprint() == first.fingerprint()
    assert "cannot be read" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_the_encoding_may_be_read_by_whoever_may_read_the_users_files(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "cache", **KINDS["bpe"])
    (kept,) = (tmp_path / "cache").iterdir()
    usual = tmp_path / "usual"
    usual.touch()
    assert kept.stat().st_mode == usual.stat().st_mode


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert make(folder, tmp_path / "file", **KINDS["bpe"]).vocab_size == 300
    assert "cannot be written" in caplog.text


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert encoding.default_cache() == tmp_path / "memory-models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert encoding.default_cache() == Path.home() / ".cache" / "memory-models"


def test_the_encoding_is_kept_with_a_run(task: Text, tmp_path: Path) -> None:
    task.keep(tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer.json"
    assert kept.exists() == (task.config.tokens == "bpe")
    if kept.exists():
        assert len(json.loads(kept.read_text())["model"]["vocab"]) == task.vocab_size


def test_without_tokenizers_the_error_tells_the_way_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"memory-models\[bench\].*tokens='bytes'"):
        make(folder, tmp_path, **KINDS["bpe"])
    assert make(folder, tmp_path, tokens="bytes").vocab_size == 256
