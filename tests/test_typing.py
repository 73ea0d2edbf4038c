"""What a type checker finds in the project, and what it tells those who use the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SNIPPET = """
from typing import Any, assert_type

import torch
from torch import Tensor

from htm.config import HTMConfig
from htm.memory import HTMMemory
from htm.model import HTM
from memory_models import LMOutput, MemoryLM, create, create_lm, generate, unroll

x = torch.zeros(1, 4, 256)
member = HTM(HTMConfig())
y, memory = assert_type(member(x), tuple[Tensor, HTMMemory])
assert_type(member(x, memory), tuple[Tensor, HTMMemory])
assert_type(unroll(member, x, memory), tuple[Tensor, HTMMemory])
assert_type(create("htm")(x)[0], Tensor)

tokens = torch.zeros(1, 4, dtype=torch.int64)
lm = create_lm("htm", vocab_size=5)
assert_type(lm(tokens, labels=tokens), LMOutput)
assert_type(unroll(lm, tokens), tuple[Tensor, Any])
assert_type(unroll(torch.compile(lm), tokens), tuple[Tensor, Any])
assert_type(MemoryLM.from_pretrained("folder"), MemoryLM)
for step in generate(MemoryLM.from_pretrained("folder"), tokens, max_new_tokens=1):
    assert_type(step.token, Tensor)
"""


@pytest.mark.early
def test_the_checker_finds_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_calls_have_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(SNIPPET)
    # The checker of the project's own settings would not be as strict as a user's.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    done = subprocess.run(
        [*command, f"--cache-dir={tmp_path}", str(tmp_path / "user.py")],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
