"""Results made up so that the right cells and lines are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import DIVERGED, FAILED, FINISHED, Results, write_json

GAPS = ("gap 0", "gap 1", "gap 2")


def metric(name: str, series: str | None = None) -> dict[str, Any]:
    return {"name": name, "higher_is_better": True, "unit": "accuracy", "series": series}


FACTS = {
    "summary": "a made-up task",
    "headline": "mean accuracy",
    "metrics": [
        *(metric(f"speed/{place}", "speed") for place in ("slow", "fast")),
        *(metric(f"mean accuracy/{gap}", "accuracy") for gap in GAPS),
        metric("worst accuracy"),
        metric("mean accuracy"),
    ],
    "floor": {f"mean accuracy/{gap}": value for gap, value in zip(GAPS, (1.0, 0.25, 0.25), strict=True)},
    "floor_is": "best without memory (exact)",
    "chance": {"mean accuracy": 0.25, "mean accuracy/gap 0": None},
    "facts": {"letters": 26},
}


def record(model: str, seed: int, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{model}-{seed}",
        "model": model,
        "task": "made-up",
        "seed": seed,
        "tags": ["control"] if model == "window" else ["family"],
        "status": FINISHED,
        "command": f"memory-bench run --model {model} --task made-up --seed {seed}",
        "settings": {"train": {"steps": 10, "batch_size": 2, "threads": 1}},
        "versions": {"cpu": "abacus", "torch": "2", "python": "3", "memory-models": "0"},
        "task_facts": FACTS,
        "parameters": 89_123,
        "state_bytes": 0 if model == "window" else 8400.0,
        "peak_bytes": 3 * 2**28,
        "tokens_per_second": 25_000.0,
        "seconds": {"training": 60.0, "evaluation": 5.0, "cpu": 64.0},
        "loss": 0.1,
        "curve": [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0 / (seed + 1), "score": 0.5}],
        "scores": scores,
        "memory_use": {
            "drop": {"none": 0.7, "shuffled": 0.6, "frozen": 0.5},
            "scores": {mode: {"mean accuracy": 0.3} for mode in ("carried", "none", "shuffled", "frozen")},
        },
        **changes,
    }


def scores(value: float) -> dict[str, float]:
    return {entry["name"]: value for entry in FACTS["metrics"]}  # type: ignore[index]


def failure(model: str, seed: int, status: str) -> dict[str, Any]:
    entry = record(model, seed, {})
    kept = {name: entry[name] for name in ("id", "model", "task", "seed", "tags", "command", "settings")}
    return {**kept, "status": status, "error": "the loss is nan at step 3 of 10"}


def comparison_with_failures(tmp_path: Path) -> Path:
    """The folder of runs of three models, of which some went wrong."""
    results = Results(tmp_path / "results")
    results.append(record("window", 0, scores(0.2)))
    for seed, value in enumerate((0.9, 0.95, 1.0)):
        if seed == 1:
            results.append(failure("htm", 1, FAILED))
        results.append(record("htm", seed, scores(value)))
    results.append(failure("memxl", 0, DIVERGED))
    ids = ["window-0", "htm-0", "htm-1", "htm-2", "memxl-0", "gru-0"]
    runs = [{"id": i, "model": i[:-2], "seed": int(i[-1])} for i in ids]
    write_json(results.comparison, {"task": "made-up", "command": "memory-bench compare", "runs": runs})
    return results.folder
