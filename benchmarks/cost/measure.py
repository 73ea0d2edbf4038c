"""Measures one case in a process of its own: the case comes on standard input, the figures go out as JSON."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from benchmarks.cost import VOCABULARY
from benchmarks.cost.flops import flop_counter
from benchmarks.evaluate import StateWeight
from benchmarks.members import build_model
from benchmarks.speed.peer_worker import extra_peak
from memory_models.replay import memory_replay
from memory_models.segments import Segment

REPEATS, SECONDS = 7, 6.0
DECODED = 64


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """All figures of a case, as `Case.to_json` describes it.

    Returns:
        `parameters`; `state_bytes` that a row carries from segment to segment; `training` with `seconds` of a
        step over all rows and tokens (median), `peak_bytes` above what was there before, `saved_bytes` that
        autograd held at most and `operations`; `decoding` with `seconds` for each token of all rows.
    """
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    model = build_model(case["model"], case["options"], VOCABULARY)
    tokens = torch.randint(VOCABULARY, (case["rows"], case["length"]))
    step = _steps(model, tokens)[case["gradient"]]
    clock = time.process_time if case["threads"] == 1 else time.perf_counter

    def training_step() -> None:
        model.zero_grad(set_to_none=True)
        step()

    # The first call of a process pays for what later ones find ready.
    warm_up = _steps(model, tokens[:, : 2 * model.segment_length])[case["gradient"]]
    warm_up()
    model.zero_grad(set_to_none=True)
    gc.collect()
    peak = extra_peak(training_step)
    with saved_bytes() as saved:
        training_step()
    with flop_counter() as counter:
        training_step()
    seconds = _median(training_step, clock)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": {
            "seconds": seconds,
            "tokens_per_second": tokens.numel() / seconds,
            "peak_bytes": peak["bytes"],
            "peak_method": peak["method"],
            "saved_bytes": saved[0],
            "operations": counter.get_total_flops(),
        },
    }
    model.zero_grad(set_to_none=True)
    memory, found["state_bytes"] = _read(model, tokens)
    if case["decode"]:
        each = _decode(model, memory, case["rows"], clock)
        found["decoding"] = {"seconds": each, "tokens_per_second": case["rows"] / each}
    return found


def _steps(model: Any, tokens: Tensor) -> dict[str, Callable[[], None]]:
    """One training step over all segments, by the way of the gradient."""
    # Copies: a kept view would count the storage of all tokens.
    pieces = [piece.clone() for piece in tokens.split(model.segment_length, 1)]
    asked = tokens.numel()

    def loss_of(logits: Tensor, index: int) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), pieces[index].flatten(), reduction="sum") / asked

    def bptt() -> None:
        memory, total = None, tokens.new_zeros((), dtype=torch.float32)
        for index, piece in enumerate(pieces):
            logits, memory, *_ = model(piece, memory)
            memory = model.commit(memory)
            total = total + loss_of(logits, index)
        total.backward()

    def truncated() -> None:
        memory = None
        for index, piece in enumerate(pieces):
            logits, memory, *_ = model(piece, memory)
            loss_of(logits, index).backward()
            memory = model.commit(memory).detach()

    def checkpointed() -> None:
        memory, total = model.init_memory(len(tokens)), tokens.new_zeros((), dtype=torch.float32)

        def segment(index: int, *leaves: Tensor) -> tuple[Tensor, ...]:
            logits, after, *_ = model(pieces[index], pytree.tree_unflatten(leaves, layout))
            return (loss_of(logits, index), *pytree.tree_leaves(after))

        leaves, layout = pytree.tree_flatten(memory)
        for index in range(len(pieces)):
            loss, *leaves = checkpoint(segment, index, *leaves, use_reentrant=False)
            # Outside the checkpoint, which calls its function twice.
            leaves = pytree.tree_leaves(model.commit(pytree.tree_unflatten(leaves, layout)))
            total = total + loss
        total.backward()

    def replay() -> None:
        memory_replay(model, [Segment(x=piece) for piece in pieces], loss_of)

    return {"bptt": bptt, "truncated": truncated, "checkpoint": checkpointed, "replay": replay}


def _read(model: Any, tokens: Tensor) -> tuple[Any, float]:
    """The memory after all tokens, and the bytes of it that a row carries from segment to segment."""
    model.eval()
    weight = StateWeight(model)
    memory: Any = None
    with torch.no_grad():
        for piece in tokens.split(model.segment_length, 1):
            memory = model.commit(model(piece, memory).memory)
            weight.add(memory)
    return memory, weight.state_bytes


def _decode(model: Any, memory: Any, rows: int, clock: Callable[[], float]) -> float:
    """Median seconds of one more token, over the tokens of some segments."""
    held: list[float] = []
    token = torch.zeros(rows, 1, dtype=torch.int64)
    ended = time.monotonic() + SECONDS
    with torch.no_grad():
        place = 0
        while len(held) < DECODED or (time.monotonic() < ended and len(held) < 4 * DECODED):
            place += 1
            start = clock()
            logits, memory, *_ = model(token, memory, close=place == model.segment_length)
            token = logits[:, -1:].argmax(-1)
            held.append(clock() - start)
            if place == model.segment_length:
                memory, place = model.commit(memory), 0
    return statistics.median(held)


def _median(step: Callable[[], None], clock: Callable[[], float]) -> float:
    seconds: list[float] = []
    ended = time.monotonic() + SECONDS
    while len(seconds) < 2 or (len(seconds) < REPEATS and time.monotonic() < ended):
        start = clock()
        step()
        seconds.append(clock() - start)
    return statistics.median(seconds)


class _Kept:
    # Stands for a tensor that autograd keeps; when it goes, so do its bytes.
    def __init__(self, tensor: Tensor, count: dict[int, int], live: list[int]) -> None:
        self.tensor, self.count, self.live = tensor, count, live
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        count[self.key] = count.get(self.key, 0) + 1
        if count[self.key] == 1:
            live[0] += self.size

    def __del__(self) -> None:
        self.count[self.key] -= 1
        if self.count[self.key] == 0:
            self.live[0] -= self.size


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Inside the block, the most bytes that autograd's graphs held at once; parameters do not count.

    Storages are counted once however many views of them are kept. What a function computes again in its
    backward pass counts while it is there.
    """
    most, live = [0], [0]
    count: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor | _Kept:
        base = tensor._base if tensor._is_view() else tensor
        if isinstance(base, torch.nn.Parameter):
            return tensor
        kept = _Kept(tensor, count, live)
        most[0] = max(most[0], live[0])
        return kept

    def unpack(kept: Tensor | _Kept) -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield most


if __name__ == "__main__":
    json.dump(measure(json.load(sys.stdin)), sys.stdout)
