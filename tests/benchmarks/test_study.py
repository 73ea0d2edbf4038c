"""The study: its parts can be planned, it goes on, and it publishes without touching words of others."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import study
from benchmarks.cli import main
from benchmarks.cost.report import write_report as write_cost_report
from benchmarks.results import Results, write_json
from benchmarks.study import Part, parts, run_study
from tests.benchmarks.made_up import record, scores
from tests.benchmarks.test_cost import record as cost_record


def test_every_part_is_a_command_that_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tyro

    from benchmarks import cli

    found = parts(work=tmp_path, seeds=(0, 1), steps_scale=0.5)
    assert len({part.name for part in found}) == len(found)
    for part in found:
        if part.command[0] != "cost":
            read = tyro.cli(cli._commands(), args=list(part.command), config=(tyro.conf.FlagCreatePairsOff,))
            assert read.folder() == part.folder
            assert read.seeds == (0, 1)
    assert main(["study", "--list", "--only", "recall-keys"]) == 0
    assert "--vary shift_keys=false,true tie_keys=false,true" in capsys.readouterr().out
    assert main(["study", "--only", "recal-keys"]) == 2
    assert "Did you mean 'recall-keys'" in capsys.readouterr().err


def fake(folder: Path) -> Part:
    return Part(name="one", title="First", command=("compare", "one"), folder=folder)


def write(folder: Path, table: str) -> None:
    results = Results(folder)
    results.append(record("htm", 0, scores(0.5)))
    results.append(record("htm", 9, scores(0.5)))
    runs = [{"id": "htm-0", "model": "htm", "seed": 0}]
    write_json(results.comparison, {"task": "t", "command": "", "runs": runs})
    (folder / "table.md").write_text(f"# t\n\n{table}\n\n## More\n\nmuch\n\n![a](a.png)\n")
    (folder / "table.csv").write_text("a\n")
    (folder / "a.png").write_bytes(b"\x89PNG")
    (folder / "runs").mkdir(exist_ok=True)


def test_a_part_is_published_and_its_tables_stand_between_their_markers(tmp_path: Path) -> None:
    part, document = fake(tmp_path / "work"), tmp_path / "RESULTS.md"
    tables = iter(["| first |", "| second |"])
    seen = []

    def command(words: Sequence[str]) -> int:
        seen.append(tuple(words))
        write(part.folder, next(tables))
        return 1

    document.write_text("# Results\n\nIntroduction.\n")
    assert run_study([part], command, publish=tmp_path / "out", document=document) == 1
    assert seen == [("compare", "one")]
    names = {path.name for path in (tmp_path / "out" / "one").iterdir()}
    assert names == {"table.md", "table.csv", "a.png", "results.jsonl"}
    lines = (tmp_path / "out" / "one" / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {"htm-0"}
    text = document.read_text()
    assert text.startswith("# Results\n\nIntroduction.\n")
    assert "## First" in text
    assert "| first |" in text
    assert "much" not in text
    document.write_text(text + "\nWhat it means.\n")
    run_study([part], command, publish=tmp_path / "out", document=document)
    again = document.read_text()
    assert "| second |" in again
    assert "| first |" not in again
    assert again.endswith("\nWhat it means.\n")
    assert again.count("## First") == 1


def test_the_tables_of_a_real_report_of_costs_are_all_published(tmp_path: Path) -> None:
    write_cost_report(
        [cost_record("window", 64, 0.5), cost_record("window", 128, 1.0)],
        tmp_path,
        command="memory-bench cost",
    )
    part = Part(name="cost", title="What it costs", command=("cost",), folder=tmp_path)
    study.write_tables(part, tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    # Of the report all tables, each a level below the part's own heading, and nothing else.
    wanted = re.findall(r"^### (.*)$", (tmp_path / "table.md").read_text(), flags=re.MULTILINE)
    assert {"Training tokens/s", "Decoding tokens/s", "Peak memory", "State per row"} <= {*wanted}
    assert re.findall(r"^#### (.*)$", text, flags=re.MULTILINE) == wanted
    assert text.count("| window |") == len(wanted)
    assert "To do it again" not in text
    assert "![" in (tmp_path / "table.md").read_text()
    assert "![" not in text


def test_two_studies_write_into_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "RESULTS.md"
    write_whole = study.write_atomically

    def slowly(path: Path, data: bytes) -> None:
        # Until the other one has read the document too, or waits for it.
        time.sleep(0.3)
        write_whole(path, data)

    monkeypatch.setattr(study, "write_atomically", slowly)
    tables = tmp_path / "table.md"
    tables.write_text("# t\n\n| cells |\n")
    found = [
        Part(name=name, title=name.title(), command=("compare",), folder=tmp_path) for name in ("one", "two")
    ]
    threads = [threading.Thread(target=study.write_tables, args=(part, tmp_path, document)) for part in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert document.read_text().count("| cells |") == 2


def test_a_part_whose_folder_another_command_holds_is_not_published(tmp_path: Path) -> None:
    part = fake(tmp_path / "work")
    write(part.folder, "| another's |")
    assert run_study([part], lambda _: 3, publish=tmp_path / "out", document=tmp_path / "R.md") == 3
    assert not (tmp_path / "R.md").exists()


def test_an_interrupted_part_ends_the_study_and_publishes_nothing(tmp_path: Path) -> None:
    part = fake(tmp_path / "work")
    write(part.folder, "| half |")
    code = run_study([part, part], lambda _: 130, publish=tmp_path / "out", document=tmp_path / "R.md")
    assert code == 130
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "R.md").exists()
