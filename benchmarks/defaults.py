"""How each model is trained on each task unless told otherwise.

Change a comparison here, or for one run with `--set`; `benchmarks.settings.plan` reads the tables.
"""

from __future__ import annotations

from typing import Any

EVERY = "*"

# Training by task and model. What a row leaves out is as in the row above it: (task, model), then
# (task, every model), then the defaults of `TrainSettings`, which serve tasks that are not named.
TRAINING: dict[str, dict[str, dict[str, Any]]] = {
    "recall": {
        EVERY: {"steps": 500, "batch_size": 32, "learning_rate": 3e-3},
    },
    "rewrite": {
        EVERY: {"steps": 500, "batch_size": 32, "learning_rate": 3e-3},
    },
    "needle": {
        EVERY: {"steps": 300, "batch_size": 32, "learning_rate": 3e-3},
    },
    # The third symbol of three comes late and at once: `full` is at .74 after 125 steps and at 1.0 after 250.
    # `memformer` is at .51 after 369 of 500 steps and rising.
    "copy": {
        EVERY: {"steps": 800, "batch_size": 32, "learning_rate": 3e-3},
    },
    "reverse": {
        EVERY: {"steps": 800, "batch_size": 32, "learning_rate": 3e-3},
    },
    # Counting is learned slowly: `full` is at .80 after 300 steps, .85 after 400, .90 after 500.
    "selective-copy": {
        EVERY: {"steps": 800, "batch_size": 32, "learning_rate": 3e-3},
    },
    "ballet": {
        EVERY: {"steps": 300, "batch_size": 32, "learning_rate": 3e-3},
    },
    # `full` is at .86 after 75 steps, .97 after 150 and .99 after 300; without the matching layer it is at 0
    # after 120. Slots are not learned by then: `memformer` is at .01, and `memxl` has its short memory only.
    "mqar": {
        EVERY: {"steps": 300, "batch_size": 32, "learning_rate": 3e-3},
    },
    "rmt-copy": {
        EVERY: {"steps": 400, "batch_size": 32, "learning_rate": 3e-3},
    },
    "rmt-reverse": {
        EVERY: {"steps": 500, "batch_size": 32, "learning_rate": 3e-3},
    },
    "text": {
        EVERY: {
            "steps": 450,
            "batch_size": 16,
            "learning_rate": 2.5e-3,
            "warmup": 80,
            # Annealing from the start costs a short run much: hold the rate, then lower it.
            "decay": 0.25,
            "final": 0.03,
            "weight_decay": 0.02,
            # A batch of a stream is one segment, so it takes many to see anything.
            "evaluation_rows": 32,
            "curve_points": 4,
            "curve_batches": 8,
            "probe_batches": 12,
        },
    },
}

# Digits behind a marker, steps of a dance, symbols behind a name: what is asked for is found by what stands
# before it, which takes long to learn without the matching layer. `full` is at .53 on `copy` of four symbols
# after 38 steps with it and at .13 without, and on `needle` at .998 after 150 steps.
_MATCHING: dict[str, Any] = {
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "ff_dim": 128,
    "token_shift": True,
    "matching_layer": True,
    "tie_embeddings": False,
    "embedding_std": 0.5,
    "embedding_scale": 1.0,
}

# `recall`, and `rewrite`, which is its form with keys that change.
_RECALLING: dict[str, dict[str, Any]] = {
    EVERY: {
        "dim": 64,
        "depth": 2,
        "heads": 2,
        "ff_dim": 128,
        "token_shift": True,
        "tie_embeddings": False,
        "embedding_std": 0.5,
        "embedding_scale": 1.0,
    },
    "htm": {"chunk_size": 4, "chunks": 24, "topk": 4, "memory_layers": (-1,)},
    "memformer": {"slots": 32, "write_heads": 4},
    "memorizing": {"memories": 96, "topk": 16},
    "memxl": {"mem_len": 16, "lmem_len": 32},
    "full": {"context": 80},
    "transformer-xl": {"cache": 16},
    "gru": {"hidden": 128},
}

# `copy` and `reverse`: the same sizes.
_COPYING: dict[str, dict[str, Any]] = {
    EVERY: _MATCHING,
    # A chunk is a segment.
    "htm": {"chunk_size": 11, "chunks": 4, "topk": 2, "memory_layers": (-1,)},
    "memformer": {"slots": 32},
    "memorizing": {"memories": 44, "topk": 16},
    "memxl": {"mem_len": 11, "lmem_len": 32},
    "full": {"context": 33},
    "transformer-xl": {"cache": 11},
    "gru": {"hidden": 128},
}

# Options of the models by task, read like `TRAINING`. The rows for every model are given to members that
# have such an option; the segment length comes from the task.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    EVERY: {
        EVERY: {"dim": 64, "depth": 2, "heads": 2, "token_shift": True},
    },
    "recall": _RECALLING,
    "rewrite": {
        **_RECALLING,
        # Without a bias for age all values of a key are alike to it: .52 after half the steps, with it .87.
        "memorizing": {"memories": 96, "topk": 16, "age_bias": True},
    },
    "needle": {
        EVERY: _MATCHING,
        # Chunks shorter than a segment, of which most hold nothing but filler.
        "htm": {"chunk_size": 8, "chunks": 18, "topk": 4, "memory_layers": (-1,)},
        "memformer": {"slots": 32},
        "memorizing": {"memories": 144, "topk": 16},
        "memxl": {"mem_len": 24, "lmem_len": 32},
        "full": {"context": 120},
        "transformer-xl": {"cache": 24},
        "gru": {"hidden": 128},
    },
    "copy": _COPYING,
    "reverse": _COPYING,
    "selective-copy": {
        EVERY: _MATCHING,
        "htm": {"chunk_size": 8, "chunks": 8, "topk": 4, "memory_layers": (-1,)},
        "memformer": {"slots": 32},
        "memorizing": {"memories": 64, "topk": 16},
        "memxl": {"mem_len": 16, "lmem_len": 32},
        "full": {"context": 48},
        "transformer-xl": {"cache": 16},
        "gru": {"hidden": 128},
    },
    "ballet": {
        EVERY: _MATCHING,
        "htm": {"chunk_size": 8, "chunks": 24, "topk": 4, "memory_layers": (-1,)},
        "memformer": {"slots": 32},
        "memorizing": {"memories": 192, "topk": 16},
        "memxl": {"mem_len": 24, "lmem_len": 32},
        "full": {"context": 168},
        "transformer-xl": {"cache": 24},
        "gru": {"hidden": 128},
    },
    # Two layers and embeddings of 64, tied, as in Zoology's smallest model. Untied, what says each of the
    # 4,096 values would have to be learned by itself.
    "mqar": {
        EVERY: {
            "dim": 64,
            "depth": 2,
            "heads": 2,
            "ff_dim": 128,
            "token_shift": True,
            "matching_layer": True,
        },
        "htm": {"chunk_size": 8, "chunks": 8, "topk": 4, "memory_layers": (-1,)},
        "memformer": {"slots": 32, "write_heads": 4},
        "memorizing": {"memories": 64, "topk": 16},
        "memxl": {"mem_len": 16, "lmem_len": 32},
        "full": {"context": 48},
        "transformer-xl": {"cache": 16},
        "gru": {"hidden": 128},
    },
    # Sizes as in the Recurrent Memory Transformer's tables: a cache of 12, and as many slots as a segment has
    # tokens.
    "rmt-copy": {
        EVERY: _MATCHING,
        "htm": {"chunk_size": 8, "chunks": 9, "topk": 4, "memory_layers": (-1,)},
        "memformer": {"slots": 24},
        "memorizing": {"memories": 72, "topk": 16},
        "memxl": {"mem_len": 12, "lmem_len": 24},
        "full": {"context": 48},
        "transformer-xl": {"cache": 12},
        "gru": {"hidden": 128},
    },
    "rmt-reverse": {
        EVERY: _MATCHING,
        "htm": {"chunk_size": 6, "chunks": 8, "topk": 4, "memory_layers": (-1,)},
        "memformer": {"slots": 12},
        "memorizing": {"memories": 48, "topk": 16},
        "memxl": {"mem_len": 12, "lmem_len": 12},
        "full": {"context": 36},
        "transformer-xl": {"cache": 12},
        "gru": {"hidden": 128},
    },
    "text": {
        EVERY: {
            "dim": 128,
            "depth": 3,
            "heads": 4,
            "ff_dim": 256,
            "token_shift": True,
            "matching_layer": True,
            "embedding_std": 0.05,
        },
        "htm": {"chunk_size": 4, "chunks": 1024, "topk": 32, "memory_layers": (-1,)},
        "memformer": {"slots": 32},
        "memorizing": {"memories": 4096, "topk": 32, "combine": "softmax", "xl_cache": 64},
        "memxl": {"mem_len": 64, "lmem_len": 32},
        "full": {"context": 1024},
        "transformer-xl": {"cache": 64},
        "gru": {"hidden": 256},
    },
}

# The same command in seconds: what `--smoke` puts on top, beside the task's own `smoke` options.
SMOKE_TRAINING: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "evaluation_rows": 4,
    "curve_points": 2,
    "curve_batches": 1,
    "probe_batches": 2,
}
SMOKE_OPTIONS: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "ff_dim": 16, "hidden": 16}

# Seconds of a step relative to `window`: only for the order of the runs and a first guess of the time left.
COST: dict[str, float] = {
    "window": 1.0,
    "full": 1.0,
    "transformer-xl": 1.3,
    "gru": 1.5,
    "memformer": 1.5,
    "memxl": 2.0,
    "htm": 4.0,
}
UNKNOWN_COST = 2.5
