"""Proximal policy optimisation over stored segments (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.agents.agent import Agent, entropy, log_probability
from benchmarks.agents.rollout import Windows
from benchmarks.endings import DivergedError


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """How an agent learns from a rollout."""

    discount: float = 0.99
    """Weight of a reward one step later (gamma)."""
    trace: float = 0.95
    """Share of a later surprise that an advantage takes in (lambda)."""
    epochs: int = 4
    """Times that a rollout is gone through."""
    minibatches: int = 4
    """Optimiser steps of each time."""
    clip: float = 0.2
    """How far from 1 the ratio of probabilities may move an objective."""
    value_clip: float | None = None
    """How far a value may move from the one while acting; None: as far as it wants."""
    value_weight: float = 0.5
    """Weight of the value's squared error."""
    entropy_weight: float = 0.03
    """Weight of the policy's entropy."""
    normalise: bool = True
    """Give the advantages of a minibatch mean 0 and deviation 1."""
    gradient_clip: float = 0.5
    """Largest norm of the whole gradient."""
    target_kl: float | None = None
    """Leave the rollout when the policy has moved this far (nats, estimated); None: never."""

    def __post_init__(self) -> None:
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie in [0, 1]")
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("clip", "value_clip", "gradient_clip", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} ({value}) must be positive")
        for name in ("value_weight", "entropy_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")


def learn(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    settings: PPOSettings,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Go through the windows in random minibatches, and step the optimiser at each.

    Args:
        agent: whose weights are changed.
        optimizer: of its parameters.
        windows: of one rollout, made with `settings.discount` and `settings.trace`.
        settings: of the objective.
        generator: of the order.

    Returns:
        Means over the minibatches: `policy_loss`, `value_loss`, `entropy`, `kl` (nats, estimated), `clipped`
        (share of steps beyond the clip), `gradient` (norm before clipping); and `explained`, the share of
        the returns' variance that the values had explained while acting.

    Raises:
        ValueError: if there are fewer windows than minibatches.
        DivergedError: if the loss or the gradient is not finite; the weights are then as before.
    """
    if len(windows) < settings.minibatches:
        raise ValueError(
            f"a rollout of {len(windows)} windows cannot be cut into {settings.minibatches} minibatches; "
            "take more environments, shorter windows or fewer minibatches"
        )
    returns = windows.advantages + windows.values
    sums: dict[str, float] = {}
    steps = 0
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(windows), generator=generator).chunk(settings.minibatches):
            batch = windows.select(rows)
            loss, figures = objective(agent, batch, settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(agent.parameters(), settings.gradient_clip)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise DivergedError(
                    f"the loss is {loss.item()}, the gradient's norm {norm.item()}; lower the learning "
                    "rate, or look for bad numbers in the observations and rewards"
                )
            optimizer.step()
            steps += 1
            for name, value in {**figures, "gradient": norm}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        if settings.target_kl is not None and figures["kl"] > settings.target_kl:
            break
    spread = returns.var().clamp(min=1e-12)
    explained = 1 - float((returns - windows.values).var() / spread)
    return {**{name: value / steps for name, value in sums.items()}, "explained": explained}


def objective(agent: Agent, batch: Windows, settings: PPOSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch, and what it consists of, detached."""
    logits, values, _ = agent.read(batch.inputs, batch.memory, reset=batch.resets)
    change = log_probability(logits, batch.actions) - batch.log_probs
    ratio = change.exp()
    advantages = batch.advantages
    if settings.normalise and advantages.numel() > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    bounded = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    policy_loss = -torch.minimum(ratio * advantages, bounded * advantages).mean()
    value_loss = _value_loss(values, batch, settings.value_clip)
    spread = entropy(logits).mean()
    loss = policy_loss + settings.value_weight * value_loss - settings.entropy_weight * spread
    return loss, {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "entropy": spread.detach(),
        # Never negative, and of less variance than the mean of the log ratio (Schulman 2020).
        "kl": (ratio - 1 - change).mean().detach(),
        "clipped": ((ratio - 1).abs() > settings.clip).float().mean(),
    }


def _value_loss(values: Tensor, batch: Windows, clip: float | None) -> Tensor:
    returns = batch.advantages + batch.values
    errors = (values - returns).square()
    if clip is not None:
        near = batch.values + (values - batch.values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * errors.mean()
