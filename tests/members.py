"""Every registered member in a size that tests can afford."""

from typing import Any

from memory_models import MemoryLM, MemoryModule, create, create_lm, list_models
from memory_models.models import config_fields, info

# Those of installed plug-ins too.
MEMBERS = list_models()
OURS = [name for name in MEMBERS if info(name).tags]
SMALL = {"dim": 16, "depth": 2, "heads": 2, "segment_length": 6}
# Small enough to evict, and so that nothing divides anything.
OWN: dict[str, dict[str, Any]] = {
    "htm": {"chunk_size": 4, "chunks": 3, "topk": 2},
    "memformer": {"slots": 5},
    "memorizing": {"memories": 7, "topk": 3},
    "memxl": {"mem_len": 5, "lmem_len": 3},
    "full": {"context": 9},
    "transformer-xl": {"cache": 5},
    "gru": {"hidden": 12},
}
# Options that change what a member carries or how it writes, by member.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"token_shift": True, "matching_layer": True})
        for name in MEMBERS
        if {"token_shift", "matching_layer"} <= config_fields(name).keys()
    ),
    ("window", {"dim_head": 3, "depth": 1, "segment_length": 1}),
    ("window", {"dropout": 0.3}),
    ("htm", {"write_gradient": True}),
    ("htm", {"write_gradient": True, "chunks": 1, "chunk_size": 5}),
    ("htm", {"chunk_size": 13, "topk": 8}),
    ("htm", {"memory_layers": (1,), "positions": False, "memory_heads": 1, "memory_dim_head": 3}),
    ("htm", {"chunk_size": 1, "chunks": 4, "topk": 4, "init_scale": None}),
    ("memformer", {"write": "gru", "write_heads": 1, "write_iterations": 2}),
    ("memformer", {"memory_layers": (0, -1), "slots": 1, "forgetting": 2.0}),
    ("memorizing", {"combine": "softmax"}),
    ("memorizing", {"combine": "softmax", "topk": 9, "memory_layers": (0, -1)}),
    ("memorizing", {"xl_cache": 5, "kv_heads": 1, "token_shift": True, "matching_layer": True}),
    ("memxl", {"write_gradient": True, "mem_len": 14, "lmem_len": 5, "gate": "nbrc", "mogrify": True}),
    ("memxl", {"memory_layers": (1,), "long_layers": (0, 1), "write_iterations": 2, "write_heads": 4}),
    ("memxl", {"mem_len": 0, "lmem_len": 0}),
    ("memxl", {"write_gradient": True, "persistent": 2, "token_shift": True, "matching_layer": True}),
    ("memorizing", {"memories": 0, "age_bias": True}),
    ("memorizing", {"xl_cache": 4, "xl_shift": True, "age_bias": True, "gate_network": True}),
    ("full", {"context": 0}),
    ("full", {"context": 64}),
    ("transformer-xl", {"cache": 0}),
    ("transformer-xl", {"cache": 14, "dim_head": 5}),
    ("transformer-xl", {"cache": 3, "token_shift": True, "matching_layer": True}),
    ("gru", {"depth": 1, "hidden": None}),
]


def small_options(name: str, **options: Any) -> dict[str, Any]:
    """Options of a tiny member; `options` come last."""
    known = config_fields(name)
    return {key: value for key, value in SMALL.items() if key in known} | OWN.get(name, {}) | options


def small(name: str, **options: Any) -> MemoryModule[Any]:
    """A tiny member in evaluation mode."""
    return create(name, **small_options(name, **options)).eval()


def small_lm(name: str, *, vocab_size: int = 11, **options: Any) -> MemoryLM:
    """A tiny language model in evaluation mode, in float64 so that equalities can be asked for."""
    return create_lm(name, vocab_size=vocab_size, **small_options(name, **options)).double().eval()
