"""What to measure a key/value memory with: sizes, keys that cluster as real ones do, and the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CONTEXT = 12  # bytes that a key is made from
_FADE = 0.75  # weight of a byte against the one after it


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size: each of `rows` rows holds `held` pairs and is asked `queries` times for `k` neighbours."""

    held: int
    rows: int = 2
    queries: int = 4096
    k: int = 32
    dim: int = 64
    added: int = 512
    """Pairs a row is given at a time."""


class Data(NamedTuple):
    """Pairs to fill with, `[rows, held, 2, dim]`; pairs to add then, likewise; queries `[rows, q, dim]`."""

    pairs: Tensor
    more: Tensor
    queries: Tensor


def cases() -> list[Case]:
    """The sizes that are reported."""
    sizes = (2048, 16_384, 65_536, 262_144)
    return [Case(held=held, rows=rows) for rows in (2, 8) for held in sizes]


def text_keys(text: bytes, n: int, dim: int, *, start: int = 0, noise: float = 0.02, seed: int = 0) -> Tensor:
    """Unit keys that cluster as a language model's do, near duplicates included: one for each byte of a text.

    Each is the sum of random vectors standing for the bytes before it, the nearest weighing most, and noise.

    Args:
        text: at least `n + 12` bytes; keys beyond its end start over.
        n: keys wanted.
        dim: their length.
        start: byte to begin with.
        noise: standard deviation of the noise.
        seed: of the noise; the vectors of the bytes are always the same.

    Returns:
        float32 `[n, dim]`.
    """
    vectors = torch.randn(_CONTEXT, 256, dim, generator=torch.Generator().manual_seed(1))
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    places = torch.arange(start, start + n + _CONTEXT) % len(codes)
    codes = codes[places]
    keys = torch.zeros(n, dim)
    for back in range(_CONTEXT):
        keys += _FADE**back * vectors[back][codes[_CONTEXT - back : _CONTEXT - back + n]]
    blur = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(F.normalize(keys, dim=-1) + noise * blur, dim=-1)


def data(case: Case, text: bytes) -> Data:
    """Keys from different places of the text for each row; queries near keys that are held."""
    n = case.held + case.added * 64
    keys = torch.stack(
        [text_keys(text, n, case.dim, start=row * len(text) // case.rows) for row in range(case.rows)]
    )
    generator = torch.Generator().manual_seed(5)
    pairs = torch.stack((keys, torch.randn(keys.shape, generator=generator)), 2)
    which = torch.randint(0, case.held, (case.rows, case.queries), generator=generator)
    near = keys.gather(1, which.unsqueeze(2).expand(-1, -1, case.dim))
    queries = near + 0.05 * torch.randn(near.shape, generator=generator)
    return Data(pairs[:, : case.held], pairs[:, case.held :], F.normalize(queries, dim=-1))


def matrix_product(queries: Tensor, keys: Tensor) -> None:
    """The limit of an exact search: the product of `[q, dim]` and `[n, dim]` in tiles that stay in cache."""
    tile = queries.new_empty(1024 * 256)
    for some_keys in keys.split(1024):
        for some in queries.split(256):
            out = tile[: len(some_keys) * len(some)].view(len(some_keys), len(some))
            torch.mm(some_keys, some.T, out=out)
