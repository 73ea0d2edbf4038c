"""Gymnasium environments by name, POPGym's among them."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from memory_models.registry import UnknownNameError


def full_name(name: str) -> str:
    """The id under which Gymnasium knows an environment.

    Args:
        name: an id such as `CartPole-v1`, one of POPGym such as `RepeatPreviousEasy`, or
            `package.module:Id-v0`, whose module is imported to register it.

    Raises:
        LookupError: if there is none; the message names the nearest.
    """
    if ":" in name or name in gymnasium.registry:
        return name
    popgym = importlib.util.find_spec("popgym") is not None
    if popgym:
        importlib.import_module("popgym.envs")
    for known in (name, f"popgym-{name}-v0"):
        if known in gymnasium.registry:
            return known
    short = [known.removeprefix("popgym-").removesuffix("-v0") for known in gymnasium.registry]
    [*near] = difflib.get_close_matches(name, short, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    missing = "" if popgym else " POPGym is not installed: pip install 'memory-models[rl]'."
    raise UnknownNameError(f"Gymnasium knows no environment {name!r}.{hint}{missing}")


def make_environments(
    name: str, rows: int, options: Mapping[str, Any] | None = None
) -> VectorEnv[Any, Any, Any]:
    """Some environments side by side in this process, as `Actor` needs them.

    Args:
        name: as for `full_name`.
        rows: how many.
        options: given to each when it is made, such as `{"k": 2}`.

    Raises:
        LookupError: if Gymnasium knows no such environment.
        TypeError: if it does not take the options.
        ValueError: if `rows` is less than 1.
    """
    if rows < 1:
        raise ValueError(f"rows ({rows}) must be at least 1")
    found = full_name(name)

    def make() -> gymnasium.Env[Any, Any]:
        # The checker costs as much as a card game's step.
        return gymnasium.make(found, disable_env_checker=True, **(options or {}))

    return SyncVectorEnv([make] * rows, autoreset_mode=AutoresetMode.SAME_STEP)


def random_return(
    name: str, options: Mapping[str, Any] | None = None, *, episodes: int = 500, seed: int = 0
) -> float:
    """Mean return of an agent that acts at random."""
    environment = gymnasium.make(full_name(name), disable_env_checker=True, **(options or {}))
    environment.action_space.seed(seed)
    returns = []
    for episode in range(episodes):
        environment.reset(seed=seed if episode == 0 else None)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = environment.step(environment.action_space.sample())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    environment.close()
    return float(np.mean(returns))
