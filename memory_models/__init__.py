"""Memory-augmented transformers behind one interface.

`create` builds a member by name, `create_lm` a language model around it; a memory is a value that goes
in with one segment and comes out for the next. See `MemoryModule` for the contract and `check_model`
for its rules, which any module can be put to.
"""

from memory_models.checkpoints import CheckpointError, load_memory, load_model, save_memory, save_model
from memory_models.generate import Step, generate, greedy, sampler
from memory_models.hub import from_pretrained, push_to_hub, save_pretrained
from memory_models.lm import LMOutput, MemoryLM
from memory_models.models import ModelInfo, create, create_lm, info, list_models, models, register
from memory_models.module import MemoryModule
from memory_models.pretrained import Pretrained
from memory_models.registry import Registry, UnknownNameError
from memory_models.replay import Replay, memory_replay
from memory_models.ring import Ring
from memory_models.segments import Segment
from memory_models.state import Memory, cat, memory_state, static
from memory_models.stats import collect_stats, record
from memory_models.testing import ContractError, check_model
from memory_models.unroll import unroll

__distribution__ = "memory-models"

__all__ = [
    "CheckpointError",
    "ContractError",
    "LMOutput",
    "Memory",
    "MemoryLM",
    "MemoryModule",
    "ModelInfo",
    "Pretrained",
    "Registry",
    "Replay",
    "Ring",
    "Segment",
    "Step",
    "UnknownNameError",
    "cat",
    "check_model",
    "collect_stats",
    "create",
    "create_lm",
    "from_pretrained",
    "generate",
    "greedy",
    "info",
    "list_models",
    "load_memory",
    "load_model",
    "memory_replay",
    "memory_state",
    "models",
    "push_to_hub",
    "record",
    "register",
    "sampler",
    "save_memory",
    "save_model",
    "save_pretrained",
    "static",
    "unroll",
]
