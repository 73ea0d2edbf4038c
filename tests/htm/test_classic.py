"""Weights and calls of htm-pytorch.

`data/published.safetensors` was made by running htm-pytorch 0.0.4 with torch 2.13.0 (seed 0): for
`HTMAttention` and `HTMBlock` with dim 16, heads 2, dim_head 4, topk_mems 3, mem_chunk_size 4, the state dict,
queries `[2, 5, 16]`, memories `[2, 24, 16]` and two masks, all random, but so that the published package is
not at fault: a whole number of chunks, and every query may read the newest token. Then for three calls
(plain; mask; mask and chunk_attn_mask) the output, and the gradient of `output.square().sum()` for queries.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from htm import HTMAttention, HTMBlock, load_published

OPTIONS = {"dim": 16, "heads": 2, "dim_head": 4, "topk_mems": 3, "mem_chunk_size": 4}
CASES = {"plain": (), "masked": ("mask",), "both": ("mask", "chunk_attn_mask")}


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "published.safetensors")


def part(published: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in published.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", CASES)
def test_attention_agrees_with_the_published_package(published: dict[str, Tensor], case: str) -> None:
    given = part(published, "attention/")
    module = load_published(HTMAttention(**OPTIONS), part(given, "weights/"))
    queries = given["queries"].requires_grad_()
    out = module(queries, given["memories"], **{name: given[name] for name in CASES[case]})
    torch.testing.assert_close(out, given[f"{case}/output"], rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), queries)
    torch.testing.assert_close(gradient, given[f"{case}/queries_grad"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_block_agrees_but_for_the_residual(published: dict[str, Tensor], case: str) -> None:
    given = part(published, "block/")
    block = load_published(HTMBlock(**OPTIONS), part(given, "weights/"))
    queries = given["queries"]
    out = block(queries, given["memories"], **{name: given[name] for name in CASES[case]})
    expected = given[f"{case}/output"] - block.norm(queries) + queries
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_weights_come_back_through_our_own_state_dict(published: dict[str, Tensor]) -> None:
    given = part(published, "attention/")
    module = load_published(HTMAttention(**OPTIONS), part(given, "weights/"))
    again = HTMAttention(**OPTIONS, summary_bias=True)
    again.load_state_dict(module.state_dict())
    assert torch.equal(
        again(given["queries"], given["memories"]), module(given["queries"], given["memories"])
    )


def test_weights_take_dtype_and_training_of_the_module(published: dict[str, Tensor]) -> None:
    module = HTMAttention(**OPTIONS).bfloat16()
    load_published(module, part(published, "attention/weights/"))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_published_signature_takes_positional_arguments() -> None:
    module = HTMAttention(16, 2, 3, 4, 8, False, 1e-5)
    settings = (module.heads, module.topk_mems, module.mem_chunk_size, module.dim_head, module.add_pos_enc)
    assert settings == (2, 3, 4, 8, False)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"to_summary_queries.bias": None}, r"missing \['to_summary_queries.bias'\]"),
        ({}, {"to_gate.weight": torch.zeros(1)}, r"unknown \['to_gate.weight'\]"),
        ({"heads": 4}, {}, r"attn.to_q.weight has shape \[8, 16\], this module needs \[16, 16\]"),
        ({"add_pos_enc": False}, {}, r"saved with positions.*build the module with add_pos_enc=True"),
        ({}, {"pos_emb.inv_freqs": None}, r"saved without positions.*add_pos_enc=False"),
        ({}, {"norm.weight": torch.zeros(16)}, r"weights of an HTMBlock, got an HTMAttention"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    published: dict[str, Tensor], options: dict, change: dict, message: str
) -> None:
    weights = part(published, "attention/weights/") | change
    weights = {name: value for name, value in weights.items() if value is not None}
    module = HTMAttention(**(OPTIONS | options))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(module, weights)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
