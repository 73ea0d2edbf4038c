"""Weights of memory-transformer-xl: where the package is not at fault ours agrees, elsewhere by how much not.

`data/published.pt` holds what memory-transformer-xl 0.1.0 returned with torch 2.13.0 (CPU) for the
cases of `record_published.py`, which made it.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memxl import MemoryTransformerXL, load_published
from tests.memxl.record_published import AGREE, BASE, DATA, DIFFER, Case, run, weights

NOTE = Path(__file__).parents[2] / "docs" / "memxl-published.md"


@pytest.fixture(scope="module")
def recorded() -> dict:
    return torch.load(DATA, weights_only=True)


@pytest.fixture(scope="module")
def shapes(recorded: dict) -> dict[str, dict[str, list[int]]]:
    return recorded["shapes"]


def published(recorded: dict, name: str) -> list[Tensor]:
    """Logits of the segments."""
    results = recorded["results"]
    return [results[f"{name}/logits/{index}"] for index in range(len((AGREE | DIFFER)[name].segments))]


def ours(case: Case, shapes: dict[str, list[int]]) -> MemoryTransformerXL:
    model = MemoryTransformerXL(**(BASE | case.options)).double()
    return load_published(model, weights(case, shapes))


@pytest.mark.parametrize("name", AGREE)
def test_outputs_and_gradients_agree_with_the_package(name: str, recorded: dict, shapes: dict) -> None:
    case = AGREE[name]
    model = ours(case, shapes[name])
    logits, gradient = run(model, model.embed.weight, case)
    for one, other in zip(logits, published(recorded, name), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, recorded["results"][f"{name}/gradient"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DIFFER)
def test_faults_differ_by_what_the_note_says(name: str, recorded: dict, shapes: dict) -> None:
    case = DIFFER[name]
    model = ours(case, shapes[name])
    expected = published(recorded, name)
    logits, _ = run(model, model.embed.weight, case)
    *earlier, difference = [float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True)]
    # The fault shows in the last segment, and is the only one that shows.
    assert all(before < 1e-10 for before in earlier[:1])
    scale = float(expected[-1].std())
    print(f"{name} | {difference:.3f} | {scale:.3f}")
    row = re.search(rf"\| {re.escape(name)} \|.*\| ([\d.]+) \| ([\d.]+) \|\n", NOTE.read_text())
    assert row, f"the note does not name {name!r}"
    torch.testing.assert_close((difference, scale), (float(row[1]), float(row[2])), rtol=0, atol=2e-3)


def test_nearest_rows_of_the_position_table_are_taken(shapes: dict) -> None:
    given = weights(AGREE["plain"], shapes["plain"])
    model = ours(AGREE["plain"], shapes["plain"])
    assert given["pos_emb"].shape[1] == 8 + 8 + 1
    assert torch.equal(model.distances, given["pos_emb"][:, 1:])


def test_weights_take_dtype_of_the_module(shapes: dict) -> None:
    model = MemoryTransformerXL(**BASE).bfloat16()
    load_published(model, weights(AGREE["plain"], shapes["plain"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"pos_emb": None}, r"missing \['pos_emb'\], unknown nothing"),
        ({}, {"attn_layers.0.gru.Uc.bias": None}, r"missing \['attn_layers.0.gru.Uc.bias'\]"),
        ({}, {"to_gate.weight": torch.zeros(1)}, r"unknown \['to_gate.weight'\]"),
        ({"gru_gated_residual": False}, {}, r"unknown \['attn_layers.0.gru.U.bias'"),
        ({"mogrify_gru": True}, {}, r"missing \['attn_layers.0.mogrify.Q.0.0.weight'"),
        ({"depth": 3}, {}, r"missing \['attn_layers.2.fn.norm.weight'"),
        ({"emb_dim": 12}, {}, r"missing \['to_model_dim.weight'"),
        ({"lmem_len": 2}, {}, r"pos_emb has 17 rows.* this model's make 8 \+ 8 \+ 2"),
        ({"heads": 8}, {}, r"distances would get the shape \[4, 16, 8\], this model needs \[8, 16, 4\]"),
        ({"memory_layers": [2]}, {}, r"writer.depths would get the shape \[2, 32\].* \[1, 32\]"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    shapes: dict, options: dict, change: dict, message: str
) -> None:
    given = {
        name: value
        for name, value in (weights(AGREE["plain"], shapes["plain"]) | change).items()
        if value is not None
    }
    model = MemoryTransformerXL(**(BASE | options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(model, given)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
