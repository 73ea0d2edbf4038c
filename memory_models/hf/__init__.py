"""Memory for models of Hugging Face transformers, and the members as models of its own.

`attach` adds a memory to a decoder model that somebody already has; `MemoryModelForCausalLM` is a member of
this library as an `AutoModelForCausalLM`. Importing this package registers that class with transformers, an
optional dependency: `pip install memory-models[hf]`.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "memory_models.hf needs transformers, which is not installed: pip install memory-models[hf]"
    ) from error

from memory_models.hf.adapter import AttachedMemory, MemoryAdapter
from memory_models.hf.attach import attach, load_attached
from memory_models.hf.attached import Attached
from memory_models.hf.cache import MemoryCache
from memory_models.hf.causal_lm import MemoryModelForCausalLM
from memory_models.hf.config import MemoryModelConfig

_transformers.AutoConfig.register(MemoryModelConfig.model_type, MemoryModelConfig, exist_ok=True)
_transformers.AutoModelForCausalLM.register(MemoryModelConfig, MemoryModelForCausalLM, exist_ok=True)

__all__ = [
    "Attached",
    "AttachedMemory",
    "MemoryAdapter",
    "MemoryCache",
    "MemoryModelConfig",
    "MemoryModelForCausalLM",
    "attach",
    "load_attached",
]
