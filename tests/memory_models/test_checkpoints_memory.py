"""Memories on disk: the same back, clear errors, and never half a file, whatever stops the writing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory_models import CheckpointError, Memory, checkpoints, load_memory, save_memory, unroll
from memory_models.files import replace_file
from tests.members import MEMBERS, small
from tests.memory_models.saved import Counter, assert_same, counter


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


@pytest.mark.parametrize("name", MEMBERS)
def test_a_memory_takes_the_dtypes_of_the_model_that_will_use_it(name: str, tmp_path: Path) -> None:
    model = small(name)
    _, memory = unroll(model, torch.randn(3, 15, 16), close=False)
    save_memory(memory, tmp_path / "m.safetensors")
    model.to(torch.bfloat16)
    x = torch.randn(3, 2, 16, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(TypeError, match=r"use memory\.to\(module\.init_memory\(1\)\)"):
        model(x, memory)
    # In the middle of a stream, and through a file.
    moved = memory.detach().to(model.init_memory(1))
    loaded = load_memory(tmp_path / "m.safetensors", like=model.init_memory(1))
    assert_same(loaded, moved)
    fresh = model.init_memory(1).tensors()
    assert {path: leaf.dtype for path, leaf in moved.tensors().items()} == {
        path: leaf.dtype for path, leaf in fresh.items()
    }
    assert model(x, moved)[0].isfinite().all()


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


def test_a_model_in_place_of_its_memory_is_answered_with_the_way_out(tmp_path: Path) -> None:
    model = small("window")
    save_memory(model.init_memory(2), tmp_path / "m")
    with pytest.raises(TypeError, match=r"such as model\.init_memory\(1\), got a Window"):
        load_memory(tmp_path / "m", model)  # type: ignore[type-var]


def test_a_link_goes_on_leading_to_what_was_saved(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "m", tmp_path / "disk" / "target"
    link.symlink_to(target)
    for value in (1.0, 2.0):
        save_memory(counter(value), link)
        assert link.is_symlink()
        assert_same(load_memory(target, counter()), counter(value))
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["target"]


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **about: str) -> None:
    """The same file with other tensors or other metadata."""
    with checkpoints.safe_open(path, framework="pt") as file:
        kept = file.metadata() | about
    # As somebody might who writes such files; with the old checksum it would be a damaged one.
    del kept["crc32"]
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
    rewrite(path, good | {"value": torch.ones(2, 3).long()})
    refused(r"value is torch\.int64, expected torch\.float32")
    assert_same(load_memory(path, counter()), counter())


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_memory(counter(), path)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in range(begin, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged: its checksum does not fit its content"):
            load_memory(path, counter())


def test_a_memory_without_a_checksum_can_be_read(tmp_path: Path) -> None:
    save_memory(counter(), tmp_path / "m")
    rewrite(tmp_path / "m")
    assert_same(load_memory(tmp_path / "m", counter()), counter())


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


def test_a_system_that_cannot_sync_folders_can_keep_memories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refuse_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save_memory(counter(1.0), tmp_path / "m")
    assert_same(load_memory(tmp_path / "m", counter()), counter(1.0))


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
