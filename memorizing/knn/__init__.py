"""KNNMemory and its parts: the ring that holds pairs, the engines that find them, attention over them."""

from memorizing.knn.exact import TopK, block_top_k, exact_top_k
from memorizing.knn.faiss_engine import FaissOptions
from memorizing.knn.memory import KNNMemory
from memorizing.knn.results import Attended, Entry, Gathered, Held, Lookup, RowStats
from memorizing.knn.storage import MemoryFileError

__all__ = [
    "Attended",
    "Entry",
    "FaissOptions",
    "Gathered",
    "Held",
    "KNNMemory",
    "Lookup",
    "MemoryFileError",
    "RowStats",
    "TopK",
    "block_top_k",
    "exact_top_k",
]
