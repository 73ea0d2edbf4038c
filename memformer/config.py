"""Options of Memformer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memory_models.transformer import TransformerConfig, resolve_layers

WRITES = ("bmn", "gru")


@dataclass(frozen=True, kw_only=True)
class MemformerConfig(TransformerConfig):
    """Options of the `memformer` member (Wu et al. 2020, arXiv:2010.06891)."""

    slots: int = 64
    """Memory slots of a row, each as wide as a token."""
    memory_layers: tuple[int, ...] | None = None
    """Layers that read the slots, from 0, or from -1 for the last; None: the last. The paper: all."""
    write: str = "bmn"
    """How slots change: "bmn" (the paper's, on the unit sphere) or "gru" (the published package's)."""
    write_heads: int | None = None
    """Heads of the write's attention, each of which fills its part of a slot on its own; None: heads."""
    write_iterations: int = 1
    """Times that the same segment is written."""
    temperature: float = 0.25
    """Divides the logits of a "bmn" write; below 1 slots choose more sharply."""
    forgetting: float = 0.2
    """Initial norm of the biases of a "bmn" write; a larger one forgets faster."""
    own_bias: float = 2.0
    """Initial bonus of a slot's logit for itself in a "bmn" write; a larger one keeps more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slots", "write_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.write not in WRITES:
            raise ValueError(f"write ({self.write!r}) must be one of {', '.join(map(repr, WRITES))}")
        if self.write_heads is not None and self.write_heads < 1:
            raise ValueError(f"write_heads ({self.write_heads}) must be at least 1")
        if self.dim % self.heads_of_write:
            raise ValueError(
                f"dim ({self.dim}) must be divisible by the heads of the write ({self.heads_of_write}); "
                "give write_heads"
            )
        for name in ("temperature", "forgetting"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if not math.isfinite(self.own_bias):
            raise ValueError(f"own_bias ({self.own_bias}) must be finite")
        # A wrong layer is to be heard of here, not at the first call.
        _ = self.layers_with_memory

    @property
    def heads_of_write(self) -> int:
        """Heads of the write's attention."""
        return self.heads if self.write_heads is None else self.write_heads

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """The layers that read the slots, from 0."""
        return resolve_layers((-1,) if self.memory_layers is None else self.memory_layers, self.depth)
