"""One file for one memory: safetensors, with a description and a checksum in its header."""

from __future__ import annotations

import json
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FORMAT = "memory-models KNNMemory"
_VERSION = 1


class MemoryFileError(ValueError):
    """The file is damaged, or not one that `KNNMemory.save` has written."""


def save(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write atomically: a temporary file beside `path`, flushed to disk, then renamed.

    Raises:
        OSError: if it cannot be written; what was at `path` is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "description": text,
        "checksum": f"{_checksum(text, tensors):08x}",
    }
    # A name of its own, so that two writers of one path do not write into one file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        # Newer releases of safetensors write for the owner alone; the result gets what any new file would.
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save` wrote.

    The file may be replaced meanwhile: then the new one is read.

    Raises:
        FileNotFoundError: if there is no such file.
        MemoryFileError: if it is damaged, foreign, or of a later version.
    """
    while True:
        if not path.is_file():
            raise FileNotFoundError(f"no memory at {path}")
        before = _identity(path)
        try:
            return _read(path)
        except MemoryFileError:
            # safetensors opens the header and each tensor by name, so that they may come from two files.
            if path.is_file() and _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    # The times too, for the number of a file that is gone is given to the next one.
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise MemoryFileError(f"{path} holds tensors, but no KNNMemory")
            # Copies: the tensors must not hang on a file that may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:  # torch's own, where a tensor ends beyond the file
        raise MemoryFileError(f"{path} is damaged, or was not written by KNNMemory.save: {error}") from error
    if header.get("version") != str(_VERSION):
        raise MemoryFileError(
            f"{path} has version {header.get('version')}, this release reads version {_VERSION}"
        )
    text = header.get("description", "")
    if header.get("checksum") != f"{_checksum(text, tensors):08x}":
        raise MemoryFileError(f"{path} is damaged: its checksum does not fit its content")
    return json.loads(text), tensors


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        # As bytes, for numpy has no bfloat16.
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return value
