"""Memory Transformer-XL: Transformer-XL's short memory (Dai et al. 2019), and a gated long-term memory."""

from memxl.autoregressive import AutoregressiveWrapper, SegmentLoss, top_k, top_p
from memxl.classic import ClassicMemory, MemoryTransformerXL, Segment
from memxl.config import MemXLConfig
from memxl.gates import GRUGate, MogrifiedGate, Mogrifier, NBRCGate, make_gate
from memxl.layers import MemXLAttention
from memxl.memory import MemoryWriter, MemXLMemory, ShortMemory, linear_attention
from memxl.model import MemXL
from memxl.published import load_published

__distribution__ = "memory-models"

__all__ = [
    "AutoregressiveWrapper",
    "ClassicMemory",
    "GRUGate",
    "MemXL",
    "MemXLAttention",
    "MemXLConfig",
    "MemXLMemory",
    "MemoryTransformerXL",
    "MemoryWriter",
    "MogrifiedGate",
    "Mogrifier",
    "NBRCGate",
    "Segment",
    "SegmentLoss",
    "ShortMemory",
    "linear_attention",
    "load_published",
    "make_gate",
    "top_k",
    "top_p",
]
