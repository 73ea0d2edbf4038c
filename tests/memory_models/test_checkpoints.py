"""Models on disk: the same back, clear errors for what is damaged or does not fit, no mixture of two."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import memory_models
from memory_models import (
    CheckpointError,
    MemoryLM,
    checkpoints,
    create,
    create_lm,
    load_memory,
    load_model,
    save_memory,
    save_model,
    unroll,
)
from memory_models.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from tests.members import MEMBERS, small, small_lm
from tests.memory_models.saved import assert_same, counter
from tests.memory_models.toys import Mean

TOY = "tests.memory_models.toys:Mean"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change the options wherever they are written, as somebody might who writes such files."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_module_comes_back_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(name).to(dtype)
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder").eval()
    assert type(loaded) is type(model)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    x = torch.randn(2, 9, 16).to(dtype)
    with torch.no_grad():
        (y, memory), (again, later) = unroll(model, x), unroll(loaded, x)
    assert torch.equal(y, again)
    assert_same(later, memory)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_language_model_comes_back_the_same(name: str, tied: bool, tmp_path: Path) -> None:
    model = small_lm(name, tie_embeddings=tied, embedding_scale=2.5).float()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert isinstance(loaded, MemoryLM)
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert loaded.embedding_scale == 2.5
    ids = torch.randint(11, (2, 9))
    assert torch.equal(unroll(model, ids)[0], unroll(loaded, ids)[0])
    # Tied weights take the room of one.
    assert ("head.weight" in load_file(tmp_path / WEIGHTS_FILE)) != tied


def test_options_that_json_has_no_type_for_come_back(tmp_path: Path) -> None:
    model = small("htm", memory_layers=(1,), init_scale=None)
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config


def test_a_third_partys_module_comes_back_by_its_path(tmp_path: Path) -> None:
    save_model(create(TOY, dim=3), tmp_path)
    assert type(load_model(tmp_path)) is Mean


def test_the_folder_is_readable_by_eye_and_by_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save_model(small("gru"), tmp_path)
    finally:
        os.umask(old)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["model"] == "gru"
    assert config["options"]["hidden"] == 12
    assert config["format_version"] == 1


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    save_model(small("gru"), tmp_path)
    second = small("htm")
    save_model(second, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(second)
    for name, tensor in second.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_what_cannot_be_built_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not made by create or create_lm"):
        save_model(Mean(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another head": (
        lambda lm: setattr(lm, "head", torch.nn.Linear(16, 3)),
        r"missing nothing, unexpected \['head\.bias', 'head\.weight'\]",
    ),
    "a head untied": (
        lambda lm: setattr(lm, "head", torch.nn.Linear(16, lm.vocab_size, bias=False)),
        r"unexpected \['head\.weight'\]",
    ),
    "another part": (lambda lm: lm.add_module("value", torch.nn.Linear(2, 1)), r"unexpected \['value\.bias"),
    "a longer embedding": (
        lambda lm: setattr(lm.embedding, "weight", torch.nn.Parameter(torch.zeros(99, 16))),
        "unexpected",
    ),
    "weight norm": (
        lambda lm: torch.nn.utils.parametrizations.weight_norm(lm.module.trunk.feedforwards[0].to_out),
        r"missing \['module\.trunk\.feedforwards\.0\.to_out\.weight'\], unexpected .*original0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_could_not_be_loaded_again_is_not_saved(change: str, tmp_path: Path) -> None:
    model = small_lm("window")
    change_it, message = CHANGES[change]
    change_it(model)
    with pytest.raises(ValueError, match=f"was changed since it was made.*{message}"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_draws_no_random_numbers(tmp_path: Path) -> None:
    model, state = small_lm("memxl"), torch.get_rng_state()
    save_model(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE, "both"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    save_model(small("gru"), tmp_path)
    for name in (CONFIG_FILE, WEIGHTS_FILE) if missing == "both" else (missing,):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE if missing == "both" else missing):
        load_model(tmp_path)


BAD_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is not readable JSON"),
    "cut short": ('{"format": "memory-mod', "is not readable JSON"),
    "not text": (b"\xff\xfe\x00", "is not readable JSON"),
    "a list": ("[]", "was not written by memory-models"),
    "somebody else's": ('{"architectures": ["Bert"]}', "was not written by memory-models"),
    "of a later version": (
        '{"format": "memory-models", "format_version": 2}',
        "has format version 2, this library reads 1; load it with the library version it names",
    ),
    "of no version": ('{"format": "memory-models"}', "has format version None"),
    "without a model": ('{"format": "memory-models", "format_version": 1}', "does not describe a model"),
    "with odd options": (
        '{"format": "memory-models", "format_version": 1, "model": "gru", "options": 3}',
        "does not describe a model",
    ),
    "with an unknown option": (
        '{"format": "memory-models", "format_version": 1, "model": "gru", "options": {"hiden": 3}}',
        "does not describe a model: unknown option 'hiden' for model 'gru'. Did you mean 'hidden'",
    ),
    "with an unknown model": (
        '{"format": "memory-models", "format_version": 1, "model": "gro", "options": {}}',
        "does not describe a model: unknown model 'gro'. Did you mean 'gru'",
    ),
    "with a value out of range": (
        '{"format": "memory-models", "format_version": 1, "model": "gru", "options": {"dim": -1}}',
        r"does not describe a model: dim \(-1\) must be at least 1",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD_CONFIGS[case]
    save_model(small("gru"), tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def claim_a_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "a header too long": claim_a_huge_header,
    "a pickle": lambda path: torch.save({"weight": torch.ones(2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    save_model(small("gru"), tmp_path)
    DAMAGE[damage](tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is damaged or no safetensors file"):
        load_model(tmp_path)
    path = tmp_path / "memory.safetensors"
    save_memory(counter(), path)
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match=r"memory\.safetensors is damaged or no safetensors file"):
        load_memory(path, counter())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_of_the_weights_is_refused(share: float, tmp_path: Path) -> None:
    save_model(small_lm("window"), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin + int(share * (len(content) - 1 - begin))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its checksum does not fit its content"):
        load_model(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_no_fault_of_the_file(device: str, tmp_path: Path) -> None:
    save_model(small("gru"), tmp_path)
    with pytest.raises(ValueError, match=f"device '{device}'") as caught:
        load_model(tmp_path, device=device)
    assert not isinstance(caught.value, CheckpointError)


def test_weights_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    save_model(create("gru", dim=8, depth=1, hidden=4), tmp_path)
    edit_config(tmp_path, options={"dim": 8, "depth": 1, "hidden": 5})
    with pytest.raises(CheckpointError, match=r"does not fit: .* is \[12, 8\], expected \[15, 8\]"):
        load_model(tmp_path)
    edit_config(tmp_path, options={"dim": 8, "depth": 2, "hidden": 4})
    with pytest.raises(
        CheckpointError, match=r"does not fit: missing \['layers\.1\.bias.*unexpected nothing"
    ):
        load_model(tmp_path)
    edit_config(tmp_path, model="window", options={"dim": 8})
    with pytest.raises(CheckpointError, match=r"missing \['trunk\..*unexpected \['layers\.0\.bias"):
        load_model(tmp_path)


def test_options_and_weights_of_two_saves_do_not_marry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both models have weights of the same shapes, so that nothing else would notice.
    save_model(small("htm", topk=1), tmp_path)
    real, calls = os.replace, []

    def stopped(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_model(small("htm", topk=2), tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="describe different models: a save was stopped between the two"
    ):
        load_model(tmp_path)
    save_model(small("htm", topk=2), tmp_path)
    assert load_model(tmp_path).config.topk == 2


def test_a_stop_between_the_files_of_one_models_saves_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_lm("gru", vocab_size=5, dim=4)
    save_model(model, tmp_path)
    with torch.no_grad():
        model.embedding.weight.fill_(7)
    monkeypatch.setattr(checkpoints, "library_version", lambda: "a later one")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path)
    monkeypatch.undo()
    assert (load_model(tmp_path).embedding.weight == 7).all()  # type: ignore[union-attr]


def test_a_model_of_two_dtypes_keeps_both(tmp_path: Path) -> None:
    model = memory_models.create_lm("window", vocab_size=7, dim=8, depth=1, heads=2).to(torch.bfloat16)
    model.module.trunk.norm.float()  # type: ignore[union-attr, operator]
    memory_models.save_model(model, tmp_path)
    loaded = memory_models.load_model(tmp_path)
    assert isinstance(loaded, memory_models.MemoryLM)
    assert loaded.head.weight is loaded.embedding.weight
    for (name, theirs), ours in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
