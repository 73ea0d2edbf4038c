"""The `AutoregressiveWrapper` of memory-transformer-xl: loss by segment, and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memory_models.checks import check_flags, check_ids, check_sizes, check_tensor
from memory_models.generate import check_temperature, filter_logits, scale_logits
from memxl.classic import ClassicMemory, MemoryTransformerXL
from memxl.classic_loss import linear_cross_entropy
from memxl.embeddings import Embeddings
from memxl.products import are_plain

__all__ = ["AutoregressiveWrapper", "SegmentLoss", "top_k", "top_p"]


class SegmentLoss(NamedTuple):
    """Loss of one segment of one part of the batch.

    Attributes:
        loss: mean cross-entropy over its targets; zero if it has none.
        is_last_batch: whether this was the last part of the batch, so that an optimiser may step.
    """

    loss: Tensor
    is_last_batch: bool


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Logits `[batch, tokens]` with all but the largest set to minus infinity.

    Args:
        thres: share of the vocabulary that is left out; at least one token stays.
    """
    return filter_logits(logits, top_k=max(1, int((1 - thres) * logits.shape[-1])))


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Logits `[batch, tokens]` with all but the likeliest set to minus infinity.

    Args:
        thres: probability that may be left out; those that stay hold at least the rest of it.
    """
    return filter_logits(logits, top_p=max(1 - thres, torch.finfo(torch.float32).tiny))


class AutoregressiveWrapper(nn.Module):
    """Next-token loss and generation around a `MemoryTransformerXL`.

    Args:
        net: the model.
        ignore_index: target that takes no part in the loss.
        pad_value: token that fills up sequences of a list; it is masked.
    """

    def __init__(self, net: MemoryTransformerXL, ignore_index: int = -100, pad_value: int = 0) -> None:
        super().__init__()
        self.net = net
        self.ignore_index = ignore_index
        self.pad_value = pad_value
        self.seq_len = net.seq_len

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        max_batch_size: int | None = None,
        return_loss: bool = False,
        truncate_every: int | None = None,
        mask: Tensor | None = None,
        memories: ClassicMemory | None = None,
    ) -> tuple[Tensor, ClassicMemory] | Iterator[SegmentLoss]:
        """Call the model, or yield the loss of segment after segment.

        The memory links the losses: call `loss.backward(retain_graph=True)` on each, or `backward` once on
        their sum. With `truncate_every=1` a plain `backward` on each will do.

        Args:
            x: int64 tokens `[batch, time]`, or a list of `[time]`, which is padded and masked.
            max_batch_size: cut the batch into parts of this size; None: one part.
            return_loss: yield losses instead of calling the model.
            truncate_every: cut the gradient into the long memory at every so many segments; None: never.
            mask: bool `[batch, time]`, false at padding, which is not a target either; with losses it may
                be one shorter, for the inputs alone.
            memories: what came before; None starts afresh.

        Returns:
            Logits and memories as from the model (one segment), or an iterator over `SegmentLoss`.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if shapes disagree or an id is outside the vocabulary.
        """
        if not isinstance(x, Tensor):
            if mask is not None:
                raise ValueError("a list of sequences brings its own mask; give a tensor with mask")
            mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in x], batch_first=True)
            x = pad_sequence(list(x), batch_first=True, padding_value=self.pad_value)
        check_tensor("tokens", x)
        if mask is not None:
            check_tensor("mask", mask)
            check_flags("mask", mask, tuple(mask.shape), x.device)
        if not return_loss:
            return self.net(x, memories=memories, mask=mask)
        inputs, targets = x[:, :-1], x[:, 1:]
        if mask is not None:
            if mask.shape == x.shape:
                targets = targets.masked_fill(~mask[:, 1:], self.ignore_index)
                mask = mask[:, :-1]
            if mask.shape != inputs.shape:
                raise ValueError(f"mask has shape {tuple(mask.shape)}, the tokens {tuple(x.shape)}")
            targets = targets.masked_fill(~mask, self.ignore_index)
            inputs = torch.where(mask, inputs, 0)
        check_ids("tokens", inputs, self.net.vocabulary)
        check_ids("targets", targets.masked_fill(targets == self.ignore_index, 0), self.net.vocabulary)
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size ({max_batch_size}) must be at least 1")
        if truncate_every is not None and truncate_every < 1:
            raise ValueError(f"truncate_every ({truncate_every}) must be at least 1; None: never")
        return self._losses(inputs, targets, mask, memories, max_batch_size or max(1, len(x)), truncate_every)

    def _losses(
        self,
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        memories: ClassicMemory | None,
        size: int,
        truncate_every: int | None,
    ) -> Iterator[SegmentLoss]:
        parts = [slice(begin, begin + size) for begin in range(0, len(inputs), size)]
        carried = [
            None if memories is None else ClassicMemory(memories.short[:, part], memories.long[part])
            for part in parts
        ]
        embeddings = Embeddings(self.net.embed, inputs, self.seq_len)
        for number, begin in enumerate(range(0, inputs.shape[1], self.seq_len), start=1):
            time = slice(begin, begin + self.seq_len)
            truncate = truncate_every is not None and number % truncate_every == 0
            for index, part in enumerate(parts):
                x, carried[index] = self.net.features(
                    inputs[part, time],
                    memories=carried[index],
                    mask=None if mask is None else mask[part, time],
                    detach_lmem=truncate,
                    embedded=embeddings.segment(number - 1)[part],
                )
                loss = self._mean_loss(x.flatten(0, 1), targets[part, time].flatten())
                del x
                yield SegmentLoss(loss, index == len(parts) - 1)

    def _mean_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        head = self.net.to_logits
        # An adapter or a quantised map put in its place is more than its weight.
        if isinstance(head, nn.Linear) and are_plain(head):
            return linear_cross_entropy(x, head.weight, head.bias, targets, ignore_index=self.ignore_index)
        total = F.cross_entropy(head(x), targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = top_k,
        filter_thres: float = 0.9,
        mask: Tensor | None = None,
        memories: ClassicMemory | None = None,
    ) -> Tensor:
        """Continue a prompt of any length; each token is read once and written once.

        Args:
            start_tokens: int64 `[batch, time]` or `[time]`, at least one token a row.
            seq_len: how many tokens to generate.
            eos_token: a row that drew it repeats it, and when all have, generation stops.
            temperature: divides the logits before drawing; 0 takes the likeliest.
            filter_logits_fn: called with the logits and `thres=filter_thres`.
            filter_thres: share that the filter leaves out.
            mask: bool like `start_tokens`, false at padding.
            memories: what came before the prompt; None starts afresh.

        Returns:
            The new tokens, `[batch, up to seq_len]` or `[up to seq_len]`.

        Raises:
            ValueError: if a row of the prompt has no token, shapes disagree or a number is out of range.
        """
        check_sizes(least=0, seq_len=seq_len)
        check_temperature(temperature)
        prompt = start_tokens[None] if start_tokens.dim() == 1 else start_tokens
        if mask is None:
            mask = torch.ones_like(prompt, dtype=torch.bool)
        mask = mask[None] if mask.dim() == 1 else mask
        if mask.shape != prompt.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the prompt {tuple(prompt.shape)}")
        lengths = mask.sum(1)
        if not len(prompt) or not bool((lengths > 0).all()):
            raise ValueError(
                f"each row of the prompt needs at least one token, got lengths {lengths.tolist()}"
            )

        def draw(logits: Tensor) -> Tensor:
            filtered = filter_logits_fn(logits, thres=filter_thres)
            if temperature == 0:
                return filtered.argmax(-1, keepdim=True)
            return torch.multinomial(scale_logits(filtered, temperature).softmax(-1), 1)

        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            found = prompt.new_full(
                (len(prompt), seq_len), self.pad_value if eos_token is None else eos_token
            )
            longest = 0
            # Rows of one length go together: their segments end at the same token.
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero().squeeze(1)
                real = prompt[rows][mask[rows]].view(len(rows), length)
                before = None
                if memories is not None:
                    before = ClassicMemory(memories.short[:, rows], memories.long[rows])
                new = self._continue(real, seq_len, eos_token, draw, before)
                found[rows, : new.shape[1]] = new
                longest = max(longest, new.shape[1])
        finally:
            for part, training in modes:
                part.training = training
        found = found[:, :longest]
        return found[0] if start_tokens.dim() == 1 else found

    def _continue(
        self,
        prompt: Tensor,
        seq_len: int,
        eos_token: int | None,
        draw: Callable[[Tensor], Tensor],
        memories: ClassicMemory | None,
    ) -> Tensor:
        net = self.net
        memories = net.init_memories(len(prompt)) if memories is None else memories
        segment = net.open(memories)
        pieces = list(prompt.split(self.seq_len, dim=1))
        found: list[Tensor] = []
        ended = torch.zeros_like(prompt[:, :1], dtype=torch.bool)
        while len(found) < seq_len and not bool(ended.all()):
            piece = pieces.pop(0)
            logits, segment = net.read(piece, segment)
            if segment.hiddens.shape[2] == self.seq_len:
                memories = net.write(memories, segment)
                segment = net.open(memories)
            if pieces:
                continue
            token = draw(logits[:, -1])
            if eos_token is not None:
                token = token.masked_fill(ended, eos_token)
                ended = ended | (token == eos_token)
            found.append(token)
            pieces.append(token)
        return torch.cat(found, 1) if found else prompt[:, :0]
