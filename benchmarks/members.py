"""The models of the comparison: the one place where the harness asks the registry of members."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from benchmarks.provenance import source_digest
from memory_models.lm import MemoryLM
from memory_models.models import config_fields, create_lm, info, list_models, models

FIRST_TAGS = ("family", "control")


def build_model(name: str, options: Mapping[str, Any], vocab_size: int) -> MemoryLM:
    """The language model around member `name`, its weights drawn from torch's global generator."""
    return create_lm(name, vocab_size=vocab_size, **options)


def all_models() -> list[str]:
    """Names of all members: families first, then controls, then the rest."""
    names = [name for tag in FIRST_TAGS for name in list_models(tag=tag)]
    return [*names, *(name for name in list_models() if name not in names)]


def controls() -> list[str]:
    """Names of the members that are there for comparison only."""
    return list_models(tag="control")


def known_options(name: str) -> set[str]:
    """What `build_model` takes for member `name`.

    Raises:
        LookupError: if there is no such member.
    """
    of_lm = set(inspect.signature(MemoryLM.__init__).parameters) - {"self", "module", "vocab_size"}
    return set(config_fields(name)) | of_lm


def code_digest(name: str, *modules: str, afresh: bool = False) -> str:
    """Hash of the code that makes a run's numbers: of member `name`, and of all that `modules` import.

    `afresh` as in `source_digest`.
    """
    module = info(name).target.partition(":")[0]
    package = module.rpartition(".")[0]
    spec = importlib.util.find_spec(package) if package else None
    # A namespace package is a mere folder; what else lies there is not the member's code.
    own = package if spec is not None and spec.origin is not None else module
    return source_digest(["memory_models", own], reached_from=[module, *modules], afresh=afresh)


def tags_of(name: str) -> list[str]:
    """Tags of member `name`, such as `family` or `control`."""
    return list(info(name).tags)


class Shown(NamedTuple):
    """A member as a list shows it."""

    kind: str
    summary: str
    carries: str


def shown(name: str) -> Shown:
    """What there is to say of member `name`.

    A plug-in's entry point tells nothing but where its class is, so the first lines of what the class and its
    memory say of themselves stand in; nothing if it cannot be imported.
    """
    entry = info(name)
    kind, summary, carries = ", ".join(entry.tags) or "plug-in", entry.summary, entry.carries
    if not (summary and carries):
        try:
            member = models.load(name)
        except Exception as error:  # whatever somebody else's package raises: the list must not end there
            return Shown(kind, summary or f"cannot be imported: {error}", carries)
        memories = [kind for base in getattr(member, "__orig_bases__", ()) for kind in get_args(base)]
        summary = summary or _first_line(member)
        carries = carries or next((text for text in map(_first_line, memories) if text), "")
    return Shown(kind, summary, carries)


def _first_line(described: Any) -> str:
    text = (getattr(described, "__doc__", None) or "").strip().partition("\n")[0]
    # What `dataclass` writes where there is nothing.
    return "" if text.startswith(f"{getattr(described, '__name__', '')}(") else text.removesuffix(".")
