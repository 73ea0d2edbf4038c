"""Runs on Ray: the same numbers as here, the same words of a failure."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from benchmarks.compare import compare, launch_here
from benchmarks.fanout import launcher
from benchmarks.progress import LineDisplay
from benchmarks.results import FAILED, FINISHED, Results
from benchmarks.settings import plan
from tests.benchmarks.tiny import STREAM, TINY


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="local, ray"), launcher("moon", 1):
        pass


def test_local_is_the_usual_way() -> None:
    with launcher("local", 1) as launch:
        assert launch is launch_here


@pytest.mark.slow
def test_ray_gives_the_same_numbers_and_the_same_words(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    good = plan(TINY, STREAM, 0, smoke=True)
    dying = plan(TINY, STREAM, 0, smoke=True, assignments=["trouble=die"])
    said = io.StringIO()
    found = {}
    for place in ("local", "ray"):
        results = Results(tmp_path / place)
        with launcher(place, 1) as launch:
            found[place] = compare([good, dying], results, jobs=1, display=LineDisplay(said), launch=launch)
    for here, there in zip(found["local"], found["ray"], strict=True):
        assert here["status"] == there["status"]
        assert here.get("scores") == there.get("scores")
        assert here.get("error") == there.get("error")
        assert here.get("stderr") == there.get("stderr")
    assert [record["status"] for record in found["ray"]] == [FINISHED, FAILED]
    assert found["ray"][1]["stderr"][-1] == "last words"
