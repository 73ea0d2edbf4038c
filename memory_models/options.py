"""Options of other types than their annotations: which are refused, and with what message."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES = {bool: "true or false (a bool)", int: "an int", float: "a float", str: "a string"}


def check_types(owner: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that the annotations of `owner`, a dataclass or a function, do not allow.

    A bool is no int and an int is no bool, an int will do as a float, and a list as a tuple. Only annotations
    made of bool, int, float, str, None, literals, tuples, sequences and unions are checked.

    Raises:
        TypeError: for a value of another type; the message names option, value and type.
        ValueError: for another string than those of a `Literal`.
    """
    annotations = _annotations(owner)
    for name, value in options.items():
        annotation = annotations.get(name, Any)
        if _fits(value, annotation):
            continue
        message = f"{name} ({value!r}) must be {_in_words(annotation)}"
        allowed = _alternatives(annotation)
        if isinstance(value, str) and any(get_origin(kind) is Literal for kind in allowed):
            raise ValueError(message)
        raise TypeError(message)


@functools.lru_cache(maxsize=256)
def _annotations(owner: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(owner)
    except (NameError, AttributeError, TypeError):
        # Names that are imported for the type checker only, in a class of somebody else's.
        return {}


def _fits(value: Any, annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in get_args(annotation))
    if origin in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in get_args(annotation))
    if origin in (tuple, Sequence):
        # A list too: JSON and many users write one.
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        kinds = get_args(annotation)
        if origin is Sequence or kinds[1:] == (...,):
            return all(_fits(part, kinds[0]) for part in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if annotation in (None, type(None)):
        return value is None
    if annotation in (int, float):
        accepted = (int, float) if annotation is float else int
        return isinstance(value, accepted) and not isinstance(value, bool)
    return not (annotation in (bool, str) and not isinstance(value, annotation))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _in_words(annotation: Any) -> str:
    words = []
    for kind in _alternatives(annotation):
        if get_origin(kind) is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif get_origin(kind) is Sequence:
            words.append(f"a sequence of {get_args(kind)[0].__name__}s")
        elif get_origin(kind) is tuple:
            words.append(f"a {inspect.formatannotation(kind)}")
        else:
            words.append("None" if kind is type(None) else _NAMES.get(kind) or inspect.formatannotation(kind))
    return " or ".join(words)
