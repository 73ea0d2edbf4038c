"""Every code block of the README is run: the Python ones in order, the commands as far as seconds go."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "sh"
    for line in code.splitlines()
    if line and not line.startswith("#")
]
# Behind the README's own words, where the last one counts: each run is a process that takes seconds to start.
SMALL = {
    "compare": ["--smoke", "--seeds", "0", "--models", "memorizing", "window", "--no-controls"],
    "run": ["--smoke"],
    "sweep": ["--smoke"],
    "cost": ["--smoke", "--lengths", "32"],
    "train": [
        *("--steps", "2", "--sample-tokens", "0"),
        *("--set", "dim=16", "depth=1", "heads=2", "segment_length=8"),
    ],
    "generate": ["--tokens", "5"],
}
BENCH = [sys.executable, "-c", "import sys; from benchmarks.cli import main; sys.exit(main())"]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert len(PYTHON) >= 4
    assert all(command.split()[0] in ("make", "memory-bench") for command in COMMANDS)


def test_the_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), namespace)
    assert (tmp_path / "my-model" / "model.safetensors").exists()
    assert "read" in namespace


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_the_make_commands_name_targets(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Their words are read by tests/test_docs.py, and each command runs in a test of its own, with less to start.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bench_commands_run(tmp_path: Path) -> None:
    # The same words, small: --smoke for what trains, and a file that is there for what reads one.
    text = tmp_path / "path" / "to" / "enwik8.gz"
    text.parent.mkdir(parents=True)
    import gzip

    words = "".join(
        ("  <page>\n" if i % 200 == 0 else "") + f"identifier_{i % 97} = remember({i % 13})\n"
        for i in range(4000)
    )
    text.write_bytes(gzip.compress(words.encode()))
    lines = [c for c in COMMANDS if c.startswith("memory-bench")]
    assert any(" list" in line for line in lines)
    assert any(" compare" in line for line in lines)
    for line in lines:
        arguments = shlex.split(line)[1:]
        if arguments[0] == "speed":
            continue  # needs the published packages; tests/benchmarks/test_speed.py runs it where they are
        arguments += SMALL.get(arguments[0], [])
        done = subprocess.run([*BENCH, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "results" / "recall" / "table.md").exists()
