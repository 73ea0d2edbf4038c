"""Rare identifiers and the scores of `text`, the obvious way: one document, one token at a time."""

from __future__ import annotations

import keyword
import math
import string

LETTERS = string.ascii_letters + "_"


def names(text: str) -> list[tuple[int, int]]:
    """Where identifiers stand in an ASCII text, keywords left out."""
    found = []
    start = 0
    while start < len(text):
        end = start
        while end < len(text) and text[end] in LETTERS + string.digits:
            end += 1
        word = text[start:end]
        if word and word[0] in LETTERS and word not in keyword.kwlist:
            found.append((start, end))
        start = max(end, start + 1)
    return found


def rare_names(
    text: str, pieces: list[str], *, training: list[str], at_most: int, min_length: int, segment: int
) -> list[tuple[list[int], str]]:
    """For each rare identifier its tokens and the name of its group.

    Args:
        text: a held-out document.
        pieces: the text of each of its tokens, from the start of the document.
        training: the training documents.
        at_most: in how many of them a rare name may occur.
        min_length: of a name.
        segment: tokens of a segment.
    """
    tokens_at = [index for index, piece in enumerate(pieces) for _ in piece]
    words = [{document[a:b] for a, b in names(document)} for document in training]
    found = []
    last: dict[str, int] = {}
    for start, end in names(text):
        name = text[start:end]
        if end > len(tokens_at) or len(name) < min_length:
            continue
        tokens = sorted(set(tokens_at[start:end]))
        previous = last.get(name)
        last[name] = tokens[-1]
        if tokens[0] == 0 or sum(name in document for document in words) > at_most:
            continue
        if previous is None:
            group = "first"
        else:
            back = (tokens[0] - 1) // segment - previous // segment
            group = next(
                label
                for label, bound in [
                    ("same segment", 0),
                    ("1-4 back", 4),
                    ("5-16 back", 16),
                    ("17+ back", math.inf),
                ]
                if back <= bound
            )
        found.append((tokens, group))
    return found


def scores(
    documents: list[tuple[list[float], list[int], list[tuple[list[int], str]]]], *, segment: int
) -> dict[str, float]:
    """The metrics of `text`.

    Args:
        documents: for each the bits and the bytes of its tokens (the first token's do not count), and what
            `rare_names` gave.
        segment: tokens of a segment, a multiple of 8.
    """
    bins: dict[str, list[tuple[float, float]]] = {}
    places = [(0, segment // 8), (segment // 8, segment // 4), (segment // 4, segment // 2)]
    places.append((segment // 2, segment))
    positions = [(0, 64), (64, 256), (256, 1024), (1024, 2048), (2048, 4096)]
    for bits, sizes, named in documents:
        for token in range(1, len(bits)):
            read = token - 1
            keys = ["bits per byte"]
            keys += [f"bits per byte/place {a}-{b}" for a, b in places if a <= read % segment < b]
            keys += [f"bits per byte/position {a}-{b}" for a, b in positions if a <= read < b]
            keys += ["bits per byte/position 4096+"] if read >= 4096 else []
            for key in keys:
                bins.setdefault(key, []).append((bits[token], sizes[token]))
        for tokens, group in named:
            total = (sum(bits[token] for token in tokens), 1.0)
            bins.setdefault(f"identifier bits/{group}", []).append(total)
            if group in ("5-16 back", "17+ back"):
                bins.setdefault("identifier bits/5+ back", []).append(total)
    return {key: sum(b for b, _ in all_) / sum(n for _, n in all_) for key, all_ in bins.items()}
