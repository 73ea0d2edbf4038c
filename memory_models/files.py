"""Files that are replaced whole: a reader, or a kill at any moment, finds the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new file, then put it in the place of `path` in one step.

    The data reach the disk before the name does. If anything fails the old file stays as it was. Where `path`
    is a symbolic link, the file that it leads to is replaced.
    """
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        # mkstemp makes files that only their owner may read; a checkpoint is shared like any file.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let a new name in a folder reach the disk: a new file is safe only when its folder is."""
    # Not every system can sync a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_file(path: Path, read: Callable[[Path], R]) -> R:
    """What `read` makes of the file; once more if the file was replaced meanwhile.

    safetensors opens a file by name twice, for its header and for its tensors, which could then be of two.
    """
    while True:
        before = _identity(path)
        try:
            found = read(path)
        except Exception:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return found


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # The times too, for the number of a file that is gone is given to the next one.
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
