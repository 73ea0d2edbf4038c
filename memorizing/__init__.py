"""Memorizing Transformer (Wu et al. 2022, arXiv 2203.08913), and `KNNMemory`, its memory, usable alone."""

from memorizing.config import MemorizingConfig
from memorizing.knn import FaissOptions, KNNMemory, MemoryFileError
from memorizing.layers import KNNAttention, read_pairs
from memorizing.memory import MemorizingMemory, PairMemory, XLCache
from memorizing.model import Memorizing

__distribution__ = "memory-models"

__all__ = [
    "FaissOptions",
    "KNNAttention",
    "KNNMemory",
    "Memorizing",
    "MemorizingConfig",
    "MemorizingMemory",
    "MemoryFileError",
    "PairMemory",
    "XLCache",
    "read_pairs",
]
