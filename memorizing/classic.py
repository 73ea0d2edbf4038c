"""Code and weights written against the package memorizing-transformers-pytorch.

`MemorizingTransformer` has that package's constructor and calls, and takes its checkpoints. What differs, on
purpose, and by how much, is listed in docs/memorizing-published.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from memorizing.classic_checks import (
    check_stores,
    check_tokens,
    layer_numbers,
    load_published,
    shift_number,
    shifted,
)
from memorizing.classic_layers import FeedForward, LocalAttention, MemoryAttention, RelativeBias, Residual
from memorizing.classic_memory import Documents, KNNMemoryList, XLMemories, held_after, hide, write_pairs
from memorizing.knn import KNNMemory
from memorizing.knn.checks import whole
from memory_models.checks import check_tensor
from memory_models.generate import Sample, greedy
from memory_models.lm import IGNORED_LABEL, cross_entropy

__all__ = ["KNNMemoryList", "MemorizingTransformer", "XLMemories", "load_published"]


class MemorizingTransformer(nn.Module):
    """The language model of memorizing-transformers-pytorch (after Wu et al. 2022, arXiv 2203.08913).

        model = MemorizingTransformer(num_tokens=256, dim=512, depth=8, memorizing_layers=(4, 5))
        with model.knn_memories_context(batch_size=2) as knn_memories:
            xl_memories = None
            for segment, labels in stream:  # int64 [2, time]
                loss, xl_memories = model(segment, knn_memories, xl_memories, labels)
                loss.backward()

    A memorizing layer puts the nearest pairs of its store beside the segment under one softmax, then stores
    the segment's own pairs (where it has an XL cache, those that leave the cache). Every store is read before
    any is written. The search is exact; the oldest pairs give way. No gradient reaches a stored pair, and
    storing, wrapping or clearing between forward and backward changes no gradient.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the residual stream.
        depth: number of layers, counted from 1.
        dim_head: width of a head.
        heads: query heads; all share one head of keys and values.
        knn_attn_heads: query heads of memorizing layers; None: `heads`.
        attn_dropout: dropout of the attention weights.
        ff_mult: width of the feed-forward layers, in `dim`.
        ff_dropout: dropout inside them.
        memorizing_layers: layers with a store; None: `depth // 2`.
        max_knn_memories: pairs that a row of a store keeps.
        num_retrieved_memories: pairs that each query reads.
        clear_memories_on_sos_token_id: a token that begins a document: from it on, its row sees neither the
            memories nor its own earlier tokens, and only what comes from it on is stored.
        clear_memories_on_eos_token_id: a token that ends one: the same holds from the token behind it.
        knn_memories_directory: no effect: stores live in RAM, on the model's device.
        shift_knn_memories_down: each memorizing layer reads the store so many memorizing layers further up
            (the last ones those of the first), and writes its own.
        pad_id: labels of this id, and those of -100, are not asked for. Tokens of this id are tokens.
        xl_max_memories: tokens from before the segment that XL layers attend to.
        xl_memory_layers: these layers; None: all.
        shift_xl_memories_down: as `shift_knn_memories_down`, for the caches (ERNIE-Doc, arXiv 2012.15688).
        knn_memory_multiprocessing: no effect: the search is a few matrix products.

    Raises:
        TypeError, ValueError: if an argument has no meaning.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        knn_attn_heads: int | None = None,
        attn_dropout: float = 0.0,
        ff_mult: int = 4,
        ff_dropout: float = 0.0,
        memorizing_layers: int | Iterable[int] | None = None,
        max_knn_memories: int = 250_000,
        num_retrieved_memories: int = 32,
        clear_memories_on_sos_token_id: int | None = None,
        clear_memories_on_eos_token_id: int | None = None,
        knn_memories_directory: str | PathLike[str] | None = None,
        shift_knn_memories_down: float = 0,
        pad_id: int = 0,
        xl_max_memories: int = 0,
        xl_memory_layers: int | Iterable[int] | None = None,
        shift_xl_memories_down: float = 0,
        knn_memory_multiprocessing: bool = False,
    ) -> None:
        super().__init__()
        dim, depth = whole("dim", dim, least=1), whole("depth", depth, least=1)
        dim_head, heads = whole("dim_head", dim_head, least=1), whole("heads", heads, least=1)
        knn_heads = heads if knn_attn_heads is None else whole("knn_attn_heads", knn_attn_heads, least=1)
        retrieved = whole("num_retrieved_memories", num_retrieved_memories, least=0)
        if knn_memories_directory is not None or knn_memory_multiprocessing:
            warnings.warn(
                "knn_memories_directory and knn_memory_multiprocessing have no effect: memories live in RAM, "
                "KNNMemory.save keeps them",
                stacklevel=2,
            )
        self.num_tokens = whole("num_tokens", num_tokens, least=1)
        self.dim_head = dim_head
        self.pad_id = pad_id
        self.max_knn_memories = whole("max_knn_memories", max_knn_memories, least=1)
        self.xl_max_memories = whole("xl_max_memories", xl_max_memories, least=0)
        self.clear_memories_on_sos_token_id = clear_memories_on_sos_token_id
        self.clear_memories_on_eos_token_id = clear_memories_on_eos_token_id
        self.shift_knn_memories_down = shift_number("shift_knn_memories_down", shift_knn_memories_down)
        self.shift_xl_memories_down = shift_number("shift_xl_memories_down", shift_xl_memories_down)
        chosen = depth // 2 if memorizing_layers is None else memorizing_layers
        self.memorizing_layers = layer_numbers("memorizing_layers", chosen, depth)
        cached = range(1, depth + 1) if xl_memory_layers is None else xl_memory_layers
        self.xl_memory_layers = (
            layer_numbers("xl_memory_layers", cached, depth) if self.xl_max_memories else ()
        )
        self.num_memory_layers = len(self.memorizing_layers)
        self.num_xl_memory_layers = len(self.xl_memory_layers)

        # The published names, so that its checkpoints load as they are.
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.rel_pos_bias = RelativeBias(heads=heads, scale=dim_head**0.5)
        self.knn_rel_pos_bias = RelativeBias(heads=knn_heads, scale=dim_head**0.5)
        self.layers = nn.ModuleList()
        for layer in range(1, depth + 1):
            attention: LocalAttention
            if layer in self.memorizing_layers:
                attention = MemoryAttention(
                    dim, heads=knn_heads, dim_head=dim_head, dropout=attn_dropout, retrieved=retrieved
                )
            else:
                attention = LocalAttention(dim, heads=heads, dim_head=dim_head, dropout=attn_dropout)
            feedforward = FeedForward(dim, mult=ff_mult, dropout=ff_dropout)
            self.layers.append(nn.ModuleList([Residual(dim, attention), Residual(dim, feedforward)]))
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_tokens))

    def create_knn_memories(self, *, batch_size: int, index: str = "exact") -> KNNMemoryList:
        """Empty stores in the model's dtype and on its device, independent of all others.

        Args:
            batch_size: rows.
            index: as in `KNNMemory`; anything but "exact" needs Faiss and a model in float32 or less.
        """
        weight = self.token_emb.weight
        return KNNMemoryList(
            KNNMemory(
                self.dim_head,
                self.max_knn_memories,
                batch_size,
                index=index,
                dtype=weight.dtype,
                device=weight.device,
            )
            for _ in self.memorizing_layers
        )

    @property
    def _vocabulary(self) -> int | None:
        # None where a module without one was put in the place of the embedding.
        return getattr(self.token_emb, "num_embeddings", None)

    @contextmanager
    def knn_memories_context(self, *, batch_size: int, index: str = "exact") -> Iterator[KNNMemoryList]:
        """`create_knn_memories` for the length of a block; then the list is empty, whatever happened."""
        knn_memories = self.create_knn_memories(batch_size=batch_size, index=index)
        try:
            yield knn_memories
        finally:
            knn_memories.cleanup()

    def forward(
        self,
        x: Tensor,
        knn_memories: Sequence[KNNMemory] = (),
        xl_memories: XLMemories | Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        add_knn_memory: bool = True,
    ) -> tuple[Tensor, XLMemories]:
        """One segment: read the memories, predict, write the memories.

        Args:
            x: token ids, int64 `[batch, time]`, at least one token.
            knn_memories: from `create_knn_memories`; written in place when all else is done.
            xl_memories: what the call before returned, or a list as the published package returns it.
            labels: int64 `[batch, time]`, the right answer at each place (no shift is applied).
            add_knn_memory: false leaves the stores as they are: nothing is added, and nothing cleared.

        Returns:
            Logits `[batch, time, num_tokens]`, or with labels the mean cross-entropy in nats (0 if none is
            asked for), and the XL memories, which hold no layers where the model has none.

        Raises:
            TypeError: if `x` or `labels` are not integers.
            ValueError: if shapes, batch sizes or numbers of layers do not fit, or an id is outside the
                vocabulary.
        """
        if labels is not None:
            check_tensor("labels", labels)
            labels = labels.masked_fill(labels == self.pad_id, IGNORED_LABEL)
        check_tokens(x, labels, self._vocabulary)
        batch, time = x.shape
        check_stores(knn_memories, len(self.memorizing_layers), batch)
        past = XLMemories.given(xl_memories, (batch, len(self.xl_memory_layers), self.dim_head), x.device)
        sos, eos = self.clear_memories_on_sos_token_id, self.clear_memories_on_eos_token_id
        documents = Documents.find(x, sos, eos)
        may_read = None if documents is None else documents.number == 0
        hidden_keys = hide(past, time, documents)
        biases = [bias(time, past.cached) for bias in (self.rel_pos_bias, self.knn_rel_pos_bias)]
        if hidden_keys is not None:
            biases = [bias.masked_fill(hidden_keys, -torch.inf) for bias in biases]
        caches = dict(zip(self.xl_memory_layers, past.layers, strict=True))
        read_caches = shifted(caches, self.shift_xl_memories_down)
        stores = dict(zip(self.memorizing_layers, knn_memories, strict=True))
        read_stores = shifted(stores, self.shift_knn_memories_down)

        hidden = self.token_emb(x)
        pairs: dict[int, Tensor] = {}
        blocks: Any = self.layers
        for layer, (attention, feedforward) in enumerate(blocks, 1):
            bias, cache = biases[layer in stores], read_caches.get(layer)
            if cache is None or not past.cached:
                bias, cache = bias[..., past.cached :], None
            normed = attention.norm(hidden)
            if layer in stores:
                attended, new = attention.fn(normed, cache, bias, read_stores[layer], may_read)
            else:
                attended, new = attention.fn(normed, cache, bias)
            if layer in caches:
                pairs[layer] = torch.cat([caches[layer].to(new.dtype), new.detach()], 1)
            elif layer in stores:
                pairs[layer] = new.detach()
            hidden = hidden + attended
            hidden = hidden + feedforward.fn(feedforward.norm(hidden))
        result = self.to_logits(hidden)
        if labels is not None:
            result = cross_entropy(result, labels)

        if add_knn_memory:
            cleared = [False] * batch if documents is None else documents.cleared.tolist()
            for layer, store in stores.items():
                held = past.held if layer in caches else torch.zeros_like(past.held)
                keep = self.xl_max_memories if layer in caches else 0
                write_pairs(store, pairs[layer], held_after(held, time, documents).tolist(), keep, cleared)
        return result, past.after([pairs[layer] for layer in caches], time, documents, self.xl_max_memories)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        segment_length: int,
        knn_memories: Sequence[KNNMemory] | None = None,
        xl_memories: XLMemories | Sequence[Tensor] | None = None,
        sample: Sample = greedy,
    ) -> Tensor:
        """Continue prompts; the memories are written once for each finished segment.

        The logits are those of teacher forcing in segments of `segment_length`. Each token costs a pass over
        the open segment, which is computed again. The model is run in evaluation mode and set back.

        Args:
            prompt: int64 `[batch, time]`, at least one token.
            max_new_tokens: so many.
            segment_length: tokens of a segment, best as in training.
            knn_memories: what came before the prompt; finished segments are added. None: new ones, which
                are not kept.
            xl_memories: what came before the prompt.
            sample: from logits `[batch, num_tokens]` to tokens `[batch]`: `greedy`, `sampler(...)`.

        Returns:
            The new tokens, int64 `[batch, max_new_tokens]`.

        Raises:
            TypeError, ValueError: as the call, or if a number is out of range.
        """
        count = whole("max_new_tokens", max_new_tokens, least=0)
        length = whole("segment_length", segment_length, least=1)
        check_tokens(prompt, None, self._vocabulary)
        stores = self.create_knn_memories(batch_size=len(prompt)) if knn_memories is None else knn_memories
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            tokens, begin = prompt, 0
            for _ in range(count):
                while tokens.shape[1] - begin > length:
                    _, xl_memories = self(tokens[:, begin : begin + length], stores, xl_memories)
                    begin += length
                logits, _ = self(tokens[:, begin:], stores, xl_memories, add_knn_memory=False)
                tokens = torch.cat([tokens, sample(logits[:, -1])[:, None]], 1)
        finally:
            for part, training in modes:
                part.training = training
        return tokens[:, prompt.shape[1] :]
