"""Models in folders and on the Hub: the same back, with and without a memory; the Hub itself is a folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import memory_models
from memory_models import CheckpointError, MemoryLM, create_lm, from_pretrained, push_to_hub, save_pretrained
from memory_models.hub import MEMORY_FILE, STORE_FILE, TOKENIZER_FILE
from memory_models.models import models
from tests.members import MEMBERS, small, small_lm

TOY = "tests.memory_models.toys:Mean"
REPOSITORY = "someone/small-model"


def lm(**options: Any) -> MemoryLM:
    return create_lm(TOY, vocab_size=7, **options)


def tokens(rows: int = 2, time: int = 5) -> torch.Tensor:
    return torch.arange(rows * time).view(rows, time) % 7


@pytest.mark.parametrize("name", MEMBERS)
def test_a_model_and_its_memory_come_back_from_a_folder(name: str, tmp_path: Path) -> None:
    model = small_lm(name)
    before = model(tokens(), None).memory
    model.save_pretrained(tmp_path / "kept", memory=before)
    loaded, memory = from_pretrained(tmp_path / "kept", with_memory=True)
    assert isinstance(loaded, MemoryLM)
    loaded.eval()
    next_tokens = tokens().flip(1)
    for one, other in zip(model(next_tokens, before)[:1], loaded(next_tokens, memory)[:1], strict=True):
        assert torch.equal(one, other)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "config.json", "model.safetensors", MEMORY_FILE,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gru", "memxl"])
def test_a_member_without_a_language_model_comes_back(name: str, tmp_path: Path) -> None:
    module = small(name)
    x = torch.randn(2, 6, module.dim)
    _, before = module(x, None)
    save_pretrained(module, tmp_path, memory=before)
    loaded, memory = from_pretrained(tmp_path, with_memory=True)
    assert torch.equal(module(x, before)[0], loaded.eval()(x, memory)[0])


def test_an_outside_store_is_saved_beside_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    model = small_lm("memorizing", store="outside").float()
    memory = model.commit(model(tokens(), None).memory)
    memory = model.commit(model(tokens(), memory).memory)
    model.save_pretrained(tmp_path, memory=memory)
    assert (tmp_path / STORE_FILE).exists()
    loaded, again = from_pretrained(tmp_path, with_memory=True)
    assert torch.equal(model(tokens(), memory).logits, loaded.eval()(tokens(), again).logits)


def test_the_class_method_refuses_a_model_of_another_class(tmp_path: Path) -> None:
    save_pretrained(small("gru"), tmp_path)
    with pytest.raises(CheckpointError, match="holds a GRU, not a MemoryLM"):
        MemoryLM.from_pretrained(tmp_path)
    lm().save_pretrained(tmp_path)
    assert type(MemoryLM.from_pretrained(str(tmp_path))) is MemoryLM


def test_a_memory_of_earlier_weights_does_not_stay(tmp_path: Path) -> None:
    model = lm()
    model.save_pretrained(tmp_path, memory=model.init_memory(2))
    model.save_pretrained(tmp_path)
    from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="without a memory"):
        from_pretrained(tmp_path, with_memory=True)


def test_a_model_that_cannot_be_built_again_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    model = lm()
    model.save_pretrained(tmp_path, memory=model.init_memory(2))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="not made by create"):
        MemoryLM(small("gru"), vocab_size=3).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_what_is_no_folder_and_no_hub_id_is_said_to_be_so(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", "nothing", "./a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*owner/name"):
            from_pretrained(source)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        from_pretrained(tmp_path / "file")


class FakeHub:
    """Repositories are folders; what the two calls were given is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.downloads: list[dict[str, Any]] = []

    def create_repo(self, **options: Any) -> Any:
        self.made.append(options)
        return SimpleNamespace(repo_id=options["repo_id"])

    def upload_folder(self, *, folder_path: Path, repo_id: str, **options: Any) -> str:
        self.uploads.append(options)
        target = self.root / repo_id
        for pattern in options["delete_patterns"] or ():
            for path in target.glob(pattern):
                path.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.downloads.append({"allow_patterns": allow_patterns, **options})
        if not (self.root / repo_id).exists():
            raise OSError(f"401 Client Error: Repository Not Found {repo_id}")
        snapshot = self.root / "cache" / str(len(self.downloads))
        snapshot.mkdir(parents=True)
        for name in allow_patterns:
            if (self.root / repo_id / name).exists():
                shutil.copy(self.root / repo_id / name, snapshot / name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    pytest.importorskip("huggingface_hub")
    import huggingface_hub
    import huggingface_hub.hub_mixin

    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", lambda token=None: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_model_goes_to_the_hub_and_comes_back(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_lm("gru")
    assert model.push_to_hub(REPOSITORY, private=True, branch="dev") == (
        f"https://huggingface.co/{REPOSITORY}/commit/1"
    )
    assert hub.made == [{"repo_id": REPOSITORY, "private": True, "exist_ok": True}]
    assert hub.uploads[0]["revision"] == "dev"
    assert {path.name for path in (hub.root / REPOSITORY).iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    card = (hub.root / REPOSITORY / "README.md").read_text()
    assert "library_name: memory-models" in card
    assert "- gru" in card
    loaded = MemoryLM.from_pretrained(
        REPOSITORY, revision="dev", token="secret", local_files_only=True
    ).eval()
    assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
    assert hub.downloads[0]["revision"] == "dev"
    assert hub.downloads[0]["token"] == "secret"
    assert hub.downloads[0]["local_files_only"] is True
    assert MEMORY_FILE not in hub.downloads[0]["allow_patterns"]
    assert TOKENIZER_FILE in hub.downloads[0]["allow_patterns"]


def test_a_memory_goes_to_the_hub_only_if_asked_and_leaves_with_its_weights(hub: FakeHub) -> None:
    model = small_lm("memxl")
    memory = model(tokens()).memory
    push_to_hub(model, REPOSITORY, memory=memory)
    loaded, again = from_pretrained(REPOSITORY, with_memory=True)
    assert torch.equal(model(tokens(), memory).logits, loaded.eval()(tokens(), again).logits)
    push_to_hub(model, REPOSITORY)
    with pytest.raises(FileNotFoundError, match="without a memory"):
        from_pretrained(REPOSITORY, with_memory=True)


def test_a_folder_comes_before_a_repository_of_the_same_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_lm("gru").push_to_hub(REPOSITORY)
    monkeypatch.chdir(tmp_path)
    lm().save_pretrained(REPOSITORY)
    assert type(MemoryLM.from_pretrained(REPOSITORY).module).__name__ == "Mean"
    assert not hub.downloads


def test_a_repository_that_is_not_there(hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder a/b, and the Hub did not give it: 401"):
        from_pretrained("a/b")


def test_a_downloaded_model_imports_no_class_of_its_choice(hub: FakeHub) -> None:
    lm().push_to_hub(REPOSITORY)
    assert json.loads((hub.root / REPOSITORY / "config.json").read_text())["model"] == TOY
    with pytest.raises(CheckpointError, match="trust_classes"):
        from_pretrained(REPOSITORY)
    assert isinstance(from_pretrained(REPOSITORY, trust_classes=True), MemoryLM)


def test_a_model_not_made_from_the_registry_makes_no_repository(hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="not made by create"):
        MemoryLM(small("gru"), vocab_size=3).push_to_hub(REPOSITORY)
    assert not hub.made


def test_without_huggingface_hub_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    lm().save_pretrained(tmp_path)
    assert isinstance(from_pretrained(tmp_path), MemoryLM)
    with pytest.raises(ImportError, match=r"memory-models\[train\]"):
        lm().push_to_hub(REPOSITORY)
    with pytest.raises(ImportError, match=r"no folder someone/small-model.*memory-models\[train\]"):
        from_pretrained(REPOSITORY)


def test_registered_names_have_no_colon() -> None:
    # What `trust_classes` tells apart.
    assert not [name for name in models.names() if ":" in name]
    assert "from_pretrained" in memory_models.__all__


@pytest.mark.parametrize("name", ["htm", "gru"])
def test_a_bare_member_has_the_methods_too(tmp_path: Path, name: str) -> None:
    model = small(name)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
