"""The decoder of the classic Memformer: logits, loss and generation from an encoder's output."""

# b batch, t time

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memformer.transformer import KeysValues, Layer, RelativePositions, check_context, packed
from memory_models.checks import check_flags
from memory_models.generate import check_temperature, filter_logits, scale_logits
from memory_models.lm import IGNORED_LABEL, cross_entropy

Filter = Callable[[Tensor, float], Tensor]


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the share `1 - thres` of the vocabulary that is most likely, at least one token."""
    return filter_logits(logits, top_k=max(1, int((1 - thres) * logits.shape[-1])))


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the smallest set of tokens that holds the probability `1 - thres`, at least one token."""
    return filter_logits(logits, top_p=max(1 - thres, torch.finfo(torch.float32).tiny))


class Decoder(nn.Module):
    """Token ids to logits of the next token, causal, reading an encoder's output.

    Args:
        num_tokens: size of the vocabulary.
        dim: width, of the context too.
        depth: number of layers.
        heads: attention heads.
        max_seq_len: most tokens that are read at a time.
    """

    def __init__(self, *, num_tokens: int, dim: int, depth: int, heads: int, max_seq_len: int) -> None:
        super().__init__()
        self.num_tokens, self.dim, self.max_seq_len = num_tokens, dim, max_seq_len
        self.embedding = nn.Embedding(num_tokens, dim)
        self.positions = RelativePositions(heads, bidirectional=False)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each one.

        Args:
            tokens: int64 `[batch, time]`, `time` at most `max_seq_len`.
            context: the encoder's output `[batch, length, dim]`.
            mask: bool `[batch, time]`, false at padding, which has no place in its row.
            context_mask: bool `[batch, length]`, the encoder's `src_mask`.

        Returns:
            `[batch, time, num_tokens]`, zero at padding.

        Raises:
            TypeError: if ids are not integers or a mask is not boolean.
            ValueError: if shapes disagree, there are too many tokens or an id is outside the vocabulary.
        """
        ids = packed("tokens", tokens, mask, num_tokens=self.num_tokens, longest=self.max_seq_len)
        pairs = self._project(context, context_mask, tokens)
        # Causal attention hides the padding, which comes last: no mask.
        x, _ = self._read(ids.tokens, pairs, None, None, context_mask)
        return ids.unpack(self.to_logits(x))

    def loss(
        self,
        tgt: Tensor | Sequence[Tensor],
        context: Tensor,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of each token of `tgt` but a row's first, given those before it.

        Args:
            tgt: int64 `[batch, time]`, or rows of different lengths; the first token is the start. -100 is
                padding.
            context: the encoder's output `[batch, length, dim]`.
            mask: bool `[batch, time]`, false at padding, which is neither read nor asked for.
            context_mask: bool `[batch, length]`, the encoder's `src_mask`.

        Returns:
            A scalar; zero if no row has two tokens.

        Raises:
            TypeError: if ids are not integers or a mask is not boolean.
            ValueError: if shapes disagree, there are fewer than two or more than `max_seq_len + 1` tokens, or
                an id is outside the vocabulary.
        """
        if not isinstance(tgt, Tensor):
            tgt = pad_sequence(list(tgt), batch_first=True, padding_value=IGNORED_LABEL)
        if tgt.dim() != 2 or tgt.shape[1] < 2:
            raise ValueError(
                f"tgt must be [batch, time] with a start token and at least one to predict, got "
                f"{tuple(tgt.shape)}"
            )
        check_flags("tgt_mask", mask, tuple(tgt.shape), tgt.device)
        mask = tgt != IGNORED_LABEL if mask is None else mask & (tgt != IGNORED_LABEL)
        # The last token is asked for but not read.
        ids = packed("tgt", tgt, mask, num_tokens=self.num_tokens, longest=self.max_seq_len + 1)
        assert ids.keep is not None
        pairs = self._project(context, context_mask, tgt)
        x, _ = self._read(ids.tokens[:, :-1], pairs, None, None, context_mask)
        return cross_entropy(
            self.to_logits(x), torch.where(ids.keep[:, 1:], ids.tokens[:, 1:], IGNORED_LABEL)
        )

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Filter = top_k,
        filter_thres: float = 0.9,
        *,
        context: Tensor,
        context_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts.

        Each step costs one token until prompt and continuation are longer than `max_seq_len`; from there on
        the last `max_seq_len` tokens are read anew for each one.

        Args:
            start_tokens: int64 `[batch, time]`, at least one token a row; `[time]` for one row.
            seq_len: most tokens to generate.
            eos_token: an id that ends a row, which repeats it from there on; generation ends when all have.
            temperature: divides the logits that the filter left; 0 takes the most likely token.
            filter_logits_fn: from logits `[batch, num_tokens]` and `filter_thres` to logits: `top_k` or
                `top_p` of this module, or your own.
            filter_thres: for `top_k` and `top_p` the share that is dropped.
            context: the encoder's output `[batch, length, dim]`.
            context_mask: bool `[batch, length]`, the encoder's `src_mask`.
            input_mask: bool like `start_tokens`, false at padding, for prompts of different lengths.
            generator: source of randomness; None: torch's global one.

        Returns:
            The new tokens only, int64 `[batch, at most seq_len]`, or `[at most seq_len]` for one row.

        Raises:
            TypeError: if ids are not integers or a mask is not boolean.
            ValueError: if shapes disagree, a prompt is empty, an id is outside the vocabulary, or an option
                is out of range.
        """
        check_temperature(temperature)
        if seq_len < 0 or not 0 <= filter_thres <= 1:
            raise ValueError(
                f"seq_len ({seq_len}) must not be negative, filter_thres ({filter_thres}) must lie between 0 "
                "and 1"
            )
        one_row = start_tokens.dim() == 1
        if one_row:
            start_tokens = start_tokens[None]
            input_mask = input_mask[None] if input_mask is not None and input_mask.dim() == 1 else input_mask
        tokens, keep = self._right_aligned(start_tokens, input_mask)
        pairs = self._project(context, context_mask, tokens)
        new = tokens[:, :0]
        ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        past: list[KeysValues] | None = None
        for _ in range(seq_len):
            if past is not None and tokens.shape[1] <= self.max_seq_len:
                x, past = self._read(tokens[:, -1:], pairs, past, keep, context_mask)
            else:
                begin = max(0, tokens.shape[1] - self.max_seq_len)
                tokens, keep = tokens[:, begin:], None if keep is None else keep[:, begin:]
                x, past = self._read(tokens, pairs, None, keep, context_mask)
            logits = filter_logits_fn(self.to_logits(x[:, -1]), filter_thres)
            drawn = _draw(logits, temperature, generator).to(tokens.dtype)
            if eos_token is not None:
                drawn = torch.where(ended, eos_token, drawn)
                ended = drawn == eos_token
            new = torch.cat([new, drawn[:, None]], 1)
            tokens = torch.cat([tokens, drawn[:, None]], 1)
            keep = None if keep is None else torch.cat([keep, torch.ones_like(keep[:, :1])], 1)
            if eos_token is not None and bool(ended.all()):
                break
        return new[0] if one_row else new

    def _right_aligned(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Prompts end in the same column; only distances matter, so that padding before them has no effect.
        check_flags("input_mask", mask, tuple(tokens.shape), tokens.device)
        if tokens.dim() != 2 or tokens.shape[1] == 0 or (mask is not None and not bool(mask.any(1).all())):
            raise ValueError(
                f"start_tokens must be [batch, time] with at least one token a row, got {tuple(tokens.shape)}"
                f"{'' if mask is None else ' and a row that is all padding'}"
            )
        if mask is not None:
            order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
            tokens, mask = torch.where(mask, tokens, 0).gather(1, order), mask.gather(1, order)
        tokens = packed(
            "start_tokens", tokens, None, num_tokens=self.num_tokens, longest=tokens.shape[1]
        ).tokens
        return tokens, mask

    def _project(self, context: Tensor, context_mask: Tensor | None, tokens: Tensor) -> list[KeysValues]:
        check_context("context", context, tokens, self.dim)
        check_flags("context_mask", context_mask, tuple(context.shape[:2]), context.device)
        if context_mask is not None:
            # where, not multiply: padding may hold NaN, which a weight of zero does not undo.
            context = torch.where(context_mask[..., None], context, 0)
        return [cast(Layer, layer).cross.project(context) for layer in self.layers]

    def _read(
        self,
        tokens: Tensor,
        pairs: list[KeysValues],
        past: list[KeysValues] | None,
        keep: Tensor | None,
        context_keep: Tensor | None,
    ) -> tuple[Tensor, list[KeysValues]]:
        # Hidden states of the tokens after those of `past`, and what the tokens after these need.
        x = self.embedding(tokens)
        before = 0 if past is None else past[0].keys.shape[2]
        bias = self.positions(tokens.shape[1], before + tokens.shape[1])
        so_far = []
        for index, layer in enumerate(self.layers):
            x, own = layer(
                x,
                pairs[index],
                bias=bias,
                keep=keep,
                context_keep=context_keep,
                past=None if past is None else past[index],
            )
            so_far.append(own)
        return self.norm(x), so_far


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = scale_logits(logits, temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
