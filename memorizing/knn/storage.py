"""One file for one memory: safetensors, with a description and a checksum in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from memory_models.checkpoints import CheckpointError, checksum, read_tensors, write_tensors

_FORMAT = "memory-models KNNMemory"
_VERSION = 2
# Version 1 had a checksum of its own; since then all files of tensors have one.
_READABLE = ("1", "2")


class MemoryFileError(ValueError):
    """The file is damaged, or not one that `KNNMemory.save` has written."""


def save(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write atomically: a temporary file beside `path`, flushed to disk, then renamed.

    Raises:
        OSError: if it cannot be written; what was at `path` is still there.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "description": text,
    }
    write_tensors(path, tensors, header)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save` wrote.

    The file may be replaced meanwhile: then the new one is read.

    Raises:
        FileNotFoundError: if there is no such file.
        MemoryFileError: if it is damaged, foreign, or of a later version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no memory at {path}")
    try:
        found, header = read_tensors(path)
    except CheckpointError as error:
        raise MemoryFileError(f"{path} is damaged, or was not written by KNNMemory.save: {error}") from error
    if header.get("format") != _FORMAT:
        raise MemoryFileError(f"{path} holds tensors, but no KNNMemory")
    if header.get("version") not in _READABLE:
        raise MemoryFileError(
            f"{path} has version {header.get('version')}, this release reads {' and '.join(_READABLE)}"
        )
    # Copies: the tensors must not hang on a file that may be replaced.
    tensors = {name: tensor.clone() for name, tensor in found.items()}
    text = header.get("description", "")
    if header["version"] == "1" and header.get("checksum") != checksum(text, tensors):
        raise MemoryFileError(f"{path} is damaged: its checksum does not fit its content")
    return json.loads(text), tensors
