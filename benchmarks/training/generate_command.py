"""`memory-bench generate`: go on from a prompt of any length, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.endings import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from benchmarks.training.processes import Processes
from benchmarks.training.tokenizer import tokenizer_of
from memory_models.generate import generate, sampler
from memory_models.hub import from_pretrained, local_folder
from memory_models.lm import MemoryLM


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Go on from a prompt of any length with a trained model; the text comes as it is drawn."""

    model: str
    """Folder of the model (OUT/model of a training), or its id on the Hugging Face Hub, owner/name."""
    prompt: str = ""
    """Text to go on from."""
    prompt_file: Path | None = None
    """File to go on from, in place of --prompt; - reads standard input."""
    tokens: int = 200
    """Most tokens to write."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from so many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the smallest set of tokens that holds this probability."""
    stop: str = ""
    """Token of the tokenizer that ends the text, such as <|endoftext|>."""
    seed: int = 0
    """Of the draws."""
    memory_row: int | None = None
    """Start with this row of the memory saved beside the model; default: with a fresh memory."""
    device: str = "auto"
    """Where to run; auto: an accelerator if there is one."""
    trust_classes: bool = False
    """Let a model from the Hub name any class of the installed packages."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options of `memory-bench generate` and write the text; returns the exit code."""
    import tyro

    try:
        config = tyro.cli(
            GenerateConfig,
            args=arguments,
            prog="memory-bench generate",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        for text in stream(config):
            print(text, end="", flush=True)
        print()
    except BrokenPipeError:
        # Whoever read it has had enough.
        sys.stderr.close()
        return EXIT_OK
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED
    except (LookupError, TypeError, ValueError, ImportError, OSError) as error:
        print(f"memory-bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


def stream(config: GenerateConfig, *, read: Callable[[], bytes] | None = None) -> Iterator[str]:
    """The text piece by piece, each as soon as its characters are complete.

    Args:
        config: what to write.
        read: gives standard input, for `--prompt-file -`.

    Raises:
        FileNotFoundError: if the model, its memory or the prompt file is missing.
        CheckpointError: if the model is damaged.
        ValueError: if the prompt is empty, an option is out of range, or the tokenizer does not fit.
    """
    prompt = _prompt(config, read or sys.stdin.buffer.read)
    device = Processes(config.device).device
    draw = sampler(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    wants_memory = config.memory_row is not None
    folder = local_folder(config.model, with_memory=wants_memory, trust_classes=config.trust_classes)
    memory = None
    if wants_memory:
        model, memory = from_pretrained(folder, with_memory=True, device=device)
    else:
        model = from_pretrained(folder, device=device)
    if not isinstance(model, MemoryLM):
        raise ValueError(
            f"{config.model} holds a {type(model).__name__} over embeddings, not a language model"
        )
    if memory is not None and config.memory_row is not None:
        if not 0 <= config.memory_row < memory.batch_size:
            raise ValueError(
                f"memory_row ({config.memory_row}) must lie between 0 and {memory.batch_size - 1}, the rows "
                "of the memory"
            )
        memory = memory.select(torch.tensor([config.memory_row]))
    tokenizer = tokenizer_of(folder, model.vocab_size)
    stop = tokenizer.id_of(config.stop) if config.stop else None
    ids = torch.tensor(tokenizer.encode(prompt).tolist(), dtype=torch.int64, device=device)[None]
    if not ids.numel():
        raise ValueError("the prompt has no token; give at least one")
    decode = tokenizer.stream()
    steps = generate(model, ids, max_new_tokens=config.tokens, memory=memory, sample=draw, stop=stop)
    for step in steps:
        token = int(step.token[0])
        if token == stop:
            return
        text = decode(token)
        if text:
            yield text


def _prompt(config: GenerateConfig, read: Callable[[], bytes]) -> bytes:
    if config.prompt and config.prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if config.prompt_file is None:
        content = config.prompt.encode()
    elif str(config.prompt_file) == "-":
        content = read()
    else:
        content = config.prompt_file.read_bytes()
    if not content:
        raise ValueError("the prompt is empty; give --prompt TEXT or --prompt-file FILE")
    return content
