"""The pages of the site that lie elsewhere in the repository, and the links between there and here."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# What does not lie in docs/, and where it is in the site.
ELSEWHERE = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CITATION.cff": "CITATION.cff",
    "examples/README.md": "examples.md",
}
_TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that do not lie in docs/."""
    for name, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where their targets are in the site; in the repository they are right already."""
    here = page.file.src_uri
    elsewhere = {page: name for name, page in ELSEWHERE.items()}
    place = elsewhere.get(here, f"docs/{here}")

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        if path in ELSEWHERE:
            found = ELSEWHERE[path]
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        else:
            return match[1]
        return posixpath.relpath(found, posixpath.dirname(here) or ".")

    return _TARGET.sub(target, markdown)
