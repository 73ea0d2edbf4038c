"""Models and memories on disk: safetensors beside readable JSON, written atomically.

A model is a folder with `config.json` and `model.safetensors`; a memory is one safetensors file. Nothing
is pickled. A `config.json` names the class to build, which is imported: like any import, only from
installed packages.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memory_models.files import read_file, replace_file
from memory_models.lm import MemoryLM
from memory_models.models import build, describe
from memory_models.module import MemoryModule
from memory_models.state import Memory, is_static
from memory_models.wrapped import unwrapped

FORMAT = "memory-models"
FORMAT_VERSION = 1
_CHECKSUM = "crc32"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

M = TypeVar("M", bound=Memory)


class CheckpointError(ValueError):
    """A file that is damaged, foreign, of another version, or does not fit."""


def save_model(model: MemoryModule[Any] | MemoryLM, folder: str | os.PathLike[str]) -> None:
    """Write a registered model's options and weights.

    Args:
        model: made by `create` or `create_lm`; what `torch.compile` or `DistributedDataParallel` put around
            it is left out.
        folder: made if it is not there; files in it are replaced one by one, each atomically.

    Raises:
        ValueError: if the model was not made from the registry, so that it could not be built again, or was
            changed since, so that its weights would not fit.
        OSError: if the disk refuses.
    """
    folder, model = Path(folder), unwrapped(model)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        **describe(model),
    }
    tensors = _unshared(model)
    _check_unchanged(model, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # The weights carry the options too: a stop between the two files must not marry the new weights to
    # the options of another model.
    about = {"format": FORMAT, "config": text}
    write_tensors(folder / WEIGHTS_FILE, tensors, about)
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_model(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> MemoryModule[Any] | MemoryLM:
    """Build the model that `save_model` wrote, each tensor in the dtype it was saved in.

    Raises:
        FileNotFoundError: if the folder or one of its two files is missing.
        CheckpointError: if a file is damaged, of another version, or does not fit the model.
        ValueError: if nothing can be put on `device`.
    """
    _check_device(device)
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    try:
        model = build(config)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a model: {error}") from error
    tensors, about = read_tensors(folder / WEIGHTS_FILE, device)
    _check_same_save(folder, config, about)
    expected = dict(_unshared(model))
    _check_tensors(folder / WEIGHTS_FILE, expected, tensors)
    model.to(device=device)
    # Each in the dtype it was saved in (norms may be wider than matrices); replacing the data, not the
    # parameter, keeps tied weights tied.
    for name, target in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors:
            # A copy: what was read lies where the file had it, and unaligned products are slower and round
            # differently.
            target.data = tensors[name].clone()
    return model


def save_memory(memory: Memory, path: str | os.PathLike[str]) -> None:
    """Write a memory to one file, atomically: a kill at any moment leaves the old file or the new one."""
    tensors = {name: leaf.detach().contiguous().clone() for name, leaf in memory.tensors().items()}
    about = {
        "format": f"{FORMAT} memory",
        "format_version": str(FORMAT_VERSION),
        "library_version": library_version(),
        "class": _class_name(memory),
        "static": _static_fields(memory),
    }
    write_tensors(Path(path), tensors, about)


def load_memory(path: str | os.PathLike[str], like: M) -> M:
    """Read a memory that `save_memory` wrote.

    Args:
        path: the file.
        like: a memory of the model that will use it, such as `model.init_memory(1)`: it gives the
            structure, the floating dtypes and the device; the number of rows comes from the file.

    Raises:
        TypeError: if `like` is no memory.
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, no memory, of another version, or does not fit `like`.
    """
    if not isinstance(like, Memory):
        raise TypeError(
            f"load_memory takes a memory to go by, such as model.init_memory(1), got a {type(like).__name__}"
        )
    path = Path(path)
    leaves = like.tensors()
    device = next(iter(leaves.values())).device
    tensors, about = read_tensors(path, device)
    if about.get("format") != f"{FORMAT} memory":
        raise CheckpointError(f"{path} is not a memory written by save_memory")
    _check_version(path, about.get("format_version"))
    if about.get("class") != _class_name(like):
        raise CheckpointError(f"{path} holds a {about.get('class')}, not a {_class_name(like)}")
    if about.get("static") != _static_fields(like):
        raise CheckpointError(f"{path} comes from a model with other options (its fixed fields differ)")
    _check_tensors(path, leaves, tensors, rows_may_differ=True)
    _, structure = pytree.tree_flatten(like)
    # Copies, as of a model's weights.
    copies = [tensors[name].to(leaf.dtype, copy=True) for name, leaf in leaves.items()]
    return pytree.tree_unflatten(copies, structure)


def library_version() -> str:
    """The installed version, or "unknown" in a source tree that was never installed."""
    try:
        return metadata.version("memory-models")
    except metadata.PackageNotFoundError:
        return "unknown"


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file with a checksum, by `replace_file`.

    Raises:
        OSError: if the disk refuses; the old file stays as it was.
    """
    about = {**about, _CHECKSUM: _of_content(about, tensors)}

    def write(part: Path) -> None:
        try:
            save_file(tensors, part, metadata=about)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error

    replace_file(path, write)


def read_tensors(
    path: Path, device: torch.device | str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the notes of a safetensors file that may be replaced at any moment.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged or of another kind. In a file without a checksum, as others write
            them and this library did, changed numbers go unnoticed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint file: {path}")

    def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
        found = about.pop(_CHECKSUM, None)
        if found is not None and found != _of_content(about, tensors):
            raise CheckpointError(f"{path} is damaged: its checksum does not fit its content")
        return tensors, about

    try:
        tensors, about = read_file(path, read)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}, about


def checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """Eight hex digits that change with the text and with any name or number of the tensors."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        # As bytes, for numpy has no bfloat16.
        value = zlib.crc32(tensors[name].cpu().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _of_content(about: dict[str, str], tensors: dict[str, Tensor]) -> str:
    # Bytes alone would not tell one dtype from another of its width.
    forms = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return checksum(json.dumps([about, forms], sort_keys=True), tensors)


def _check_device(device: torch.device | str | None) -> None:
    try:
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"nothing can be put on device {str(device)!r} here: {error}") from error
    if not usable:
        raise ValueError("device 'meta' holds no values, so that nothing can be loaded to it")


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    # Tied weights have two names; safetensors keeps the first.
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # On meta nothing lies anywhere; there the object itself tells.
        key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.detach().contiguous()
    return kept


def _check_unchanged(model: MemoryModule[Any] | MemoryLM, tensors: dict[str, Tensor]) -> None:
    """Refuse a model whose tensors are not those of the model that its description builds."""
    # Fresh weights are drawn, which must not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                built = build(describe(model))
        except Exception:
            # A module of somebody else's may need values to be built.
            built = build(describe(model))
    misfit = _misfit(_unshared(built), tensors)
    if misfit:
        raise ValueError(
            f"this {type(model).__name__} was changed since it was made, so that it could not be loaded "
            f"again: {misfit}; undo the change, or save its state_dict yourself"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by {FORMAT}")
    _check_version(path, config.get("format_version"))
    return config


def _check_same_save(folder: Path, config: dict[str, Any], about: dict[str, str]) -> None:
    def described(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != "library_version"}

    if (
        about.get("format") == FORMAT
        and "config" in about
        and described(json.loads(about["config"])) != described(config)
    ):
        raise CheckpointError(
            f"{CONFIG_FILE} and {WEIGHTS_FILE} in {folder} describe different models: a save was stopped "
            "between the two, or one was edited; save again, or build the model with create and load the "
            "weights into it"
        )


def _check_version(path: Path, version: Any) -> None:
    if str(version) != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}, this library reads {FORMAT_VERSION}; "
            "load it with the library version it names and save it again"
        )


def _check_tensors(
    path: Path, expected: dict[str, Tensor], found: dict[str, Tensor], *, rows_may_differ: bool = False
) -> None:
    misfit = _misfit(expected, found, rows_may_differ=rows_may_differ)
    if misfit:
        raise CheckpointError(f"{path} does not fit: {misfit}")


def _misfit(
    expected: dict[str, Tensor], found: dict[str, Tensor], *, rows_may_differ: bool = False
) -> str | None:
    missing, odd = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or odd:
        return f"missing {missing or 'nothing'}, unexpected {odd or 'nothing'}"
    skip = 1 if rows_may_differ else 0
    rows = {tensor.shape[0] for tensor in found.values()} if rows_may_differ else set()
    if len(rows) > 1:
        return f"its tensors have {sorted(rows)} rows"
    for name, tensor in expected.items():
        if found[name].shape[skip:] != tensor.shape[skip:]:
            return f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        both_floating = found[name].is_floating_point() and tensor.is_floating_point()
        if rows_may_differ and found[name].dtype != tensor.dtype and not both_floating:
            return f"{name} is {found[name].dtype}, expected {tensor.dtype}"
    return None


def _static_fields(memory: Memory) -> str:
    # Our own words: the text of a torch TreeSpec changes with the version of torch.
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, tuple):
            for index, part in enumerate(value):
                walk(part, f"{path}.{index}")
        elif isinstance(value, Memory):
            for field in dataclasses.fields(value):  # type: ignore[arg-type]
                part, name = getattr(value, field.name), f"{path}.{field.name}"
                if is_static(field):
                    found[name.removeprefix(".")] = repr(part)
                else:
                    walk(part, name)

    walk(memory, "")
    return json.dumps(found, sort_keys=True)


def _class_name(memory: Memory) -> str:
    return f"{type(memory).__module__}.{type(memory).__qualname__}"
