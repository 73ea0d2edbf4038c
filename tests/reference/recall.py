"""`recall` answered the obvious way: read one sequence from left to right and keep a dictionary."""

from __future__ import annotations


def answers(tokens: list[int], *, keys: int, values: int, segment_length: int) -> tuple[list[int], list[int]]:
    """Labels and gaps of one sequence, -100 and -1 where nothing is asked.

    Token ids: keys from 0, values from `keys`, then the question mark.
    """
    question = keys + values
    written: dict[int, tuple[int, int]] = {}
    labels, gaps = [], []
    previous = question
    for place, token in enumerate(tokens):
        segment = place // segment_length
        label, gap = -100, -1
        if keys <= token < question:
            written[previous] = (token, segment)
        elif token == question:
            label, when = written[previous]
            gap = segment - when
        labels.append(label)
        gaps.append(gap)
        previous = token
    return labels, gaps


def memoryless(tokens: list[int], *, keys: int, values: int, segment_length: int, guess: int) -> list[int]:
    """Answers of somebody who forgets everything at the end of each segment and then says `guess`."""
    question = keys + values
    found = []
    written: dict[int, int] = {}
    previous = question
    for place, token in enumerate(tokens):
        if place % segment_length == 0:
            written = {}
        if keys <= token < question:
            written[previous] = token
        found.append(written.get(previous, guess) if token == question else -1)
        previous = token
    return found
