"""Files that look like programs, and the task `text` over them."""

from __future__ import annotations

import random
import string
from pathlib import Path

from benchmarks.corpus import Corpus, Document, load_corpus
from benchmarks.task import create_task
from benchmarks.tasks.text import Text

SEGMENT = 16
KINDS = {"bytes": {"tokens": "bytes"}, "bpe": {"tokens": "bpe", "vocab_size": 300}}


def source(index: int) -> str:
    """Something like a program, with names of its own that come again near and far."""
    draw = random.Random(index)
    own = ["".join(draw.choices(string.ascii_lowercase, k=draw.randrange(2, 9))) for _ in range(12)]
    # in two, three and four files: the border between rare and not
    own += [f"pair{index // 2}", f"trio{index // 3}", f"four{index // 4}"] * 2
    common = ["self", "value", "x", "items2", "_private", "for", "return"]
    lines = []
    for _ in range(draw.randrange(30, 160)):
        called = draw.choice(own) + draw.choice(["", "_1", "2"])
        indent = "    " * draw.randrange(3)
        lines.append(
            f"{indent}{draw.choice(common)} = {called}({draw.choice(own)}, 12e4) + 0xff # and then {called}"
        )
    return "\n".join(lines) + "\n"


def write_programs(root: Path) -> Path:
    """24 files of `source` in folder `root`."""
    for index in range(24):
        (root / f"{index:02}.py").write_text(source(index))
    return root


def make(folder: Path, cache: Path, **options: object) -> Text:
    sizes = {"segment_length": SEGMENT, "evaluation_tokens": 5000, "min_bytes": 100}
    made = create_task("text", cache=cache, data=str(folder), **{**sizes, **options})
    assert isinstance(made, Text)
    return made


def corpus_of(folder: Path) -> Corpus:
    return load_corpus(str(folder), min_bytes=100)


def pieces(task: Text, document: Document) -> tuple[list[int], list[str]]:
    """Ids and texts of a document's tokens, by the trained encoding itself."""
    if task.config.tokens == "bytes":
        return list(document.content), [chr(byte) for byte in document.content]
    import tokenizers

    encoded = tokenizers.Tokenizer.from_str(task._text.tokenizer).encode(document.content.decode())
    return encoded.ids, [document.content.decode()[a:b] for a, b in encoded.offsets]
