"""Figures as they stand in a table."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.summary import BOOTSTRAP, Figure


def number(figure: Figure | None) -> str:
    """A score: three decimals below 10, two above, with its interval if there is one.

    Of how many seeds it is stands behind it, here as in the other formats, where some have no value.
    """
    if figure is None:
        return "–"
    digits = 3 if abs(figure.mean) < 10 else 2
    text = _signed(figure.mean, digits)
    if figure.interval == BOOTSTRAP and figure.bounds is not None:
        # It need not be even on both sides.
        text += f" [{' '.join(_signed(end, digits) for end in figure.bounds)}]"
    elif figure.half_width is not None:
        text += f" ± {figure.half_width:.{digits}f}"
    return text + _share_of_seeds(figure)


def _share_of_seeds(figure: Figure) -> str:
    return f" ({figure.count} of {figure.count + figure.missing})" if figure.missing else ""


def _signed(value: float, digits: int) -> str:
    # Rounding must not print a minus before zero.
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def small(figure: Figure | None) -> str:
    """A positive figure of any size, to two digits."""
    return "–" if figure is None else f"{figure.mean:.2g}{_share_of_seeds(figure)}"


def count(figure: Figure | None) -> str:
    """A count to three digits: `89.1 k`."""
    if figure is None:
        return "–"
    return _scaled(figure.mean, 1000, ("", " k", " M", " G")) + _share_of_seeds(figure)


def size(figure: Figure | None) -> str:
    """Bytes to three digits: `8.2 KiB`."""
    if figure is None:
        return "–"
    return _scaled(figure.mean, 1024, (" B", " KiB", " MiB", " GiB")) + _share_of_seeds(figure)


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value /= base
        step += 1
    digits = 0 if step == 0 or value >= 100 else 1
    return f"{value:.{digits}f}{units[step]}"
