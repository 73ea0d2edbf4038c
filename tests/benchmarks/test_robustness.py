"""A comparison that is killed in the middle goes on, and ends with the numbers it would have had."""

from __future__ import annotations

import io
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.compare import compare
from benchmarks.progress import LineDisplay
from benchmarks.results import FINISHED, Results, read_json
from benchmarks.settings import plan
from tests.benchmarks.tiny import STREAM, TINY, comparison

LONG = ("steps=150", "pause=0.002")


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    spec = plan(TINY, STREAM, 0, smoke=True, assignments=LONG)
    results = Results(tmp_path / "killed")
    process = subprocess.Popen(comparison(results.folder, "--set", *LONG), stdout=subprocess.DEVNULL)
    progress = results.run_folder(spec.id) / "progress.json"
    deadline = time.monotonic() + 120
    while (read_json(progress) or {}).get("step", 0) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not results.is_finished(spec.id)
    # At once: the worker of the killed comparison may still be saving itself.
    [after] = compare([spec], results, jobs=1, display=LineDisplay(io.StringIO()))
    [whole] = compare([spec], Results(tmp_path / "whole"), jobs=1, display=LineDisplay(io.StringIO()))
    assert after["status"] == whole["status"] == FINISHED
    assert after["scores"] == whole["scores"]
    assert [entry["loss"] for entry in after["curve"]] == [entry["loss"] for entry in whole["curve"]]
    assert [record["status"] for record in results.records()] == [FINISHED]
