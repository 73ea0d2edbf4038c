"""What a forward pass changes beside its return value, and how to set it back to run the pass again.

That is the state of random generators (dropout) and the buffers of modules (BatchNorm's averages, the vectors
of spectral normalisation).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Rewind:
    """Marks in the course of several passes, to which generators and buffers can be set back.

    Replayed are torch's global generators (the processor's and those of `devices`), those in `generators`,
    and the global ones of Python's `random` and of NumPy. Marks are set in order and returned to in reverse.

    Args:
        module: whose buffers are set back; None: of nobody.
        devices: where the passes run.
        generators: others that the passes draw from.
    """

    def __init__(
        self,
        module: nn.Module | None,
        devices: Iterable[torch.device],
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        kinds = {device for device in devices if device.type not in ("cpu", "meta")}
        self._devices = sorted(kinds, key=str)
        self._generators = generators
        self._random: list[_Random] = []
        owners = [] if module is None else list(module.modules())
        self._places = [
            (owner, name) for owner in owners for name, buffer in owner._buffers.items() if buffer is not None
        ]
        # A copy of every buffer as it was at the last mark: what a pass writes in place is gone afterwards.
        self._latest: list[_Held] = []
        # For each stretch between two marks the buffers that changed in it, as they were before.
        self._before: list[dict[int, _Held]] = []
        self._target: dict[int, _Held] = {}
        self._at: int | None = None

    def mark(self) -> None:
        """Remember this moment; marks are numbered from zero."""
        self._random.append(_Random.now(self._devices, self._generators))
        if not self._latest:
            self._latest = [_Held.of(owner, name) for owner, name in self._places]
            return
        changed = {
            place: held
            for place, held in enumerate(self._latest)
            if not held.is_current(*self._places[place])
        }
        self._before.append(changed)
        for place in changed:
            self._latest[place] = _Held.of(*self._places[place])

    def to(self, mark: int) -> None:
        """Set everything as it was at a mark; call it for smaller and smaller ones."""
        if self._at is None:
            self._at = len(self._before)
        while self._at > mark:
            self._at -= 1
            self._target.update(self._before[self._at])
        self._random[mark].restore(self._devices, self._generators)
        for place, held in self._target.items():
            held.put(*self._places[place])

    def finish(self) -> None:
        """Set everything as it was at the last mark, if it was set back since."""
        if self._at is not None:
            self._random[-1].restore(self._devices, self._generators)
            for place in self._target:
                self._latest[place].put(*self._places[place])


class _Held(NamedTuple):
    """A buffer at one moment: the tensor, how often it had been written, what it held."""

    tensor: Tensor
    version: int
    value: Tensor

    @classmethod
    def of(cls, owner: nn.Module, name: str) -> _Held:
        tensor = owner._buffers[name]
        assert tensor is not None
        return cls(tensor, tensor._version, tensor.detach().clone())

    def is_current(self, owner: nn.Module, name: str) -> bool:
        # The kernels of batch normalisation write running averages without counting it.
        uncounted = isinstance(owner, _NormBase) and owner.training
        return not uncounted and owner._buffers[name] is self.tensor and self.tensor._version == self.version

    def put(self, owner: nn.Module, name: str) -> None:
        owner._buffers[name] = self.tensor
        with torch.no_grad():
            self.tensor.copy_(self.value)


class _Random(NamedTuple):
    """The states of all generators at one moment."""

    cpu: Tensor
    devices: list[Tensor]
    generators: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, devices: Sequence[torch.device], generators: Sequence[torch.Generator]) -> _Random:
        return cls(
            cpu=torch.get_rng_state(),
            devices=[_of_device(device).get_rng_state(*_index(device)) for device in devices],
            generators=[generator.get_state() for generator in generators],
            python=random.getstate(),
            numpy=np.random.get_state(),  # noqa: NPY002 (the global generator is the one to replay)
        )

    def restore(self, devices: Sequence[torch.device], generators: Sequence[torch.Generator]) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(devices, self.devices, strict=True):
            _of_device(device).set_rng_state(state, *_index(device))
        for generator, state in zip(generators, self.generators, strict=True):
            generator.set_state(state)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


def _of_device(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    # torch.mps has one device and takes no argument.
    return () if device.type == "mps" else (device,)
