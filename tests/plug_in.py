"""The example plug-in as an installer leaves it, without installing anything."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest

from memory_models.models import ENTRY_POINTS, models

PLUG_IN = Path(__file__).resolve().parent.parent / "examples" / "plugin_model"
NAME = "fading"


def write_entry_points(folder: Path) -> None:
    """Write down in `folder` what the distribution of the plug-in says of itself."""
    project = tomllib.loads((PLUG_IN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    written = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    written.mkdir()
    (written / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"][ENTRY_POINTS].items()]
    (written / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines]))


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends the plug-in is a member, found through its entry point in `folder`."""
    installed = {point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    write_entry_points(folder)
    for path in (folder, PLUG_IN):
        monkeypatch.syspath_prepend(str(path))
    monkeypatch.delitem(sys.modules, "fading_memory", raising=False)
    # The entry points are read once; now once more.
    ours = {entry.name: entry for entry in models if entry.name not in installed}
    monkeypatch.setattr(models, "_entries", ours)
    monkeypatch.setattr(models, "_complete", False)
