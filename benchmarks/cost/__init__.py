"""What a model costs, without training it: time, peak memory, state and operations against length.

`memory-bench cost`. Every case is measured in a process of its own, so that what one leaves in the allocator
cannot help or harm the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.members import code_digest, known_options
from benchmarks.provenance import version_of
from benchmarks.results import run_id

__all__ = ["GRADIENTS", "OPTIONS", "SMOKE_OPTIONS", "Case", "plan"]

GRADIENTS = ("bptt", "checkpoint", "replay", "truncated")
"""How the gradient gets through the segments: back-propagation through time; the same with each segment's
activations computed again (`torch.utils.checkpoint`); memory replay; not at all."""

# The same transformer for every member; what a member remembers is bounded, but for `full`.
OPTIONS: dict[str, dict[str, Any]] = {
    "*": {"dim": 256, "depth": 4, "heads": 4, "segment_length": 128},
    "htm": {"chunk_size": 32, "chunks": 128, "topk": 8, "memory_layers": (-1,)},
    "memorizing": {"memories": 4096, "topk": 32},
    "memformer": {"slots": 64},
    "memxl": {"mem_len": 128, "lmem_len": 64},
    "transformer-xl": {"cache": 128},
}
SMOKE_OPTIONS: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "segment_length": 16}
VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    model: str
    """Name of the member."""
    length: int
    """Tokens of a row."""
    rows: int = 1
    """Rows at once."""
    gradient: str = "bptt"
    """How the gradient gets through the segments in training, one of `GRADIENTS`."""
    decode: bool = True
    """Whether to measure decoding too."""
    threads: int = 1
    """Threads; with one the times are CPU time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the language model."""
    code: str = ""
    """Hash of the code measured."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that compute."""

    @property
    def id(self) -> str:
        """Twelve hex digits that name the case."""
        return run_id(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def plan(
    models: Sequence[str],
    lengths: Sequence[int],
    *,
    gradients: Sequence[str] = ("bptt",),
    rows: int = 1,
    threads: int = 1,
    changes: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
) -> list[Case]:
    """The cases of a measurement: every model at every length, with every way of the gradient.

    Args:
        models: names of members.
        lengths: tokens of a row.
        gradients: of `GRADIENTS`.
        rows: rows at once.
        threads: threads of a process.
        changes: options in place of those of `OPTIONS`, for the members that have them.
        usual: the same, but no error if no member has such an option.

    Raises:
        LookupError: if there is no such member.
        ValueError: if a number is out of range, a way of the gradient unknown, or no member has an option.
    """
    for name, values in (("lengths", lengths), ("rows", (rows,)), ("threads", (threads,))):
        if not values or min(values) < 1:
            raise ValueError(f"{name} ({', '.join(map(str, values))}) must be at least 1")
    for gradient in gradients:
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient {gradient!r} is none of {', '.join(GRADIENTS)}")
    changes, unused = dict(changes or {}), set(changes or {})
    cases = []
    for model in models:
        known = known_options(model)
        wished = {**OPTIONS["*"], **OPTIONS.get(model, {}), **(usual or {})}
        if model == "full":
            wished["context"] = max(lengths)
        options = {key: value for key, value in (wished | changes).items() if key in known}
        unused -= known
        for length in lengths:
            for index, gradient in enumerate(gradients):
                cases.append(
                    Case(
                        model=model,
                        length=length,
                        rows=rows,
                        gradient=gradient,
                        # Decoding has no gradient: once is enough.
                        decode=index == 0,
                        threads=threads,
                        options=options,
                        code=code_digest(model, "benchmarks.cost.measure"),
                        libraries={name: version_of(name) for name in ("torch", "x-transformers")},
                    )
                )
    if unused:
        raise ValueError(f"none of these models has an option {', '.join(sorted(unused))}")
    return cases
