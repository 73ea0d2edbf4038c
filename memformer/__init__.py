"""Memformer (Wu et al. 2020, arXiv 2010.06891): memory slots that segments read and write."""

from memformer.classic import Memformer, load_published
from memformer.config import MemformerConfig
from memformer.layers import GatedSlotWrite, SlotAttention, SlotWrite
from memformer.memory import MemformerMemory
from memformer.model import MemformerDecoder
from memformer.replay import memory_replay_backprop

__distribution__ = "memory-models"

__all__ = [
    "GatedSlotWrite",
    "Memformer",
    "MemformerConfig",
    "MemformerDecoder",
    "MemformerMemory",
    "SlotAttention",
    "SlotWrite",
    "load_published",
    "memory_replay_backprop",
]
