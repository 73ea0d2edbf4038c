"""`memory-bench cost`: measure the cases one after the other, keep every figure, write the report."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost import SMOKE_OPTIONS, Case, plan
from benchmarks.provenance import versions
from benchmarks.results import FAILED, FINISHED, Record, Results
from benchmarks.settings import value_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options of `memory-bench cost` and run it; returns the exit code."""
    import tyro

    return tyro.cli(cost, args=arguments, prog="memory-bench cost", config=(tyro.conf.FlagCreatePairsOff,))


def cost(
    *,
    models: tuple[str, ...] = ("all",),
    lengths: tuple[int, ...] = (512, 2048, 8192),
    gradients: tuple[str, ...] = ("bptt",),
    rows: int = 1,
    threads: int = 1,
    set: tuple[str, ...] = (),
    smoke: bool = False,
    out: Path = Path("results/cost"),
    timeout: float = 1800.0,
) -> int:
    """What the models cost, untrained: time, peak memory, state and operations against length.

    Every case runs in a process of its own. The tables go to the terminal and, with pictures, to the folder;
    cases that were measured before with the same code are not measured again.

    Args:
        models: names of models; all is every family and every control.
        lengths: tokens of a row.
        gradients: how the gradient gets through the segments in training: bptt, checkpoint (activations
            computed again), replay (memory replay), truncated (not at all). Several draw the trade-off.
        rows: rows at once.
        threads: threads of a process; with one the times are CPU time, else wall time.
        set: options of the models as key=value, such as dim=512.
        smoke: tiny sizes, to see that it works.
        out: folder for results.jsonl, table.md, table.csv, index.html and the pictures.
        timeout: seconds after which a case is given up.

    Returns:
        Exit code: 0; 1 if a case failed; 2 for wrong use; 130 after Ctrl-C.
    """
    from benchmarks.members import all_models

    changes: dict[str, Any] = {}
    try:
        for assignment in set:
            name, equals, text = assignment.partition("=")
            if not equals or not name:
                raise ValueError(f"{assignment!r} is not of the form key=value, such as dim=512")
            changes[name.removeprefix("model.")] = value_of(text)
        names = [name for wish in models for name in (all_models() if wish == "all" else [wish])]
        cases = plan(
            list(dict.fromkeys(names)),
            (32, 64) if smoke else sorted(dict.fromkeys(lengths)),
            gradients=tuple(dict.fromkeys(gradients)),
            rows=rows,
            threads=threads,
            changes=changes,
            usual=SMOKE_OPTIONS if smoke else None,
        )
    except LookupError as error:
        print(f"memory-bench: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    except (TypeError, ValueError) as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return 2
    results = Results(out)
    command = shlex.join(
        ["memory-bench", "cost", *_words(models, lengths, gradients, rows, threads, set, smoke)]
    )
    try:
        records = measure_all(cases, results, timeout=timeout)
    except KeyboardInterrupt:
        print(f"Stopped; what was measured is kept in {out}. The same command goes on from there.")
        return 130
    from benchmarks.cost.report import write_report

    files = write_report(records, out, command=command)
    print((out / "table.md").read_text(encoding="utf-8"))
    print("written: " + ", ".join(str(path) for path in files))
    return 0 if all(record["status"] == FINISHED for record in records) else 1


def measure_all(cases: Sequence[Case], results: Results, *, timeout: float) -> list[Record]:
    """Measure what was not measured yet, one case at a time, and give the records of all cases, in order."""
    from benchmarks.progress import display_for

    latest = results.latest()
    done = {case.id: latest[case.id] for case in cases if results.is_finished(case.id)}
    display = display_for()
    display.start(total=len(cases), done=len(done))
    try:
        for case in cases:
            if case.id in done:
                continue
            title = f"{case.model} {case.length} {case.gradient}"
            display.job_started(title)
            record = {
                "id": case.id,
                "case": case.to_json(),
                **measure_apart(case, timeout=timeout),
                "versions": versions(),
            }
            results.append(record)
            display.job_ended(title, {**record, "model": case.model, "seed": 0, "task": "cost"})
            done[case.id] = record
    finally:
        display.stop()
    return [done[case.id] for case in cases]


def measure_apart(case: Case, *, timeout: float) -> Record:
    """The figures of a case from a process of its own, or what went wrong."""
    command = [sys.executable, "-m", "benchmarks.cost.measure"]
    try:
        process = subprocess.run(
            command,
            input=json.dumps(case.to_json()),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": FAILED, "error": f"no answer within {timeout:.0f} s"}
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"the process ended with code {process.returncode}"
        return {"status": FAILED, "error": reason, "traceback": lines[-30:]}
    found: Mapping[str, Any] = json.loads(process.stdout)
    return {"status": FINISHED, **found}


def _words(
    models: Sequence[str],
    lengths: Sequence[int],
    gradients: Sequence[str],
    rows: int,
    threads: int,
    changes: Sequence[str],
    smoke: bool,
) -> list[str]:
    words = ["--models", *models, "--lengths", *map(str, lengths), "--gradients", *gradients]
    words += ["--rows", str(rows), "--threads", str(threads)]
    return [*words, *(["--set", *changes] if changes else []), *(["--smoke"] if smoke else [])]
