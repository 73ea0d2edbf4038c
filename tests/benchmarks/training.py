"""A small corpus, a small tokenizer and small trainings for the tests of `memory-bench train`."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.training.settings import TrainConfig

TEXT = "the memory of a row goes on while its document lasts, für jede Zeile – 記憶 and 🙂 too"
WORDS = TEXT.split()
MODEL = ("dim=16", "depth=2", "heads=2", "segment_length=8")


def write_corpus(folder: Path, documents: int = 12) -> Path:
    """Documents of words at random, of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    for number in range(documents):
        words = (draw.choice(WORDS) for _ in range(15 + 3 * number))
        (folder / f"{number:02}.txt").write_text(f"{number}: {' '.join(words)}.\n", encoding="utf-8")
    return folder


def write_tokenizer(path: Path, *, vocab_size: int = 300) -> Path:
    """A byte-level encoding with a token for the end of a document."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    made.save(str(path))
    return path


def tiny(folder: Path, **changes: Any) -> TrainConfig:
    """A training of a few small steps on the corpus of `write_corpus`, made if it is not there."""
    data = folder / "text"
    if not data.exists():
        write_corpus(data)
    config = TrainConfig(
        data=data,
        model="memxl",
        out=folder / "out",
        set=MODEL,
        steps=6,
        batch_size=4,
        segments=2,
        warmup=2,
        min_bytes=10,
        held_out=2,
        held_out_tokens=60,
        evaluate_every=0,
        evaluation_rows=2,
        sample_tokens=0,
        device="cpu",
        threads=1,
    )
    return replace(config, **changes)


def words_of(config: TrainConfig) -> list[str]:
    """The options of `memory-bench train` that give this configuration."""
    usual = TrainConfig(data=config.data, model=config.model, out=config.out)
    words: list[str] = []
    for name, value in vars(config).items():
        if value == getattr(usual, name) and name not in ("data", "model", "out"):
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [option] if value else []
        else:
            words += [option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words
