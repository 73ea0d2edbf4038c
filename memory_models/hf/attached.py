"""The handle of a memory that was attached to somebody else's model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from memory_models.checkpoints import CheckpointError
from memory_models.hf.adapter import (
    WEIGHTS_FILE,
    AttachedMemory,
    MemoryAdapter,
    read_attached,
    write_attached,
)
from memory_models.hf.cache import carried, carry, repeat_rows
from memory_models.hf.masks import newest_flags
from memory_models.state import Memory

CHILD = "attached_memory"


class Attached:
    """A memory attached to a model of transformers; made by `attach` and `load_attached`.

    Where the memory of a call comes from and goes to:

    - A call that goes on with a key/value cache (`past_key_values`, every step of `generate()`) goes on with
      the memory which that cache carries. Beam search reorders both.
    - Any other call starts afresh, and its memory ends with it: a training step or an evaluation is a text of
      its own.
    - Inside `with attached.stream():` any other call starts with `attached.memory`, and every call leaves its
      memory there. That is how a text is read that is longer than one call.

    A call of any length is cut into segments of the member's `segment_length`; what is left over stays open
    and the next call completes it. One call at a time: a handle is not for several threads.

    Attributes:
        model: the model.
        adapters: what was added, by layer.
        description: what `attach` needs to add the same again, as JSON values.
    """

    def __init__(
        self,
        model: Any,
        decoder: nn.Module,
        layers: Mapping[int, nn.Module],
        adapters: Mapping[int, MemoryAdapter],
        *,
        description: dict[str, Any],
        freeze: bool,
    ) -> None:
        self.model = model
        self.adapters = dict(adapters)
        self.description = description
        self._layers = dict(layers)
        self._memory: AttachedMemory | None = None
        self._streaming = self._detach = self._generating = False
        self._call: _Call | None = None
        self._signature = inspect.signature(decoder.forward)
        self._trained = [p for p in model.parameters() if p.requires_grad] if freeze else []
        for parameter in self._trained:
            parameter.requires_grad_(False)
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            # Also after an error, which must not leave a half-read call behind.
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        for index, layer in self._layers.items():
            layer.add_module(CHILD, self.adapters[index])
            # First of all hooks, so that those which record hidden states see what the next layer sees.
            hook = partial(self._after_layer, index)
            self._handles.append(layer.register_forward_hook(hook, prepend=True))
        model.generate = self._generate
        model.__dict__[CHILD] = self

    @property
    def memory(self) -> AttachedMemory | None:
        """The memory of the stream, None where nothing was read; may be set: it is a value."""
        return self._memory

    @memory.setter
    def memory(self, memory: AttachedMemory | None) -> None:
        if memory is not None and not isinstance(memory, AttachedMemory):
            raise TypeError(f"memory must be an AttachedMemory or None, got {type(memory)}")
        self._memory = memory

    def init_memory(self, batch_size: int) -> AttachedMemory:
        """A fresh memory of `batch_size` rows."""
        return AttachedMemory(layers=tuple(a.member.init_memory(batch_size) for a in self.adapters.values()))

    def reset(self, rows: Tensor | None = None) -> None:
        """Begin new texts in the stream.

        Args:
            rows: bool `[batch]`, true where a new text begins; None: in all rows.

        Raises:
            TypeError, ValueError: if `rows` is not bool or does not fit the memory.
        """
        if rows is None or self._memory is None:
            self._memory = None
        else:
            self._memory = self.init_memory(self._memory.batch_size).where(rows, self._memory)

    @contextmanager
    def stream(self, memory: AttachedMemory | None = None, *, detach: bool = True) -> Iterator[Attached]:
        """Carry the memory from call to call.

        `generate()` in a stream starts with the stream's memory. Afterwards the stream has read the prompt
        and all that was generated but the last token, which nobody fed; if beams or `num_return_sequences`
        made more rows than the prompt has, it is as before.

        Args:
            memory: where to start, `attached.memory` of an earlier stream say; None: afresh.
            detach: whether to cut the gradient between calls; without, a loss reaches through the memory into
                earlier calls, if the member lets it, and all their activations are kept. With it what such a
                member writes learns only from later segments of the same call.

        Raises:
            RuntimeError: if a stream is open already.
        """
        if self._streaming:
            raise RuntimeError("a stream is open already; begin new texts in it with attached.reset()")
        self.memory = memory
        self._streaming, self._detach = True, detach
        try:
            yield self
        finally:
            self._streaming = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that were added."""
        for adapter in self.adapters.values():
            yield from adapter.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names such as `layers.3.gate`."""
        for index, adapter in self.adapters.items():
            yield from adapter.named_parameters(prefix=f"layers.{index}")

    def state_dict(self) -> dict[str, Tensor]:
        """What was added, by names such as `layers.3.gate`."""
        return {
            f"layers.{index}.{name}": tensor
            for index, adapter in self.adapters.items()
            for name, tensor in adapter.state_dict().items()
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what was added, and nothing else, to one file in a folder, that of the model for instance.

        It is `attached_memory.safetensors`, written atomically.
        """
        write_attached(Path(folder), self.description, self.state_dict())

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote into what is attached, in the dtype it has here.

        Raises:
            FileNotFoundError: if the folder has no such file.
            CheckpointError: if the file is damaged, or of a memory with other options, layers or widths.
        """
        path = Path(folder) / WEIGHTS_FILE
        description, found = read_attached(path)
        for name, value in self.description.items():
            if description.get(name) != value:
                raise CheckpointError(
                    f"{path} does not fit: its {name} is {description.get(name)!r}, here it is {value!r}"
                )
        expected = self.state_dict()
        if expected.keys() != found.keys():
            odd = ", ".join(sorted(expected.keys() ^ found.keys()))
            raise CheckpointError(f"{path} does not fit: only one of the two has {odd}")
        for name, tensor in expected.items():
            if found[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path} does not fit: {name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
                )
        for name, tensor in expected.items():
            tensor.copy_(found[name])

    def remove(self) -> None:
        """Take the memory off: the model is as it was before, its `requires_grad` flags too."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            delattr(layer, CHILD)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        del self.model.__dict__["generate"], self.model.__dict__[CHILD]
        self._handles, self._layers, self._trained = [], {}, []

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        cache = given.get("past_key_values")
        ids = given.get("input_ids")
        x = given.get("inputs_embeds") if ids is None else ids
        if x is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds")
        rows, time = x.shape[:2]
        memory = carried(cache)
        if memory is None and self._streaming:
            if self._generating and cache is None:
                raise ValueError(
                    "generate(use_cache=False) reads its text again at each step, which a stream would "
                    "remember as often; generate with a cache, or outside the stream"
                )
            memory = self._memory
            if memory is not None and self._generating:
                memory = repeat_rows(memory, rows)
        if memory is not None and memory.batch_size != rows:
            raise ValueError(
                f"the call has {rows} rows but the memory has {memory.batch_size}; begin new texts with "
                "attached.reset(), or take rows with attached.memory = attached.memory.select(indices)"
            )
        layers = dict.fromkeys(self.adapters, None) if memory is None else self._by_layer(memory)
        self._call = _Call(newest_flags(given.get("attention_mask"), rows, time), layers, cache)

    def _after_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._call
        if call is None:
            raise RuntimeError(
                f"layer {index} was called outside the model, where its memory cannot be followed; call the "
                "model, and with gradient checkpointing a version of transformers that checkpoints forward "
                "and not hooks (5.23 does)"
            )
        hidden = output[0] if isinstance(output, tuple) else output
        mask = None if call.mask is None else call.mask.to(hidden.device)
        hidden, call.memories[index] = self.adapters[index](hidden, call.memories[index], mask)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self._call = self._call, None
        if output is None or call is None:
            return
        layers = tuple(memory for memory in call.memories.values() if memory is not None)
        if len(layers) < len(self.adapters):
            raise RuntimeError("the model left out a layer that has a memory (early exit is not supported)")
        memory = AttachedMemory(layers=layers)
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        cache = next((part for part in parts if isinstance(part, Cache)), call.cache)
        if isinstance(cache, Cache):
            carry(cache, memory)
        if self._streaming:
            self._memory = memory.detach() if self._detach else memory

    def _by_layer(self, memory: Memory) -> dict[int, Memory | None]:
        if not isinstance(memory, AttachedMemory) or len(memory.layers) != len(self.adapters):
            raise ValueError("the memory comes from another attachment: start afresh with a new cache")
        return dict(zip(self.adapters, memory.layers, strict=True))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        # The model's own method, found through its class: a copy of the model must not call the original's.
        generate = type(self.model).generate
        if not self._streaming:
            return generate(self.model, *args, **kwargs)
        named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = args[0] if args else next((x for x in named if x is not None), None)
        rows, before = 1 if prompt is None else prompt.shape[0], self._memory
        self._generating = True
        finished = False
        try:
            result = generate(self.model, *args, **kwargs)
            finished = True
        finally:
            self._generating = False
            if not finished or self._memory is None or self._memory.batch_size != rows:
                self._memory = before
        return result


class _Call:
    """One call of the model while it runs."""

    def __init__(self, mask: Tensor | None, memories: dict[int, Memory | None], cache: Any) -> None:
        self.mask = mask
        self.memories = memories
        self.cache = cache
