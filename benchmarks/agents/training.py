"""An agent in training: act, learn, note what came of it; stopped, it goes on with the weights it had."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memory_models
from benchmarks.agents.agent import Agent
from benchmarks.agents.environments import make_environments
from benchmarks.agents.ppo import learn
from benchmarks.agents.rollout import Actor
from benchmarks.agents.settings import AgentSettings
from benchmarks.agents.spaces import Inputs, count_actions
from benchmarks.provenance import versions
from benchmarks.results import read_json, write_atomically, write_json
from memory_models.checkpoints import CheckpointError
from memory_models.files import replace_file

RECENT_EPISODES = 100
CURVE_FILE, CHECKPOINT_FILE, RESULT_FILE, SETTINGS_FILE = (
    "curve.jsonl",
    "checkpoint.pt",
    "result.json",
    "settings.json",
)

logger = logging.getLogger(__name__)


class Training:
    """Everything that moves while an agent learns.

    Args:
        settings: of the run.

    Raises:
        LookupError: for an unknown member or environment.
        TypeError: for an option that it does not have, or spaces that the agent cannot use.
        ValueError: for a value out of range.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        options = settings.member_options()
        environments = make_environments(settings.environment, settings.rows, settings.environment_options)
        actions = count_actions(environments.single_action_space)
        inputs = Inputs(
            environments.single_observation_space,
            actions,
            previous_action=settings.previous_action,
            previous_reward=settings.previous_reward,
            clock=settings.clock,
        )
        torch.manual_seed(settings.seed)
        module = memory_models.create(settings.target, **options)
        self.agent = Agent(module, inputs=inputs.width, actions=actions)
        self.optimizer = torch.optim.Adam(
            self.agent.parameters(), lr=settings.learning_rate, eps=1e-5, fused=True
        )
        self.actor = Actor(
            self.agent, environments, inputs, seed=settings.seed, reward_scale=settings.reward_scale
        )
        self.update = 0
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self.recent: deque[float] = deque(maxlen=RECENT_EPISODES)

    @property
    def steps(self) -> int:
        """Steps taken in all environments together."""
        return self.update * self.settings.rollout_steps

    @property
    def recent_return(self) -> float | None:
        """Mean return of the last hundred episodes that ended, or of as many as there are."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def advance(self) -> dict[str, Any]:
        """Act for one rollout and learn from it; gives, and keeps, a line of the learning curve.

        Raises:
            DivergedError: if the loss is not finite.
        """
        settings, began = self.settings, time.process_time()
        share = self.update / settings.updates if settings.anneal else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - share)
        rollout = self.actor.collect(segments=settings.segments, window=settings.window)
        windows = rollout.windows(discount=settings.ppo.discount, trace=settings.ppo.trace)
        figures = learn(self.agent, self.optimizer, windows, settings.ppo, generator=self.actor.generator)
        self.recent.extend(rollout.returns)
        self.update += 1
        self.seconds += time.process_time() - began
        line = {
            "step": self.steps,
            "cpu_seconds": round(self.seconds, 2),
            "episodes": len(rollout.returns),
            "return": self.recent_return,
            **{name: round(value, 6) for name, value in figures.items()},
        }
        self.curve.append(line)
        return line

    def save(self, folder: Path) -> None:
        """Write weights, optimiser and learning curve, each atomically.

        Raises:
            OSError: if the disk refuses.
        """
        content = {
            "id": self.settings.id,
            "settings": self.settings.to_json(),
            "update": self.update,
            "seconds": self.seconds,
            "recent": list(self.recent),
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.actor.generator.get_state(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(line) + "\n" for line in self.curve)
        write_atomically(folder / CURVE_FILE, lines.encode())
        replace_file(folder / CHECKPOINT_FILE, lambda part: torch.save(content, part))

    def restore(self, folder: Path) -> bool:
        """Go on from what `save` wrote, with new episodes; whether there was anything.

        Raises:
            CheckpointError: if the file is damaged or of other settings, code or libraries.
        """
        path = folder / CHECKPOINT_FILE
        try:
            content = torch.load(path, weights_only=True)
        except FileNotFoundError:
            return False
        except Exception as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it to start afresh") from error
        _check_same(path, content.get("id"), json.loads(content["settings"]), self.settings)
        self.agent.load_state_dict(content["agent"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.actor.generator.set_state(content["generator"])
        self.update, self.seconds = content["update"], content["seconds"]
        self.recent.extend(content["recent"])
        lines = (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()
        self.curve = [line for line in map(json.loads, lines) if line["step"] <= self.steps]
        return True


def run(
    settings: AgentSettings,
    folder: Path,
    *,
    say: Callable[[str], Any] = print,
    stopped: Callable[[], bool] = lambda: False,
    every: float = 20.0,
) -> dict[str, Any] | None:
    """Train to the end and write `result.json`; a run that ended before is not done again.

    One that says nothing of its code, as older ones do, is taken as it is if the settings are the same.

    Args:
        settings: of the run.
        folder: of its files: settings.json, curve.jsonl, checkpoint.pt, result.json.
        say: takes a line of progress now and then.
        stopped: asked after each update whether to save and leave.
        every: seconds between two such lines, and between two checkpoints.

    Returns:
        The result, or None if it was stopped before the end.

    Raises:
        CheckpointError: if what is in the folder is damaged or of other settings, code or libraries.
    """
    before = read_json(folder / RESULT_FILE)
    if before is not None:
        _check_same(folder / RESULT_FILE, before.get("id"), before["settings"], settings)
        return before
    training = Training(settings)
    write_json(folder / SETTINGS_FILE, json.loads(settings.to_json()))
    title = f"{settings.environment} {settings.memory} seed {settings.seed}"
    if training.restore(folder):
        say(f"{title}: goes on at step {training.steps}")
    told = time.monotonic()
    while training.update < settings.updates:
        line = training.advance()
        if stopped():
            training.save(folder)
            return None
        if time.monotonic() - told >= every:
            training.save(folder)
            told = time.monotonic()
            say(f"{title}: {_words(training, line)}")
    training.save(folder)
    result = {
        "id": settings.id,
        "settings": json.loads(settings.to_json()),
        "member_options": settings.member_options(),
        "weights": sum(parameter.numel() for parameter in training.agent.parameters()),
        "state_bytes": training.agent.module.init_memory(1).nbytes,
        "return": training.recent_return,
        "episodes": len(training.recent),
        "steps": training.steps,
        "cpu_seconds": round(training.seconds, 1),
        "versions": versions(),
    }
    write_json(folder / RESULT_FILE, result)
    (folder / CHECKPOINT_FILE).unlink()
    say(f"{title}: {_words(training, training.curve[-1])}")
    return result


def _check_same(path: Path, identity: str | None, saved: dict[str, Any], settings: AgentSettings) -> None:
    if saved != json.loads(settings.to_json()):
        raise CheckpointError(f"{path} is of a run with other settings; give another --out")
    if identity not in (None, settings.id):
        raise CheckpointError(
            f"{path} is of a run with the same settings but other code or libraries; give another --out"
        )


def _words(training: Training, line: dict[str, Any]) -> str:
    shown = "no episode ended yet" if line["return"] is None else f"return {line['return']:+.3f}"
    return (
        f"step {training.steps} of {training.settings.updates * training.settings.rollout_steps}, {shown}, "
        f"entropy {line['entropy']:.2f}, {training.steps / max(training.seconds, 1e-9):.0f} steps/s"
    )
