"""The classic MemorizingTransformer, reading and in training, against memorizing-transformers-pytorch.

Both processes load this file, and in one of them this project does not exist: outside functions it imports
only the standard library and torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.speed import Case, Work

# As in the package's README.
TOKENS, DIM, DIM_HEAD, HEADS, DEPTH, BATCH = 20_000, 512, 64, 8, 8, 2
MEMORY_LAYERS = (4, 5)
CAPACITY, RETRIEVED = 64_000, 32
FORWARD, TRAINING = (1, 1024), (4, 512)
_INPUTS = 4
# Parameters whose gradients are compared; both packages have the same names.
_COMPARED = (
    "token_emb.weight",
    "layers.0.0.fn.to_q.weight",
    "layers.3.0.fn.scale",
    "layers.3.0.fn.to_kv.weight",
    "layers.4.0.fn.to_q.weight",
    "knn_rel_pos_bias.relative_attention_bias.weight",
    "to_logits.1.weight",
)


def cases() -> list[Case]:
    """One segment read behind those before it, and four segments of training from an empty memory."""
    from benchmarks.speed import Case

    return [
        Case(
            name=f"memorizing/{'training' if backward else 'forward'} {index}/s{segments}x{length}",
            package="memorizing-transformers-pytorch",
            settings={
                "index": index,
                "segments": segments,
                "length": length,
                "backward": backward,
                "seed": 0,
            },
            work=least_work(segments=segments, length=length, backward=backward),
            tolerance=1e-3 if backward else 1e-4,
            note="compared: a segment read with an empty memory, for the package's search is approximate"
            + ("" if backward else "; the memory grows by a segment with each step"),
        )
        for backward, (segments, length) in ((False, FORWARD), (True, TRAINING))
        for index in (("exact",) if backward else ("exact", "auto"))
    ]


def least_work(*, segments: int, length: int, backward: bool) -> Work:
    """Operations and bytes of a step: every product forward, and with gradients twice as much backward.

    One head of keys and values serves all; the products of causal attention are halved. Of the search only
    the products with the pairs found are counted, for how many others are looked at is the search's affair.
    Of bytes the weights are read in every pass, gradients and logits written.
    """
    from benchmarks.speed import Work

    square, passes, tokens = DIM * DIM, 3 if backward else 1, BATCH * segments * length
    inner = HEADS * DIM_HEAD
    layer = 2 * DIM * inner + 2 * DIM * DIM_HEAD + 8 * square
    attention = 2 * inner * length / 2
    found = 2 * inner * RETRIEVED
    count = passes * tokens * (DEPTH * (layer + attention) + TOKENS * DIM)
    # Queries and weights take a gradient from the pairs found, the pairs none.
    count += tokens * len(MEMORY_LAYERS) * found * (2 if backward else 1)
    weights = TOKENS * DIM + DEPTH * layer
    moved = weights * (3 if backward else 1) + passes * tokens * TOKENS
    return Work(operations=2 * count, bytes=4 * moved)


def _options() -> dict[str, Any]:
    return {
        "num_tokens": TOKENS,
        "dim": DIM,
        "dim_head": DIM_HEAD,
        "heads": HEADS,
        "depth": DEPTH,
        "memorizing_layers": MEMORY_LAYERS,
        "max_knn_memories": CAPACITY,
        "num_retrieved_memories": RETRIEVED,
    }


def theirs(settings: Mapping[str, Any], weights: str) -> Reading:
    """The published model, its weights written to `weights`."""
    import faiss  # type: ignore[import-not-found, unused-ignore]
    from memorizing_transformers_pytorch import (  # type: ignore[import-not-found, unused-ignore]
        MemorizingTransformer,
    )

    torch.manual_seed(settings["seed"])
    # It writes to files, which are gone with the process.
    folder = tempfile.TemporaryDirectory()
    model = MemorizingTransformer(**_options(), knn_memories_directory=folder.name)
    torch.save(model.state_dict(), weights)
    reading = Reading(model, model.create_knn_memories(batch_size=BATCH), settings)
    reading.folder, reading.faiss = folder, faiss
    return reading


def ours(settings: Mapping[str, Any], weights: str) -> Reading:
    """Our model with the published one's weights."""
    from memorizing import MemorizingTransformer, load_published

    model = MemorizingTransformer(**_options())
    load_published(model, torch.load(weights, weights_only=True))
    stores = model.create_knn_memories(batch_size=BATCH, index=settings["index"])
    return Reading(model, stores, settings)


class Reading:
    """Reads a stream in segments, or trains on some of its segments from an empty memory.

    Args:
        model: of either side.
        stores: its memories.
        settings: what `cases` put into the case.

    Attributes:
        folder: what the stores need to stay, if anything.
        faiss: the module, to be told how many threads to take; None if it is not ours to tell.
    """

    def __init__(self, model: nn.Module, stores: Any, settings: Mapping[str, Any]) -> None:
        self.model, self.stores = model, stores
        self.backward: bool = settings["backward"]
        self.length: int = settings["length"]
        self.folder: Any = None
        self.faiss: Any = None
        generator = torch.Generator().manual_seed(settings["seed"] + 1)
        shape = (_INPUTS, BATCH, settings["segments"] * self.length + 1)
        # No token of id 0: labels of it are not asked for.
        self.tokens = torch.randint(1, TOKENS, shape, generator=generator)

    def step(self, index: int) -> None:
        """The next segment, or all segments of training."""
        if self.backward:
            self.stores.clear_memory()
        self._read(self.tokens[index % _INPUTS])

    def warm_up(self) -> None:
        """The same on a few tokens; the memory is empty afterwards."""
        self._read(self.tokens[0, :, :65])
        self.stores.clear_memory()
        self.model.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """Logits of a segment read with an empty memory, and its gradients."""
        self.stores.clear_memory()
        tokens = self.tokens[0, :, : self.length + 1]
        with torch.no_grad():
            output = self.model(tokens[:, :-1], knn_memories=self.stores)
        found = {"output": output if isinstance(output, Tensor) else output[0]}
        if self.backward:
            self.stores.clear_memory()
            self._read(tokens)
            for name in _COMPARED:
                gradient = self.model.get_parameter(name).grad
                if gradient is None:
                    raise RuntimeError(f"no gradient reached {name}")
                found[f"gradient of {name}"] = gradient
        return found

    def _read(self, tokens: Tensor) -> None:
        if self.faiss is not None:
            # Faiss would take all cores.
            self.faiss.omp_set_num_threads(torch.get_num_threads())
        self.model.zero_grad(set_to_none=True)
        segments = tokens[:, :-1].split(self.length, dim=1)
        if not self.backward:
            with torch.no_grad():
                for segment in segments:
                    self.model(segment, knn_memories=self.stores)
            return
        for segment, labels in zip(segments, tokens[:, 1:].split(self.length, dim=1), strict=True):
            result = self.model(segment, knn_memories=self.stores, labels=labels)
            # Ours always returns the memories too.
            (result if isinstance(result, Tensor) else result[0]).backward()
