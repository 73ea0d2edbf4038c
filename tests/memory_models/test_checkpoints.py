"""Models and memories on disk: the same back, clear errors, and never half a file."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import memory_models
from memory_models import (
    CheckpointError,
    Memory,
    MemoryLM,
    checkpoints,
    create,
    create_lm,
    load_memory,
    load_model,
    memory_state,
    save_memory,
    save_model,
    static,
    unroll,
)
from memory_models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, replace_file
from tests.members import MEMBERS, small, small_lm
from tests.memory_models.toys import Mean

TOY = "tests.memory_models.toys:Mean"


@memory_state
class Counter(Memory):
    value: Tensor
    parts: tuple[Tensor, ...]
    width: int = static(default=1)


def counter(value: float = 1.0, rows: int = 2, width: int = 1) -> Counter:
    return Counter(value=torch.full((rows, 3), value), parts=(torch.arange(rows),), width=width)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    theirs = other.tensors()
    assert one.tensors().keys() == theirs.keys()
    for path, leaf in one.tensors().items():
        assert leaf.dtype == theirs[path].dtype
        assert torch.equal(leaf, theirs[path]), path


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


@pytest.mark.parametrize("name", MEMBERS)
def test_a_memory_comes_back_the_same(name: str, tmp_path: Path) -> None:
    model = small(name)
    with torch.no_grad():
        _, memory = unroll(model, torch.randn(3, 15, 16), close=False)
        save_memory(memory, tmp_path / "m.safetensors")
        # The number of rows comes from the file.
        loaded = load_memory(tmp_path / "m.safetensors", like=model.init_memory(1))
        assert_same(loaded, memory)
        x = torch.randn(3, 2, 16)
        torch.testing.assert_close(model(x, loaded)[0], model(x, memory)[0], atol=1e-6, rtol=0)


def test_rows_that_share_memory_and_need_gradients_can_be_saved(tmp_path: Path) -> None:
    value = torch.randn(1, 3, requires_grad=True).expand(4, 3)
    memory = Counter(value=value, parts=(torch.arange(8)[::2],))
    save_memory(memory, tmp_path / "m")
    loaded = load_memory(tmp_path / "m", counter())
    assert_same(loaded, memory.detach())
    assert not loaded.value.requires_grad


def test_nan_infinity_and_no_rows_come_back(tmp_path: Path) -> None:
    for memory in (counter(float("inf")), counter(rows=0)):
        save_memory(memory, tmp_path / "m")
        assert_same(load_memory(tmp_path / "m", counter()), memory)
    save_memory(counter(float("nan")), tmp_path / "m")
    assert load_memory(tmp_path / "m", counter()).value.isnan().all()


def test_a_missing_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint file: .*nothing\.safetensors"):
        load_memory(tmp_path / "nothing.safetensors", counter())


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **about: str) -> None:
    """The same file with other tensors or other metadata."""
    with checkpoints.safe_open(path, framework="pt") as file:
        kept = file.metadata() | about
    save_file(load_file(path) if tensors is None else tensors, path, metadata=kept)


def test_a_memory_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    good = {"value": torch.ones(2, 3), "parts.0": torch.arange(2)}

    def refused(message: str, like: Memory | None = None) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_memory(path, counter() if like is None else like)
        save_memory(counter(), path)

    save_memory(counter(), path)
    refused(
        r"holds a tests\..*Counter, not a memory_models\.transformer\.OpenSegment",
        small("window").init_memory(1),
    )
    refused(r"other options \(its fixed fields differ\)", counter(width=2))
    rewrite(path, format_version="2")
    refused("has format version 2, this library reads 1")
    rewrite(path, format="something else")
    refused("is not a memory written by save_memory")
    save_file(good, path)
    refused("is not a memory written by save_memory")
    rewrite(path, {"value": torch.ones(2, 3)})
    refused(r"missing \['parts\.0'\], unexpected nothing")
    rewrite(path, good | {"extra": torch.ones(2)})
    refused(r"missing nothing, unexpected \['extra'\]")
    rewrite(path, good | {"value": torch.ones(2, 4)})
    refused(r"value is \[2, 4\], expected \[2, 3\]")
    rewrite(path, good | {"value": torch.ones(5, 3)})
    refused(r"its tensors have \[2, 5\] rows")
    rewrite(path, good | {"value": torch.ones(2, 3).double()})
    refused(r"value is torch\.float64, expected torch\.float32")
    assert_same(load_memory(path, counter()), counter())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("htm", {"chunks": 5}, r"layers\.0\.contents is \[3, 3, 4, 16\], expected \[1, 5, 4, 16\]"),
        ("htm", {"memory_layers": (0,)}, r"unexpected \['hiddens\.1'"),
        ("window", {"depth": 3}, r"missing \['layers\.2\.keys'"),
        ("full", {"context": 8}, r"keys\.0 is"),
    ],
)
def test_the_memory_of_a_model_with_other_options_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_memory(small(name).init_memory(3), tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        load_memory(tmp_path / "m", small(name, **options).init_memory(1))


def fail_half_way(path: Path) -> None:
    path.write_bytes(b"half")
    raise RuntimeError("disk full")


def test_a_writer_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk full"):
        replace_file(target, fail_half_way)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(RuntimeError, match="disk full"):
        replace_file(tmp_path / "new", fail_half_way)
    assert os.listdir(tmp_path) == ["file"]
    replace_file(target, lambda path: path.write_bytes(b"new"))
    assert target.read_bytes() == b"new"


# The file is written and synced, then put in place, then its folder is synced.
@pytest.mark.parametrize(
    ("function", "calls", "wanted"), [("fsync", 1, 1.0), ("replace", 1, 1.0), ("fsync", 2, 2.0)]
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_memory_or_the_new(
    function: str, calls: int, wanted: float, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    save_memory(counter(1.0), path)
    child = os.fork()
    if child == 0:
        real, left = getattr(os, function), [calls]

        def die(*arguments: Any) -> Any:
            left[0] -= 1
            return os.kill(os.getpid(), signal.SIGKILL) if left[0] == 0 else real(*arguments)

        setattr(os, function, die)
        save_memory(counter(2.0), path)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert_same(load_memory(path, counter()), counter(wanted))
    save_memory(counter(3.0), path)
    assert_same(load_memory(path, counter()), counter(3.0))


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    program = textwrap.dedent(
        f"""
        import torch
        from memory_models import Ring, save_memory
        while True:
            for value in (1.0, 2.0):
                ring = Ring.empty(64, 1000, like=torch.zeros(1))
                save_memory(ring.append(torch.full((64, 1000), value)), {str(path)!r})
        """
    )
    from memory_models import Ring

    for wait in (0.0, 0.003, 0.011, 0.02):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
        while not path.exists():
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(wait)
        child.kill()
        child.wait()
        ring = load_memory(path, Ring.empty(1, 1000, like=torch.zeros(1)))
        assert ring.values.unique().tolist() in ([1.0], [2.0])


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


def test_a_memory_replaced_while_it_is_read_is_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "memory.safetensors", []
    save_memory(counter(1.0), path)
    real = torch.UntypedStorage.from_file

    def replace_and_open(*args: Any, **options: Any) -> Any:
        # safetensors has read the header by now, and opens the file once more for the tensors.
        opened.append(args)
        if len(opened) == 1:
            save_memory(counter(7.0, rows=5), path)
        return real(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(replace_and_open))
    loaded = load_memory(path, counter())
    assert len(opened) == 2
    assert loaded.batch_size == 5
    assert (loaded.value == 7).all()


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the file size stands for a full disk")
def test_a_full_disk_leaves_the_old_memory(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "memory.safetensors"
    save_memory(counter(1.0), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*memory\.safetensors"):
            save_memory(counter(2.0, rows=1000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_memory(path, counter()).batch_size == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
