"""Memorizing Transformer (Wu et al. 2022, arXiv 2203.08913), and `KNNMemory`, its memory, usable alone."""

from memorizing.classic import MemorizingTransformer, load_published
from memorizing.config import MemorizingConfig
from memorizing.gate import AgeBias, MemoryGate
from memorizing.knn import FaissOptions, KNNMemory, MemoryFileError
from memorizing.layers import KNNAttention, read_pairs
from memorizing.memory import MemorizingMemory, OutsidePairs, PairMemory, XLCache
from memorizing.model import Memorizing
from memorizing.store import OutsideStore, StoreError

__distribution__ = "memory-models"

__all__ = [
    "AgeBias",
    "FaissOptions",
    "KNNAttention",
    "KNNMemory",
    "Memorizing",
    "MemorizingConfig",
    "MemorizingMemory",
    "MemorizingTransformer",
    "MemoryFileError",
    "MemoryGate",
    "OutsidePairs",
    "OutsideStore",
    "PairMemory",
    "StoreError",
    "XLCache",
    "load_published",
    "read_pairs",
]
