"""Models in folders and on the Hugging Face Hub: `save_pretrained`, `from_pretrained`, `push_to_hub`.

A folder holds `config.json` and `model.safetensors`, as `save_model` writes them, and `memory.safetensors` if
a memory was given. The Hub needs the package huggingface_hub, folders do not.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, overload

import torch

from memory_models.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    load_memory,
    load_model,
    save_memory,
    save_model,
)
from memory_models.lm import MemoryLM
from memory_models.models import describe
from memory_models.module import MemoryModule
from memory_models.state import Memory
from memory_models.wrapped import unwrapped

Model: TypeAlias = MemoryModule[Any] | MemoryLM

MEMORY_FILE = "memory.safetensors"
# What lies outside the memory, of members whose `store` can be saved, such as `memorizing` with
# store="outside".
STORE_FILE = "store.safetensors"
TOKENIZER_FILE = "tokenizer.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def save_pretrained(model: Model, folder: str | os.PathLike[str], *, memory: Memory | None = None) -> None:
    """Write a model's options and weights, and a memory beside them.

    Args:
        model: made by `create` or `create_lm`, compiled or not.
        folder: made if it is not there. A memory that an earlier model left in it is removed first: whenever
            this is stopped, no memory stands beside weights that did not write it.
        memory: what the model returned, or None for no memory.

    Raises:
        ValueError: if the model was not made from the registry, so that it could not be built again.
    """
    model = unwrapped(model)
    describe(model)
    folder = Path(folder)
    for name in (MEMORY_FILE, STORE_FILE):
        (folder / name).unlink(missing_ok=True)
    save_model(model, folder)
    if memory is not None:
        store = _store_of(model)
        if store is not None:
            store.save(folder / STORE_FILE)
        save_memory(memory, folder / MEMORY_FILE)


@overload
def from_pretrained(
    source: str | os.PathLike[str],
    *,
    with_memory: Literal[False] = False,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_classes: bool = False,
) -> Model: ...


@overload
def from_pretrained(
    source: str | os.PathLike[str],
    *,
    with_memory: Literal[True],
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_classes: bool = False,
) -> tuple[Model, Memory]: ...


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    with_memory: bool = False,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_classes: bool = False,
) -> Model | tuple[Model, Memory]:
    """Load what `save_pretrained` or `push_to_hub` wrote.

    Args:
        source: a folder; if there is none of that name, a Hub id `owner/name`.
        with_memory: whether to load the memory too, and return it beside the model.
        device: where to put both; None: the CPU.
        revision: branch, tag or commit on the Hub.
        token: of the Hub; None: the one kept by `hf auth login`.
        cache_dir: where downloads are kept; None: the Hub's usual cache.
        local_files_only: whether to take only what was downloaded before.
        trust_classes: whether a model from the Hub may name any class (`package.module:Class`) of the
            installed packages, which is then imported and called, and not only a registered member.

    Returns:
        The model, in training mode like any new module, or `(model, memory)`.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a model, or a file is missing.
        CheckpointError: if a file is damaged, of another version, or does not fit the model.
        ImportError: if it must come from the Hub and huggingface_hub is not installed.
    """
    folder = local_folder(
        source,
        with_memory=with_memory,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        trust_classes=trust_classes,
    )
    model = load_model(folder, device=device)
    if not with_memory:
        return model
    if not (folder / MEMORY_FILE).exists():
        raise FileNotFoundError(
            f"{source} holds a model without a memory ({MEMORY_FILE}); save one with "
            "save_pretrained(folder, memory=memory), or load with with_memory=False"
        )
    memory = load_memory(folder / MEMORY_FILE, model.init_memory(1))
    store = _store_of(model)
    if store is not None:
        store.load(folder / STORE_FILE)
    return model, memory


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    memory: Memory | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Put a model on the Hub through huggingface_hub's `ModelHubMixin`, in one commit with a model card.

    Args:
        model: made by `create` or `create_lm`.
        repo_id: `owner/name`; made if it is not there.
        memory: goes beside the weights; whoever loads it sees what its streams held.
        private: whether a new repository is private; None: as its owner has set.
        token: of the Hub; None: the one kept by `hf auth login`.
        branch: where to commit; None: the main one.
        create_pr: whether to open a pull request in place of committing.
        commit_message: first line of the commit.

    Returns:
        The address of the commit.

    Raises:
        ImportError: if huggingface_hub is not installed.
        ValueError: if the model was not made from the registry.
    """
    hub = _import_hub()
    # Here, because the mixin makes the repository before it asks for the files.
    member = describe(unwrapped(model))["model"]

    class Upload(hub.ModelHubMixin, library_name="memory-models", tags=["memory-models", member]):  # type: ignore[name-defined, call-arg]
        def _save_pretrained(self, save_directory: Path) -> None:
            save_pretrained(model, save_directory, memory=memory)

    commit = Upload().push_to_hub(
        repo_id,
        private=private,
        token=token,
        branch=branch,
        create_pr=create_pr,
        commit_message=commit_message,
        # An upload adds; a memory of the weights before must not stay.
        delete_patterns=[MEMORY_FILE, STORE_FILE],
    )
    return str(commit)


def local_folder(
    source: str | os.PathLike[str],
    *,
    with_memory: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_classes: bool = False,
) -> Path:
    """The folder itself, or the one that a model on the Hub was downloaded to, its tokenizer included.

    Raises:
        FileNotFoundError, CheckpointError, ImportError: as `from_pretrained`.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = os.fspath(source)
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file; give the folder that save_pretrained wrote")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no folder {name}, and a model on the Hub is named owner/name")
    hub = _import_hub(name)
    patterns = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE]
    try:
        found = Path(
            hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*patterns, MEMORY_FILE, STORE_FILE] if with_memory else patterns,
            )
        )
    except (OSError, ValueError) as error:
        # Of these kinds are all of the Hub's: not found, not allowed, no connection.
        raise FileNotFoundError(f"no folder {name}, and the Hub did not give it: {error}") from error
    _check_trusted(name, found / CONFIG_FILE, trust_classes)
    return found


def _check_trusted(name: str, config: Path, trust_classes: bool) -> None:
    if trust_classes or not config.exists():
        return
    try:
        member = json.loads(config.read_text(encoding="utf-8"))["model"]
    except (ValueError, LookupError, TypeError):
        # `load_model` says what is wrong with it.
        return
    if ":" in str(member):
        raise CheckpointError(
            f"{name} names the class {member}, which would be imported and called; if you trust its author, "
            "pass trust_classes=True"
        )


def _store_of(model: Model) -> Any:
    return getattr(getattr(model, "module", model), "store", None)


def _import_hub(name: str | None = None) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        missing = "" if name is None else f"there is no folder {name}; "
        raise ImportError(
            f"{missing}the Hugging Face Hub needs the package huggingface_hub: "
            "pip install 'memory-models[train]'"
        ) from error
    return huggingface_hub
