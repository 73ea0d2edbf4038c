"""Options of the Memorizing Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from memory_models.transformer import TransformerConfig, resolve_layers

COMBINE = ("gate", "softmax")
STORES = ("state", "outside")
INDEXES = ("exact", "ivf", "auto")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig(TransformerConfig):
    """Options of the `memorizing` member (Wu et al. 2022, arXiv:2203.08913)."""

    memories: int = 4096
    """Key/value pairs that each (key/value) head of a row keeps; the oldest leave. 0: no memory."""
    topk: int = 32
    """Pairs each query reads; fewer where there are fewer."""
    memory_layers: tuple[int, ...] | None = None
    """Layers with a memory, from 0, or from -1 for the last; None: the matching one, or 3/4 of the depth."""
    combine: str = "gate"
    """How memory and local attention are joined: "gate" (a learned share per head) or "softmax" (one)."""
    kv_heads: int | None = None
    """Heads of keys and values in memory layers, each shared by as many query heads; None: heads."""
    shift_keys: bool | None = None
    """Keys of memory layers from the token before; None: in a matching layer only."""
    tie_keys: bool | None = None
    """Start key weights of memory layers equal to the query weights; None: in a matching layer only."""
    age_bias: bool = False
    """Add a learned function of a pair's age to its logit, for each head."""
    gate_network: bool = False
    """Let the gate depend on how many pairs are held and on the age of those attended to."""
    xl_cache: int = 0
    """Tokens from before the segment that every layer attends to; the memory gets what leaves them."""
    xl_shift: bool = False
    """Cache each layer's outputs in place of its inputs, as enhanced recurrence does (ERNIE-Doc §3.3)."""
    store: str = "state"
    """Where the pairs are: "state" (exact rings, copied at each write) or "outside" (written by `commit`)."""
    pending_segments: int = 4
    """Outside store: newest segments whose pairs stay in the state too; `commit` may wait that long."""
    store_index: str = "exact"
    """Outside store: "exact", or with Faiss "ivf", "auto" or a factory string (see `KNNMemory`)."""
    store_dtype: str | None = None
    """Outside store: "float32", "bfloat16" or "float16"; None: the dtype of the weights."""
    store_device: str | None = None
    """Outside store: where the pairs live and are searched; None: the device of the weights."""
    store_streams: int | None = None
    """Outside store: rows kept, least recently used first out; None: twice the most committed at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("topk", "pending_segments", "store_streams"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("memories", "xl_cache"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads ({self.heads}) must be divisible by kv_heads ({self.kv_heads})")
        for name, known in (("combine", COMBINE), ("store", STORES), ("store_dtype", (None, *DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}"
                )
        self._check_store()
        if self.gate_network and self.combine != "gate":
            raise ValueError(f"gate_network needs combine='gate', got combine={self.combine!r}")
        if self.xl_shift and self.xl_cache == 0:
            raise ValueError("xl_shift needs a cache: give xl_cache at least 1")
        # A wrong layer is to be heard of here, not at the first call.
        _ = self.layers_with_memory

    def _check_store(self) -> None:
        # A wrong store is to be heard of here, not at the first commit.
        if self.store_device is not None:
            try:
                device = torch.device(self.store_device)
            except RuntimeError as error:
                raise ValueError(f"store_device ({self.store_device!r}) is no device: {error}") from None
            if device.type == "meta":
                raise ValueError("store_device ('meta') holds no values")
        if self.store_index not in INDEXES:
            # Imported here, for Faiss comes with it.
            from memorizing.knn.faiss_engine import make_index

            try:
                make_index(self.store_index, self.head_width, "ip")
            except ValueError as error:
                raise ValueError(
                    f"store_index ({self.store_index!r}) must be one of {', '.join(map(repr, INDEXES))} or a "
                    f"factory string of Faiss: {error}"
                ) from None

    @property
    def stores(self) -> int:
        """Stores of pairs in a memory layer, one for each head of keys and values."""
        return self.kv_heads or self.heads

    @property
    def kept_pairs(self) -> int:
        """Pairs of each store that are in the state: all of them, or the newest beside an outside store."""
        if self.store == "state":
            return self.memories
        return min(self.memories, self.pending_segments * self.segment_length)

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """The layers that keep and read a memory (in the paper layer 9 of 12, §4.1)."""
        if self.memory_layers is not None:
            return resolve_layers(self.memory_layers, self.depth)
        if self.matching_layer:
            return (self.depth - 1,)
        return (max(0, math.floor(0.75 * self.depth + 0.5) - 1),)
