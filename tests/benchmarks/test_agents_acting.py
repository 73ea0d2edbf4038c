"""Acting one step at a time and learning from stored segments see the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import Tensor

import memory_models
from benchmarks.agents import (
    Actor,
    Agent,
    Inputs,
    Reactive,
    Rollout,
    advantages_of,
    count_actions,
    entropy,
    log_probability,
    sample,
)
from benchmarks.agents.reactive import TARGET, ReactiveConfig
from benchmarks.agents.spaces import CLOCK_PERIODS
from memory_models.testing import check_model
from tests.benchmarks.agents_environments import Counting, Cue, side_by_side

SEGMENT = 4
SIZES: dict[str, Any] = {"dim": 16, "depth": 2, "segment_length": SEGMENT}
WITH_MEMORY: dict[str, dict[str, Any]] = {
    "htm": {"heads": 2, "chunk_size": 2, "chunks": 8, "topk": 3},
    "memformer": {"heads": 2, "slots": 4},
    "memorizing": {"heads": 2, "memories": 16, "topk": 4},
    "memxl": {"heads": 2, "lmem_len": 4, "mem_len": 4},
    "gru": {"hidden": 16},
    "transformer-xl": {"heads": 2},
    "full": {"heads": 2, "context": 16},
}
WITHOUT: dict[str, dict[str, Any]] = {"window": {"heads": 2}, TARGET: {}}


def actor_with(module: Any, environments: SyncVectorEnv, **options: Any) -> Actor:
    inputs = Inputs(
        environments.single_observation_space,
        count_actions(environments.single_action_space),
        **{"previous_action": True, "previous_reward": True, "clock": True, **options},
    )
    agent = Agent(module, inputs=inputs.width, actions=inputs.actions)
    # The policy starts almost even; opinions make a difference visible.
    torch.nn.init.orthogonal_(agent.policy.weight, 1.0)
    return Actor(agent, environments, inputs, seed=0)


def cues(rows: int = 5, **options: Any) -> SyncVectorEnv:
    return side_by_side([Cue(**options) for _ in range(rows)])


@pytest.mark.parametrize(
    ("name", "window"),
    [*((name, 3) for name in [*WITH_MEMORY, *WITHOUT]), ("htm", 1), ("memxl", 1), ("gru", 1)],
)
def test_probabilities_computed_again_are_those_of_acting(name: str, window: int) -> None:
    module = memory_models.create(name, **SIZES, **{**WITH_MEMORY, **WITHOUT}[name])
    actor = actor_with(module, cues(3))
    # The second rollout begins with a memory and within episodes.
    rollouts = [actor.collect(segments=6, window=window) for _ in range(2)]
    for rollout in rollouts:
        windows = rollout.windows(discount=0.9, trace=0.8)
        assert len(windows) == 3 * 6 // window
        begins = windows.resets.nonzero()[:, 1] % SEGMENT
        assert {0, 1, 2, 3} == set(begins.tolist()), "episodes begin anywhere in a segment"
        step = actor.agent.read(windows.inputs, windows.memory, reset=windows.resets)
        ratio = (log_probability(step.logits, windows.actions) - windows.log_probs).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
        torch.testing.assert_close(step.values, windows.values, rtol=1e-5, atol=1e-5)
    assert not rollouts[1].resets[:, 0].all()
    windows = rollouts[1].windows(discount=0.9, trace=0.8)
    afresh = actor.agent.read(windows.inputs, None, reset=windows.resets).values
    # Otherwise the law above would hold of any memory.
    assert ((afresh - windows.values).abs().max() > 1e-3) == (name in WITH_MEMORY)
    without_resets = actor.agent.read(windows.inputs, windows.memory).values
    assert ((without_resets - windows.values).abs().max() > 1e-3) == (name != TARGET)


@pytest.mark.parametrize("name", ["htm", "memformer", "gru"])
def test_the_gradient_flows_through_a_window_and_no_further(name: str) -> None:
    module = memory_models.create(name, **SIZES, **WITH_MEMORY[name])
    actor = actor_with(module, side_by_side([Counting(60, truncates=False) for _ in range(2)]))
    reaches = {}
    for window in (1, 2):
        rollout = actor.collect(segments=2, window=window)
        inputs = rollout.inputs.requires_grad_()
        windows = rollout.windows(discount=0.9, trace=0.8)
        assert not any(leaf.requires_grad for leaf in windows.memory.tensors().values())
        values = actor.agent.read(windows.inputs, windows.memory, reset=windows.resets).values
        # The last windows are those of the rollout's end.
        (gradient,) = torch.autograd.grad(values[-2:, -1].sum(), inputs)
        assert gradient[:, SEGMENT:].any()
        reaches[window] = bool(gradient[:, :SEGMENT].any())
    assert reaches == {1: False, 2: module.differentiable_memory}
    assert module.differentiable_memory == (name != "htm")


def test_windows_are_the_rows_cut_in_time_and_select_keeps_a_windows_parts_together() -> None:
    module = memory_models.create("gru", **SIZES, **WITH_MEMORY["gru"])
    actor = actor_with(module, cues(3))
    rollout = actor.collect(segments=4, window=2)
    windows = rollout.windows(discount=0.9, trace=0.8)
    advantages = advantages_of(
        rollout.rewards, rollout.values, rollout.next_values, rollout.ended, discount=0.9, trace=0.8
    )
    for row in range(3):
        for part in range(2):
            one = windows.select(torch.tensor([3 * part + row]))
            steps = slice(part * 2 * SEGMENT, (part + 1) * 2 * SEGMENT)
            assert torch.equal(one.inputs[0], rollout.inputs[row, steps])
            assert torch.equal(one.actions[0], rollout.actions[row, steps])
            assert torch.equal(one.advantages[0], advantages[row, steps])
            state = one.memory.tensors()["layers.0"][0]
            assert torch.equal(state, rollout.memories[part].tensors()["layers.0"][row])


def slow_advantages(rollout: Rollout, discount: float, trace: float) -> Tensor:
    """The definition (Schulman et al. 2016, equation 16), episode by episode and step by step."""
    found = torch.zeros_like(rollout.rewards)
    rows, time = found.shape
    for row in range(rows):
        for step in range(time):
            weight, later = 1.0, step
            while True:
                reward, value = rollout.rewards[row, later], rollout.values[row, later]
                found[row, step] += weight * (reward + discount * rollout.next_values[row, later] - value)
                if rollout.ended[row, later] or later == time - 1:
                    break
                weight *= discount * trace
                later += 1
    return found


@pytest.mark.parametrize(("discount", "trace"), [(0.97, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)])
def test_advantages_are_those_of_the_definition(discount: float, trace: float) -> None:
    rollout = some_rollout()
    fast = advantages_of(
        rollout.rewards, rollout.values, rollout.next_values, rollout.ended, discount=discount, trace=trace
    )
    torch.testing.assert_close(fast, slow_advantages(rollout, discount, trace))


def some_rollout() -> Rollout:
    shape = (4, 12)
    ended = torch.rand(shape) < 0.25
    numbers = {name: torch.randn(shape, dtype=torch.float64) for name in ("rewards", "values", "next_values")}
    blank = torch.zeros(shape)
    return Rollout(
        inputs=blank[..., None],
        resets=ended.roll(1, 1),
        actions=blank.long(),
        log_probs=blank,
        ended=ended,
        memories=(),
        returns=(),
        lengths=(),
        **numbers,
    )


def test_with_all_weight_on_later_rewards_a_return_is_what_came_after() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    ended = torch.tensor([[False, True, False, False]])
    values = torch.randn(1, 4)
    after = torch.tensor([[values[0, 1], 0.0, values[0, 3], 10.0]])
    returns = values + advantages_of(rewards, values, after, ended, discount=1.0, trace=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 2.0, 17.0, 14.0]]))


@pytest.mark.parametrize("truncates", [False, True])
def test_the_value_after_the_last_step_is_bootstrapped_only_where_a_time_limit_cut(truncates: bool) -> None:
    # Episodes of 3 steps in segments of 8, so that one call without a memory sees an episode whole.
    module = memory_models.create("gru", dim=16, depth=1, segment_length=8, hidden=16)
    environments = side_by_side([Counting(3, truncates=truncates) for _ in range(2)])
    actor = actor_with(module, environments)
    rollout = actor.collect(segments=1)
    assert rollout.ended[0].tolist() == [False, False, True] * 2 + [False] * 2
    assert rollout.resets[0].tolist() == [True, False, False] * 2 + [True, False]
    assert rollout.lengths == (3, 3, 3, 3)
    for row in range(2):
        for begin in (0, 3):
            actions = rollout.actions[row, begin : begin + 3]
            last = actor.inputs(np.array([3]), actions[-1:], actions[-1:].float(), torch.tensor([3]))
            episode = torch.cat([rollout.inputs[row, begin : begin + 3], last])
            expected = actor.agent.read(episode[None]).values[0, -1] if truncates else torch.tensor(0.0)
            torch.testing.assert_close(rollout.next_values[row, begin + 2], expected)
    # Within an episode, and at the rollout's end, it is the value of the step that follows.
    torch.testing.assert_close(rollout.next_values[:, 0], rollout.values[:, 1])
    following = actor.collect(segments=1)
    torch.testing.assert_close(rollout.next_values[:, -1], following.values[:, 0])


def test_returns_and_rewards_are_those_of_the_episodes() -> None:
    module = memory_models.create("gru", dim=16, depth=1, segment_length=5, hidden=16)
    environments = side_by_side(
        [Counting(3, truncates=False, first_action=2), Counting(4, truncates=True, first_action=2)]
    )
    actor = actor_with(module, environments)
    actor.reward_scale = 0.5
    rollouts = [actor.collect(segments=3), actor.collect(segments=1)]
    actions = torch.cat([rollout.actions for rollout in rollouts], 1)
    rewards = torch.cat([rollout.rewards for rollout in rollouts], 1)
    assert actions.unique().tolist() == [0, 1, 2]
    assert torch.equal(rewards, 0.5 * (actions + 2))
    actions = actions + 2
    expected = [actions[0, i : i + 3].sum().item() for i in range(0, 18, 3)]
    expected += [actions[1, i : i + 4].sum().item() for i in range(0, 20, 4)]
    assert sorted(r for rollout in rollouts for r in rollout.returns) == sorted(expected)
    assert sorted(n for rollout in rollouts for n in rollout.lengths) == [3] * 6 + [4] * 5


def test_acting_is_repeatable_and_a_seed_changes_it() -> None:
    def actions(seed: int) -> Tensor:
        torch.manual_seed(0)
        module = memory_models.create("window", **SIZES, **WITHOUT["window"])
        environments = cues()
        inputs = Inputs(environments.single_observation_space, 3)
        actor = Actor(Agent(module, inputs=inputs.width, actions=3), environments, inputs, seed=seed)
        return actor.collect(segments=3).actions

    assert torch.equal(actions(1), actions(1))
    assert not torch.equal(actions(1), actions(2))


def test_an_observation_that_is_not_finite_is_refused() -> None:
    class Broken(Cue):
        def _seen(self, kind: int, sign: int) -> Any:
            return kind, sign, np.full(2, np.nan, np.float32)

    module = memory_models.create("gru", **SIZES, **WITH_MEMORY["gru"])
    actor = actor_with(module, side_by_side([Broken()]))
    with pytest.raises(ValueError, match="not finite"):
        actor.collect(segments=1)


def test_what_an_actor_refuses() -> None:
    module = memory_models.create("gru", **SIZES, **WITH_MEMORY["gru"])
    late = SyncVectorEnv([Cue] * 2)
    inputs = Inputs(late.single_observation_space, 3)
    agent = Agent(module, inputs=inputs.width, actions=3)
    with pytest.raises(ValueError, match=r"AutoresetMode\.SAME_STEP"):
        Actor(agent, late, inputs, seed=0)
    actor = Actor(agent, cues(2), inputs, seed=0)
    with pytest.raises(ValueError, match=r"segments \(3\) must be a multiple of window \(2\)"):
        actor.collect(segments=3, window=2)
    with pytest.raises(ValueError, match="dropout=0"):
        Agent(memory_models.create("window", **SIZES, heads=2, dropout=0.1), inputs=3, actions=2)
    outside = memory_models.create("memorizing", **SIZES, heads=2, memories=16, store="outside")
    with pytest.raises(ValueError, match="store='state'"):
        Agent(outside, inputs=3, actions=2)


def test_inputs_of_every_kind_of_space() -> None:
    space = spaces.Dict(
        {
            "card": spaces.Discrete(3, start=5),
            "pair": spaces.MultiDiscrete([2, 3]),
            "rest": spaces.Tuple((spaces.MultiBinary(2), spaces.Box(-5, 5, (2, 1)))),
        }
    )
    environments = {
        "card": np.array([5, 7]),
        "pair": np.array([[1, 0], [0, 2]]),
        "rest": (np.array([[1, 0], [1, 1]], np.int8), np.array([[[0.5], [-2.0]], [[3.0], [4.0]]])),
    }
    inputs = Inputs(space, 2, previous_action=True, previous_reward=True)
    rows = inputs(environments, torch.tensor([1, 1]), torch.tensor([9.0, 9.0]), torch.tensor([0, 4]))
    expected = [
        # card, pair, pair, binary, box, last action, last reward
        [1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0.5, -2, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 3, 4, 0, 1, 9],
    ]
    assert rows.tolist() == expected
    assert inputs.width == 15


def test_the_clock_tells_every_step_of_an_episode_apart() -> None:
    inputs = Inputs(spaces.Discrete(1), 2, clock=True)
    ages = torch.arange(1024)
    rows = inputs(np.zeros(1024, int), ages, ages, ages)
    assert inputs.width == rows.shape[1] == 1 + 2 * len(CLOCK_PERIODS)
    apart = torch.cdist(rows, rows) + 10 * torch.eye(1024)
    assert apart.min() > 1
    # What is so many steps ago is the same rotation everywhere, which is what attention can learn.
    steps = (rows[3:, 1:] * rows[:-3, 1:]).sum(1)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=0, atol=1e-3)


def test_an_input_is_a_copy_of_what_the_environment_may_write_over() -> None:
    seen = np.zeros((2, 3), np.float32)
    inputs = Inputs(spaces.Box(-1, 1, (3,)), 2)
    rows = inputs(seen, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    seen += 1
    assert rows.eq(0).all()


def test_spaces_that_an_agent_cannot_use() -> None:
    with pytest.raises(TypeError, match="FlattenObservation"):
        Inputs(spaces.Text(5), 2)
    with pytest.raises(TypeError, match="DiscreteAction"):
        count_actions(spaces.MultiDiscrete([2, 2]))
    assert count_actions(gymnasium.make("CartPole-v1").action_space) == 2


def test_policy_figures_are_those_of_torchs_distribution() -> None:
    logits = 3 * torch.randn(6, 5)
    actions = torch.randint(5, (6,))
    known = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_probability(logits, actions), known.log_prob(actions))
    torch.testing.assert_close(entropy(logits), known.entropy())
    drawn = torch.stack([sample(logits) for _ in range(4000)])
    shares = torch.nn.functional.one_hot(drawn, 5).float().mean(0)
    torch.testing.assert_close(shares, known.probs, rtol=0, atol=0.05)


def test_the_agent_without_memory_keeps_the_contract() -> None:
    check_model(Reactive(ReactiveConfig(dim=8, depth=1, segment_length=4)), skip=["compile"])
    with pytest.raises(ValueError, match="depth"):
        ReactiveConfig(depth=0)
    with pytest.raises(ValueError, match="ff_dim"):
        ReactiveConfig(ff_dim=0)


def test_a_rollout_has_a_field_for_each_that_windows_need() -> None:
    fields = {field.name for field in dataclasses.fields(Rollout)}
    assert {"inputs", "resets", "actions", "log_probs", "values"} <= fields
