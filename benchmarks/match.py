"""Equal terms: models of equally many parameters, or with equally large memories, by a search over a width.

`params` searches over `dim` (the feed-forward grows along and then makes up the rest), or over `hidden` of a
recurrent network. `state` searches over the option that says how much a member keeps, and counts what
`evaluate` counts: the bytes of a row that carry something from segment to segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.evaluate import evaluate
from benchmarks.members import build_model, known_options, tags_of
from benchmarks.settings import RunSpec, cached_task, setting_of
from memory_models.transformer import TransformerConfig

PARAMS, STATE = "params", "state"
TOLERANCE = {PARAMS: 0.02, STATE: 0.1}
"""How far, as a share, a matched model may lie off; a memory grows in whole chunks or slots."""
STATE_OPTIONS = ("memories", "chunks", "slots", "lmem_len", "cache", "context", "hidden")
"""Options that say how much a member keeps, the first that it has being searched."""
# A width bought with parameters is no memory: a recurrent network of more is another model.
_MOST_WIDENING = 4
# Batches after which every part of a stream's memory has been written.
_STREAM_BATCHES = 24


class MatchError(ValueError):
    """A model cannot be made equal; the message says what could be reached."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """What the search found for one model.

    Attributes:
        model: its `RunSpec.label`.
        options: options to change, empty if it is as in the settings.
        value: parameters, or bytes of a row, that it then has.
        note: why it is not matched; empty if it is.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    value: float
    note: str = ""

    @property
    def assignments(self) -> list[str]:
        """As for `--set`."""
        return [f"model.{name}={value}" for name, value in self.options.items()]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A search over several models.

    Attributes:
        by: `params` or `state`.
        reference: whose figure the others shall have, in words.
        target: that figure.
        models: what was found, by `RunSpec.label`.
    """

    by: str
    reference: str
    target: float
    models: Mapping[str, Matched]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return dataclasses.asdict(self)


def match(specs: Sequence[RunSpec], by: str, *, reference: RunSpec | int | None = None) -> Match:
    """Find the options with which the models of `specs` are equally large.

    Args:
        specs: a run for each model, as planned from the settings.
        by: `params` or `state`.
        reference: a run whose model sets the target, or the target itself. None: for `params` the smallest of
            the models, for `state` the smallest memory of any but a control, or of any if all are controls.

    Returns:
        What each model needs. A control whose memory cannot have that size stays as it is, with a note.

    Raises:
        ValueError: if `by` is unknown or the target is not positive.
        MatchError: if a model cannot be brought within `TOLERANCE` of the target.
    """
    if by not in (PARAMS, STATE):
        raise ValueError(f"match {by!r} is neither {PARAMS!r} nor {STATE!r}")
    measure = count_parameters if by == PARAMS else measure_state
    if isinstance(reference, int):
        name, target = "the figure given", float(reference)
    elif reference is not None:
        name, target = reference.label, measure(reference)
    else:
        name, target = _smallest(specs, by, measure)
    if target <= 0:
        raise ValueError(f"nothing to match: {name} has {target:.0f} {unit(by)}; name another (--match-to)")
    find = _match_parameters if by == PARAMS else _match_state
    return Match(by=by, reference=name, target=target, models={s.label: find(s, target) for s in specs})


def unit(by: str) -> str:
    """What is counted, in words."""
    return "parameters" if by == PARAMS else "bytes of state"


def count_parameters(spec: RunSpec) -> int:
    """Parameters of the run's model; nothing is allocated for them."""
    return _parameters(spec, {})


def measure_state(spec: RunSpec) -> float:
    """Bytes of a row's memory that carry something, in the run's model before training."""
    return _state(spec, {})


def _smallest(specs: Sequence[RunSpec], by: str, measure: Callable[[RunSpec], float]) -> tuple[str, float]:
    sizes = {spec.label: measure(spec) for spec in specs}
    if by == STATE:
        controls = {spec.label for spec in specs if "control" in tags_of(spec.model)}
        memories = {name: size for name, size in sizes.items() if name not in controls and size > 0}
        sizes = memories or {name: size for name, size in sizes.items() if size > 0} or sizes
    # Among equals the one that has no memory: it is what the others are compared with.
    name = min(sizes, key=lambda model: (sizes[model], model != "window"))
    return name, sizes[name]


def _match_parameters(spec: RunSpec, target: float) -> Matched:
    if _near(found := count_parameters(spec), target, share=0.002):
        return Matched(model=spec.label, value=found)
    names = known_options(spec.model)
    if "hidden" in names:
        base = setting_of(spec, "model.hidden") or 2 * setting_of(spec, "model.dim")
        best = _search(lambda width: _parameters(spec, {"hidden": width}), base, target)
        options: dict[str, Any] = {"hidden": best}
    elif "dim" in names:
        options = _match_dim(spec, target)
    else:
        raise MatchError(f"{spec.label} has neither 'dim' nor 'hidden', so its parameters cannot be matched")
    return _checked(spec, options, _parameters(spec, options), target, PARAMS)


def _match_dim(spec: RunSpec, target: float) -> dict[str, Any]:
    dim = setting_of(spec, "model.dim")
    inner = _inner_width(spec) if "ff_dim" in known_options(spec.model) else None

    def options(width: int, feedforward: int | None = None) -> dict[str, Any]:
        if inner is None:
            return {"dim": width}
        return {"dim": width, "ff_dim": feedforward or max(1, round(inner * width / dim))}

    best = _search(lambda width: _parameters(spec, options(width)), dim, target)
    if inner is None:
        return options(best)
    proportional = options(best)["ff_dim"]
    filled = _search(lambda width: _parameters(spec, options(best, width)), proportional, target)
    return options(best, filled)


def _inner_width(spec: RunSpec) -> int:
    chosen = setting_of(spec, "model.ff_dim")
    usual = TransformerConfig(dim=setting_of(spec, "model.dim"), heads=1).feedforward_width
    return int(chosen or usual)


def _match_state(spec: RunSpec, target: float) -> Matched:
    size = measure_state(spec)
    option = next((name for name in STATE_OPTIONS if name in known_options(spec.model)), None)
    if size == 0 and option is None:
        return Matched(model=spec.label, value=0, note="carries nothing")
    if _near(size, target, share=0.002):
        return Matched(model=spec.label, value=size)
    if option is None:
        raise MatchError(
            f"{spec.label} has none of the options {', '.join(STATE_OPTIONS)}, so its state "
            f"({size:.0f} bytes) cannot be matched"
        )
    base = _kept(spec, option)
    try:
        most = base * _MOST_WIDENING if option == "hidden" else None
        best = _search(lambda value: _state(spec, {option: value}), base, target, most=most)
        return _checked(spec, {option: best}, _state(spec, {option: best}), target, STATE)
    except MatchError as error:
        if "control" not in tags_of(spec.model):
            raise
        return Matched(model=spec.label, value=size, note=f"not matched: {error}")


def _kept(spec: RunSpec, option: str) -> int:
    value = setting_of(spec, f"model.{option}")
    if value is None:
        # The controls' own rules for what is not set.
        value = (
            2 * setting_of(spec, "model.dim")
            if option == "hidden"
            else cached_task(spec.task, spec.task_options).segment_length
        )
    return max(int(value), 1)


def _checked(spec: RunSpec, options: dict[str, Any], value: float, target: float, by: str) -> Matched:
    if not _near(value, target, share=TOLERANCE[by]):
        reached = ", ".join(f"{name} {wide}" for name, wide in options.items())
        raise MatchError(
            f"{spec.label} cannot have {target:,.0f} {unit(by)}: with {reached} it has {value:,.0f} "
            f"({value / target - 1:+.1%}); name another reference (--match-to), leave the model out, or "
            "change its other options with --set"
        )
    return Matched(model=spec.label, options=options, value=value)


def _near(value: float, target: float, *, share: float) -> bool:
    return abs(value - target) <= share * target


def _search(size: Callable[[int], float], base: int, target: float, *, most: int | None = None) -> int:
    """The width, among those with which the model can be built, whose size is nearest to the target.

    Args:
        size: grows with the width; raises `ValueError` for one that the model refuses.
        base: a width that it takes. Widths are tried in steps that keep whatever divides it.
        target: the size wished for.
        most: largest width to try; None: as large as it takes.
    """
    step = next((step for step in range(1, base + 1) if _sizes(size, base + step, base + 2 * step)), base)
    # Widths base + k * step, for k from `low` to `high`.
    low, high = -((base - 1) // step), 1
    while size(base + high * step) < target and (most is None or base + high * step < most):
        high *= 2
    if most is not None:
        high = min(high, max((most - base) // step, 0))
    best = base
    while low <= high:
        middle = (low + high) // 2
        width = base + middle * step
        found = _sizes(size, width)
        if found is None:
            # Too narrow for some other option: only wider ones are left.
            low = middle + 1
            continue
        if abs(found[0] - target) < abs(size(best) - target):
            best = width
        if found[0] < target:
            low = middle + 1
        else:
            high = middle - 1
    return best


def _sizes(size: Callable[[int], float], *widths: int) -> list[float] | None:
    try:
        return [size(width) for width in widths]
    except ValueError:
        return None


def _parameters(spec: RunSpec, options: Mapping[str, Any]) -> int:
    vocabulary = cached_task(spec.task, spec.task_options).vocab_size
    with torch.device("meta"):
        model = build_model(spec.model, {**spec.model_options, **options}, vocabulary)
    return sum(parameter.numel() for parameter in model.parameters())


def _state(spec: RunSpec, options: Mapping[str, Any]) -> float:
    task = cached_task(spec.task, spec.task_options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(spec.model, {**spec.model_options, **options}, task.vocab_size)
    batches = _STREAM_BATCHES if task.streaming else 1
    return evaluate(model, task, rows=2, batches=batches).state_bytes
