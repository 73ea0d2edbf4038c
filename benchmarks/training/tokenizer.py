"""Text to token ids and back: bytes, or a Hugging Face tokenizer file."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_models.files import replace_file
from memory_models.hub import TOKENIZER_FILE

BYTES = "bytes"
_ENCODED_AT_ONCE = 64


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used."""


class Tokenizer:
    """Bytes, or what a `tokenizer.json` says.

    Args:
        text: the content of the file; empty: bytes.
    """

    def __init__(self, text: str = "") -> None:
        self.text = text
        self._inner: Any = None
        self.vocab_size = 256
        if text:
            self._inner = _import_tokenizers().Tokenizer.from_str(text)
            # Not their number: ids may leave gaps.
            self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1
            if not self.vocab_size:
                raise TokenizerError("the tokenizer has no tokens")
            # Of a file made for fixed lengths: a document is neither cut nor filled up.
            self._inner.no_truncation()
            self._inner.no_padding()

    @property
    def is_bytes(self) -> bool:
        """Whether a token is a byte."""
        return self._inner is None

    @property
    def fingerprint(self) -> str:
        """Hash of the file; `"bytes"` for bytes."""
        return BYTES if self.is_bytes else hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def encode(self, content: bytes) -> NDArray[np.integer]:
        """The ids of one text, valid UTF-8 unless tokens are bytes."""
        return self.encode_all([content])[0]

    def encode_all(self, contents: Sequence[bytes]) -> list[NDArray[np.integer]]:
        """The ids of each text."""
        if self._inner is None:
            return [np.frombuffer(content, dtype=np.uint8) for content in contents]
        kind = np.uint16 if self.vocab_size <= 2**16 else np.int32
        found: list[NDArray[np.integer]] = []
        # Few at a time: an encoding holds a hundred times the bytes of its ids.
        for start in range(0, len(contents), _ENCODED_AT_ONCE):
            texts = [
                content.decode(errors="replace") for content in contents[start : start + _ENCODED_AT_ONCE]
            ]
            encoded = self._inner.encode_batch(texts, add_special_tokens=False)
            found += [np.array(one.ids, dtype=kind) for one in encoded]
        return found

    def id_of(self, token: str) -> int:
        """The id of a token by its name.

        Raises:
            TokenizerError: if there is none.
        """
        found = None if self._inner is None else self._inner.token_to_id(token)
        if found is None:
            raise TokenizerError(f"the tokenizer has no token {token!r}")
        return int(found)

    def stream(self) -> Callable[[int], str]:
        """A function from one id after the other to the text that it completes, often empty or a word."""
        if self._inner is None:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda token: decoder.decode(bytes([token]))
        return _TextStream(self._inner.decode)

    def save(self, folder: Path) -> None:
        """Write the file into a model's folder, or remove one that is there if tokens are bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.text:
            replace_file(folder / TOKENIZER_FILE, lambda path: path.write_text(self.text, encoding="utf-8"))
        else:
            (folder / TOKENIZER_FILE).unlink(missing_ok=True)


class _TextStream:
    # A token's text may depend on the one before (a space that the first word of a text has not), and a
    # character may take several tokens: what is new is the difference of two texts that start together.
    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._new: list[int] = []

    def __call__(self, token: int) -> str:
        self._new.append(token)
        before, after = self._decode(self._context), self._decode(self._context + self._new)
        if len(after) <= len(before) or after.endswith("�"):
            return ""
        self._context, self._new = self._new, []
        return after[len(before) :]


def load_tokenizer(source: str | Path) -> Tokenizer:
    """`"bytes"`, a tokenizer file, or the folder that holds one under its usual name.

    Raises:
        FileNotFoundError: if there is no such file.
        TokenizerError: if it cannot be read as a tokenizer.
        ImportError: if the package tokenizers is needed and not installed.
    """
    if str(source) == BYTES:
        return Tokenizer()
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer file {path}; give a tokenizer.json of Hugging Face tokenizers, or {BYTES}"
        )
    _import_tokenizers()
    try:
        text = path.read_text(encoding="utf-8")
        if not text:
            raise TokenizerError("it is empty")
        return Tokenizer(text)
    except OSError:
        raise
    # The package raises plain `Exception`.
    except Exception as error:
        raise TokenizerError(f"{path} is no tokenizer file of Hugging Face tokenizers: {error}") from error


def tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model's folder.

    Raises:
        TokenizerError: if there is none and the model's tokens are not bytes, or it does not fit the model.
    """
    if (folder / TOKENIZER_FILE).exists():
        tokenizer = load_tokenizer(folder)
    elif vocab_size == 256:
        tokenizer = Tokenizer()
    else:
        raise TokenizerError(
            f"{folder} has no {TOKENIZER_FILE} and the model has {vocab_size} tokens, so they are not bytes; "
            "put the tokenizer that it was trained with into the folder"
        )
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {vocab_size}: it is not "
            "the one that the model was trained with"
        )
    return tokenizer


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "a tokenizer file needs the package tokenizers: pip install 'memory-models[bench]'"
        ) from error
    return tokenizers
