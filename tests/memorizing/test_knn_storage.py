"""Files, copies and pickles: complete or not there at all, and never shared."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from memorizing import FaissOptions, KNNMemory, MemoryFileError


def filled(index="exact", **options):
    torch.manual_seed(0)
    memory = KNNMemory(8, 300, 3, index=index, faiss_options=FaissOptions(train_from=100), **options)
    memory.add(torch.randn(3, 200, 2, 8))
    with memory.at_batch_indices([0, 2]):
        memory.add(torch.randn(2, 250, 2, 8))
    memory.clear(2)
    return memory


def assert_same(one, other):
    assert repr(one) == repr(other)
    assert one.counts.tolist() == other.counts.tolist()
    for row in range(one.num_indices):
        for mine, theirs in zip(one.contents(row), other.contents(row), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)


OPTIONS = [
    {},
    {"index": "ivf", "metric": "cosine"},
    {"index": "auto"},
    {"index": "SQ8", "metric": "l2"},
    {"dtype": torch.bfloat16, "track_hits": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_a_copy_goes_on_exactly_as_the_original(tmp_path, options, way):
    memory = filled(**options)
    queries = torch.randn(3, 20, 8)
    memory.search(queries, 4)
    if way == "file":
        memory.save(tmp_path / "memory")
        other = KNNMemory.load(tmp_path / "memory")
        assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    else:
        other = pickle.loads(pickle.dumps(memory)) if way == "pickle" else copy.deepcopy(memory)
    assert_same(memory, other)
    assert other.faiss_options == memory.faiss_options
    for _ in range(3):
        assert torch.equal(memory.lookup(queries, 8).ids, other.lookup(queries, 8).ids)
        more = torch.randn(3, 130, 2, 8)
        memory.add(more)
        other.add(more)
        assert_same(memory, other)
    before = memory.contents(0)
    other.clear()
    assert torch.equal(memory.contents(0).keys, before.keys)


def test_memories_share_nothing_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = filled()
    two = KNNMemory(8, 300, 3)
    before = one.contents(0).keys
    two.add(torch.randn(3, 300, 2, 8))
    assert torch.equal(one.contents(0).keys, before)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_memory_does_not_hang_on_its_file(tmp_path):
    path = tmp_path / "memory"
    memory = filled()
    memory.save(path)
    other = KNNMemory.load(path)
    path.write_bytes(b"something else")
    assert_same(memory, other)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "memory"
    memory = filled()
    memory.save(path)
    old = path.read_bytes()
    memory.add(torch.randn(3, 5, 2, 8))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        memory.save(path)
    assert path.read_bytes() == old
    assert [item.name for item in tmp_path.iterdir()] == ["memory"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "memory"
    code = f"""
import torch
from memorizing import KNNMemory
memory = KNNMemory(64, 4000, 2)
memory.add(torch.randn(2, 4000, 2, 64))
memory.save({str(path)!r})
print("saved", flush=True)
while True:
    memory.add(torch.randn(2, 100, 2, 64))
    memory.save({str(path)!r})
"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline().strip() == "saved"
    for _ in range(5):
        time.sleep(0.013)
        assert len(KNNMemory.load(path)) == 8000  # also while it is being replaced
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert len(KNNMemory.load(path)) == 8000


@pytest.mark.parametrize("newer", [10, 60])  # fewer pairs and more than before
def test_a_file_replaced_while_it_is_read_gives_the_new_memory(tmp_path, monkeypatch, newer):
    def memory(pairs):
        made = KNNMemory(8, 100, 2)
        made.add(torch.full((2, pairs, 2, 8), float(pairs)))
        return made

    path = tmp_path / "memory"
    memory(30).save(path)
    real, opened = torch.UntypedStorage.from_file, []

    def replace_and_open(*args, **kwargs):
        # safetensors has read the header by now, and opens the file once more for the tensors.
        opened.append(args)
        if len(opened) == 1:
            memory(newer).save(path)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(replace_and_open))
    loaded = KNNMemory.load(path)
    assert len(opened) == 2
    assert len(loaded) == 2 * newer
    pairs, found = loaded.search(torch.ones(2, 1, 8), 5)
    assert found.all()
    assert (pairs == newer).all()


@pytest.mark.parametrize("place", [0.0005, 0.1, 0.5, 0.999])
def test_a_damaged_file_is_refused(tmp_path, place):
    path = tmp_path / "memory"
    filled().save(path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(MemoryFileError):
        KNNMemory.load(path)


def test_a_file_of_the_first_version_is_read_and_its_checksum_compared(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "memory"
    filled().save(path)
    with safe_open(path, framework="pt") as file:
        about = {key: file.metadata()[key] for key in ("format", "description")} | {"version": "1"}
    tensors = load_file(path)
    value = zlib.crc32(about["description"].encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), value))
    save_file(tensors, path, metadata=about | {"checksum": f"{value:08x}"})
    assert len(KNNMemory.load(path)) == len(filled())
    save_file(tensors, path, metadata=about | {"checksum": f"{value ^ 1:08x}"})
    with pytest.raises(MemoryFileError, match="its checksum does not fit its content"):
        KNNMemory.load(path)


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "memory"
    filled().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MemoryFileError, match="damaged"):
        KNNMemory.load(path)
    path.write_bytes(b"")
    with pytest.raises(MemoryFileError):
        KNNMemory.load(path)
    path.write_text("hello")
    with pytest.raises(MemoryFileError):
        KNNMemory.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(MemoryFileError, match="no KNNMemory"):
        KNNMemory.load(path)
    with pytest.raises(FileNotFoundError, match="no memory at"):
        KNNMemory.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        filled().save(tmp_path / "no folder" / "memory")


def test_the_new_file_has_the_rights_of_any_new_file(tmp_path):
    filled().save(tmp_path / "memory")
    (tmp_path / "other").touch()
    assert Path(tmp_path / "memory").stat().st_mode == (tmp_path / "other").stat().st_mode
