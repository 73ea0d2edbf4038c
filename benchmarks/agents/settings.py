"""What can be set of an agent's training, and the options of the members for it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from benchmarks.agents.ppo import PPOSettings
from benchmarks.agents.reactive import TARGET
from benchmarks.members import code_digest
from benchmarks.provenance import version_of
from benchmarks.results import plain, run_id
from benchmarks.settings import value_of
from memory_models.models import config_fields
from memory_models.registry import nearest

NONE = "none"
LIBRARIES = ("torch", "x-transformers", "gymnasium", "popgym")

# The same transformer for all; a member that has no such option goes without. One layer: what attention
# learns within a segment then serves the memory too, whose write has no gradient in some members.
COMMON: dict[str, Any] = {"dim": 64, "depth": 1, "heads": 2, "ff_dim": 128}
OPTIONS: dict[str, dict[str, Any]] = {
    "htm": {"chunk_size": 8, "chunks": 16, "topk": 2},
    "memformer": {"slots": 32},
    "memorizing": {"memories": 128, "topk": 32, "combine": "softmax"},
    "memxl": {"lmem_len": 16},
    "full": {"context": 128},
    "gru": {"hidden": 128},
}


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """One agent in one environment: everything that changes its numbers."""

    environment: str = "RepeatPreviousEasy"
    """An id of Gymnasium, or the name of a task of POPGym."""
    environment_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Given to the environment when it is made."""
    memory: str = "htm"
    """A member, `package.module:Class`, or `none` for an agent without memory."""
    memory_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the member, on top of those in `OPTIONS`."""
    seed: int = 0
    """Seed of the weights, the environments and the actions."""
    steps: int = 200_000
    """Steps in all environments together."""
    rows: int = 64
    """Environments side by side."""
    segment_length: int = 8
    """Steps of a segment; the memory is written at its end."""
    segments: int = 8
    """Segments acted before each learning."""
    window: int = 2
    """Segments through which the gradient flows; the memory is stored at the start of each such window."""
    previous_action: bool = False
    """Tell the agent its last action."""
    previous_reward: bool = False
    """Tell the agent its last reward."""
    clock: bool = False
    """Tell the agent the steps since the episode began, as sines and cosines."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this for learning, so that values are of the order of 1."""
    learning_rate: float = 2e-3
    """Learning rate of Adam at the start."""
    anneal: bool = True
    """Lower the learning rate to nothing, in a straight line over all steps."""
    ppo: PPOSettings = dataclasses.field(default_factory=PPOSettings)
    """How the agent learns from what it did."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "segment_length", "segments", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.segments % self.window:
            raise ValueError(f"segments ({self.segments}) must be a multiple of window ({self.window})")
        for name in ("learning_rate", "reward_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        windows = self.rows * self.segments // self.window
        if windows < self.ppo.minibatches:
            raise ValueError(
                f"rows ({self.rows}) times segments / window ({self.segments // self.window}) gives "
                f"{windows} windows, fewer than minibatches ({self.ppo.minibatches})"
            )

    @property
    def rollout_steps(self) -> int:
        """Steps between one learning and the next, in all environments together."""
        return self.rows * self.segments * self.segment_length

    @property
    def updates(self) -> int:
        """Rollouts of the whole training; at least one."""
        return max(1, self.steps // self.rollout_steps)

    @property
    def target(self) -> str:
        """What `memory_models.create` is asked for."""
        return TARGET if self.memory == NONE else self.memory

    def member_options(self) -> dict[str, Any]:
        """The options that `memory_models.create` is given.

        Raises:
            LookupError: if there is no such member.
            TypeError: if it has no such option; the message names the nearest.
        """
        known = config_fields(self.target)
        wished = {**COMMON, "segment_length": self.segment_length}
        usual = {name: value for name, value in wished.items() if name in known}
        for name in self.memory_options:
            if name not in known:
                raise TypeError(f"unknown option {name!r} for memory {self.memory!r}. {nearest(name, known)}")
        return {**usual, **OPTIONS.get(self.memory, {}), **self.memory_options}

    @property
    def id(self) -> str:
        """Twelve hex digits that change with all that changes the numbers: settings, code, libraries.

        Raises:
            LookupError, TypeError: as `member_options`.
        """
        return run_id(
            {
                "settings": dataclasses.asdict(self),
                "member_options": self.member_options(),
                "code": code_digest(self.target, "benchmarks.agents.training"),
                "libraries": {name: version_of(name) for name in LIBRARIES},
            }
        )

    def to_json(self) -> str:
        """All settings as one line of JSON, in order of name."""
        return json.dumps(plain(dataclasses.asdict(self)), sort_keys=True)


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, Any]:
    """What `key=value` texts say, numbers as numbers.

    Raises:
        ValueError: if one has another form.
    """
    found = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"{assignment!r} is not of the form key=value, such as dim=128")
        found[name] = value_of(text)
    return found
