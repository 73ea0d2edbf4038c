"""Small sweeps of the smallest model, done in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as compare_module
from benchmarks.progress import LineDisplay
from benchmarks.results import Record, Results
from benchmarks.sweep import SweepPlan, plan_sweep, run_sweep, write_sweep
from benchmarks.train import run
from tests.benchmarks.tiny import STREAM, TINY


def planned(*vary: str, mode: str = "train", seeds: tuple[int, ...] = (0,), **options: Any) -> SweepPlan:
    return plan_sweep(TINY, STREAM, vary, seeds, mode=mode, smoke=True, **options)


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `compare` do its runs here, one after the other; returns the ids in the order of their starts."""
    started: list[str] = []

    def compare(specs: Any, results: Results, *, display: Any, **_: Any) -> list[Record]:
        display.start(total=len(specs), done=0)
        for spec in specs:
            if not results.is_finished(spec.id):
                started.append(spec.id)
                run(spec, results)
        return [results.latest()[spec.id] for spec in specs]

    monkeypatch.setattr(compare_module, "compare", compare)
    return started


def do(plan: SweepPlan, folder: Path) -> list[Record]:
    results = Results(folder)
    write_sweep(plan, results, "memory-bench sweep")
    return run_sweep(plan, results, jobs=1, display=lambda: LineDisplay(io.StringIO()))
