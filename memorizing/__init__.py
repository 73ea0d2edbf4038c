"""Memorizing Transformer (Wu et al. 2022, arXiv 2203.08913), and `KNNMemory`, its memory, usable alone."""

from memorizing.knn import FaissOptions, KNNMemory, MemoryFileError

__distribution__ = "memory-models"

__all__ = ["FaissOptions", "KNNMemory", "MemoryFileError"]
