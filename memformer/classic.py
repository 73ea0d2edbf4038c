"""Code and weights written against the package memformer.

`Memformer` and `memory_replay_backprop` have that package's constructor and calls. What differs, on purpose:

- the encoder's position buckets tell tokens after the query apart, the decoder's are all for those before;
- padded targets, by `tgt_mask` or -100, are neither read nor trained on; a mask of another length is refused;
- padding has no place in its row, and a row without a real token keeps its memory;
- segments longer than `enc_max_seq_len` or `dec_max_seq_len` are refused;
- `model.decoder.generate` works, and the replay returns its loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from memformer.decoder import Decoder
from memformer.layers import GatedSlotWrite, SlotWrite
from memformer.transformer import Encoder, RelativePositions, bucket, bucket_bounds, check_context
from memory_models.checks import check_heads, check_sizes

Write = Literal["gru", "bmn"]


class MemformerOutput(NamedTuple):
    """What a `Memformer` with a decoder returns.

    Attributes:
        enc_out: the encoder's output `[batch, time, dim]`, zero at padding.
        mems: the memory for the next segment, `[batch, num_memory_slots, dim]`.
        loss: the decoder's mean cross-entropy in nats; zero without a target.
    """

    enc_out: Tensor
    mems: Tensor
    loss: Tensor

    @property
    def mem(self) -> Tensor:
        """The package's name for `mems`."""
        return self.mems

    @property
    def dec_out(self) -> Tensor:
        """The package's name for `loss`."""
        return self.loss


class EncoderOutput(NamedTuple):
    """What a `Memformer` without a decoder returns: `enc_out` and `mems` as in `MemformerOutput`."""

    enc_out: Tensor
    mems: Tensor

    @property
    def mem(self) -> Tensor:
        """The package's name for `mems`."""
        return self.mems


class Memformer(nn.Module):
    """An encoder that reads and writes memory slots, and a decoder that reads its output.

    Wu et al., "Memformer" (arXiv 2010.06891, §2.2), as the package memformer 0.3.1 built it; for the family's
    common interface see `MemformerDecoder`.

    Args:
        dim: width of everything.
        num_memory_slots: slots of the memory.
        num_mem_updates: times that a segment is written.
        encoder_only: no decoder; the `dec_` options are not looked at then.
        mem_update_attn_heads: attention heads of the write.
        enc_num_tokens: size of the source vocabulary.
        enc_depth: layers of the encoder.
        enc_heads: attention heads of the encoder.
        enc_max_seq_len: most tokens of one source segment.
        dec_num_tokens: size of the target vocabulary.
        dec_depth: layers of the decoder.
        dec_heads: attention heads of the decoder.
        dec_max_seq_len: most target tokens that are read at a time.
        write: `"gru"`, the package's write, which its weights need, or `"bmn"`, the paper's with biased
            memory normalisation.

    Attributes:
        encoder: `encoder(src, context=mems, mask=src_mask)` gives the encoder's output.
        decoder: see `Decoder` for its logits, its loss and `generate`; None without.

    Raises:
        ValueError: if an option is out of range, or missing for the decoder.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_memory_slots: int,
        num_mem_updates: int = 1,
        encoder_only: bool = False,
        mem_update_attn_heads: int = 8,
        enc_num_tokens: int,
        enc_depth: int,
        enc_heads: int = 8,
        enc_max_seq_len: int,
        dec_num_tokens: int | None = None,
        dec_depth: int | None = None,
        dec_heads: int = 8,
        dec_max_seq_len: int | None = None,
        write: Write = "gru",
    ) -> None:
        super().__init__()
        if write not in get_args(Write):
            raise ValueError(f"write ({write!r}) must be one of {', '.join(map(repr, get_args(Write)))}")
        check_sizes(
            dim=dim,
            num_memory_slots=num_memory_slots,
            num_mem_updates=num_mem_updates,
            enc_num_tokens=enc_num_tokens,
            enc_depth=enc_depth,
            enc_max_seq_len=enc_max_seq_len,
        )
        check_heads(dim, enc_heads=enc_heads, mem_update_attn_heads=mem_update_attn_heads)
        self.dim, self.num_memory_slots, self.encoder_only = dim, num_memory_slots, encoder_only
        self.encoder = Encoder(
            num_tokens=enc_num_tokens, dim=dim, depth=enc_depth, heads=enc_heads, max_seq_len=enc_max_seq_len
        )
        self.decoder: Decoder | None = None
        if not encoder_only:
            if dec_num_tokens is None or dec_depth is None or dec_max_seq_len is None:
                raise ValueError(
                    "the decoder needs dec_num_tokens, dec_depth and dec_max_seq_len; give them, or "
                    "encoder_only=True for a model without one"
                )
            check_sizes(dec_num_tokens=dec_num_tokens, dec_depth=dec_depth, dec_max_seq_len=dec_max_seq_len)
            check_heads(dim, dec_heads=dec_heads)
            self.decoder = Decoder(
                num_tokens=dec_num_tokens,
                dim=dim,
                depth=dec_depth,
                heads=dec_heads,
                max_seq_len=dec_max_seq_len,
            )
        kind = GatedSlotWrite if write == "gru" else SlotWrite
        self.write: GatedSlotWrite | SlotWrite = kind(
            dim, slots=num_memory_slots, heads=mem_update_attn_heads, iterations=num_mem_updates
        )

    def get_initial_mem(self, batch_size: int) -> Tensor:
        """The memory of `batch_size` new documents, `[batch_size, num_memory_slots, dim]`; learned."""
        return self.write.initial().expand(batch_size, -1, -1)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor | Sequence[Tensor] | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> MemformerOutput | EncoderOutput:
        """Read one segment, write it into the memory, and predict a target from it.

        Args:
            src: int64 `[batch, time]`, `time` at most `enc_max_seq_len`.
            tgt: int64 `[batch, time]`, a start token and the tokens to predict, at most
                `dec_max_seq_len + 1`; -100 is padding. A sequence of rows may differ in length.
            mems: what the last call returned, `[batch, num_memory_slots, dim]`; None starts afresh.
            src_mask: bool like `src`, false at padding, which is neither attended nor written.
            tgt_mask: bool like `tgt`, false at padding, which is neither read nor in the loss.

        Returns:
            `(enc_out, mems, loss)`, or `(enc_out, mems)` of a model without decoder. The `mems` given are not
            changed.

        Raises:
            TypeError: if ids are not integers or a mask is not boolean.
            ValueError: if shapes disagree, a segment is too long, an id is outside the vocabulary, or there
                is a target but no decoder.
        """
        if mems is None:
            mems = self.get_initial_mem(src.shape[0])
        check_context("mems", mems, src, self.dim)
        if mems.shape[1] != self.num_memory_slots:
            raise ValueError(f"mems holds {mems.shape[1]} slots, the model has {self.num_memory_slots}")
        if tgt is None and tgt_mask is not None:
            raise ValueError("tgt_mask is given without tgt")
        enc_out = self.encoder(src, mems, src_mask)
        written = self.write(mems, enc_out, src_mask)
        if self.decoder is None:
            if tgt is not None:
                raise ValueError("a model with encoder_only=True has no decoder to predict tgt with")
            return EncoderOutput(enc_out, written)
        if tgt is None:
            # A leaf, so that code which calls backward for every segment goes on working.
            loss = torch.zeros((), device=src.device, requires_grad=True)
        else:
            loss = self.decoder.loss(tgt, enc_out, mask=tgt_mask, context_mask=src_mask)
        return MemformerOutput(enc_out, written, loss)


_PUBLISHED = (
    (r"^write\.start", "memory_slots"),
    (r"^write\.to_", "mem_updater.to_"),
    (r"^write\.gru", "gru"),
    (r"^write\.norm", "mem_ff.fn.norm"),
    (r"^write\.feedforward", "mem_ff.fn.fn.net"),
    (r"\bembedding\.", "token_emb."),
    (r"\bpositions\.", "layer_blocks.rel_pos_emb.relative_attention_bias."),
    (r"\blayers\.(\d+)\.", r"layer_blocks.layers.\1."),
    (r"\.attention\.(?!norm)", ".0.fn.fn."),
    (r"\.attention\.norm", ".0.fn.norm"),
    (r"\.cross\.(?!norm)", ".1.fn.fn."),
    (r"\.cross\.norm", ".1.fn.norm"),
    (r"\.feedforward\.0", ".2.fn.norm"),
    (r"\.feedforward\.1", ".2.fn.fn.net.0"),
    (r"\.feedforward\.3", ".2.fn.fn.net.2"),
    (r"^decoder\.", "decoder.net."),
    (r"\.to_queries\.", ".to_q."),
    (r"\.to_keys_values\.", ".to_kv."),
)


def load_published(model: Memformer, state_dict: Mapping[str, Tensor]) -> Memformer:
    """Copy weights of the package memformer's `Memformer` into `model`.

    Outputs and memories then agree to rounding wherever the package is not at fault (see this module). Its
    position buckets are: each bucket of ours gets the mean of what the package added over the bucket's
    distances, which is all the same if those weights are zero.

    Args:
        model: built with the published model's options and `write="gru"`.
        state_dict: as saved by memformer.

    Returns:
        `model` itself.

    Raises:
        ValueError: if a weight is missing, unknown or of another shape, or `model` writes otherwise; nothing
            is loaded then.
    """
    if not isinstance(model.write, GatedSlotWrite):
        raise ValueError('the published weights write with a GRU; build the model with write="gru"')
    theirs = {name: _published_name(name) for name in model.state_dict()}
    missing = sorted(set(theirs.values()) - state_dict.keys())
    unknown = sorted(state_dict.keys() - set(theirs.values()))
    if missing or unknown:
        raise ValueError(
            "not a state dict of memformer's Memformer with these options: "
            f"missing {missing}, unknown {unknown}"
        )
    for name, parameter in model.state_dict().items():
        given = state_dict[theirs[name]]
        if given.shape != parameter.shape:
            raise ValueError(
                f"{theirs[name]} has shape {list(given.shape)}, this model needs {list(parameter.shape)}: "
                "build it with the published model's options"
            )
    weights = {name: state_dict[theirs[name]] for name in theirs}
    for prefix, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        if part is not None:
            name = f"{prefix}.positions.weight"
            weights[name] = _rebucketed(part.positions, weights[name])
    model.load_state_dict(weights)
    return model


def _published_name(name: str) -> str:
    for ours, theirs in _PUBLISHED:
        name = re.sub(ours, theirs, name)
    return name


def _rebucketed(positions: RelativePositions, published: Tensor) -> Tensor:
    # The package has the two kinds of buckets the wrong way round: its encoder's are one-sided, where all
    # tokens after the query share the first bucket, its decoder's two-sided.
    both = positions.bidirectional
    distances = torch.arange(-positions.max_distance, positions.max_distance + 1 if both else 1)
    theirs = bucket(distances, bucket_bounds(bidirectional=not both), bidirectional=not both)
    ours = bucket(distances, bucket_bounds(bidirectional=both), bidirectional=both)
    added = published.to("cpu", torch.promote_types(published.dtype, torch.float32))[theirs]
    sums = added.new_zeros(published.shape).index_add(0, ours, added)
    # Bucket `buckets // 2` of the two-sided kind would be distance zero after the query: never asked for.
    return sums / torch.bincount(ours, minlength=positions.buckets).clamp(min=1)[:, None]
