"""The members by name: defaults that work, options that are checked, entries of third parties."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import memory_models
from memory_models import (
    MemoryLM,
    MemoryModule,
    ModelInfo,
    Registry,
    create,
    create_lm,
    info,
    list_models,
    models,
    register,
    unroll,
)
from memory_models.models import build, config_fields, describe
from tests.members import MEMBERS, OURS, small, small_lm
from tests.memory_models.toys import Mean

TOY = "tests.memory_models.toys:Mean"


class NoConfig(nn.Module):
    pass


@pytest.fixture
def _toy() -> Iterator[None]:
    register(ModelInfo("toy", TOY, tags=("toys",)))
    yield
    models.unregister("toy")


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_needs_no_more_than_a_width(name: str) -> None:
    model = create(name, dim=32)
    assert isinstance(model, MemoryModule)
    assert model.dim == 32
    x = torch.randn(2, model.segment_length + 3, 32)
    with torch.no_grad():
        y, memory = unroll(model, x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert memory.batch_size == 2


@pytest.mark.parametrize("name", MEMBERS)
def test_a_language_model_needs_a_vocabulary_too(name: str) -> None:
    model = create_lm(name, vocab_size=50, dim=32)
    assert isinstance(model, MemoryLM)
    assert model.head.weight is model.embedding.weight
    tokens, labels = torch.randint(50, (2, 8, 40))
    assert model(tokens).logits.shape == (8, 40, 50)
    # Without the tie logits are near N(0, 1), so that the loss is that of chance, ln 50, and half a nat.
    apart = create_lm(name, vocab_size=50, dim=32, tie_embeddings=False)
    assert apart(tokens, labels=labels).loss.item() == pytest.approx(4.41, abs=0.35)


@pytest.mark.parametrize("name", OURS)
def test_each_member_says_what_it_is(name: str) -> None:
    entry = info(name)
    assert entry.name == name
    assert entry.summary
    assert entry.carries
    assert set(entry.tags) <= {"family", "control"}
    assert entry.tags
    assert ":" in entry.target


def test_members_by_tag_and_pattern() -> None:
    assert set(list_models(tag="control")) == {"window", "full", "transformer-xl", "gru"}
    assert "htm" in list_models(tag="family")
    assert list_models("trans*") == ["transformer-xl"]
    assert list_models("trans*", tag="family") == []
    assert len(MEMBERS) == len(set(MEMBERS))


def test_an_unknown_member_is_answered_with_the_nearest_and_all_names() -> None:
    known = ", ".join(sorted(MEMBERS))
    for call in (create, info, lambda name: create_lm(name, vocab_size=2)):
        with pytest.raises(LookupError) as caught:
            call("windw")
        assert str(caught.value) == f"unknown model 'windw'. Did you mean 'window'? Known: {known}"


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        (
            "htm",
            "chunksize",
            "unknown option 'chunksize' for model 'htm'. Did you mean 'chunk_size'? Known: ",
        ),
        ("gru", "head", "unknown option 'head' for model 'gru'. Known: depth, dim, dropout, hidden, segment"),
        ("window", "memory", "unknown option 'memory' for model 'window'. Known: "),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(name: str, option: str, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        create(name, **{option: 1})
    assert str(caught.value).startswith(message)


def test_a_language_models_own_options_are_suggested_too() -> None:
    with pytest.raises(
        TypeError, match=r"'tie_embedding' for model 'window'\. Did you mean 'tie_embeddings'"
    ):
        create_lm("window", vocab_size=5, tie_embedding=False)
    with pytest.raises(TypeError, match="unknown option 'vocab_size' for model 'window'"):
        create("window", vocab_size=5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("window", {"dim": 30}, r"dim \(30\) must be divisible by heads \(4\)"),
        ("htm", {"chunk_size": 0}, r"chunk_size \(0\) must be at least 1"),
        ("htm", {"chunks": 0}, r"chunks \(0\) must be at least 1"),
        ("htm", {"topk": 0}, r"topk \(0\) must be at least 1"),
        ("htm", {"memory_heads": 0}, r"memory_heads \(0\)"),
        ("htm", {"memory_layers": ()}, r"memory_layers \(\(\)\) must name different layers of 0 to 3"),
        ("htm", {"memory_layers": (1, 1)}, "must name different layers"),
        ("htm", {"memory_layers": (4,)}, "must name different layers of 0 to 3"),
        ("htm", {"memory_layers": (3, -1)}, "must name different layers"),
        ("htm", {"init_scale": 0}, r"init_scale \(0\) must be positive, or None"),
        ("htm", {"init_scale": -1.0}, r"init_scale \(-1\.0\) must be positive"),
        (
            "memorizing",
            {"store_index": "zzz"},
            r"store_index \('zzz'\) must be one of 'exact', 'ivf',",
        ),
        ("memorizing", {"store_device": "gpu"}, r"store_device \('gpu'\) is no device"),
        ("memxl", {"gate": "grru"}, r"gate \('grru'\) must be one of 'gru', 'nbrc'"),
        ("full", {"context": -1}, r"context \(-1\) must not be negative"),
        ("transformer-xl", {"cache": -1}, r"cache \(-1\) must not be negative"),
        ("gru", {"hidden": 0}, r"hidden \(0\) must be at least 1"),
        ("gru", {"depth": 0}, r"depth \(0\) must be at least 1"),
        ("gru", {"dropout": -0.5}, r"dropout \(-0\.5\) must lie in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("window", {"token_shift": "no"}, r"token_shift \('no'\) must be true or false \(a bool\)"),
        ("window", {"token_shift": 1}, r"token_shift \(1\) must be true or false"),
        ("window", {"dim": 16.0}, r"dim \(16\.0\) must be an int"),
        ("window", {"depth": True}, r"depth \(True\) must be an int"),
        ("window", {"dropout": "0.1"}, r"dropout \('0\.1'\) must be a float"),
        ("window", {"dim_head": "8"}, r"dim_head \('8'\) must be an int or None"),
        ("gru", {"segment_length": 8.0}, r"segment_length \(8\.0\) must be an int"),
        ("htm", {"topk": "abc"}, r"topk \('abc'\) must be an int"),
        ("htm", {"memory_layers": 1}, r"memory_layers \(1\) must be a tuple\[int, \.\.\.\] or None"),
        ("htm", {"memory_layers": (0.0,)}, r"memory_layers \(\(0\.0,\)\) must be a tuple"),
        ("memorizing", {"store": None}, r"store \(None\) must be a string"),
        (TOY, {"dim": "8"}, r"dim \('8'\) must be an int"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    for make in (create, lambda name, **given: create_lm(name, vocab_size=4, **given)):
        with pytest.raises(TypeError, match=message):
            make(name, **options)


def test_a_language_models_own_options_have_types_too() -> None:
    with pytest.raises(TypeError, match=r"tie_embeddings \('no'\) must be true or false"):
        create_lm("window", vocab_size=4, tie_embeddings="no")
    with pytest.raises(TypeError, match=r"vocab_size \('4'\) must be an int"):
        create_lm("window", vocab_size="4")  # type: ignore[arg-type]


def test_an_int_will_do_as_a_float_and_a_list_as_a_tuple() -> None:
    made = create("htm", dim=16, heads=2, dropout=0, init_scale=1, memory_layers=[0, -1])
    wanted = create("htm", dim=16, heads=2, dropout=0.0, init_scale=1.0, memory_layers=(0, -1))
    assert made.state_dict().keys() == wanted.state_dict().keys()


def test_options_reach_the_config() -> None:
    assert create("htm", dim=16, heads=2, chunks=7).config.chunks == 7  # type: ignore[union-attr]
    assert config_fields("htm")["chunk_size"] == 32
    assert config_fields("gru").keys() == {"dim", "depth", "hidden", "segment_length", "dropout"}


@pytest.mark.parametrize("name", MEMBERS)
def test_configs_are_frozen_keyword_only_and_documented(name: str) -> None:
    config_class = models.load(name).config_class
    with pytest.raises(TypeError):
        config_class(32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_class().dim = 3


def test_anybodys_module_can_be_made_by_its_path() -> None:
    model = create(TOY, dim=3)
    assert type(model) is Mean
    assert create_lm(TOY, vocab_size=4, dim=3)(torch.zeros(1, 2, dtype=torch.int64)).logits.shape == (1, 2, 4)
    with pytest.raises(TypeError, match=r"unknown option 'dm'.*Did you mean 'dim'"):
        create(TOY, dm=3)
    with pytest.raises(ImportError, match="has no 'Meen'"):
        create("tests.memory_models.toys:Meen")
    with pytest.raises(TypeError, match="has no config_class, a dataclass of its options"):
        create("tests.memory_models.test_models:NoConfig")


@pytest.mark.usefixtures("_toy")
def test_a_module_can_be_registered() -> None:
    assert "toy" in list_models()
    assert list_models(tag="toys") == ["toy"]
    assert create("toy", dim=3).dim == 3
    with pytest.raises(
        ValueError, match=r"model 'toy' is registered already, as tests\.memory_models\.toys:Mean"
    ):
        register(ModelInfo("toy", "somewhere:Else"))
    with pytest.raises(LookupError, match="Did you mean 'toy'"):
        create("toi")


def test_a_name_of_ours_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match=r"model 'htm' is registered already, as htm\.model:HTM"):
        register(ModelInfo("htm", "somewhere:Else"))


def test_a_plug_in_is_a_member_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [importlib.metadata.EntryPoint("plugged", TOY, "memory_models.models")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points)
    ours: Registry[ModelInfo] = Registry("model", group="memory_models.models", make=ModelInfo)
    monkeypatch.setattr(memory_models.models, "load", ours.load)
    assert [entry.name for entry in ours] == ["plugged"]
    assert ours.get("plugged") == ModelInfo("plugged", TOY)
    assert type(create("plugged", dim=2)) is Mean


@pytest.mark.parametrize("name", MEMBERS)
def test_a_model_can_be_described_and_built_again(name: str) -> None:
    for model in (small(name), small_lm(name, tie_embeddings=False)):
        again = build(describe(model))
        assert type(again) is type(model)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in again.state_dict().items()} == shapes
        assert describe(again) == describe(model) == describe(copy.deepcopy(model))


def test_what_was_not_made_from_the_registry_cannot_be_described() -> None:
    for model in (Mean(), MemoryLM(Mean(), vocab_size=2), MemoryLM(small("window"), vocab_size=2)):
        with pytest.raises(ValueError, match=r"was not made by create or create_lm.*save its state_dict"):
            describe(model)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_pickled_member_is_the_same(name: str) -> None:
    model = small_lm(name)
    other = pickle.loads(pickle.dumps(model))
    tokens = torch.arange(2 * 9).view(2, 9) % 5
    with torch.no_grad():
        assert torch.equal(unroll(other, tokens)[0], unroll(model, tokens)[0])
    assert describe(other) == describe(model)
