"""One file for one memory: safetensors, with a description and a checksum in its header."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_models.checkpoints import CheckpointError, read_tensors, write_tensors

_FORMAT = "memory-models KNNMemory"
_VERSION = 1


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
        "checksum": f"{_checksum(text, tensors):08x}",
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
    if header.get("version") != str(_VERSION):
        raise MemoryFileError(
            f"{path} has version {header.get('version')}, this release reads version {_VERSION}"
        )
    # Copies: the tensors must not hang on a file that may be replaced.
    tensors = {name: tensor.clone() for name, tensor in found.items()}
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
