"""Where identifiers stand in a text, and how far back each last stood.

Found in the raw bytes, so any text and any tokens will do: an identifier is a word of ASCII letters,
digits and underscores that does not start with a digit and is not a keyword of Python.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Letters beyond ASCII make a longer word, of which a part is not a name. Possessive, or the check at the
# end would only make the match shorter.
_NAME = re.compile(rb"(?<![A-Za-z0-9_\x80-\xff])[A-Za-z_][A-Za-z0-9_]*+(?![\x80-\xff])")
_KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)


@dataclass(frozen=True)
class Occurrence:
    """A scored identifier: tokens `begin` to `end` (exclusive) of a document, and its score group."""

    document: int
    begin: int
    end: int
    group: int


@dataclass(frozen=True)
class NameInTokens:
    """An identifier's place in the tokens of its document."""

    text: bytes
    begin: int
    end: int
    back: int | None
    """Segments between the last token of the same name before and the token from which this one is
    predicted; None: the name has not occurred before."""


def document_frequency(documents: Iterable[bytes], *, min_length: int = 1) -> Counter[bytes]:
    """In how many of the documents each identifier occurs; one that occurs in none counts 0."""
    seen: Counter[bytes] = Counter()
    for content in documents:
        seen.update({name for name in _NAME.findall(content) if len(name) >= min_length})
    return seen


def occurrences(
    content: bytes, token_bytes: NDArray[np.int64], *, min_length: int, segment: int
) -> Iterator[NameInTokens]:
    """Identifiers that lie wholly within the given tokens, in their order.

    Args:
        content: the text of the document.
        token_bytes: length of each token in bytes, from the start of the document; may cover only a part.
        min_length: shortest identifier, in bytes.
        segment: tokens of a segment.

    The first token of a document is never asked for, so a name that it belongs to is not yielded; the
    next of that name still finds it behind itself.
    """
    ends = np.cumsum(token_bytes)
    covered = int(ends[-1]) if len(ends) else 0
    last_token: dict[bytes, int] = {}
    for match in _NAME.finditer(content):
        if match.end() > covered:
            break
        name = match.group()
        if len(name) < min_length or name in _KEYWORDS:
            continue
        # the token that holds byte b is the first whose end lies beyond b
        begin = int(np.searchsorted(ends, match.start(), side="right"))
        last = int(np.searchsorted(ends, match.end() - 1, side="right"))
        before = last_token.get(name)
        last_token[name] = last
        if begin > 0:
            back = None if before is None else (begin - 1) // segment - before // segment
            yield NameInTokens(name, begin, last + 1, back)
