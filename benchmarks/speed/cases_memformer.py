"""Training the classic Memformer on a long source, by replay and plainly, against the package memformer.

Both processes load this file, and in one of them this project does not exist: outside functions it imports
only the standard library and torch. (The package's module has the name of ours; each side has one of them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.speed import Case, Work

# As in the package's README.
DIM, DEPTH, HEADS, SLOTS, TOKENS, LENGTH = 512, 2, 8, 128, 256, 1024
SEGMENTS, TARGET = 8, 512
PUBLISHED, OURS = "memformer", "memory-models"
REPLAY, PLAIN = "replay", "back-propagation"
# Parameters whose gradients are compared: the package's names and ours.
_COMPARED = {
    "memory_slots": "write.start",
    "gru.weight_hh": "write.gru.weight_hh",
    "mem_updater.to_kv.weight": "write.to_keys_values.weight",
    "mem_ff.fn.fn.net.0.weight": "write.feedforward.0.weight",
    "encoder.token_emb.weight": "encoder.embedding.weight",
    "encoder.layer_blocks.layers.1.0.fn.fn.to_q.weight": "encoder.layers.1.attention.to_queries.weight",
    "decoder.net.token_emb.weight": "decoder.embedding.weight",
    "decoder.net.to_logits.weight": "decoder.to_logits.weight",
}
_POSITIONS = ("encoder.layer_blocks.rel_pos_emb", "decoder.net.layer_blocks.rel_pos_emb")


def cases() -> list[Case]:
    """Both ways against the package's, and our replay against our plain back-propagation."""
    from benchmarks.speed import Case

    size = f"s{SEGMENTS}x{LENGTH}"
    note = (
        "the position biases are zero, for the package has the two kinds of buckets the wrong way round; "
        "with other weights the results differ, and the work does not"
    )
    found = [
        Case(
            name=f"memformer/{name}/{size}",
            package=package,
            settings={
                "ours": mine,
                "theirs": other,
                "against": package,
                "segments": SEGMENTS,
                "length": LENGTH,
                "target": TARGET,
                "seed": 0,
            },
            work=least_work(segments=SEGMENTS, target=TARGET, replay=mine == REPLAY),
            faster=faster,
            leaner=leaner,
            # Rounding, through eight segments and back.
            tolerance=1e-3,
            note=note if package == PUBLISHED else "ours on both sides: what replay costs and saves",
        )
        for name, mine, package, other, faster, leaner in (
            ("replay", REPLAY, PUBLISHED, REPLAY, 1.2, 1 / 0.6),
            ("back-propagation", PLAIN, PUBLISHED, PLAIN, None, None),
            ("replay or back-propagation", REPLAY, OURS, PLAIN, 1 / 1.35, 2.0),
        )
    ]
    return found


def least_work(*, segments: int, target: int, replay: bool) -> Work:
    """Operations and bytes of a step: every product forward, and twice as much backward.

    A layer is its maps and the two products of its attention, which of a causal one are halved. A replay
    must compute all segments but the last once more, having held none; a norm, an activation or a softmax
    counts nothing. Of bytes the weights are read forward and backward and their gradients written.
    """
    from benchmarks.speed import Work

    square = DIM * DIM

    def attention(queries: int, keys: int, *, causal: bool = False) -> float:
        return 2 * (queries + keys) * square + 2 * queries * keys * DIM / (2 if causal else 1)

    def layer(time: int, read: int, *, causal: bool = False) -> float:
        return attention(time, time, causal=causal) + attention(time, read) + 8 * time * square

    write = attention(SLOTS, SLOTS + LENGTH) + 6 * SLOTS * square + 8 * SLOTS * square
    segment = DEPTH * layer(LENGTH, SLOTS) + write
    decoder = DEPTH * layer(target - 1, LENGTH, causal=True) + (target - 1) * TOKENS * DIM
    # What the last segment writes is read by nobody.
    passes = 3 * (segments * segment - write + decoder)
    if replay:
        passes += (segments - 1) * segment
    weights = 2 * DEPTH * 16 * square + 18 * square + 3 * TOKENS * DIM + SLOTS * DIM
    return Work(operations=2 * passes, bytes=4 * 3 * weights)


def _options(length: int) -> dict[str, Any]:
    return {
        "dim": DIM,
        "num_memory_slots": SLOTS,
        "enc_num_tokens": TOKENS,
        "enc_depth": DEPTH,
        "enc_heads": HEADS,
        "enc_max_seq_len": length,
        "dec_num_tokens": TOKENS,
        "dec_depth": DEPTH,
        "dec_heads": HEADS,
        "dec_max_seq_len": LENGTH,
    }


def theirs(settings: Mapping[str, Any], weights: str) -> Training:
    """The package's model, or ours trained the other way; the weights are written to `weights`."""
    import memformer  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(settings["seed"])
    model: nn.Module = memformer.Memformer(**_options(settings["length"]))
    names = {ours: ours for ours in _COMPARED.values()}
    if settings["against"] == PUBLISHED:
        for name in _POSITIONS:
            nn.init.zeros_(model.get_parameter(f"{name}.relative_attention_bias.weight"))
        names = _COMPARED
    torch.save(model.state_dict(), weights)
    return Training(model, settings, way=settings["theirs"], names=names)


def ours(settings: Mapping[str, Any], weights: str) -> Training:
    """Our model with the other side's weights."""
    from memformer import Memformer, load_published

    model = Memformer(**_options(settings["length"]))
    state = torch.load(weights, weights_only=True)
    if settings["against"] == PUBLISHED:
        load_published(model, state)
    else:
        model.load_state_dict(state)
    names = {name: name for name in _COMPARED.values()}
    return Training(model, settings, way=settings["ours"], names=names)


class Training:
    """Gradients of a target after all segments of a source, by replay or with everything held.

    Args:
        model: of either side.
        settings: what `cases` put into the case.
        way: `REPLAY` or `PLAIN`.
        names: parameters of the model whose gradients are compared, and ours that correspond to them.
    """

    def __init__(
        self, model: nn.Module, settings: Mapping[str, Any], *, way: str, names: Mapping[str, str]
    ) -> None:
        self.model, self.way, self.names = model, way, names
        generator = torch.Generator().manual_seed(settings["seed"] + 1)
        self.length: int = settings["length"]
        time = settings["segments"] * self.length
        self.source = torch.randint(TOKENS, (1, time), generator=generator)
        self.target = torch.randint(TOKENS, (1, settings["target"]), generator=generator)

    def step(self, index: int) -> None:
        """All gradients."""
        self._train(self.source, self.target)

    def warm_up(self) -> None:
        """The same on a few tokens, in one segment."""
        self._train(self.source[:, :16], self.target[:, :16])
        self.model.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """Gradients of every part of the model; `output` is that of the first memory."""
        self.step(0)
        found = {}
        for name, common in self.names.items():
            gradient = self.model.get_parameter(name).grad
            if gradient is None:
                raise RuntimeError(f"no gradient reached {name}")
            found[f"gradient of {common}"] = gradient
        return {"output": found["gradient of write.start"], **found}

    def _train(self, source: Tensor, target: Tensor) -> None:
        import memformer

        # The package's on its side, ours on ours.
        replay: Any = memformer.memory_replay_backprop
        self.model.zero_grad(set_to_none=True)
        source_mask, target_mask = (torch.ones_like(ids, dtype=torch.bool) for ids in (source, target))
        if self.way == REPLAY:
            replay(self.model, source, target, source_mask, target_mask)
            return
        memory = None
        *earlier, last = zip(
            source.split(self.length, dim=1), source_mask.split(self.length, dim=1), strict=True
        )
        for tokens, mask in earlier:
            _, memory, _ = self.model(tokens, mems=memory, src_mask=mask)
        tokens, mask = last
        _, _, loss = self.model(tokens, target, mems=memory, src_mask=mask, tgt_mask=target_mask)
        loss.backward()
