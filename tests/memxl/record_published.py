"""Record what memory-transformer-xl 0.1.0 returns, for `test_published.py`.

Run in an environment that has the package: `.peers/bin/python -I tests/memxl/record_published.py`. Weights
are drawn from seeds, so that only results need to be kept. All in float64: a difference is no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data" / "published.pt"
BASE: dict[str, Any] = {"num_tokens": 12, "dim": 32, "seq_len": 8, "depth": 2, "heads": 4, "lmem_len": 1}
FIRST_LAYER = {"memory_layers": [1]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of both packages: options beside `BASE`, lengths of segments, and changes to the weights."""

    options: dict[str, Any] = field(default_factory=dict)
    segments: tuple[int, ...] = (8,)
    # flat: no positions; near: none beyond mem_len; without places: slots have none; normal: the first
    # layer's inputs are normalised already, so that normalising them again changes nothing.
    edits: tuple[str, ...] = ()
    padding: tuple[int, ...] = ()
    """Positions of row 1 that are masked."""


# The published package is at fault in none of these: a first segment has no memory to be wrong about, and
# with one slot its heads cannot be merged wrongly.
AGREE = {
    "plain": Case(),
    "narrow embeddings": Case(options={"emb_dim": 12}),
    "gated feed-forward": Case(options={"ff_glu": True}),
    "one kv head": Case(options={"one_kv_head": True}),
    "mogrified": Case(options={"mogrify_gru": True}),
    "plain residual": Case(options={"gru_gated_residual": False}),
    "padding": Case(padding=(5, 6, 7)),
    "persistent": Case(options={"num_mem_kv": 3}, edits=("flat",)),
    "four segments": Case(
        options=FIRST_LAYER | {"mem_write_iters": 3},
        segments=(8, 8, 8, 8),
        edits=("near", "without places", "normal"),
    ),
    "four segments, short memory of half": Case(
        options=FIRST_LAYER | {"mem_len": 4, "num_mem_kv": 3},
        segments=(8, 8, 8, 8),
        edits=("flat", "without places", "normal"),
    ),
}
_HARMLESS = ("flat", "without places", "normal")
# One fault each; everything else is chosen so that it does not show.
DIFFER = {
    "X1 heads of the write merged wrongly": Case(
        options=FIRST_LAYER | {"lmem_len": 8}, segments=(8, 8), edits=_HARMLESS
    ),
    "X2 mem_len above seq_len: nothing written": Case(
        options=FIRST_LAYER | {"mem_len": 16}, segments=(8, 8), edits=_HARMLESS
    ),
    "X3 short segment not written": Case(options=FIRST_LAYER, segments=(5, 8), edits=_HARMLESS),
    "X4 padding written": Case(
        options=FIRST_LAYER, segments=(8, 8), edits=_HARMLESS, padding=(0, 1, 2, 3, 4, 5, 6)
    ),
    "X5 distance zero moves when dim < mem_len + lmem_len": Case(
        options={"dim": 16, "lmem_len": 24, "mem_len": 8}
    ),
    "X6 persistent key/values have distances": Case(options={"num_mem_kv": 3}),
    "X6 long-memory slots have distances": Case(
        options=FIRST_LAYER, segments=(8, 8), edits=("without places", "normal")
    ),
    "short memory read without the norm": Case(segments=(8, 8), edits=("flat", "without places")),
    "places of slots add up in the state": Case(
        options=FIRST_LAYER, segments=(8, 8, 8), edits=("flat", "normal")
    ),
}


def tokens(case: Case) -> Tensor:
    """int64 `[2, time]`."""
    return (torch.arange(2 * sum(case.segments)) * 7 % 11).view(2, -1)


def mask(case: Case) -> Tensor | None:
    """bool `[2, first segment]`; the later segments have no padding."""
    if not case.padding:
        return None
    real = torch.ones(2, case.segments[0], dtype=torch.bool)
    real[1, list(case.padding)] = False
    return real


def weights(case: Case, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Published weights of these shapes, drawn from a seed each."""
    found = {}
    for index, name in enumerate(sorted(shapes)):
        drawn = torch.rand(shapes[name], generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        noise = 2 * drawn - 1
        scale = 1.0 if name in ("pos_emb", "token_emb.weight") else 1.7 * (BASE | case.options)["dim"] ** -0.5
        found[name] = 1 + 0.3 * noise if name.endswith("norm.weight") else scale * noise
    held = case.options.get("mem_len", BASE["seq_len"])
    if "flat" in case.edits:
        found["pos_emb"] = torch.zeros_like(found["pos_emb"])
    if "near" in case.edits:
        found["pos_emb"][:, : -held - 1] = 0
    if "without places" in case.edits:
        found["memory_network.lmem_pos_emb"] = torch.zeros_like(found["memory_network.lmem_pos_emb"])
    if "normal" in case.edits:
        embeddings = found["token_emb.weight"]
        embeddings = (embeddings - embeddings.mean(1, keepdim=True)) / embeddings.std(1, False, keepdim=True)
        # The norm divides by the root of the variance plus 1e-5.
        found["token_emb.weight"] = embeddings * (1 - 1e-5) ** 0.5
        found["attn_layers.0.fn.norm.weight"].fill_(1)
        found["attn_layers.0.fn.norm.bias"].fill_(0)
    return found


def run(model: torch.nn.Module, embedding: Tensor, case: Case) -> tuple[list[Tensor], Tensor]:
    """Logits of each segment, and the gradient of their squares' sum (padding left out) for `embedding`."""
    x, real = tokens(case), mask(case)
    memories, begin = None, 0
    logits, total = [], embedding.new_zeros(())
    for length in case.segments:
        here = real if begin == 0 else None
        out, memories = model(x[:, begin : begin + length], memories=memories, mask=here)
        logits.append(out.detach() if here is None else out.detach() * here[..., None])
        total = total + (out if here is None else out[here]).square().sum()
        begin += length
    return logits, torch.autograd.grad(total, embedding)[0]


def main() -> None:
    """Write `DATA`."""
    from memory_transformer_xl import MemoryTransformerXL  # type: ignore[import-not-found, unused-ignore]

    torch.set_num_threads(1)
    results: dict[str, Tensor] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, case in (AGREE | DIFFER).items():
        model = MemoryTransformerXL(**(BASE | case.options)).double()
        shapes[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(weights(case, shapes[name]))
        logits, gradient = run(model, model.token_emb.weight, case)
        results |= {f"{name}/logits/{index}": value for index, value in enumerate(logits)}
        if name in AGREE:
            results[f"{name}/gradient"] = gradient
    DATA.parent.mkdir(exist_ok=True)
    torch.save({"results": results, "shapes": shapes}, DATA)
    print(f"{DATA}: {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
