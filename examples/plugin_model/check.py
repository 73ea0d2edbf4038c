"""Put a model of your own to the rules of the contract, then use it by name. Takes about 30 seconds.

The model is in `fading_memory.py`. Without installing anything it is `"fading_memory:Fading"` wherever a
member's name is expected. After `pip install examples/plugin_model` it is `fading`, also for `memory-bench`.
"""

from __future__ import annotations

import torch

import memory_models
from memory_models.testing import RULES

NAME = "fading_memory:Fading"
# The rule "compile" takes most of the time.
SKIP: tuple[str, ...] = ()


def main(skip: tuple[str, ...] = SKIP) -> memory_models.MemoryLM:
    """Check a small one; a language model around it that has read a little, and can be saved."""
    small = memory_models.create(NAME, dim=8, averages=12, segment_length=6)
    memory_models.check_model(small, skip=skip)
    print(f"keeps {len(RULES) - len(skip)} of {len(RULES)} rules" + (f" ({skip} not tried)" if skip else ""))

    model = memory_models.create_lm(NAME, vocab_size=256, dim=64, averages=128)
    text = torch.tensor([list(b"what was said long ago fades, but is not gone. " * 20)])
    with torch.no_grad():
        logits, memory = memory_models.unroll(model, text)
    print(
        f"read {text.shape[1]} tokens; the memory is {memory.nbytes} bytes a row; logits {list(logits.shape)}"
    )
    return model


if __name__ == "__main__":
    main()
