"""The checkpoint of a training: one file, written whole or not at all, that any number of processes reads."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.training.processes import Processes
from benchmarks.training.settings import OPTIMISATION
from memory_models.checkpoints import CheckpointError
from memory_models.files import replace_file
from memory_models.state import Memory

FORMAT = "memory-models training"
FORMAT_VERSION = 1


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Put a checkpoint in the place of the one before; a kill at any moment leaves one of them.

    Raises:
        OSError: if the disk refuses; the one before still stands.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}

    def fill(part: Path) -> None:
        with part.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                # Of a write that failed torch says only that its position is not the expected one.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    replace_file(path, fill)


def read_checkpoint(
    path: Path, identity: Mapping[str, Any], *, may_change: Sequence[str] = ()
) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote, or None if there is none.

    Args:
        path: the file.
        identity: of the training that is to go on from it.
        may_change: names in the identity that may differ.

    Raises:
        CheckpointError: if it is damaged, of another version, or of another training.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({error}); remove it to start afresh, or give another --out"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of memory-bench train; give another --out")
    if state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state['format_version']}, this library reads {FORMAT_VERSION}; "
            "go on with the library it was written with"
        )
    # Older checkpoints do not say how they were optimised.
    told = {name: value for name, value in identity.items() if name in state["identity"]}
    differences = _differences(state["identity"], told)
    wrong = {name: words for name, words in differences.items() if name not in may_change}
    if wrong:
        able = " ".join(name for name in wrong if name in OPTIMISATION)
        change = f", or --may-change {able} to change that" if able else ""
        raise CheckpointError(
            f"{path} belongs to another training: {'; '.join(wrong.values())}. Give the same options and "
            f"data to go on{change}, or another --out to start afresh"
        )
    return state


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= _differences(old, new, f"{path}{name}.")
        elif old != new:
            found[f"{path}{name}"] = f"{path}{name} was {old!r}, now {new!r}"
    return found


def seed_generators(seed: int) -> None:
    """Start all random generators of this process: torch's, Python's, NumPy's."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators of this process: torch's, Python's, NumPy's."""
    name, keys, place, has_normal, normal = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys).astype(np.int64)), place, has_normal, float(normal)),
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing as when `generator_states` was asked."""
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and states["device"] is not None:
        torch.get_device_module(device).set_rng_state(states["device"], device)
    version, internal, normal = states["python"]
    random.setstate((version, tuple(internal), normal))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def memory_from(tensors: Mapping[str, Tensor], like: Memory, rows: range, device: torch.device) -> Any:
    """Some rows of a memory that a checkpoint holds.

    Args:
        tensors: its leaves, `[all rows, ...]`, by path.
        like: any memory of the same model.
        rows: which of them.
        device: where to put them.
    """
    wanted = like.tensors()
    if {name: leaf.shape[1:] for name, leaf in wanted.items()} != {
        name: leaf.shape[1:] for name, leaf in tensors.items()
    }:
        raise CheckpointError("the checkpoint's memory is not one of this model")
    _, structure = pytree.tree_flatten(like)
    # Copies of their own: an unaligned tensor is read more slowly and rounds differently.
    leaves = [tensors[name][rows.start : rows.stop].clone().to(device) for name in wanted]
    return pytree.tree_unflatten(leaves, structure)


def whole_weights(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """The state dict of a model with all processes' parts put together; every process must ask."""
    return {name: processes.whole(value) for name, value in model.state_dict().items()}


def whole_optimizer(optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Any]:
    """The state of an optimiser likewise."""
    return pytree.tree_map_only(Tensor, processes.whole, optimizer.state_dict())


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser the state that `whole_optimizer` gave, cut up as its weights are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(parameter: Tensor, value: Any) -> Any:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]

    moments = {
        index: {name: cut(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    # The settings are those of now.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
