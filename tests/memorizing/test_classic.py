"""Weights, calls and outputs of memorizing-transformers-pytorch.

`data/published.safetensors` was made by `tests/reference/published_memorizing.py`, which says how: for three
models, weights, and for three segments of two rows logits, XL memories, loss and gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memorizing import MemorizingTransformer, load_published
from tests.reference.published_memorizing import CASES, SEGMENTS, SIZES


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "published.safetensors")


def part(published: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in published.items() if name.startswith(prefix)}


def loaded(published: dict[str, Tensor], case: str, **options: Any) -> MemorizingTransformer:
    model = MemorizingTransformer(**(SIZES | CASES[case][0] | options))
    return load_published(model, part(published, f"{case}/weights/"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grad", [False, True])
def test_logits_agree_with_the_published_package(published: dict[str, Tensor], case: str, grad: bool) -> None:
    model = loaded(published, case)
    stores, caches = model.create_knn_memories(batch_size=2), None
    for index in range(SEGMENTS):
        with torch.set_grad_enabled(grad):
            logits, caches = model(published["tokens"][:, index, :-1], stores, caches)
        torch.testing.assert_close(logits, published[f"{case}/logits/{index}"], rtol=0, atol=1e-5)
        assert len(caches) == model.num_xl_memory_layers
        for layer, cache in enumerate(caches):
            torch.testing.assert_close(cache, published[f"{case}/xl/{index}/{layer}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("when", ["at the end", "after each segment"])
def test_loss_and_gradients_agree(published: dict[str, Tensor], case: str, when: str) -> None:
    model = loaded(published, case)
    total, caches = torch.zeros(()), None
    with model.knn_memories_context(batch_size=2) as stores:
        for segment in published["tokens"].unbind(1):
            loss, caches = model(segment[:, :-1], stores, caches, segment[:, 1:])
            total = total + loss
            if when == "after each segment":
                loss.backward()
    if when == "at the end":
        total.backward()
    torch.testing.assert_close(total, published[f"{case}/loss"], rtol=0, atol=1e-5)
    expected = part(published, f"{case}/grads/")
    for name, parameter in model.named_parameters():
        # The package gives the distances of a cache the wrong bias, and so the bias the wrong gradient.
        if name.endswith("relative_attention_bias.weight") and model.num_xl_memory_layers:
            continue
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_weights_load_by_name_into_the_dtype_of_the_model(published: dict[str, Tensor]) -> None:
    weights = part(published, "stores/weights/")
    model = MemorizingTransformer(**(SIZES | CASES["stores"][0]))
    model.load_state_dict(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    load_published(model.bfloat16(), weights)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"token_emb.weight": None}, r"missing \['token_emb.weight'\]"),
        ({}, {"gate": torch.zeros(1)}, r"unknown \['gate'\]"),
        ({"memorizing_layers": 2}, {}, r"missing \['layers.2.0.fn.to_out.bias'\]"),
        ({"heads": 4}, {}, r"has shape \[32, 2\], this model needs \[32, 4\]"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    published: dict[str, Tensor], options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    weights = part(published, "stores/weights/") | change
    model = MemorizingTransformer(**(SIZES | CASES["stores"][0] | options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(model, {name: value for name, value in weights.items() if value is not None})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (torch.tensor([[1, 999]]), None, "x hold 999, outside the vocabulary"),
        (torch.tensor([[1, -1]]), None, "x hold -1, outside the vocabulary"),
        (torch.tensor([[1, 2]]), torch.tensor([[-100, 999]]), "labels hold 999, outside the vocabulary"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(ids: Tensor, labels: Tensor | None, message: str) -> None:
    model = MemorizingTransformer(**(SIZES | {"memorizing_layers": ()}))
    with pytest.raises(ValueError, match=message):
        model(ids, labels=labels)


def test_loading_says_that_the_package_never_shifted_stores(published: dict[str, Tensor]) -> None:
    with pytest.warns(UserWarning, match="ignores shift_knn_memories_down"):
        loaded(published, "stores", shift_knn_memories_down=1.0)
