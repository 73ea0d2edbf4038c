"""An agent with a memory of your choice learns a task of POPGym with PPO. Takes about a minute.

`RepeatPreviousEasy` shows a playing card a step and asks for the suit of the third before it: 1 is the best
return, -0.5 that of guessing. Segments have 8 steps here, so that three in eight answers lie in the segment
before. `--memory window` shows what can be had without those, `--memory none` without any memory; any member
may take its place, or `package.module:Class`.

    python examples/ppo_popgym.py --memory htm --steps 200000
    python examples/ppo_popgym.py --memory memorizing --environment AutoencodeEasy --steps 300000

For learning curves, several seeds, and a picture: `python -m benchmarks.agents --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import memory_models
from benchmarks.agents import Actor, Agent, Inputs, PPOSettings, count_actions, learn, make_environments
from benchmarks.agents.reactive import TARGET

ROWS, SEGMENT, SEGMENTS, WINDOW = 64, 8, 8, 2
# One layer: what attention learns within a segment then serves the memory too.
SIZES = {"dim": 64, "depth": 1, "segment_length": SEGMENT}
OPTIONS: dict[str, dict[str, object]] = {
    "htm": {"chunk_size": 8, "chunks": 16, "topk": 2},
    "memorizing": {"memories": 128, "combine": "softmax"},
}


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, and return the mean return of the last hundred episodes."""
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    # Environments side by side, and what the agent is told at each step.
    environments = make_environments(options.environment, ROWS)
    actions = count_actions(environments.single_action_space)
    inputs = Inputs(environments.single_observation_space, actions, clock=True)

    # Any memory module: it is called with close=False while a segment is open, a token at a time.
    target = TARGET if options.memory == "none" else options.memory
    module = memory_models.create(target, **SIZES, **OPTIONS.get(options.memory, {}))
    agent = Agent(module, inputs=inputs.width, actions=actions)
    print(f"{options.memory}: {sum(weight.numel() for weight in agent.parameters()):,} weights")

    # The rewards of these tasks follow at once on the action, so that a short horizon serves.
    settings = PPOSettings(discount=0.5)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2e-3, eps=1e-5)
    actor = Actor(agent, environments, inputs, seed=options.seed, reward_scale=20.0)
    returns: list[float] = []
    updates = max(1, options.steps // (ROWS * SEGMENTS * SEGMENT))
    for update in range(updates):
        # Act; the memory is carried along, and kept at the start of each window of two segments.
        rollout = actor.collect(segments=SEGMENTS, window=WINDOW)
        returns = [*returns, *rollout.returns][-100:]
        # Learn: the stored segments are read in order from the memory they began with. The gradient flows
        # through a window; before the first step the probabilities are those of acting.
        windows = rollout.windows(discount=settings.discount, trace=settings.trace)
        figures = learn(agent, optimizer, windows, settings, generator=actor.generator)
        if update % 5 == 4 or update == updates - 1:
            mean = sum(returns) / max(len(returns), 1)
            steps = (update + 1) * rollout.actions.numel()
            print(f"step {steps:>7,}: return {mean:+.3f}, entropy {figures['entropy']:.2f}", flush=True)
    environments.close()
    return sum(returns) / max(len(returns), 1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", default="memorizing", help="a member, package.module:Class, or none")
    parser.add_argument("--environment", default="RepeatPreviousEasy", help="of POPGym or Gymnasium")
    parser.add_argument("--steps", type=int, default=100_000, help="in all environments together")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
