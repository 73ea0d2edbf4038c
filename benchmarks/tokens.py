"""Documents as token ids: bytes, or a small byte-pair encoding trained on the training documents.

The trained encoding and the encoded corpus are kept in a cache folder under the hash of the corpus, as one
file that is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from benchmarks.corpus import Corpus, Document
from benchmarks.results import write_atomically

_log = logging.getLogger(__name__)

KINDS = ("bpe", "bytes")

# Line break with indent, punctuation with a space on either side, word, number, space. A name is never
# glued to a space or a bracket, so it is spelled with the same tokens wherever it stands.
PATTERN = r"\s*\n[ \t]*| ?[^\sA-Za-z0-9_]+ ?|[A-Za-z_]+|[0-9]+|\s+"
_TRAINING_BYTES = 16_000_000
_ENCODED_AT_ONCE = 64
_FORMAT = 1


@dataclass(frozen=True)
class Tokenised:
    """A corpus as token ids."""

    vocab_size: int
    lengths: NDArray[np.int64]
    """`[vocab_size]`, bytes of each token."""
    training: tuple[NDArray[np.integer], ...]
    """Token ids of each training document."""
    held_out: tuple[NDArray[np.integer], ...]
    """Token ids of each held-out document."""
    tokenizer: str
    """The trained encoding as the JSON of `tokenizers`; empty for bytes."""

    @property
    def fingerprint(self) -> str:
        """Hash of the encoding."""
        return hashlib.sha256(self.tokenizer.encode()).hexdigest()[:16]


def tokenise(corpus: Corpus, *, kind: str, vocab_size: int, cache: Path | None = None) -> Tokenised:
    """Encode all documents of a corpus.

    Args:
        corpus: the documents.
        kind: `"bpe"` or `"bytes"`.
        vocab_size: most tokens of the byte-pair encoding, 256 of which are the bytes; not used for bytes.
        cache: folder to keep the encoding in; None: the user's cache folder.

    Raises:
        ValueError: if `kind` is unknown.
        ImportError: if the encoding needs the package `tokenizers` and it is not installed.
    """
    documents = [*corpus.training, *corpus.held_out]
    if kind == "bytes":
        ids: list[NDArray[np.integer]] = [np.frombuffer(d.content, dtype=np.uint8) for d in documents]
        return _tokenised(corpus, ids, np.ones(256, dtype=np.int64), "")
    if kind != "bpe":
        raise ValueError(f"tokens ({kind!r}) must be one of {', '.join(KINDS)}")
    folder = default_cache() if cache is None else cache
    key = hashlib.sha256(f"{_FORMAT} {corpus.fingerprint} {vocab_size} {PATTERN}".encode()).hexdigest()[:16]
    path = folder / f"bpe-{key}.npz"
    arrays = _read(path)
    if arrays is None:
        arrays = _byte_pairs(corpus, documents, vocab_size)
        _write(path, arrays)
    ids = np.split(arrays["tokens"], arrays["borders"])
    return _tokenised(corpus, ids, arrays["lengths"].astype(np.int64), arrays["tokenizer"].tobytes().decode())


def default_cache() -> Path:
    """The user's cache folder for this project (XDG)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memory-models"


def _tokenised(
    corpus: Corpus, ids: list[NDArray[np.integer]], lengths: NDArray[np.int64], tokenizer: str
) -> Tokenised:
    border = len(corpus.training)
    return Tokenised(len(lengths), lengths, tuple(ids[:border]), tuple(ids[border:]), tokenizer)


def _byte_pairs(corpus: Corpus, documents: list[Document], vocab_size: int) -> dict[str, NDArray[np.integer]]:
    tokenizers = _import_tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(
        [
            split.Split(tokenizers.Regex(PATTERN), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(split.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_sample(corpus.training), trainer)
    ids: list[NDArray[np.integer]] = []
    # few at a time: an encoding holds a hundred times the bytes of its ids
    for start in range(0, len(documents), _ENCODED_AT_ONCE):
        texts = [document.content.decode() for document in documents[start : start + _ENCODED_AT_ONCE]]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids += [np.array(one.ids, dtype=np.uint16) for one in encoded]
    # in the byte-level alphabet one character stands for one byte
    lengths = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    return {
        "tokens": np.concatenate(ids),
        "borders": np.cumsum([len(i) for i in ids])[:-1],
        "lengths": np.array(lengths, dtype=np.int64),
        "tokenizer": np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8),
    }


def _sample(documents: tuple[Document, ...]) -> list[str]:
    """Training documents to learn the encoding from: all, or every n-th of a large corpus."""
    stride = 1 + sum(len(document.content) for document in documents) // _TRAINING_BYTES
    return [document.content.decode() for document in documents[::stride]]


def _import_tokenizers() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokens='bpe' needs the package tokenizers: install memory-models[bench], or take tokens='bytes'"
        ) from error
    return tokenizers


def _read(path: Path) -> dict[str, NDArray[np.integer]] | None:
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in ("tokens", "borders", "lengths", "tokenizer")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("made anew: %s cannot be read (%s)", path, error)
        return None


def _write(path: Path, arrays: dict[str, NDArray[np.integer]]) -> None:
    """Write all or nothing: several runs may prepare the same corpus at once, or be killed."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        _log.warning("not kept: %s cannot be written (%s)", path, error)
