"""A comparison that is killed in the middle goes on, and ends with the numbers it would have had."""

from __future__ import annotations

import io
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from benchmarks import worker
from benchmarks.compare import Launch, compare, launch_here
from benchmarks.progress import LineDisplay
from benchmarks.results import FINISHED, Results, RunBusyError, read_json
from benchmarks.settings import plan
from tests.benchmarks.tiny import STREAM, TINY, comparison

# Time enough to be killed in.
LONG = ("steps=120", "pause=0.015")


def in_this_process(arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Any:
    """Does what a worker does, without the seconds that a new process takes."""
    folder, identity, seconds = arguments
    code = worker.main([folder, identity, str(os.getppid()), seconds])
    return SimpleNamespace(poll=lambda: code, returncode=code)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [in_this_process, launch_here])
def test_killed_in_the_middle_it_goes_on_with_the_same_numbers(tmp_path: Path, launch: Launch) -> None:
    spec = plan(TINY, STREAM, 0, smoke=True, assignments=LONG)
    results = Results(tmp_path / "killed")
    process = subprocess.Popen(comparison(results.folder, "--set", *LONG), stdout=subprocess.DEVNULL)
    progress = results.run_folder(spec.id) / worker.PROGRESS
    deadline = time.monotonic() + 120
    while (read_json(progress) or {}).get("step", 0) < 1:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(RunBusyError), results.claim(spec.id):
        pass
    process.kill()
    process.wait()
    assert not results.is_finished(spec.id)
    # At once: the worker of the killed comparison may still be saving itself.
    [after] = compare([spec], results, jobs=1, display=LineDisplay(io.StringIO()), launch=launch)
    whole_results = Results(tmp_path / "whole")
    [whole] = compare([spec], whole_results, jobs=1, display=LineDisplay(io.StringIO()), launch=launch)
    assert after["status"] == whole["status"] == FINISHED
    assert after["scores"] == whole["scores"]
    assert [entry["loss"] for entry in after["curve"]] == [entry["loss"] for entry in whole["curve"]]
    assert [record["status"] for record in results.records()] == [FINISHED]
