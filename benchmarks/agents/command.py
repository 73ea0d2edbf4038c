"""`python -m benchmarks.agents`: train agents with different memories in one environment."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.agents.environments import random_return
from benchmarks.agents.ppo import PPOSettings
from benchmarks.agents.settings import AgentSettings, parse_assignments
from benchmarks.agents.training import CURVE_FILE, run
from benchmarks.endings import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, DivergedError
from benchmarks.results import write_atomically
from benchmarks.worker import stop_on_signal

TABLE_FILE, PICTURE_FILE = "table.md", "curves.png"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Train an agent with each memory and seed in turn; the same command goes on where it was."""

    environment: str = "RepeatPreviousEasy"
    """A task of POPGym, or any id of Gymnasium, with discrete actions."""
    memory: tuple[str, ...] = ("htm", "gru", "none")
    """Members (see memory-bench list), package.module:Class, or none."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the weights, the environments and the actions."""
    out: Path | None = None
    """Folder for the table, the picture and a folder for each run; default results/agents/ENVIRONMENT."""
    set: tuple[str, ...] = ()
    """Options of the members as key=value, or MEMBER.key=value for one of them."""
    environment_set: tuple[str, ...] = ()
    """Options of the environment as key=value."""
    best: float | None = None
    """Highest possible return, drawn in the picture; the tasks of POPGym: 1."""
    threads: int = 1
    """Threads; small networks gain nothing from more."""
    steps: int = AgentSettings.steps
    """Steps in all environments together."""
    rows: int = AgentSettings.rows
    """Environments side by side."""
    segment_length: int = AgentSettings.segment_length
    """Steps of a segment; the memory is written at its end."""
    segments: int = AgentSettings.segments
    """Segments acted before each learning."""
    window: int = AgentSettings.window
    """Segments through which the gradient flows; the memory is stored at the start of each such window."""
    previous_action: bool = AgentSettings.previous_action
    """Tell the agent its last action."""
    previous_reward: bool = AgentSettings.previous_reward
    """Tell the agent its last reward."""
    clock: bool = AgentSettings.clock
    """Tell the agent the steps since the episode began, as sines and cosines."""
    reward_scale: float = AgentSettings.reward_scale
    """Rewards are multiplied by this for learning, so that values are of the order of 1."""
    learning_rate: float = AgentSettings.learning_rate
    """Learning rate of Adam at the start."""
    anneal: bool = AgentSettings.anneal
    """Lower the learning rate to nothing, in a straight line over all steps."""
    ppo: PPOSettings = dataclasses.field(default_factory=PPOSettings)
    """How the agent learns from what it did."""

    def settings(self) -> list[AgentSettings]:
        """The runs, memory by memory.

        Raises:
            LookupError, TypeError, ValueError: for what the user can put right.
        """
        names = {field.name for field in dataclasses.fields(AgentSettings)}
        shared = {name: value for name, value in vars(self).items() if name in names - {"memory"}}
        shared["environment_options"] = parse_assignments(self.environment_set)
        runs = [
            AgentSettings(**shared, memory=memory, memory_options=self._options_of(memory), seed=seed)
            for memory in dict.fromkeys(self.memory)
            for seed in dict.fromkeys(self.seeds)
        ]
        for settings in runs:
            # Asked before the first run is trained.
            settings.member_options()
        return runs

    def _options_of(self, memory: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, value in parse_assignments(self.set).items():
            member, dot, option = name.rpartition(".")
            if dot and member not in self.memory:
                raise ValueError(
                    f"--set {name}=... is for {member!r}, which is not among --memory {' '.join(self.memory)}"
                )
            if not dot or member == memory:
                options[option] = value
        return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and train; returns the exit code.

    Returns:
        0; 1 if a loss diverged or the disk refused; 2 for wrong use; 130 if it was stopped and saved.
    """
    import tyro

    words = sys.argv[1:] if arguments is None else list(arguments)
    program = "python -m benchmarks.agents"
    command = tyro.cli(Command, args=words, prog=program, config=(tyro.conf.FlagCreatePairsOff,))
    again = f"{program} {shlex.join(words)}".strip()
    torch.set_num_threads(command.threads)
    name = re.sub(r"[^\w.-]+", "-", command.environment)
    out = command.out or Path("results") / "agents" / name
    results: list[dict[str, Any]] = []
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    try:
        with stop_on_signal() as caught:
            for settings in command.settings():
                memory = re.sub(r"[^\w.-]+", "-", settings.memory)
                folder = out / "runs" / f"{memory}-{settings.seed}-{settings.id}"
                result = run(settings, folder, say=_say, stopped=caught)
                if result is None:
                    print(f"Stopped; it is saved. Go on with:\n  {again}")
                    return EXIT_INTERRUPTED
                results.append(result)
                lines = (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()
                curves.setdefault(settings.memory, []).append([json.loads(line) for line in lines])
    except LookupError as error:
        # A KeyError prints its message in quotes.
        return _fail(error.args[0] if error.args else error, EXIT_USAGE)
    except (TypeError, ValueError, ImportError) as error:
        return _fail(error, EXIT_USAGE)
    except DivergedError as error:
        return _fail(error, EXIT_FAILED)
    except OSError as error:
        return _fail(f"cannot write to {out}: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail(f"stopped at once; what was saved stands. Go on with:\n  {again}", EXIT_INTERRUPTED)
    first = results[0]["settings"]
    random = random_return(first["environment"], first["environment_options"])
    table = make_table(results, random)
    write_atomically(out / TABLE_FILE, f"{table}\n```sh\n{again}\n```\n".encode())
    from benchmarks.agents.plots import draw_curves

    draw_curves(
        curves,
        out / PICTURE_FILE,
        title=command.environment,
        random=random,
        best=command.best,
    )
    print(f"\n{table}\nwritten: {out / TABLE_FILE}, {out / PICTURE_FILE}")
    return EXIT_OK


def make_table(results: Sequence[dict[str, Any]], random: float) -> str:
    """Results as Markdown, a line for each memory: return as mean (lowest to highest) over the seeds.

    Args:
        results: of the runs.
        random: return of an agent that acts at random.
    """
    lines = [
        "| memory | return, last episodes | seeds | steps | CPU seconds | weights | state bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for memory in dict.fromkeys(result["settings"]["memory"] for result in results):
        own = [result for result in results if result["settings"]["memory"] == memory]
        returns = [result["return"] for result in own if result["return"] is not None]
        shown = "none ended"
        if returns:
            shown = f"{sum(returns) / len(returns):+.3f}"
            if len(returns) > 1:
                shown += f" ({min(returns):+.3f} to {max(returns):+.3f})"
        seconds = sum(result["cpu_seconds"] for result in own) / len(own)
        first = own[0]
        lines.append(
            f"| `{memory}` | {shown} | {len(own)} | {first['steps']:,} | {seconds:.0f} | "
            f"{first['weights']:,} | {first['state_bytes']:,} |"
        )
    lines.append(f"| at random | {random:+.3f} | | | | | |")
    return "\n".join(lines) + "\n"


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: object, code: int) -> int:
    print(f"agents: {message}", file=sys.stderr)
    return code
