"""Add a memory to a decoder model of Hugging Face transformers."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from memory_models.checkpoints import CheckpointError
from memory_models.hf.adapter import WEIGHTS_FILE, MemoryAdapter, read_attached
from memory_models.hf.attached import CHILD, Attached
from memory_models.models import config_fields, create, describe
from memory_models.options import check_types
from memory_models.transformer import resolve_layers

# What the list of layers is called in the decoders of transformers.
_LISTS = ("layers", "h", "blocks", "block")


def attach(
    model: PreTrainedModel,
    memory: str = "memorizing",
    layers: Sequence[int] | None = None,
    *,
    freeze: bool = True,
    detach_input: bool = False,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Attached:
    """Add a memory to a decoder model, without changing what it computes until the memory is trained.

    Each chosen layer gets a member of this library of its own, which reads the layer's output and whose
    output is added to it through a gate that is zero at first. Nothing of the model is replaced: names in its
    `state_dict` stay, those of the added part (`…attached_memory…`) come beside them, and `remove()` takes it
    off again. Gates, norms and members are trained as part of `model.parameters()`.

    ```python
    attached = attach(model, "memorizing", layers=[-2], segment_length=512, memories=8192)
    optimizer = torch.optim.AdamW(attached.parameters())
    with attached.stream():
        for piece in text.split(2048, 1):
            model(piece, labels=piece).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    attached.save("my-model")
    ```

    Args:
        model: with `generate()`, such as `AutoModelForCausalLM.from_pretrained` returns.
        memory: name of a member, or `"package.module:Class"`.
        layers: which get one, from 0, or from -1 for the last; None: one, at three quarters of the depth,
            where the Memorizing Transformer has it (Wu et al. 2022, §4.1).
        freeze: whether the model's own parameters stop to require a gradient.
        detach_input: whether to cut the gradient from the memory to the layers below.
        dtype: of the added part; None: the model's. float32 is better to train with.
        **options: fields of the member's config. Here `dim` is the model's width unless given, `depth` is 1,
            and `heads` those of the model where they divide `dim`.

    Returns:
        The handle, which carries the memory from call to call, saves and removes it.

    Raises:
        TypeError: if `model` is not a model of transformers, for an unknown option, or for a wrong type.
        LookupError: for an unknown memory; the message names the nearest.
        ValueError: if it is no decoder model, has a memory already, or has not those layers.
    """
    decoder, blocks = _decoder_layers(model)
    if CHILD in model.__dict__:
        raise ValueError("the model has a memory already; take it off with remove() of what attach returned")
    if layers is None:
        chosen: tuple[int, ...] = (max(0, math.floor(0.75 * len(blocks) + 0.5) - 1),)
    else:
        check_types(attach, {"layers": layers})
        try:
            chosen = tuple(sorted(resolve_layers(layers, len(blocks))))
        except ValueError as error:
            raise ValueError(str(error).replace("memory_layers", "layers")) from None
    config = model.config.get_text_config(decoder=True)
    options = {**_defaults(memory, config, options), **options}
    if dtype is None:
        dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    adapters, description = {}, {}
    for index in chosen:
        member = create(memory, **options)
        description = describe(member)
        adapter = MemoryAdapter(member, hidden_size=config.hidden_size, detach_input=detach_input)
        device = next(blocks[index].parameters()).device
        adapters[index] = adapter.to(device=device, dtype=dtype).train(model.training)
    about = {
        "memory": description["model"],
        "layers": chosen,
        "hidden_size": config.hidden_size,
        "detach_input": detach_input,
        "options": description["options"],
    }
    return Attached(
        model,
        decoder,
        {index: blocks[index] for index in chosen},
        adapters,
        # As it will be read back: tuples are lists in JSON.
        description=json.loads(json.dumps(about)),
        freeze=freeze,
    )


def load_attached(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> Attached:
    """Add to a model what `Attached.save` wrote.

    Args:
        model: like the one it was trained with.
        folder: with the file `attached_memory.safetensors`.
        freeze: as in `attach`.
        dtype: as in `attach`.

    Raises:
        FileNotFoundError: if the folder has no such file.
        CheckpointError: if the file is damaged, does not describe a memory, or the model has another width.
        TypeError, ValueError: as `attach`.
    """
    path = Path(folder) / WEIGHTS_FILE
    description, _ = read_attached(path)
    _, blocks = _decoder_layers(model)
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    try:
        if description["hidden_size"] != hidden_size or max(description["layers"]) >= len(blocks):
            raise CheckpointError(
                f"{path} is for a model of width {description['hidden_size']} with more than "
                f"{max(description['layers'])} layers, this one has width {hidden_size} and {len(blocks)}"
            )
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in description["options"].items()
        }
        attached = attach(
            model,
            description["memory"],
            description["layers"],
            freeze=freeze,
            detach_input=description["detach_input"],
            dtype=dtype,
            **options,
        )
    except KeyError as error:
        raise CheckpointError(f"{path} does not describe a memory: it has no {error}") from error
    try:
        attached.load(folder)
    except BaseException:
        attached.remove()
        raise
    return attached


def _decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"attach takes a model of transformers, got {name}; for your own: memory_models.create"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"attach takes a decoder model with generate(), as AutoModelForCausalLM gives; {name} is none"
        )
    decoder = model.get_decoder()
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            f"{name} has no past_key_values, with which a memory travels from step to step of generate()"
        )
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for attribute in _LISTS:
        blocks = getattr(decoder, attribute, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) >= depth:
            return decoder, blocks
    raise ValueError(
        f"found no list of {depth} decoder layers in {name} (looked for {', '.join(_LISTS)} in its "
        f"{type(decoder).__name__}); attach knows decoders built like GPT-2, Llama and Qwen"
    )


def _defaults(memory: str, config: Any, given: dict[str, Any]) -> dict[str, Any]:
    known = config_fields(memory)
    dim = given.get("dim", config.hidden_size)
    defaults = {"dim": dim, "depth": 1}
    if isinstance(dim, int) and dim % config.num_attention_heads == 0:
        defaults["heads"] = config.num_attention_heads
    return {name: value for name, value in defaults.items() if name in known}
