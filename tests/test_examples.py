"""The scripts of examples/ run, and show what they say they show."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import memory_models
from memory_models.models import ENTRY_POINTS, ModelInfo
from memory_models.registry import Registry
from tests.plug_in import PLUG_IN, write_entry_points

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = (
    "compare_on_my_task.py",
    "memory_in_my_network.py",
    "knn_memory_alone.py",
    "htm_attention_alone.py",
    "memory_replay_own_model.py",
    "attach_to_gpt2.py",
    "from_published_package.py",
    "plugin_model/check.py",
    "ppo_popgym.py",
)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module, under its own name as when its folder is on the path."""
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("plugin_model/fading_memory.py", monkeypatch)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_shows_and_is_in_the_list(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert "Takes " in (ast.get_docstring(tree) or "")
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"
    assert f"`{name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_members_compared_on_a_task_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load("compare_on_my_task.py", monkeypatch)
    smaller = ["steps=40", "warmup=5", "batch_size=16", "evaluation_sequences=64", "segments=3"]
    smaller += ["segment_length=6", "curve_points=1"]
    found = module.main(("memformer", "window"), [*module.SETTINGS, *smaller], tmp_path)
    floor = found["window"]["task_facts"]["floor"]["accuracy/gap 2"]
    assert floor == 1 / 8
    assert found["memformer"]["scores"]["accuracy/gap 2"] > 0.9
    assert found["memformer"]["memory_use"]["drop"]["none"] > 0.5
    assert found["window"]["scores"]["accuracy/gap 0"] > 0.9
    assert found["window"]["scores"]["accuracy/gap 2"] < 0.4
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_the_task_of_ones_own_has_a_right_answer_key(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load("compare_on_my_task.py", monkeypatch).Codeword(evaluation_sequences=16)
    scorer = task.scorer()
    for batch in task.evaluation(batch_size=8):
        scorer.update(task.oracle(batch), batch)
    assert scorer.result()["worst accuracy"] == 1


def test_a_memory_in_ones_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("memory_in_my_network.py", monkeypatch)
    module.SEGMENTS = 3
    found = module.main(60)
    assert min(found["with memory"]) > 0.9
    assert found["memory emptied"][0] > 0.9
    assert max(found["memory emptied"][1:]) < 0.4


def test_knn_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load("knn_memory_alone.py", monkeypatch).main()
    assert found["own memory"] > 0.9
    assert found["after renaming"] > 0.9
    assert found["somebody else's"] < 0.3
    assert found["pairs of user 0 after clear"] == 0
    assert found["pairs of user 1"] == 400
    assert found["same neighbours from disk"] == 1


def test_htm_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load("htm_attention_alone.py", monkeypatch).main(140)
    assert found["accuracy"] > 0.9
    assert found["with another walk's memory"] < 0.4
    assert found["share of the memory read"] == 1 / 8
    assert found["difference of the stream"] < 1e-4


def test_memory_replay_of_ones_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load("memory_replay_own_model.py", monkeypatch).main()
    assert found["difference"] < 1e-9
    assert found["replay"] < found["bptt"] / 8


def test_a_memory_attached_to_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    module = load("attach_to_gpt2.py", monkeypatch)
    module.PIECES = 2
    found = module.main(40)
    assert found["unchanged when attached"] == 1
    assert found["tensors of GPT-2 changed by training"] == 0
    assert found["names right, memory carried"] > 0.5
    assert found["names right, memory reset"] < 0.3


def test_code_of_the_published_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load("from_published_package.py", monkeypatch).main(6)
    assert len(found) == 4
    for losses in found.values():
        assert losses[-1] < losses[0] - 0.1


def test_a_plug_in_keeps_the_rules_and_is_found_by_its_target(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load("plugin_model/check.py", monkeypatch).main(skip=("compile",))
    assert type(model.module) is plugin.Fading
    assert "keeps 22 of 23 rules" in capsys.readouterr().out


def test_a_plug_in_is_what_its_formula_says(plugin: ModuleType) -> None:
    model: Any = memory_models.create("fading_memory:Fading", dim=4, averages=5, segment_length=3).double()
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    y, memory = memory_models.unroll(model, x)
    decay = torch.exp(-torch.exp(-model.log_time))
    state = torch.zeros(2, 5, dtype=torch.float64)
    for t, token in enumerate(x.unbind(1)):
        normed = token / (token.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
        written = (normed * model.norm.weight) @ model.write_weights.weight.T
        state = decay * state + (1 - decay) * written
        torch.testing.assert_close(y[:, t], token + state @ model.read_weights.weight.T)
    torch.testing.assert_close(memory.averages, state)


def test_a_plug_ins_entry_point_names_it(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_entry_points(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "fading" in [point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    registry: Registry[ModelInfo] = Registry("model", group=ENTRY_POINTS, make=ModelInfo)
    assert registry.names() == ["fading"]
    assert registry.load("fading") is plugin.Fading


@pytest.mark.slow
def test_a_plug_in_installs_and_joins_the_family(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path), str(PLUG_IN)], check=True)
    program = "import memory_models; print(type(memory_models.create('fading', dim=8)).__module__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "fading_memory\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    if name.startswith("attach"):
        pytest.importorskip("transformers")
    if name.startswith("ppo"):
        pytest.importorskip("popgym")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
