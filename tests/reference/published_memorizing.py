"""What memorizing-transformers-pytorch 0.4.1 computes, and where it is at fault.

To be run by the environment of the published packages (`make peers`), in any empty directory:

    .peers/bin/python -I tests/reference/published_memorizing.py record published.safetensors
    .peers/bin/python -I tests/reference/published_memorizing.py faults
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {"num_tokens": 12, "dim": 8, "depth": 3, "heads": 2, "dim_head": 4, "ff_mult": 2}
SIZES |= {"max_knn_memories": 64, "num_retrieved_memories": 40}
# For each case its further arguments, and whether the distance bias is zero: with one, and a cache, the
# package is at fault.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "stores": ({"memorizing_layers": (2, 3)}, False),
    "cache": ({"memorizing_layers": 2, "xl_max_memories": 8, "xl_memory_layers": (1, 2)}, True),
    "shifted": (
        {
            "memorizing_layers": 2,
            "xl_max_memories": 8,
            "xl_memory_layers": (1, 3),
            "shift_xl_memories_down": 1,
        },
        True,
    ),
}
SEGMENTS, LENGTH, BATCH = 3, 12, 2


def published() -> Any:
    import memorizing_transformers_pytorch

    return memorizing_transformers_pytorch


def made(**options: Any) -> Any:
    """A model with numbers large enough to show in the outputs."""
    torch.manual_seed(0)
    model = published().MemorizingTransformer(**(SIZES | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def record(path: str) -> None:
    """Weights, tokens, outputs, losses and gradients of each case, as safetensors."""
    torch.manual_seed(1)
    tokens = torch.randint(1, SIZES["num_tokens"], (BATCH, SEGMENTS, LENGTH + 1))
    tokens[0, 1, 3:5] = 0
    kept: dict[str, Tensor] = {"tokens": tokens}
    for name, (options, unbiased) in CASES.items():
        model = made(**options)
        if unbiased:
            torch.nn.init.zeros_(model.rel_pos_bias.relative_attention_bias.weight)
            torch.nn.init.zeros_(model.knn_rel_pos_bias.relative_attention_bias.weight)
        kept |= {f"{name}/weights/{key}": value for key, value in model.state_dict().items()}
        for labelled in (False, True):
            stores, caches, total = model.create_knn_memories(batch_size=BATCH), None, torch.zeros(())
            for index in range(SEGMENTS):
                segment = tokens[:, index]
                options = {"labels": segment[:, 1:]} if labelled else {}
                # Only XL layers fill the caches, and only with them is a pair returned.
                out = model(segment[:, :-1], stores, caches, **options)
                out, caches = out if isinstance(out, tuple) else (out, None)
                if labelled:
                    total = total + out
                else:
                    kept[f"{name}/logits/{index}"] = out
                    for layer, cache in enumerate(caches or []):
                        kept[f"{name}/xl/{index}/{layer}"] = cache
        total.backward()
        kept[f"{name}/loss"] = total
        kept |= {f"{name}/grads/{key}": value.grad for key, value in model.named_parameters()}
    header, place = {}, 0
    arrays = {name: value.detach().contiguous() for name, value in kept.items()}
    for name, array in arrays.items():
        size = array.numel() * array.element_size()
        kind = {torch.float32: "F32", torch.int64: "I64"}[array.dtype]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.numpy().tobytes())


def own_share(memory: Any, pairs: Tensor) -> float:
    """Share of stored pairs that are found by their own key."""
    found, mask = memory.search(pairs[:, :, 0], 1)
    return float(((found[:, :, 0] == pairs).flatten(2).all(-1) & mask[..., 0]).float().mean())


def unit_pairs(batch: int, count: int, dim: int = 16) -> Tensor:
    pairs = torch.randn(batch, count, 2, dim)
    return torch.cat([torch.nn.functional.normalize(pairs[:, :, :1], dim=-1), pairs[:, :, 1:]], 2)


def error(call: Callable[[], Any]) -> str:
    try:
        return f"no error, returns {type(call()).__name__}"
    except Exception as caught:
        return f"{type(caught).__name__}: {str(caught).splitlines()[0][:80]}"


@torch.no_grad()
def faults() -> None:
    """Print what is seen of each fault of docs/memorizing-published.md."""
    package = published()
    torch.manual_seed(0)
    memory = package.KNNMemory(16, 1000, 1, multiprocessing=False)
    shares = []
    for _ in range(5):
        pairs = unit_pairs(1, 300)
        memory.add(pairs)
        shares.append(own_share(memory, pairs))
    print("M1, M2 newest 300 pairs found after each of 5 adds, 1000 places:", shares)
    memory, adds = package.KNNMemory(16, 1024, 1, multiprocessing=False), []
    for _ in range(6):
        adds.append(unit_pairs(1, 256))
        memory.add(adds[-1])
    print(
        "M3 newest 1024 pairs found after 6 adds of 256, 1024 places:",
        own_share(memory, torch.cat(adds[2:], 1)),
    )
    memory, first = package.KNNMemory(16, 1000, 2, multiprocessing=False), unit_pairs(1, 100)
    with memory.at_batch_indices([0]):
        memory.add(first)
    both = unit_pairs(2, 100)
    memory.add(both)
    with memory.at_batch_indices([1]):
        print("M4 row 1 after an add to row 0 and one to both:", own_share(memory, both[1:]))

    model = made(memorizing_layers=2)
    tokens = torch.randint(2, 12, (1, 12))
    one = model.create_knn_memories(batch_size=1)
    model(tokens, one)
    pairs = torch.from_numpy(one[0].db[:, :12].copy())
    model.create_knn_memories(batch_size=1)
    print("M5 pairs found before and after a second set of stores is made: 1.0", own_share(one[0], pairs))
    for name in ("sos", "eos"):
        model = made(memorizing_layers=2, **{f"clear_memories_on_{name}_token_id": 1})
        stores = model.create_knn_memories(batch_size=1)
        model(tokens, stores)
        cleared = torch.cat([tokens[:, :-1], torch.ones(1, 1, dtype=torch.int64)], 1)
        model(cleared, stores)
        print(
            f"M6 pairs in the store after two segments, the second ending in {name}:",
            len(stores[0].knns[0].ids),
        )
    out = made(memorizing_layers=2)(tokens, model.create_knn_memories(batch_size=1))
    print("M7 without XL memories the model returns a", type(out).__name__)
    model = made(depth=1, memorizing_layers=(), xl_max_memories=16).double()
    long = torch.randint(1, 12, (1, 32))
    _, caches = model(long[:, :16], [])
    second, _ = model(long[:, 16:], [], caches)
    print(
        "M8 two segments with XL memory and one pass differ by",
        float((second - model(long, [])[0][:, 16:]).abs().max()),
    )
    model = made(memorizing_layers=2).bfloat16()
    print("M9 bfloat16:", error(lambda: model(tokens, model.create_knn_memories(batch_size=1))))
    memory = package.KNNMemory(16, 100, 2, multiprocessing=False)

    def fail() -> None:
        with memory.at_batch_indices([0]):
            raise KeyError(0)

    error(fail)
    print("M10 rows in scope after an exception within at_batch_indices([0]) of 2:", memory.scoped_indices)
    with made().knn_memories_context(batch_size=1):
        pass
    print(
        "M11 files left:",
        sorted(os.listdir("./.tmp/knn.memories")),
        [f for f in os.listdir(".") if "memmap" in f],
    )

    print(
        "heads",
        error(
            lambda: made(memorizing_layers=2, knn_attn_heads=4)(
                tokens, made().create_knn_memories(batch_size=1)
            )
        ),
    )
    results = []
    for shift in (0, 1):
        model = made(memorizing_layers=(2, 3), shift_knn_memories_down=shift)
        stores = model.create_knn_memories(batch_size=1)
        model(tokens, stores)
        results.append(model(tokens, stores))
    print("shift_knn_memories_down moves the second segment by", float((results[0] - results[1]).abs().max()))


if __name__ == "__main__":
    target = [os.path.abspath(path) for path in sys.argv[2:]]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        {"record": record, "faults": faults}[sys.argv[1]](*target)
