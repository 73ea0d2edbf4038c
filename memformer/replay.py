"""Memory replay (Memformer, Algorithm 1) under its classic name, for the classic model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from memformer.classic import Memformer
from memory_models.replay import Segment, memory_replay

EncoderLoss = Callable[[Tensor, int], Tensor | None]


@overload
def memory_replay_backprop(
    model: Memformer,
    src: Tensor,
    tgt: Tensor | Sequence[Tensor] | None = ...,
    src_mask: Tensor | None = ...,
    tgt_mask: Tensor | None = ...,
    *,
    mems: Tensor | None = ...,
    loss_fn: EncoderLoss | None = ...,
    return_mems: Literal[False] = ...,
) -> Tensor: ...


@overload
def memory_replay_backprop(
    model: Memformer,
    src: Tensor,
    tgt: Tensor | Sequence[Tensor] | None = ...,
    src_mask: Tensor | None = ...,
    tgt_mask: Tensor | None = ...,
    *,
    mems: Tensor | None = ...,
    loss_fn: EncoderLoss | None = ...,
    return_mems: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def memory_replay_backprop(
    model: Memformer,
    src: Tensor,
    tgt: Tensor | Sequence[Tensor] | None = None,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    *,
    mems: Tensor | None = None,
    loss_fn: EncoderLoss | None = None,
    return_mems: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add to every `.grad` what back-propagation through all segments of a long source would.

    The source is cut into segments of `enc_max_seq_len` tokens, the last one ragged; the target is
    predicted after the last. Activations are held for one segment at a time, for the price of one more
    forward pass through the encoder; see `memory_models.memory_replay`, which does it.

    Args:
        model: with a decoder if there is a target.
        src: int64 `[batch, time]`, of any length.
        tgt: int64 `[batch, time]` as in `Memformer.forward`; None: `loss_fn` is all that is learned.
        src_mask: bool like `src`, false at padding.
        tgt_mask: bool like `tgt`, false at padding.
        mems: where to go on, `[batch, num_memory_slots, dim]`; None starts afresh.
        loss_fn: from the encoder's output for a segment `[batch, time, dim]` and the segment's number,
            counted from 0, to a scalar, or None for no loss there; the only loss of an encoder without
            decoder, and added to the target's otherwise. It is called from the last segment to the first.
        return_mems: whether to return the memory too.

    Returns:
        The loss, detached; with `return_mems` the loss and the memory after the last segment
        `[batch, num_memory_slots, dim]`, detached, for the next call's `mems`.

    Raises:
        TypeError: if ids are not integers or a mask is not boolean.
        ValueError: if shapes disagree, an id is outside the vocabulary, there is neither a target nor a
            `loss_fn`, or a target without a decoder.
        RuntimeError: if gradients are switched off.
    """
    if tgt is None and loss_fn is None:
        raise ValueError("there is nothing to learn: give tgt, or a loss_fn on the encoder's output")
    if tgt is not None and model.decoder is None:
        raise ValueError("a model with encoder_only=True has no decoder to predict tgt with; give loss_fn")
    if tgt is None and tgt_mask is not None:
        raise ValueError("tgt_mask is given without tgt")
    segments = Segment.cut(src, model.encoder.max_seq_len, mask=src_mask)

    def read(x: Tensor, memory: Tensor | None, mask: Tensor | None = None) -> tuple[Any, Tensor]:
        out = model(x, mems=memory, src_mask=mask)
        return (out.enc_out, mask), out.mems

    def loss_of(output: tuple[Tensor, Tensor | None], index: int) -> Tensor | None:
        enc_out, mask = output
        loss = None if loss_fn is None else loss_fn(enc_out, index)
        if tgt is None or model.decoder is None or index < len(segments) - 1:
            return loss
        target = model.decoder.loss(tgt, enc_out, mask=tgt_mask, context_mask=mask)
        return target if loss is None else loss + target

    replay = memory_replay(read, segments, loss_of, mems)
    return (replay.loss, replay.memory) if return_mems else replay.loss
