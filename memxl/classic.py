"""Code written against the package memory-transformer-xl: its class, constructor and call.

`docs/memxl-published.md` says where this class differs from the package, on purpose, and by how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from memory_models.checks import check_flags, check_ids, check_sizes, check_tensor
from memxl.classic_layers import ClassicAttention, ClassicBlock, ClassicFeedForward, Context, empty_slots
from memxl.classic_memory import (
    ClassicMemory,
    GivenMemories,
    Segment,
    check_memories,
    may_be_true,
    newest,
)
from memxl.classic_writer import WRITE_HEADS, ClassicWriter, copied_weights, keep_weights
from memxl.gates import make_gate
from memxl.products import apply_map

__all__ = ["ClassicMemory", "MemoryTransformerXL", "Segment"]

# How far the residual gates are closed at the start: near identity, as GTrXL has it.
_RESIDUAL_BIAS = 2.0


class MemoryTransformerXL(nn.Module):
    """Transformer-XL with a gated long-term memory, with the constructor of memory-transformer-xl.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the model, divisible by `heads` and by 4.
        seq_len: most tokens of a segment.
        depth: number of layers.
        emb_dim: width of the token embeddings; None: `dim`.
        memory_layers: the layers with memory, counted from 1; None: all.
        mem_len: tokens held in the short memory; None: `seq_len`.
        lmem_len: slots of the long memory; None: `mem_len`.
        heads: attention heads.
        gru_gated_residual: gate the residual stream with an nBRC cell (the package's name says GRU).
        mogrify_gru: let candidate and stream modulate each other before that gate.
        attn_dropout: dropout of attention weights.
        ff_glu: gate the feed-forward's inner width.
        ff_dropout: dropout inside the feed-forward.
        attn_layer_dropout: dropout after attention.
        one_kv_head: one head of keys and values for all queries.
        num_mem_kv: learned persistent key/values in each layer and in the write.
        mem_write_iters: gated updates of the long memory a write.

    Raises:
        ValueError: if an option does not fit; the message names it.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        seq_len: int,
        depth: int,
        emb_dim: int | None = None,
        memory_layers: Sequence[int] | None = None,
        mem_len: int | None = None,
        lmem_len: int | None = None,
        heads: int = 8,
        gru_gated_residual: bool = True,
        mogrify_gru: bool = False,
        attn_dropout: float = 0.0,
        ff_glu: bool = False,
        ff_dropout: float = 0.0,
        attn_layer_dropout: float = 0.0,
        one_kv_head: bool = False,
        num_mem_kv: int = 0,
        mem_write_iters: int = 2,
    ) -> None:
        super().__init__()
        emb_dim = dim if emb_dim is None else emb_dim
        mem_len = seq_len if mem_len is None else mem_len
        lmem_len = mem_len if lmem_len is None else lmem_len
        check_sizes(
            num_tokens=num_tokens, dim=dim, seq_len=seq_len, depth=depth, emb_dim=emb_dim, heads=heads
        )
        check_sizes(
            least=0,
            mem_len=mem_len,
            lmem_len=lmem_len,
            num_mem_kv=num_mem_kv,
            mem_write_iters=mem_write_iters,
        )
        if dim % heads or dim % WRITE_HEADS:
            raise ValueError(
                f"dim ({dim}) must be divisible by heads ({heads}) and by the {WRITE_HEADS} of the write"
            )
        self.dim, self.seq_len, self.depth = dim, seq_len, depth
        self.mem_len, self.lmem_len = mem_len, lmem_len
        self.memory_layers = _check_layers(memory_layers, depth)

        self.embed = nn.Embedding(num_tokens, emb_dim)
        self.from_embedding = nn.Identity() if emb_dim == dim else nn.Linear(emb_dim, dim)
        # One row for each distance between tokens, the nearest last.
        self.distances = nn.Parameter(torch.zeros(heads, seq_len + mem_len, dim // heads))

        def gate() -> nn.Module:
            return make_gate("nbrc", dim, bias=_RESIDUAL_BIAS, mogrify=mogrify_gru)

        self.layers = nn.ModuleList(
            ClassicBlock(
                dim,
                ClassicAttention(
                    dim,
                    heads,
                    one_kv_head=one_kv_head,
                    persistent=num_mem_kv,
                    attn_dropout=attn_dropout,
                    dropout=attn_layer_dropout,
                ),
                ClassicFeedForward(dim, glu=ff_glu, dropout=ff_dropout),
                (gate(), gate()) if gru_gated_residual else None,
            )
            for _ in range(depth)
        )
        self.writer = ClassicWriter(
            dim,
            slots=lmem_len,
            layers=len(self.memory_layers),
            persistent=num_mem_kv,
            iterations=mem_write_iters,
        )
        self.to_embedding = nn.Identity() if emb_dim == dim else nn.Linear(dim, emb_dim)
        self.to_logits = nn.Linear(emb_dim, num_tokens)

    def forward(
        self,
        x: Tensor,
        memories: ClassicMemory | GivenMemories | None = None,
        mask: Tensor | None = None,
        detach_lmem: bool = False,
    ) -> tuple[Tensor, ClassicMemory]:
        """Read one segment and write it.

        Args:
            x: int64 tokens `[batch, time]`, `time` at most `seq_len`.
            memories: what the last call returned; None starts afresh.
            mask: bool `[batch, time]`, false at padding, which is neither attended nor written; a row that
                is all padding keeps its memory.
            detach_lmem: cut the gradient into the long memory before this write.

        Returns:
            Logits `[batch, time, num_tokens]` (anything at padding) and the next memories.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if shapes disagree, the segment is longer than `seq_len` or an id is outside the
                vocabulary.
        """
        y, memory = self.features(x, memories, mask, detach_lmem)
        return apply_map(self.to_logits, y), memory

    def features(
        self,
        x: Tensor,
        memories: ClassicMemory | GivenMemories | None = None,
        mask: Tensor | None = None,
        detach_lmem: bool = False,
        *,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, ClassicMemory]:
        """The same as `forward` up to what `to_logits` maps to logits: `[batch, time, emb_dim]`.

        For a loss that does without a tensor of logits; arguments and errors are those of `forward`.

        Args:
            embedded: `[batch, time, emb_dim]`, the embeddings of `x` where they have been looked up before.
        """
        x = self._checked_tokens(x, mask)
        memory = self._memories(memories, x.shape[0])
        embedded = self.embed(x) if embedded is None else embedded
        if x.shape[1] == 0:
            return self.to_embedding(self.from_embedding(embedded)), memory
        lengths = back = None
        if mask is not None and may_be_true(~mask):
            # Real tokens move to the front: then no token can see padding, and distances count tokens.
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            lengths, back = mask.sum(1), torch.argsort(order, dim=1)
            embedded = embedded.gather(1, order[..., None].expand_as(embedded))
        y, hiddens = self._walk(embedded, self._contexts(memory))
        memory = self._write(memory, hiddens, lengths, detach_lmem)
        if back is not None:
            y = y.gather(1, back[..., None].expand_as(y))
        return self.to_embedding(y), memory

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids; None where a module without one was put in the place of `embed`."""
        return getattr(self.embed, "num_embeddings", None)

    def init_memories(self, batch_size: int) -> ClassicMemory:
        """Memories of `batch_size` rows that hold nothing."""
        short = self.distances.new_zeros(len(self.memory_layers), batch_size, 0, self.dim)
        return ClassicMemory(short, short.new_zeros(batch_size, 0, self.dim))

    def open(self, memories: ClassicMemory) -> Segment:
        """Begin a segment that is read piece by piece, as a generator does; `forward` reads it whole.

        Args:
            memories: as returned by `forward`, `write` or `init_memories`.
        """
        memories = self._memories(memories, memories.long.shape[0])
        layers, batch = memories.short.shape[:2]
        hiddens = memories.short.new_zeros(layers, batch, 0, self.dim)
        return Segment(tuple(self._contexts(memories)), hiddens)

    def read(self, x: Tensor, segment: Segment) -> tuple[Tensor, Segment]:
        """Read the next tokens of an open segment; nothing is written.

        Args:
            x: int64 tokens `[batch, time]`; the segment must not get longer than `seq_len`.
            segment: as returned by `open`, or by `read` for the tokens before.

        Returns:
            Logits `[batch, time, num_tokens]`, the same as if the segment were read at once, and the segment
            with these tokens.
        """
        x = self._checked_tokens(x, None, before=segment.hiddens.shape[2])
        contexts: list[Context] = []
        y, hiddens = self._walk(self.embed(x), iter(segment.contexts), contexts)
        segment = Segment(tuple(contexts), torch.cat([segment.hiddens, hiddens], 2))
        return apply_map(self.to_logits, self.to_embedding(y)), segment

    def write(self, memories: ClassicMemory, segment: Segment, *, detach_lmem: bool = False) -> ClassicMemory:
        """End an open segment: the memories after it.

        Args:
            memories: what the segment was opened with.
            segment: as returned by the last `read`.
            detach_lmem: cut the gradient into the long memory before this write.
        """
        return self._write(memories, segment.hiddens, None, detach_lmem)

    def _memories(self, given: ClassicMemory | GivenMemories | None, batch: int) -> ClassicMemory:
        fresh = self.init_memories(batch)
        return fresh if given is None else check_memories(given, fresh, self.mem_len, self.lmem_len)

    def _contexts(self, memory: ClassicMemory) -> Iterator[Context]:
        """What each layer reads before the segment, made when it is asked for."""
        short, long = memory
        empty = torch.cat([empty_slots(long), empty_slots(short[0])], 1)
        absent = empty if may_be_true(empty) else None
        nothing = short.new_zeros(short.shape[1], 0, self.dim)
        for number, layer in enumerate(self.layers, start=1):
            if number in self.memory_layers:
                held = short[self.memory_layers.index(number)]
                yield layer.open(held, long, absent)  # type: ignore[operator]
            else:
                yield layer.open(nothing, nothing, None)  # type: ignore[operator]

    def _walk(
        self, embedded: Tensor, contexts: Iterator[Context], after: list[Context] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The last layer's output, and the inputs of the memory layers; contexts are put into `after`."""
        x = self.from_embedding(embedded)
        hiddens = []
        for number, layer in enumerate(self.layers, start=1):
            if number in self.memory_layers:
                hiddens.append(x.detach())
            x, context = layer(x, next(contexts), self.distances)
            if after is not None:
                after.append(context)
            # A layer's keys and values need not be there beside the next one's.
            del context
        return x, torch.stack(hiddens)

    def _write(
        self, memory: ClassicMemory, hiddens: Tensor, lengths: Tensor | None, detach_lmem: bool
    ) -> ClassicMemory:
        short, long = memory
        held, time = short.shape[2], hiddens.shape[2]
        queue = torch.cat([short.to(hiddens.dtype), hiddens], 2)
        steps = torch.arange(held + time, device=queue.device)
        absent = F.pad(empty_slots(short[0]), (0, time), value=False)
        if lengths is not None:
            absent = absent | (steps >= held + lengths[:, None])
        if self.lmem_len:
            before = long
            if long.shape[1] == 0:
                long = queue.new_zeros(queue.shape[1], self.lmem_len, self.dim)
            if detach_lmem:
                long = long.detach()
            # The published loop steps its optimiser between segments that one graph connects. A write keeps
            # the weights that it was done with, which autograd would otherwise find changed.
            weights = copied_weights(self.writer, before) if torch.is_grad_enabled() else {}
            written = functional_call(
                self.writer, weights, (long, queue, absent if may_be_true(absent) else None)
            )
            long = written if lengths is None else torch.where(lengths[:, None, None] > 0, written, long)
            if weights:
                keep_weights(long, weights)
        return ClassicMemory(newest(queue, held, lengths, self.mem_len), long)

    def _checked_tokens(self, x: Tensor, mask: Tensor | None, *, before: int = 0) -> Tensor:
        check_tensor("tokens", x)
        check_flags("mask", mask, tuple(x.shape), x.device)
        if mask is not None:
            # Padding may carry any id; it must not reach the embedding.
            x = torch.where(mask, x, 0)
        check_ids("tokens", x, self.vocabulary)
        if before + x.shape[1] > self.seq_len:
            raise ValueError(
                f"a segment has at most {self.seq_len} tokens (seq_len), got {before + x.shape[1]}; cut the "
                "input into segments"
            )
        return x


def _check_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    chosen = tuple(range(1, depth + 1)) if layers is None else tuple(sorted(layers))
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 1 or chosen[-1] > depth:
        raise ValueError(f"memory_layers ({chosen}) must name different layers from 1, the first, to {depth}")
    return chosen
