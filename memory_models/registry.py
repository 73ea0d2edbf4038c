"""Names for things that are imported only when somebody asks for them.

A `Registry` maps a name to a `"package.module:attribute"` string. One class serves the models and the
tasks; third parties join through an entry-point group or by passing such a string instead of a name.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

DISTRIBUTION = "memory-models"


class Entry(Protocol):
    """What a registry holds: at least a name and a target."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str: ...


E = TypeVar("E", bound=Entry)


class UnknownNameError(LookupError):
    """A name that no registry entry carries; the message lists the nearest and the known ones."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that helps somebody who mistyped: `Did you mean 'x'? Known: …`."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}"


def import_target(target: str) -> Any:
    """Import `"package.module:attribute"`.

    Raises:
        ValueError: if the string has not that form.
        ImportError: if the module or its attribute is missing, or if another distribution's package
            of the same name is found in place of ours.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"target {target!r} must look like 'package.module:attribute'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # htm and memformer are also names of other people's distributions: without this the user
        # would read "No module named 'htm.model'", which helps nobody.
        _check_owner(module_name, cause=error)
        raise
    _check_owner(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ImportError(f"module {module_name!r} has no {attribute!r} (target {target!r})") from error


# Top-level packages of this distribution whose names others use too.
_OURS = ("memory_models", "htm", "memformer", "memorizing", "memxl", "benchmarks")


def _check_owner(module_name: str, *, cause: ImportError | None = None) -> None:
    top = module_name.partition(".")[0]
    if top not in _OURS:
        return
    try:
        package = importlib.import_module(top)
    except ImportError:
        if importlib.util.find_spec(top) is None:
            return
        raise
    if getattr(package, "__distribution__", None) == DISTRIBUTION:
        return
    others = [d for d in importlib.metadata.packages_distributions().get(top, []) if d != DISTRIBUTION]
    owner = f" (installed by {', '.join(sorted(set(others)))})" if others else ""
    raise ImportError(
        f"package {top!r} at {getattr(package, '__file__', None)}{owner} is not the one of {DISTRIBUTION}: "
        "uninstall it, or install memory-models in an environment of its own"
    ) from cause


@dataclass(frozen=True)
class Named:
    """The smallest entry: a name and where its object lives."""

    name: str
    target: str


class Registry(Generic[E]):
    """Entries by name, plug-ins included, in order of registration.

    Args:
        kind: what an entry is called in messages, such as `"model"`.
        group: the entry-point group through which other distributions add entries; each entry point's
            name becomes the entry's name and its value the target.
        make: builds an entry from a plug-in's name and target.
        find: gives more entries when a name is first asked for; they come before the plug-ins.
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str | None = None,
        make: Any = Named,
        find: Callable[[], Iterable[E]] = tuple,
    ) -> None:
        self.kind = kind
        self._group = group
        self._make = make
        self._find_more = find
        self._entries: dict[str, E] = {}
        self._complete = False

    def register(self, entry: E) -> None:
        """Add an entry.

        Raises:
            ValueError: if the name is taken.
        """
        if entry.name in self._entries:
            taken = self._entries[entry.name].target
            raise ValueError(f"{self.kind} {entry.name!r} is registered already, as {taken}")
        self._entries[entry.name] = entry

    def unregister(self, name: str) -> None:
        """Take an entry out again, as a test or a notebook needs."""
        self._find(name)
        del self._entries[name]

    def get(self, name: str) -> E:
        """The entry called `name`, or one made on the spot from a `"package.module:attribute"` string.

        Raises:
            UnknownNameError: if there is none; the message names the nearest.
        """
        if ":" in name:
            return self._make(name, name)
        return self._find(name)

    def load(self, name: str) -> Any:
        """Import what the entry called `name` points to."""
        return import_target(self.get(name).target)

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a shell pattern, in order of registration."""
        self._read_more()
        return [name for name in self._entries if fnmatch.fnmatchcase(name, pattern)]

    def __iter__(self) -> Iterator[E]:
        self._read_more()
        return iter(list(self._entries.values()))

    def __contains__(self, name: object) -> bool:
        self._read_more()
        return name in self._entries

    def __len__(self) -> int:
        self._read_more()
        return len(self._entries)

    def _find(self, name: str) -> E:
        self._read_more()
        if name not in self._entries:
            raise UnknownNameError(f"unknown {self.kind} {name!r}. {nearest(name, self._entries)}")
        return self._entries[name]

    def _read_more(self) -> None:
        # Once, and late: reading the entry points of every installed distribution takes time that
        # `import memory_models` must not spend.
        if self._complete:
            return
        before = dict(self._entries)
        try:
            for entry in self._find_more():
                self.register(entry)
            points = importlib.metadata.entry_points(group=self._group) if self._group else ()
            for point in points:
                self.register(self._make(point.name, point.value))
        except ValueError:
            # All or none: a clash must not be heard once and then leave half of them in place.
            self._entries = before
            raise
        self._complete = True
