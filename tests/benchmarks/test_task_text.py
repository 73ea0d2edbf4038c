"""`text`: streams that are the documents, names found right, scores equal to an obvious loop's."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.corpus import load_corpus
from benchmarks.names import occurrences
from benchmarks.streams import NOTHING, ReadingOrder, deal
from benchmarks.task import IGNORED, Batch, create_task
from benchmarks.tasks.text import Text
from tests.benchmarks.programs import KINDS, SEGMENT, corpus_of, make, pieces, write_programs
from tests.reference import text as reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_programs(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    return make(folder, tmp_path_factory.mktemp("cache"), **KINDS[request.param])


def whole_rows(batches: list[Batch]) -> list[list[tuple[list[int], list[int]]]]:
    """For each row its documents, as the tokens read and the labels asked for."""
    rows: list[list[tuple[list[int], list[int]]]] = [[] for _ in batches[0].tokens]
    for batch in batches:
        assert batch.mask is not None
        assert batch.reset is not None
        for row, documents in enumerate(rows):
            if batch.reset[row]:
                documents.append(([], []))
            there = batch.mask[row]
            documents[-1][0].extend(batch.tokens[row][there].tolist())
            documents[-1][1].extend(batch.labels[row][there].tolist())
            # padding only at the end of a document
            assert not (there[1:] & ~there[:-1]).any()
    return rows


def test_training_rows_are_whole_documents_read_in_order(task: Text, folder: Path) -> None:
    known = {tuple(pieces(task, document)[0]) for document in corpus_of(folder).training}
    batches = [task.batch(seed=1, step=step, batch_size=4) for step in range(600)]
    for documents in whole_rows(batches):
        # the first begins at random, the last is not finished
        for tokens, labels in documents[1:-1]:
            assert (*tokens, labels[-1]) in known
            assert labels[:-1] == tokens[1:]
        first = (*documents[0][0], documents[0][1][-1])
        assert any(whole[len(whole) - len(first) :] == first for whole in known)


def test_a_row_begins_at_a_segment_border_with_a_reset(task: Text) -> None:
    batch = task.batch(seed=0, step=0, batch_size=16)
    assert batch.reset is not None
    assert batch.reset.all()
    position = batch.extras["position"][:, 0]
    assert (position % SEGMENT == 0).all()
    assert len(position.unique()) > 4


def test_each_epoch_reads_every_document_once() -> None:
    segments = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    order = ReadingOrder(segments, name="text", seed=0, rows=3)
    places = [[order.find(row, step) for step in range(200)] for row in range(3)]
    starts = sorted(order._documents[0] + order._documents[1] + order._documents[2])
    assert starts == sorted(list(range(8)) * order._epoch)
    for row in places:
        assert row[0].reset
        for before, after in itertools.pairwise(row):
            if after.segment:
                assert after == (before.document, before.segment + 1, False)
            else:
                assert after.reset
                assert before.segment == segments[before.document] - 1
    # rows do not read the same
    assert len({tuple(p.document for p in row) for row in places}) == 3


def test_more_rows_than_documents_is_fine(task: Text) -> None:
    batch = task.batch(seed=0, step=40, batch_size=50)
    assert batch.tokens.shape == (50, SEGMENT)


def test_dealing_for_evaluation_reads_everything_once_and_evenly() -> None:
    segments = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    steps = list(deal(segments, rows=3))
    assert len(steps) == 11  # 31 segments over 3 rows
    read = [place for places in steps for place in places if place != NOTHING]
    assert sorted(p[:2] for p in read) == [(d, s) for d in range(8) for s in range(segments[d])]
    assert all(place.reset == (place.segment == 0) for place in read)


def test_evaluation_reads_the_start_of_every_held_out_document(folder: Path, tmp_path: Path) -> None:
    for kind, limit in [("bytes", 700), ("bpe", 5000)]:
        task = make(folder, tmp_path, evaluation_tokens=limit, held_out=3, **KINDS[kind])
        held_out = load_corpus(str(folder), min_bytes=100, held_out=3).held_out
        expected = sorted(pieces(task, document)[0][: limit + 1] for document in held_out)
        for batch_size in (1, 2, 8):
            rows = whole_rows(list(task.evaluation(batch_size=batch_size)))
            assert len(rows) == min(batch_size, 3)
            found = [[*tokens, labels[-1]] for row in rows for tokens, labels in row]
            assert sorted(found) == expected


def test_any_file_is_read_as_byte_tokens_and_only_so(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(np.random.default_rng(0).bytes(40_000))
    task = Text(data=str(path), tokens="bytes", min_bytes=100, segment_length=64)
    batches = [task.batch(seed=0, step=step, batch_size=1) for step in range(800)]
    read = b"".join(bytes(documents[0]) for row in whole_rows(batches) for documents in row[1:-1])
    assert b"\0" in read
    assert all(bits == bits for name, bits in task.floor().items() if name == "bits per byte")
    with pytest.raises(ValueError, match=r"zero byte; .*tokens=bytes"):
        Text(data=str(path), tokens="bpe")


def test_bytes_add_up_to_the_documents(task: Text, folder: Path) -> None:
    total = sum(int(batch.extras["bytes"].sum()) for batch in task.evaluation(batch_size=2))
    expected = 0
    for document in corpus_of(folder).held_out:
        texts = pieces(task, document)[1][:5001]
        expected += sum(map(len, texts[1:]))
    assert total == expected


def test_names_of_a_hand_written_document() -> None:
    content = b"foo = bar(foo)\nbaz\nfoo for x in xyz2 0xabc caf\xc3\xa9s bar"
    ones = np.ones(len(content), dtype=np.int64)
    found = [(n.text.decode(), n.begin, n.back) for n in occurrences(content, ones, min_length=3, segment=8)]
    # by byte: bar at 6, foo at 10 (predicted from 9, segment 1; last seen at 2, segment 0), ...
    assert found == [
        ("bar", 6, None),
        ("foo", 10, 1),
        ("baz", 15, None),
        ("foo", 19, 1),
        ("xyz2", 32, None),
        ("bar", 50, 5),
    ]
    # a part of the tokens: names must lie wholly within
    assert len(list(occurrences(content, ones[:34], min_length=3, segment=8))) == 4
    assert list(occurrences(content, ones[:0], min_length=3, segment=8)) == []


def test_a_name_in_the_same_segment_is_one_that_is_in_reach_when_it_is_predicted() -> None:
    # predicted from token 7, the last of its segment, so the first segment is in reach
    near = list(occurrences(b"abc     abc", np.ones(11, dtype=np.int64), min_length=3, segment=8))
    assert [(n.begin, n.back) for n in near] == [(8, 0)]
    far = list(occurrences(b"abc      abc", np.ones(12, dtype=np.int64), min_length=3, segment=8))
    assert [(n.begin, n.back) for n in far] == [(9, 1)]


def named(task: Text, folder: Path) -> list[tuple[list[str], list[tuple[list[int], str]]]]:
    """The obvious reading: for each held-out document its tokens' texts, and its rare names."""
    corpus = corpus_of(folder)
    training = [document.content.decode() for document in corpus.training]
    found = []
    for document in corpus.held_out:
        texts = pieces(task, document)[1][:5001]
        rare = reference.rare_names(
            document.content.decode(), texts, training=training, at_most=2, min_length=3, segment=SEGMENT
        )
        found.append((texts, rare))
    return found


def test_rare_names_are_those_of_the_obvious_loop(task: Text, folder: Path) -> None:
    expected = sorted((len(tokens), group) for _, rare in named(task, folder) for tokens, group in rare)
    assert {group for _, group in expected} == set(task.groups)
    found: dict[int, list[int]] = {}
    for batch in task.evaluation(batch_size=3):
        occurrence, group = batch.extras["occurrence"], batch.groups
        assert torch.equal(occurrence >= 0, group >= 0)
        for index, value in zip(occurrence[group >= 0].tolist(), group[group >= 0].tolist(), strict=True):
            found.setdefault(index, []).append(value)
    assert sorted((len(all_), task.groups[all_[0]]) for all_ in found.values()) == expected
    assert all(len(set(all_)) == 1 for all_ in found.values())
    counts = {f"rare identifiers, {g}": sum(group == g for _, group in expected) for g in task.groups}
    assert {name: n for name, n in task.facts().items() if name in counts} == counts


def test_scores_are_those_of_the_obvious_loop(task: Text, folder: Path) -> None:
    # the bits of a token depend on the token before it and on itself, so both sides can know them
    table = torch.randn(task.vocab_size, task.vocab_size, generator=torch.Generator().manual_seed(0))
    bits = -table.double().log_softmax(-1) / math.log(2)
    scorer = task.scorer()
    for batch in task.evaluation(batch_size=2):
        scorer.update(table[batch.tokens], batch)
    documents = []
    for document, (texts, rare) in zip(corpus_of(folder).held_out, named(task, folder), strict=True):
        ids = pieces(task, document)[0][: len(texts)]
        by_token = [0.0, *(float(bits[a, b]) for a, b in itertools.pairwise(ids))]
        documents.append((by_token, [len(text) for text in texts], rare))
    expected = reference.scores(documents, segment=SEGMENT)
    result = {name: value for name, value in scorer.result().items() if not math.isnan(value)}
    assert result == pytest.approx(expected, rel=1e-5)
    assert task.headline in result


def test_a_copier_of_rare_names_pays_for_first_occurrences_only(task: Text) -> None:
    """Sure of every rare name that has occurred before, and clueless about all else."""

    def copy(batch: Batch) -> Tensor:
        known = batch.groups > 0
        logits = torch.zeros(*batch.tokens.shape, task.vocab_size)
        logits[known] = 100.0 * torch.nn.functional.one_hot(batch.labels[known], task.vocab_size)
        return logits

    scorer, tokens = task.scorer(), 0
    for batch in task.evaluation(batch_size=4):
        scorer.update(copy(batch), batch)
        tokens += int((batch.groups == 0).sum())
    result, counts = scorer.result(), scorer.counts()
    first = math.log2(task.vocab_size) * tokens / counts["identifier bits/first"]
    assert result["identifier bits/first"] == pytest.approx(first)
    assert task.chance()["identifier bits/first"] == pytest.approx(first)
    for group in ("same segment", "1-4 back", "5-16 back", "17+ back", "5+ back"):
        assert result[f"identifier bits/{group}"] == pytest.approx(0, abs=1e-6)
    far = counts["identifier bits/5-16 back"] + counts["identifier bits/17+ back"]
    assert counts["identifier bits/5+ back"] == far > 0


def test_an_evaluation_that_is_cut_short_leaves_half_read_names_out(task: Text) -> None:
    scorer, complete = task.scorer(), 0
    seen: dict[int, int] = {}
    for batch in list(task.evaluation(batch_size=3))[:7]:
        scorer.update(torch.zeros(*batch.tokens.shape, task.vocab_size), batch)
        for index in batch.extras["occurrence"][batch.groups >= 0].tolist():
            seen[index] = seen.get(index, 0) + 1
    sizes = [o.end - o.begin for o in task._occurrences]
    complete = sum(count == sizes[index] for index, count in seen.items())
    counts = scorer.counts()
    assert sum(counts[f"identifier bits/{group}"] for group in task.groups) == complete < len(sizes)


def test_chance_is_uniform_and_the_floor_knows_frequencies(task: Text, folder: Path) -> None:
    corpus = corpus_of(folder)
    ids = [token for document in corpus.training for token in pieces(task, document)[0]]
    counts = np.bincount(ids, minlength=task.vocab_size) + 1
    bits, size, asked = 0.0, 0, 0
    for document in corpus.held_out:
        tokens, texts = (part[1:5001] for part in pieces(task, document))
        bits -= float(np.log2(counts[tokens] / counts.sum()).sum())
        size += sum(map(len, texts))
        asked += len(tokens)
    assert task.floor()["bits per byte"] == pytest.approx(bits / size)
    assert task.chance()["bits per byte"] == pytest.approx(asked * math.log2(task.vocab_size) / size)


def test_the_fingerprint_follows_content_and_settings_not_the_place(folder: Path, tmp_path: Path) -> None:
    def fingerprint(root: Path, **options: object) -> str:
        return make(root, tmp_path / "cache", **{**KINDS["bytes"], **options}).fingerprint()

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(folder) == fingerprint(copy)
    others = [
        fingerprint(folder, **option)
        for option in [
            {"segment_length": 32},
            {"held_out": 1},
            {"min_name": 4},
            {"documents": 5},
            KINDS["bpe"],
        ]
    ]
    assert len({fingerprint(folder), *others}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "words"}, r"tokens \('words'\) must be one of bpe, bytes"),
        ({"vocab_size": 100}, r"vocab_size \(100\) must lie between 256"),
        ({"segment_length": 0}, r"segment_length \(0\) must be at least 1"),
        ({"held_out": 0}, r"held_out \(0\) must be at least 1"),
        ({"min_bytes": 1}, r"min_bytes \(1\) must be at least 2"),
        ({"documents": -1}, r"documents \(-1\) must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task("text", **options)


@pytest.mark.parametrize("length", [1, 3, 8, 100])
def test_any_segment_length_has_its_places(folder: Path, tmp_path: Path, length: int) -> None:
    task = make(folder, tmp_path, tokens="bytes", segment_length=length, evaluation_tokens=300)
    counts = task.chance(), task.scorer()
    for batch in task.evaluation(batch_size=4):
        counts[1].update(torch.zeros(*batch.tokens.shape, 256), batch)
    by_place = [n for name, n in counts[1].counts().items() if "/place" in name]
    assert sum(by_place) == counts[1].counts()["bits per byte"]


def test_importing_the_task_imports_no_tokenizers() -> None:
    code = "import sys, benchmarks.tasks.text; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_labels_are_never_asked_at_padding_or_across_documents(task: Text) -> None:
    for batch in task.evaluation(batch_size=3):
        assert batch.mask is not None
        assert torch.equal(batch.labels != IGNORED, batch.mask)
        inside = batch.mask[:, 1:]
        assert torch.equal(batch.tokens[:, 1:][inside], batch.labels[:, :-1][inside])
