"""Sampling from a language model whose context is its memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memory_models.advance import advance, pieces
from memory_models.checks import check_tensor
from memory_models.lm import MemoryLM
from memory_models.state import Memory
from memory_models.wrapped import unwrapped

Sample = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """One generated token.

    Attributes:
        token: int64 `[batch]`.
        memory: the memory after everything *before* this token; feed the token next to go on.
        logits: `[batch, vocab_size]`, from which the token was drawn.

    A row that has ended repeats its last token, memory and logits.
    """

    token: Tensor
    memory: Any
    logits: Tensor


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, `[batch, vocab_size]` to int64 `[batch]`."""
    return logits.argmax(-1)


def sampler(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Sample:
    """A function that draws tokens from logits.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep only so many of the most likely tokens.
        top_p: of what is left keep the smallest set that holds this probability (Holtzman et al. 2020).
        generator: source of randomness; None: torch's global one.

    Raises:
        TypeError: if `top_k` is no whole number.
        ValueError: if an option is out of range.
    """
    check_temperature(temperature)
    if top_k is not None and not isinstance(top_k, int):
        raise TypeError(f"top_k ({top_k}) must be an int, or None")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must lie in (0, 1]")
    if temperature == 0:
        return greedy

    def draw(logits: Tensor) -> Tensor:
        kept = filter_logits(scale_logits(logits, temperature), top_k=top_k, top_p=top_p)
        return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)

    return draw


def check_temperature(temperature: float) -> None:
    """Refuse a temperature by which logits cannot be divided, 0 (greedy) apart, with a `ValueError`."""
    least = torch.finfo(torch.float32).tiny
    if temperature != 0 and not least <= temperature < math.inf:
        raise ValueError(f"temperature ({temperature}) must be 0 (greedy) or in [{least:.1e}, inf)")


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits over a temperature above 0, in float32 or better, less a constant for each row."""
    exact = logits.to(_at_least_float32(logits))
    # The largest becomes zero, so that none grows beyond all numbers.
    return (exact - exact.amax(-1, keepdim=True)) / temperature


def filter_logits(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`[..., vocab_size]` with the tokens outside the top k and the nucleus at minus infinity."""
    if top_k is not None and top_k < logits.shape[-1]:
        # By rank, not by value: a tie at the border must not let more than k through.
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, -1).indices, True)
        logits = logits.masked_fill(~keep, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1, dtype=_at_least_float32(ordered))
        # Drop a token if those before it hold the probability already; the first always stays.
        drop = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits


def _at_least_float32(logits: Tensor) -> torch.dtype:
    # In bfloat16 a sum of many small probabilities stops growing.
    return torch.promote_types(logits.dtype, torch.float32)


@torch.no_grad()
def generate(
    model: MemoryLM | Callable[..., Any],
    prompt: Tensor,
    *,
    max_new_tokens: int,
    memory: Memory | None = None,
    lengths: Tensor | None = None,
    sample: Sample = greedy,
    stop: int | Collection[int] | Tensor | None = None,
) -> Iterator[Step]:
    """Continue prompts token by token, through any number of segments, at one token's cost each.

    Segments end where they end in training, after `segment_length` tokens of each row, so that the
    logits equal those of one teacher-forced pass. The model is run in evaluation mode and set back.

    Args:
        model: a language model; what `torch.compile` or `DistributedDataParallel` put around it is left out.
        prompt: int64 `[batch, time]`, at least one token in each row.
        max_new_tokens: most tokens to yield.
        memory: what came before the prompt; its open segment goes on.
        lengths: int64 `[batch]`, real tokens of each prompt, which stand first; None means all.
        sample: from logits `[batch, vocab_size]` to tokens `[batch]`: `greedy` or a `sampler(...)`.
        stop: an id, or ids, that end a row; a row that has ended repeats its last step, its memory
            included, and the iterator ends when all have.

    Yields:
        A `Step` for each token. The step's memory has not seen its token yet: to go on later, pass that
        memory and the token as the next prompt.

    Raises:
        TypeError: if `prompt` or `lengths` is no tensor, or `stop` no token id.
        ValueError: if a prompt is empty, `lengths` do not fit it or `max_new_tokens` is negative.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must not be negative")
    check_tensor("prompt", prompt)
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be [batch, time] with at least one token, got {tuple(prompt.shape)}")
    if lengths is not None:
        _check_lengths(lengths, prompt)
    # A compiled model would be compiled again for each length, and processes would wait for each other.
    inner = unwrapped(model)
    return _steps(inner, prompt, max_new_tokens, memory, lengths, sample, _ids(stop, prompt.device))


def _check_lengths(lengths: Tensor, prompt: Tensor) -> None:
    batch, time = prompt.shape
    check_tensor("lengths", lengths, prompt.device)
    fits = lengths.shape == (batch,) and not lengths.is_floating_point() and lengths.dtype != torch.bool
    if not fits or bool(((lengths < 1) | (lengths > time)).any()):
        raise ValueError(
            f"lengths must be int64 [{batch}] and give each prompt between 1 and {time} tokens, got {lengths}"
        )


def _steps(
    model: MemoryLM,
    prompt: Tensor,
    max_new_tokens: int,
    memory: Memory | None,
    lengths: Tensor | None,
    sample: Sample,
    stop: Tensor,
) -> Iterator[Step]:
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    token, logits = prompt[:, 0], None
    for _ in range(max_new_tokens):
        # A generator may be left and resumed anywhere: mode and gradient are set around each step only.
        modes = [(part, part.training) for part in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                if logits is None:
                    logits, memory = _read_prompt(model, prompt, memory, lengths)
                else:
                    # A row that has ended reads padding, which leaves its memory as it was.
                    mask = ~ended[:, None] if len(stop) else None
                    newest, memory = advance(model, token[:, None], memory, mask)
                    logits = torch.where(ended[:, None], logits, newest[:, -1])
                drawn = sample(logits)
        finally:
            # Part by part: a user may keep some of them, frozen ones say, in evaluation mode.
            for part, training in modes:
                part.training = training
        token = torch.where(ended, token, drawn)
        yield Step(token, memory, logits)
        ended = ended | torch.isin(token, stop)
        if len(stop) and bool(ended.all()):
            return


def _read_prompt(
    model: MemoryLM, prompt: Tensor, memory: Memory | None, lengths: Tensor | None
) -> tuple[Tensor, Memory]:
    """The logits after the last real token of each row, `[batch, vocab_size]`, and the memory."""
    last, mask = prompt.new_full(prompt.shape[:1], prompt.shape[1] - 1), None
    if lengths is not None:
        last = lengths - 1
        if len(lengths):
            prompt = prompt[:, : int(lengths.max())]
        mask = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
    begin, rows, found = 0, [], []
    # Piece by piece: the logits of a whole prompt may take more than everything else.
    for logits, after in pieces(model, prompt, memory, mask):
        end = begin + logits.shape[1]
        here = ((begin <= last) & (last < end)).nonzero().squeeze(1)
        rows.append(here)
        found.append(logits[here, last[here] - begin])
        begin, memory = end, after
    assert memory is not None
    return torch.cat(found)[torch.cat(rows).argsort()], memory


def _ids(stop: int | Collection[int] | Tensor | None, device: torch.device) -> Tensor:
    given = stop.flatten().tolist() if isinstance(stop, Tensor) else stop
    ids = [] if given is None else given if isinstance(given, Iterable) else [given]
    try:
        return torch.tensor(sorted(map(operator.index, ids)), dtype=torch.int64, device=device)
    except TypeError:
        raise TypeError(f"stop must be a token id or several, got {stop!r}") from None
