"""The models of the comparison: the one place where the harness asks the registry of members."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

from benchmarks.provenance import source_digest
from memory_models.lm import MemoryLM
from memory_models.models import config_fields, create_lm, info, list_models

FIRST_TAGS = ("family", "control")


def build_model(name: str, options: Mapping[str, Any], vocab_size: int) -> MemoryLM:
    """The language model around member `name`, its weights drawn from torch's global generator."""
    return create_lm(name, vocab_size=vocab_size, **options)


def all_models() -> list[str]:
    """Names of all members: families first, then controls, then the rest."""
    names = [name for tag in FIRST_TAGS for name in list_models(tag=tag)]
    return [*names, *(name for name in list_models() if name not in names)]


def known_options(name: str) -> set[str]:
    """What `build_model` takes for member `name`.

    Raises:
        LookupError: if there is no such member.
    """
    of_lm = set(inspect.signature(MemoryLM.__init__).parameters) - {"self", "module", "vocab_size"}
    return set(config_fields(name)) | of_lm


def code_digest(name: str, *modules: str) -> str:
    """Hash of the code that makes a run's numbers: of member `name`, and of all that `modules` import."""
    module = info(name).target.partition(":")[0]
    package = module.rpartition(".")[0]
    spec = importlib.util.find_spec(package) if package else None
    # A namespace package is a mere folder; what else lies there is not the member's code.
    own = package if spec is not None and spec.origin is not None else module
    return source_digest(["memory_models", own], reached_from=[module, *modules])


def tags_of(name: str) -> list[str]:
    """Tags of member `name`, such as `family` or `control`."""
    return list(info(name).tags)
