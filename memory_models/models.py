"""The members by name: `create("htm", dim=256)`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memory_models.lm import MemoryLM
from memory_models.module import MemoryModule
from memory_models.options import check_types
from memory_models.registry import Registry, import_target, nearest

ENTRY_POINTS = "memory_models.models"
_RECIPE = "_memory_models_recipe"


@dataclass(frozen=True)
class ModelInfo:
    """One member of the family, as the registry knows it; only strings, nothing imported.

    Attributes:
        name: what `create` is given.
        target: `"package.module:Class"` of a `MemoryModule` with a `config_class` attribute (a dataclass
            of options), constructed as `Class(config)`.
        summary: one line.
        tags: such as `family` or `control`.
        carries: what the memory holds from segment to segment.
        paper: where it comes from.
    """

    name: str
    target: str
    summary: str = ""
    tags: tuple[str, ...] = ()
    carries: str = ""
    paper: str = ""


models: Registry[ModelInfo] = Registry("model", group=ENTRY_POINTS, make=ModelInfo)

for _entry in (
    ModelInfo(
        "htm",
        "htm.model:HTM",
        summary="Hierarchical Transformer Memory: attend to chunk summaries, then inside the best chunks",
        tags=("family",),
        carries="per layer: chunks of past hiddens, their summaries, an open chunk",
        paper="Lampinen et al. 2021, arXiv:2105.14039",
    ),
    ModelInfo(
        "memformer",
        "memformer.model:MemformerDecoder",
        summary="Memformer: read memory slots, which take in each segment when it ends",
        tags=("family",),
        carries="memory slots on the unit sphere, with gradient",
        paper="Wu et al. 2020, arXiv:2010.06891",
    ),
    ModelInfo(
        "memorizing",
        "memorizing.model:Memorizing",
        summary="Memorizing Transformer: attend to the nearest of all earlier keys and values",
        tags=("family",),
        carries="per memory layer: keys and values of past tokens, first in, first out",
        paper="Wu et al. 2022, arXiv:2203.08913",
    ),
    ModelInfo(
        "memxl",
        "memxl.model:MemXL",
        summary="Memory Transformer-XL: a short memory per layer, and slots written at each segment's end",
        tags=("family",),
        carries="per layer: hiddens of the last tokens; for all layers: gated slots, with gradient",
        paper="after Dai et al. 2019, arXiv:1901.02860, and the package memory-transformer-xl",
    ),
    ModelInfo(
        "window",
        "benchmarks.controls.window:Window",
        summary="the same transformer with no memory: lower control",
        tags=("control",),
        carries="nothing",
    ),
    ModelInfo(
        "full",
        "benchmarks.controls.full:Full",
        summary="the same transformer attending to everything so far: upper control",
        tags=("control",),
        carries="per layer: keys and values of the last `context` tokens, with gradient",
        paper="Vaswani et al. 2017, arXiv:1706.03762",
    ),
    ModelInfo(
        "transformer-xl",
        "benchmarks.controls.transformer_xl:TransformerXL",
        summary="segment recurrence with a cache per layer, through x-transformers",
        tags=("control",),
        carries="per layer: hiddens of the last `cache` tokens, without gradient",
        paper="Dai et al. 2019, arXiv:1901.02860",
    ),
    ModelInfo(
        "gru",
        "benchmarks.controls.gru:GRU",
        summary="gated recurrent units, no attention",
        tags=("control",),
        carries="per layer: one hidden vector",
        paper="Cho et al. 2014, arXiv:1406.1078",
    ),
):
    models.register(_entry)


def register(entry: ModelInfo) -> None:
    """Add a member; duplicate names raise `ValueError`."""
    models.register(entry)


def list_models(pattern: str = "*", *, tag: str | None = None) -> list[str]:
    """Names of members that match a shell pattern and carry a tag, plug-ins included."""
    wanted = models.names(pattern)
    return [entry.name for entry in models if entry.name in wanted and (tag is None or tag in entry.tags)]


def info(name: str) -> ModelInfo:
    """What the registry knows of a member.

    Raises:
        LookupError: if there is none of that name.
    """
    return models.get(name)


def create(name: str, **options: Any) -> MemoryModule[Any]:
    """Build a member over embeddings `[batch, time, dim]`.

    Args:
        name: a registered name, or `"package.module:Class"`.
        **options: fields of the member's config; all have defaults.

    Raises:
        LookupError: for an unknown name; the message names the nearest.
        TypeError: for an unknown option; the message names the nearest. Or for a value of another type than
            the option's annotation.
        ValueError: for a value out of range.
    """
    model_class = models.load(name)
    config = _make_config(name, model_class, options)
    model = model_class(config)
    model.__dict__[_RECIPE] = {"model": name, "options": dataclasses.asdict(config)}
    return model


_LM_OPTIONS = tuple(
    name
    for name in inspect.signature(MemoryLM.__init__).parameters
    if name not in ("self", "module", "vocab_size")
)


def create_lm(name: str, *, vocab_size: int, **options: Any) -> MemoryLM:
    """Build a language model around a member.

    Args:
        name: a registered name, or `"package.module:Class"`.
        vocab_size: number of token ids.
        **options: the member's options and those of `MemoryLM` (`tie_embeddings`, `embedding_std`,
            `embedding_scale`).

    Raises:
        LookupError, TypeError, ValueError: as `create`.
    """
    check_options(name, options)
    check_types(MemoryLM.__init__, {"vocab_size": vocab_size})
    own = {key: options.pop(key) for key in _LM_OPTIONS if key in options}
    model = MemoryLM(create(name, **options), vocab_size=vocab_size, **own)
    model.__dict__[_RECIPE] = {"vocab_size": vocab_size, **own}
    return model


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what `create_lm` would not take as options of a model, as to names and types.

    Raises:
        TypeError: for an unknown option, or for a value of another type.
        ValueError: for another string than those an option may have.
    """
    config_class = _config_class(name, models.load(name))
    _check_names(name, options, {*(field.name for field in dataclasses.fields(config_class)), *_LM_OPTIONS})
    own = {key: value for key, value in options.items() if key in _LM_OPTIONS}
    check_types(MemoryLM.__init__, own)
    check_types(config_class, {key: value for key, value in options.items() if key not in own})


def config_fields(name: str) -> dict[str, Any]:
    """The options of a member with their defaults."""
    config_class = _config_class(name, models.load(name))
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def describe(model: MemoryModule[Any] | MemoryLM) -> dict[str, Any]:
    """What `build` needs to make the same model again, as JSON values.

    Raises:
        ValueError: if the model was not made by `create` or `create_lm`.
    """
    recipe = model.__dict__.get(_RECIPE)
    if recipe is None:
        raise ValueError(
            f"this {type(model).__name__} was not made by create or create_lm, so its options are not known; "
            "make it with create, which also takes 'package.module:Class', or save its state_dict yourself"
        )
    if isinstance(model, MemoryLM):
        return {"language_model": recipe, **describe(model.module)}
    return dict(recipe)


def build(description: dict[str, Any]) -> MemoryModule[Any] | MemoryLM:
    """The model that `describe` described, with fresh weights."""
    options: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in description["options"].items()
    }
    if "language_model" in description:
        return create_lm(description["model"], **description["language_model"], **options)
    return create(description["model"], **options)


def _make_config(name: str, model_class: Any, options: dict[str, Any]) -> Any:
    config_class = _config_class(name, model_class)
    _check_names(name, options, {field.name for field in dataclasses.fields(config_class)})
    # Before the config, which compares values; and for configs of other distributions, which check none.
    check_types(config_class, options)
    return config_class(**options)


def _check_names(name: str, options: Iterable[str], known: Collection[str]) -> None:
    for option in options:
        if option not in known:
            raise TypeError(f"unknown option {option!r} for model {name!r}. {nearest(option, known)}")


def _config_class(name: str, model_class: Any) -> Any:
    config_class = getattr(model_class, "config_class", None)
    if isinstance(config_class, str):
        config_class = import_target(config_class)
    if config_class is None or not dataclasses.is_dataclass(config_class):
        raise TypeError(f"model {name!r} ({model_class}) has no config_class, a dataclass of its options")
    return config_class
