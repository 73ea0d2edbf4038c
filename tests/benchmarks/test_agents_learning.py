"""The objective of PPO, a training from start to end, and the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from torch import Tensor

import memory_models
from benchmarks import provenance
from benchmarks.agents import (
    Actor,
    Agent,
    AgentSettings,
    DivergedError,
    Inputs,
    PPOSettings,
    Training,
    Windows,
    learn,
    make_environments,
    objective,
    random_return,
    run,
)
from benchmarks.agents import settings as settings_module
from benchmarks.agents.command import Command, main, make_table
from benchmarks.agents.reactive import TARGET
from benchmarks.agents.settings import OPTIONS
from benchmarks.results import write_json
from memory_models.checkpoints import CheckpointError
from tests.benchmarks.agents_environments import Cue, side_by_side

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {"dim": 8, "depth": 1}


def some_windows(agent: Agent, *, count: int = 6, time: int = 4) -> Windows:
    inputs = torch.randn(count, time, agent.embed.in_features)
    memory = agent.module.init_memory(count).detach()
    resets = torch.zeros(count, time, dtype=torch.bool)
    with torch.no_grad():
        logits, values, _ = agent.read(inputs, memory, reset=resets)
    actions = torch.randint(agent.policy.out_features, (count, time))
    log_probs = torch.distributions.Categorical(logits=logits).log_prob(actions)
    advantages = torch.randn(count, time)
    return Windows(
        inputs=inputs,
        resets=resets,
        actions=actions,
        log_probs=log_probs,
        values=values,
        advantages=advantages,
        memory=memory,
    )


@pytest.fixture
def agent() -> Agent:
    module = memory_models.create("gru", **TINY, hidden=8, segment_length=4)
    return Agent(module, inputs=3, actions=4)


def policy_gradient(agent: Agent, windows: Windows, **options: Any) -> Tensor:
    settings = PPOSettings(value_weight=0, entropy_weight=0, normalise=False, **options)
    loss, _ = objective(agent, windows, settings)
    (gradient,) = torch.autograd.grad(loss, agent.policy.weight)
    return gradient


def test_before_the_first_update_the_objective_has_the_policy_gradient(agent: Agent) -> None:
    windows = some_windows(agent)
    logits = agent.read(windows.inputs, windows.memory, reset=windows.resets).logits
    chosen = torch.distributions.Categorical(logits=logits).log_prob(windows.actions)
    (expected,) = torch.autograd.grad(-(chosen * windows.advantages).mean(), agent.policy.weight)
    torch.testing.assert_close(policy_gradient(agent, windows), expected)


@pytest.mark.parametrize(
    ("moved", "advantage", "pulls"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False), (0.5, 1.0, True), (1.1, 1.0, True)],
)
def test_a_ratio_beyond_the_clip_pulls_only_back(
    agent: Agent, moved: float, advantage: float, pulls: bool
) -> None:
    windows = some_windows(agent)
    windows = dataclasses.replace(
        windows,
        log_probs=windows.log_probs - torch.tensor(moved).log(),
        advantages=torch.full_like(windows.advantages, advantage),
    )
    assert bool(policy_gradient(agent, windows, clip=0.2).any()) == pulls
    _, figures = objective(agent, windows, PPOSettings(clip=0.2))
    assert figures["clipped"] == (abs(moved - 1) > 0.2)
    torch.testing.assert_close(figures["kl"], torch.tensor(moved - 1).sub(torch.tensor(moved).log()))


def test_the_loss_of_the_values(agent: Agent) -> None:
    windows = some_windows(agent)
    values = windows.values
    # As if the agent had expected this much less while it acted.
    windows = dataclasses.replace(windows, values=values - 3, advantages=torch.full_like(values, 5.0))
    _, free = objective(agent, windows, PPOSettings())
    torch.testing.assert_close(free["value_loss"], torch.tensor(0.5 * (3.0 - 5.0) ** 2))
    _, near = objective(agent, windows, PPOSettings(value_clip=1.0))
    torch.testing.assert_close(near["value_loss"], torch.tensor(0.5 * (1.0 - 5.0) ** 2))
    _, wide = objective(agent, windows, PPOSettings(value_clip=4.0))
    torch.testing.assert_close(wide["value_loss"], free["value_loss"])


def test_the_loss_is_the_weighted_sum(agent: Agent) -> None:
    windows = some_windows(agent)
    loss, figures = objective(agent, windows, PPOSettings(value_weight=0.3, entropy_weight=0.7))
    expected = figures["policy_loss"] + 0.3 * figures["value_loss"] - 0.7 * figures["entropy"]
    torch.testing.assert_close(loss.detach(), expected)
    # Normalised advantages have mean 0, and the ratio is 1.
    torch.testing.assert_close(figures["policy_loss"], torch.tensor(0.0), rtol=0, atol=1e-6)


def test_learning_leaves_a_rollout_when_the_policy_has_moved_far(agent: Agent) -> None:
    windows = some_windows(agent)

    def moved(target: float | None) -> Tensor:
        torch.manual_seed(0)
        own = Agent(agent.module, inputs=3, actions=4)
        before = own.policy.weight.detach().clone()
        optimizer = torch.optim.SGD(own.policy.parameters(), lr=1.0)
        learn(own, optimizer, windows, PPOSettings(epochs=5, minibatches=2, target_kl=target))
        return (own.policy.weight - before).norm()

    assert moved(1e-9) < moved(None)


def test_learning_refuses_what_is_not_finite_and_leaves_the_weights(agent: Agent) -> None:
    windows = some_windows(agent)
    windows = dataclasses.replace(windows, advantages=windows.advantages / 0)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    with pytest.raises(DivergedError, match="lower the learning"):
        learn(agent, torch.optim.Adam(agent.parameters()), windows, PPOSettings(minibatches=1))
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    with pytest.raises(ValueError, match="6 windows cannot be cut into 7 minibatches"):
        learn(agent, torch.optim.Adam(agent.parameters()), windows, PPOSettings(minibatches=7))


def test_figures_of_learning(agent: Agent) -> None:
    windows = some_windows(agent)
    figures = learn(agent, torch.optim.Adam(agent.parameters()), windows, PPOSettings())
    returns = windows.values + windows.advantages
    explained = 1 - windows.advantages.var() / returns.var()
    assert figures["explained"] == pytest.approx(explained.item(), rel=1e-4)
    assert set(figures) == {
        "policy_loss",
        "value_loss",
        "entropy",
        "kl",
        "clipped",
        "gradient",
        "explained",
    }


# A training from start to end.


SMALL: dict[str, Any] = {
    "environment_options": {"k": 2},
    "memory_options": {"dim": 16, "depth": 1},
    "steps": 192,
    "rows": 4,
    "segment_length": 4,
    "segments": 4,
    "ppo": PPOSettings(epochs=1, minibatches=2),
}


def small(**options: Any) -> AgentSettings:
    return AgentSettings(**{**SMALL, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    folder = tmp_path_factory.mktemp("run")
    said: list[str] = []
    result = run(small(memory="gru", rows=16, steps=2048), folder, say=said.append, every=0.0)
    assert result is not None
    return folder, result, said


def test_a_run_leaves_its_curve_and_result(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, result, said = finished
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [256 * (i + 1) for i in range(8)]
    assert lines[0]["return"] is None, "no episode of 51 steps ends in the first 16"
    assert -1 <= lines[-1]["return"] == result["return"] <= 1
    assert sum(line["episodes"] for line in lines) == result["episodes"] == 2 * 16
    assert sorted(path.name for path in folder.iterdir()) == ["curve.jsonl", "result.json", "settings.json"]
    assert json.loads((folder / "settings.json").read_text())["environment_options"] == {"k": 2}
    assert said[0].startswith("RepeatPreviousEasy gru seed 0: step 256 of 2048, no episode ended yet")
    assert "return " in said[-1]


def test_a_run_that_ended_is_not_done_again(
    finished: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "advance", lambda self: pytest.fail("trained again"))
    folder, result, _ = finished
    assert run(small(memory="gru", rows=16, steps=2048), folder) == json.loads(json.dumps(result))


def test_a_run_that_was_stopped_goes_on_with_its_weights(tmp_path: Path) -> None:
    settings = small(memory="gru")
    assert settings.updates == 3
    assert run(settings, tmp_path, say=lambda _: None, stopped=lambda: True) is None
    fresh, again = Training(settings), Training(settings)
    assert not fresh.restore(tmp_path / "nowhere")
    assert again.restore(tmp_path)
    assert (again.update, again.steps, len(again.curve)) == (1, 64, 1)
    assert not torch.equal(again.agent.policy.weight, fresh.agent.policy.weight)
    said: list[str] = []
    result = run(settings, tmp_path, say=said.append)
    assert said[0] == "RepeatPreviousEasy gru seed 0: goes on at step 64"
    assert result is not None
    assert result["steps"] == 192
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 3


def test_what_changes_the_numbers_changes_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def ids() -> list[str]:
        return [small(memory=memory, memory_options={}).id for memory in ("gru", "none")]

    before = ids()
    assert ids() == before
    assert small(memory="gru", memory_options={}, seed=1).id != before[0]
    with monkeypatch.context() as patch:
        # What a member gets unless it is told otherwise.
        patch.setitem(OPTIONS, "gru", {"hidden": 16})
        assert [mine == other for mine, other in zip(ids(), before, strict=True)] == [False, True]
    digest = provenance._digest_of
    for changed in ("benchmarks.agents.ppo", "memory_models"):
        with monkeypatch.context() as patch:
            patch.setattr(
                provenance,
                "_digest_of",
                lambda module, alone=False, changed=changed: (
                    b"new" if module == changed else digest(module, alone=alone)
                ),
            )
            assert not set(ids()) & set(before)
    with monkeypatch.context() as patch:
        patch.setattr(settings_module, "version_of", lambda name: "9.9")
        assert not set(ids()) & set(before)


def test_results_of_other_code_are_refused_and_old_ones_can_be_read(
    finished: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    _, result, _ = finished
    settings = small(memory="gru", rows=16, steps=2048)
    assert result["id"] == settings.id
    write_json(tmp_path / "result.json", result | {"id": "0123456789ab"})
    with pytest.raises(CheckpointError, match="other code or libraries"):
        run(settings, tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        run(small(memory="gru"), tmp_path)
    old = {name: value for name, value in result.items() if name != "id"}
    write_json(tmp_path / "result.json", old)
    assert run(settings, tmp_path) == json.loads(json.dumps(old))


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    run(small(memory="gru"), tmp_path, say=lambda _: None, stopped=lambda: True)
    with pytest.raises(CheckpointError, match="other settings"):
        Training(small(memory="gru", seed=1)).restore(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        Training(small(memory="gru")).restore(tmp_path)


@pytest.mark.parametrize("memory", [*OPTIONS, "window", "none"])
def test_every_member_trains_with_its_own_options(memory: str) -> None:
    usual = small(memory=memory, memory_options={}).member_options()
    assert usual.items() >= OPTIONS.get(memory, {}).items()
    assert usual["segment_length"] == 4
    training = Training(small(memory=memory, previous_action=True, previous_reward=True, clock=True))
    before = training.agent.embed.weight.detach().clone()
    line = training.advance()
    assert not torch.equal(training.agent.embed.weight, before)
    assert line["step"] == 64
    assert training.steps == 64


def test_the_learning_rate_falls_to_nothing_or_stays() -> None:
    for anneal in (True, False):
        training = Training(small(memory="none", anneal=anneal, learning_rate=3e-3))
        rates = []
        for _ in range(training.settings.updates):
            training.advance()
            rates.append(training.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([3e-3, 2e-3, 1e-3] if anneal else [3e-3] * 3)


def test_a_random_agent_has_the_return_that_the_rules_give() -> None:
    # 52 cards, each answered rightly one time in four, for a 52nd of a point more or less.
    assert random_return("AutoencodeEasy", episodes=50) == pytest.approx(-0.5, abs=0.05)
    assert random_return("CartPole-v1", episodes=20) == pytest.approx(22, abs=8)


def wrong_settings() -> list[tuple[Callable[[], Any], type[Exception], str]]:
    return [
        (lambda: small(rows=0), ValueError, r"rows \(0\)"),
        (lambda: small(window=3), ValueError, r"segments \(4\) must be a multiple of window \(3\)"),
        (lambda: small(learning_rate=-1.0), ValueError, "learning_rate"),
        (lambda: small(rows=1, window=4), ValueError, "fewer than minibatches"),
        (lambda: small(memory="hmt").member_options(), LookupError, "Did you mean 'htm'"),
        (lambda: small(memory_options={"dpth": 1}).member_options(), TypeError, "Did you mean 'depth'"),
        (lambda: make_environments("RepeatPreviousEsay", 1), LookupError, "'RepeatPreviousEasy'"),
        (lambda: make_environments("CartPole-v1", 0), ValueError, r"rows \(0\)"),
        (lambda: PPOSettings(discount=1.5), ValueError, "discount"),
        (lambda: PPOSettings(epochs=0), ValueError, "epochs"),
        (lambda: PPOSettings(clip=0), ValueError, "clip"),
        (lambda: PPOSettings(value_clip=-1), ValueError, "value_clip"),
        (lambda: PPOSettings(entropy_weight=-0.1), ValueError, "entropy_weight"),
        (lambda: Training(small(environment="Pendulum-v1", environment_options={})), TypeError, "discrete"),
    ]


@pytest.mark.parametrize("case", range(len(wrong_settings())))
def test_wrong_settings_are_named_with_the_way_out(case: int) -> None:
    make, kind, words = wrong_settings()[case]
    with pytest.raises(kind, match=words):
        make()


# The command.


def test_the_command_trains_and_writes_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(
        f"--memory gru none --seeds 0 1 --out {tmp_path} --steps 480 --rows 4 --segment-length 60 "
        "--segments 1 --window 1 --set dim=16 gru.hidden=8 none.depth=2 --environment-set k=2 "
        "--ppo.epochs 1 --ppo.minibatches 1 --best 1"
    )
    assert main(words) == 0
    table = (tmp_path / "table.md").read_text()
    shown = capsys.readouterr().out
    for name in ("gru", "none"):
        (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert line in shown
    assert "--memory gru none --seeds 0 1" in table
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.name.rpartition("-")[0] for path in runs] == ["gru-0", "gru-1", "none-0", "none-1"]
    options = [json.loads((path / "result.json").read_text())["member_options"] for path in runs]
    assert [option.get("hidden") for option in options] == [8, 8, None, None]
    assert [option["depth"] for option in options] == [1, 1, 2, 2]
    assert {option["dim"] for option in options} == {16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--memory hmt", "Did you mean 'htm'"),
        ("--environment RepeatPreviousEsay", "Did you mean 'RepeatPreviousEasy'"),
        ("--set gru.dpth=1 --memory gru", "Did you mean 'depth'"),
        ("--set htm.depth=1 --memory gru", "not among --memory gru"),
        ("--set depth", "key=value"),
        ("--rows 0", "rows (0) must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*shlex.split(words), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_gymnasium_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("benchmarks.agents")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"memory-models\[rl\]"):
        importlib.import_module("benchmarks.agents")


def test_a_table_has_the_range_over_the_seeds() -> None:
    def result(memory: str, value: float | None) -> dict[str, Any]:
        return {
            "settings": {"memory": memory},
            "return": value,
            "steps": 1000,
            "cpu_seconds": 12.0,
            "weights": 5,
            "state_bytes": 64,
        }

    table = make_table([result("htm", 0.25), result("htm", 0.75), result("none", None)], -0.5)
    assert "| `htm` | +0.500 (+0.250 to +0.750) | 2 | 1,000 | 12 | 5 | 64 |" in table
    assert "| `none` | none ended | 1 |" in table
    assert "| at random | -0.500 |" in table


def test_the_defaults_of_the_command_are_those_of_a_run() -> None:
    (settings,) = Command(memory=("htm",)).settings()
    assert settings == AgentSettings()
    assert AgentSettings(memory="none").target == TARGET


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["gru", "memxl", "none"])
def test_an_agent_learns_what_only_a_memory_can_know(memory: str) -> None:
    """Three signs, answered 2 to 6 steps later, beyond a segment of 2: chance is a return of -1/3."""
    options = AgentSettings(memory=memory, segment_length=2).member_options() | {"dim": 32}
    module = memory_models.create(TARGET if memory == "none" else memory, **options)
    environments = side_by_side([Cue() for _ in range(32)])
    inputs = Inputs(environments.single_observation_space, 3)
    agent = Agent(module, inputs=inputs.width, actions=3)
    actor = Actor(agent, environments, inputs, seed=0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    settings = PPOSettings(minibatches=2)
    returns: list[float] = []
    for _ in range(28):
        rollout = actor.collect(segments=8, window=4)
        learn(agent, optimizer, rollout.windows(discount=0.95, trace=0.95), settings)
        returns += rollout.returns
    reached = sum(returns[-300:]) / 300
    if memory == "none":
        assert abs(reached + 1 / 3) < 0.2
    else:
        assert reached > 0.8


# The example.


def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = ROOT / "examples" / "ppo_popgym.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = example(monkeypatch)
    monkeypatch.setattr(module, "ROWS", 4)
    reached = module.main(["--memory", "window", "--steps", "256"])
    assert -1 <= reached < 0.5
    assert "step     256: return" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_learns_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert example(monkeypatch).main([]) > 0.8


def test_the_commands_of_the_docs_are_understood() -> None:
    text = (ROOT / "docs" / "how-to" / "agents.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python -m benchmarks\.agents (.*)$", text, re.M)
    assert len(lines) >= 4
    for line in lines:
        assert tyro.cli(Command, args=shlex.split(line)).settings(), line
