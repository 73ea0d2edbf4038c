"""The classic MemoryTransformerXL over four segments, against memory-transformer-xl.

Both processes load this file, and in one of them this project does not exist: outside functions it imports
only the standard library and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.speed import Case, Work

TOKENS, DIM, DEPTH, LENGTH, PERSISTENT = 20_000, 512, 4, 256, 128
MEMORY_LAYERS = (3, 4)
SEGMENTS, WRITES = 4, 2
# Parameters whose gradients are compared: the package's names and ours.
_COMPARED = {
    "token_emb.weight": "embed.weight",
    "to_logits.1.weight": "to_logits.weight",
    "attn_layers.0.fn.fn.to_q.weight": "layers.0.attention.to_queries.weight",
    "attn_layers.3.fn.fn.to_kv.weight": "layers.3.attention.to_keys_values.weight",
    "ff_layers.2.fn.fn.w1.weight": "layers.2.feedforward.to_inner.weight",
}


def cases() -> list[Case]:
    """Four segments forward to their logits, to their losses, and with one backward pass through them all."""
    from benchmarks.speed import Case

    kinds = {
        "forward": {"losses": False, "backward": False},
        "loss": {"losses": True, "backward": False},
        "forward+backward": {"losses": True, "backward": True},
    }
    return [
        Case(
            name=f"memxl/{kind}/s{SEGMENTS}x{LENGTH}",
            package="memory-transformer-xl",
            settings={"segments": SEGMENTS, **settings, "seed": 0},
            work=least_work(segments=SEGMENTS, **settings),
            faster=1.5,
            leaner=1 / 0.6,
            note="losses and gradients by `AutoregressiveWrapper`, logits by the model's call; compared: the "
            "first segment's, for the package writes its long memory with its heads merged wrongly and reads "
            "the short one without the norm (docs/memxl-published.md); later segments are the same work",
        )
        for kind, settings in kinds.items()
    ]


def least_work(*, segments: int, backward: bool, losses: bool = False) -> Work:
    """Operations and bytes of a step: every product forward, and with gradients twice as much backward.

    What lies in the memories takes no gradient but for the long one, so that the keys and values made of
    short memory cost a pass less. Products of the causal attention within a segment are halved, products
    with distances counted as those with keys. Of bytes the weights are read in every pass, gradients and,
    where no loss stands in for them, logits written.
    """
    from benchmarks.speed import Work

    square, passes = DIM * DIM, 3 if backward else 1
    count = forward = 0.0
    for segment in range(segments):
        short = long = LENGTH if segment else 0
        for layer in range(1, DEPTH + 1):
            reads = layer in MEMORY_LAYERS
            read = long * reads + PERSISTENT
            scored = LENGTH * (read + short * reads + LENGTH / 2)
            # queries, output, four times wider and back, and a gate of five maps behind each of both layers
            maps = LENGTH * (2 + 8 + 10) * square
            pairs = 2 * (read + LENGTH) * square
            distances = LENGTH * (short * reads + LENGTH / 2)
            count += passes * (maps + pairs + 2 * scored * DIM + distances * DIM)
            forward += 2 * short * reads * square * min(passes, 2)
        logits = LENGTH * TOKENS * DIM
        count += passes * logits
        if segment < segments - 1:
            # Linear attention of the slots over everything written: both its products are with matrices
            # of a head's width.
            written = len(MEMORY_LAYERS) * (short + LENGTH) + PERSISTENT
            head = DIM // 4
            once = (2 * LENGTH + 5 * LENGTH + 2 * LENGTH) * square + (2 * LENGTH + written) * head * DIM
            # Keys and values of what was written are the same in every write of a segment but for the slots.
            count += passes * WRITES * once + min(passes, 2) * 2 * written * square
    weights = 2 * TOKENS * DIM + DEPTH * (4 + 8 + 10) * square + 9 * square
    logits = 0 if losses else segments * LENGTH * TOKENS
    bytes_moved = 4 * (weights * (3 if backward else 1) + logits * passes)
    return Work(operations=2 * (count + forward), bytes=bytes_moved)


def _options() -> dict[str, Any]:
    return {
        "num_tokens": TOKENS,
        "dim": DIM,
        "depth": DEPTH,
        "seq_len": LENGTH,
        "mem_len": LENGTH,
        "lmem_len": LENGTH,
        "memory_layers": list(MEMORY_LAYERS),
        "num_mem_kv": PERSISTENT,
        "mem_write_iters": WRITES,
    }


def theirs(settings: Mapping[str, Any], weights: str) -> Reading:
    """The published model, its weights written to `weights`."""
    from memory_transformer_xl import (  # type: ignore[import-not-found, unused-ignore]
        MemoryTransformerXL,
    )
    from memory_transformer_xl.autoregressive_wrapper import (  # type: ignore[import-not-found, unused-ignore]
        AutoregressiveWrapper,
    )

    torch.manual_seed(settings["seed"])
    model = MemoryTransformerXL(**_options())
    torch.save(model.state_dict(), weights)
    return Reading(AutoregressiveWrapper(model), settings, names=_COMPARED)


def ours(settings: Mapping[str, Any], weights: str) -> Reading:
    """Our model with the published one's weights."""
    from memxl import AutoregressiveWrapper, MemoryTransformerXL, load_published

    model = MemoryTransformerXL(**_options())
    load_published(model, torch.load(weights, weights_only=True))
    return Reading(AutoregressiveWrapper(model), settings, names={name: name for name in _COMPARED.values()})


class Reading:
    """Reads the segments one after the other, from an empty memory, and learns from all of them at the end.

    Args:
        wrapper: `AutoregressiveWrapper` of either side.
        settings: what `cases` put into the case.
        names: parameters of the model whose gradients are compared, and ours that correspond to them.
    """

    def __init__(self, wrapper: Any, settings: Mapping[str, Any], *, names: Mapping[str, str]) -> None:
        self.wrapper, self.names = wrapper, names
        self.losses: bool = settings["losses"]
        self.backward: bool = settings["backward"]
        generator = torch.Generator().manual_seed(settings["seed"] + 1)
        self.tokens = torch.randint(TOKENS, (1, settings["segments"] * LENGTH + 1), generator=generator)

    def step(self, index: int) -> None:
        """All segments."""
        self._read(self.tokens)

    def warm_up(self) -> None:
        """The same on a few tokens."""
        self._read(self.tokens[:, :17])
        self.wrapper.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """Logits, loss and gradients of the first segment."""
        first = self.tokens[:, : LENGTH + 1]
        with torch.no_grad():
            found = {"output": self.wrapper.net(first[:, :-1])[0]}
        if self.losses:
            found["loss"] = self._read(first)[None]
        if self.backward:
            for name, common in self.names.items():
                gradient = self.wrapper.net.get_parameter(name).grad
                if gradient is None:
                    raise RuntimeError(f"no gradient reached {name}")
                found[f"gradient of {common}"] = gradient
        return found

    def _read(self, tokens: Tensor) -> Tensor:
        self.wrapper.zero_grad(set_to_none=True)
        total = torch.zeros(())
        with torch.set_grad_enabled(self.backward):
            if self.losses:
                for loss, _ in self.wrapper(tokens, return_loss=True):
                    total = total + loss
                    del loss
            else:
                memory = None
                for segment in tokens[:, :-1].split(LENGTH, dim=1):
                    # The logits go before the next segment's come.
                    memory = self.wrapper.net(segment, memory)[1]
        if self.backward:
            total.backward()
        return total.detach()
