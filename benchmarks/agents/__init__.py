"""Agents with any member as their memory: act one step at a time, learn from stored segments.

Needs the extra `rl`. `python -m benchmarks.agents --help` trains; the parts serve other loops:

- `Agent`: an actor-critic around a memory module, which carries nothing itself.
- `Actor.collect`: a Gymnasium loop that pays one token a step and stores whole segments, each window with
  the memory that it began with.
- `Rollout`, `Windows`, `advantages_of`: what is stored, and what learning shuffles.
- `learn`: proximal policy optimisation.
"""

from __future__ import annotations

try:
    import gymnasium as _gymnasium  # noqa: F401
except ImportError as error:
    raise ImportError("agents need gymnasium: pip install 'memory-models[rl]'") from error

from benchmarks.agents.agent import Agent, Step, entropy, log_probability, sample
from benchmarks.agents.environments import make_environments, random_return
from benchmarks.agents.ppo import PPOSettings, learn, objective
from benchmarks.agents.reactive import Reactive
from benchmarks.agents.rollout import Actor, Rollout, Windows, advantages_of
from benchmarks.agents.settings import AgentSettings
from benchmarks.agents.spaces import Inputs, count_actions
from benchmarks.agents.training import Training, run
from benchmarks.endings import DivergedError

__all__ = [
    "Actor",
    "Agent",
    "AgentSettings",
    "DivergedError",
    "Inputs",
    "PPOSettings",
    "Reactive",
    "Rollout",
    "Step",
    "Training",
    "Windows",
    "advantages_of",
    "count_actions",
    "entropy",
    "learn",
    "log_probability",
    "make_environments",
    "objective",
    "random_return",
    "run",
    "sample",
]
