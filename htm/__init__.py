"""Hierarchical Transformer Memory (Lampinen et al., arXiv 2105.14039)."""

from htm.chunks import chunk_positions, summarize, with_previous
from htm.classic import load_published
from htm.config import HTMConfig
from htm.layers import HTMAttention, HTMBlock
from htm.memory import ChunkMemory, HTMMemory
from htm.model import HTM

__distribution__ = "memory-models"

__all__ = [
    "HTM",
    "ChunkMemory",
    "HTMAttention",
    "HTMBlock",
    "HTMConfig",
    "HTMMemory",
    "chunk_positions",
    "load_published",
    "summarize",
    "with_previous",
]
