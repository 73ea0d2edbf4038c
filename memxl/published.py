"""Weights of the package memory-transformer-xl, loaded into our classic class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memxl.classic import MemoryTransformerXL

__all__ = ["load_published"]

_BUILD_ALIKE = "build the model with the published model's options"


def load_published(model: MemoryTransformerXL, state_dict: Mapping[str, Tensor]) -> MemoryTransformerXL:
    """Copy weights of memory-transformer-xl's `MemoryTransformerXL` into `model`.

    The outputs then agree to rounding wherever the package is not at fault; `docs/memxl-published.md` has
    the rest. Of its position table the newest `seq_len + mem_len` rows are taken, one for each distance
    between tokens, nearest last; the others belonged to the long memory, whose slots have no distance here.

    Args:
        model: built with the published model's options; dropouts have no weights.
        state_dict: as saved by memory-transformer-xl.

    Returns:
        `model` itself.

    Raises:
        ValueError: if a weight is missing, unknown or of another shape; nothing is loaded then.
    """
    published = _Published(state_dict)
    found = _translate(model, published)
    unknown = sorted(state_dict.keys() - published.used)
    if published.missing or unknown:
        raise ValueError(
            "these weights of memory-transformer-xl do not fit: missing "
            f"{published.missing or 'nothing'}, unknown {unknown or 'nothing'}; {_BUILD_ALIKE}"
        )
    parameters = dict(model.named_parameters())
    assert parameters.keys() == found.keys(), "a parameter of ours has no published counterpart"
    for name, value in found.items():
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"{name} would get the shape {list(value.shape)}, this model needs "
                f"{list(parameters[name].shape)}; {_BUILD_ALIKE}"
            )
    with torch.no_grad():
        for name, value in found.items():
            parameters[name].copy_(value)
    return model


class _Published:
    """The published state dict, and which of its weights were asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.used: set[str] = set()
        self.missing: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.used.add(name)
        if name in self.weights:
            return self.weights[name]
        self.missing.append(name)
        return torch.zeros(())

    def linear(self, name: str) -> dict[str, Tensor]:
        return {"weight": self(f"{name}.weight"), "bias": self(f"{name}.bias")}


def _translate(model: MemoryTransformerXL, published: _Published) -> dict[str, Tensor]:
    """Our parameters by name, made of the published weights."""
    found: dict[str, Tensor] = {"embed.weight": published("token_emb.weight")}

    def put(name: str, weights: Mapping[str, Tensor]) -> None:
        found.update({f"{name}.{part}": weight for part, weight in weights.items()})

    table = published("pos_emb")
    rows = model.seq_len + model.mem_len
    if table.dim() == 3 and table.shape[1] != rows + model.lmem_len:
        raise ValueError(
            f"pos_emb has {table.shape[1]} rows, that is seq_len + mem_len + lmem_len; this model's make "
            f"{model.seq_len} + {model.mem_len} + {model.lmem_len}; {_BUILD_ALIKE}"
        )
    found["distances"] = table[:, model.lmem_len :] if table.dim() == 3 else table
    if isinstance(model.from_embedding, torch.nn.Linear):
        put("from_embedding", published.linear("to_model_dim"))
        put("to_embedding", published.linear("to_logits.0"))
    put("to_logits", published.linear("to_logits.1"))
    for index, layer in enumerate(model.layers):
        ours = f"layers.{index}"
        for part, theirs in (("attention", "attn_layers"), ("feedforward", "ff_layers")):
            prefix = f"{theirs}.{index}"
            put(f"{ours}.{part}_norm", published.linear(f"{prefix}.fn.norm"))
            put(f"{ours}.{part}_gate", _gate(getattr(layer, f"{part}_gate"), prefix, published))
        body = f"attn_layers.{index}.fn.fn"
        found[f"{ours}.attention.to_queries.weight"] = published(f"{body}.to_q.weight")
        found[f"{ours}.attention.to_keys_values.weight"] = published(f"{body}.to_kv.weight")
        put(f"{ours}.attention.to_out", published.linear(f"{body}.to_out"))
        found[f"{ours}.attention.persistent"] = _rows(published(f"{body}.mem_kv"))
        body = f"ff_layers.{index}.fn.fn"
        put(f"{ours}.feedforward.to_inner", published.linear(f"{body}.w1"))
        put(f"{ours}.feedforward.to_out", published.linear(f"{body}.w2"))
    put("writer", _writer(model, published))
    return found


def _writer(model: MemoryTransformerXL, published: _Published) -> dict[str, Tensor]:
    prefix = "memory_network"
    # One number a layer, added to all features; ours is a vector.
    depths = published(f"{prefix}.depth_emb")
    return {
        "initial": _rows(published(f"{prefix}.init_lmem")),
        "places": _rows(published(f"{prefix}.lmem_pos_emb")),
        "depths": depths.reshape(-1, 1).expand(-1, model.dim),
        "persistent": _rows(published(f"{prefix}.mem_kv")),
        "to_queries.weight": published(f"{prefix}.attn.to_q").mT,
        "to_keys_values.weight": published(f"{prefix}.attn.to_kv").mT,
        "to_out.weight": published(f"{prefix}.attn.to_out").mT,
        **{f"gate.{name}": weight for name, weight in _nbrc(f"{prefix}.gate", published).items()},
    }


def _gate(gate: torch.nn.Module | None, prefix: str, published: _Published) -> dict[str, Tensor]:
    if gate is None:
        return {}
    cell = _nbrc(f"{prefix}.gru", published)
    if not hasattr(gate, "mogrifier"):
        return cell
    found = {f"gate.{name}": weight for name, weight in cell.items()}
    for ours, theirs in (("of_state", "Q"), ("of_candidate", "R")):
        first = published.linear(f"{prefix}.mogrify.{theirs}.0.0")
        second = published.linear(f"{prefix}.mogrify.{theirs}.0.1")
        if published.missing:
            continue
        found[f"mogrifier.{ours}.0.weight"] = first["weight"]
        found[f"mogrifier.{ours}.1.weight"] = second["weight"]
        # Two maps in a row need one bias.
        found[f"mogrifier.{ours}.1.bias"] = second["bias"] + second["weight"] @ first["bias"]
    return found


def _nbrc(prefix: str, published: _Published) -> dict[str, Tensor]:
    parts = {name: published.linear(f"{prefix}.{name}") for name in ("Ua", "Wa", "Uc", "Wc", "U")}
    if published.missing:
        return {}
    biases = [parts["Ua"]["bias"] + parts["Wa"]["bias"], parts["Uc"]["bias"] + parts["Wc"]["bias"]]
    return {
        "from_candidate.weight": torch.cat([parts[name]["weight"] for name in ("Ua", "Uc", "U")]),
        "from_candidate.bias": torch.cat([*biases, parts["U"]["bias"]]),
        "from_state.weight": torch.cat([parts[name]["weight"] for name in ("Wa", "Wc")]),
    }


def _rows(weight: Tensor) -> Tensor:
    """A learned input saved as `[1, rows, dim]`, as `[rows, dim]`."""
    return weight.reshape(-1, weight.shape[-1]) if weight.dim() else weight
