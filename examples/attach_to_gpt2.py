"""Give a GPT-2 that is there already a memory: attach it, train what was added, generate with it.

Takes about 10 seconds and needs `memory-models[hf]`. The model is a tiny GPT-2 with random weights, made here
so that nothing is downloaded; your own from `AutoModelForCausalLM.from_pretrained` goes in its place. A text
comes in pieces of 8 tokens, each a call of its own. The first piece says a name, and each asks for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memory_models.hf import attach

NAMES, NOISE = 8, 8
SAY, ASK = NAMES + NOISE, NAMES + NOISE + 1
PIECES, PIECE, ROWS = 3, 8, 32
STEPS = 100


def texts(rows: int) -> Tensor:
    """Tokens `[rows, PIECES, PIECE]`: noise, once SAY and a name, and ASK and that name in each piece."""
    tokens = torch.randint(NAMES, NAMES + NOISE, (rows, PIECES, PIECE))
    names, places, row = torch.randint(NAMES, (rows,)), torch.randint(PIECE - 3, (rows,)), torch.arange(rows)
    tokens[row, 0, places], tokens[row, 0, places + 1] = SAY, names
    tokens[:, :, -2], tokens[:, :, -1] = ASK, names[:, None]
    return tokens


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers with random weights."""
    sizes = {"vocab_size": ASK + 1, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, initializer_range=0.1, bos_token_id=SAY, eos_token_id=SAY)
    return GPT2LMHeadModel(config).eval()


def main(steps: int = STEPS) -> dict[str, float]:
    """Attach, compare, train, generate; the shares of names that are right, and what was added."""
    torch.manual_seed(0)
    model = tiny_gpt2()
    text = texts(256)
    with torch.no_grad():
        before = model(text[:, 0]).logits
        attached = attach(model, "memorizing", layers=[0], segment_length=PIECE, memories=32)
        unchanged = torch.equal(model(text[:, 0]).logits, before)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}

    optimizer = torch.optim.AdamW(attached.parameters(), lr=5e-3)
    for _ in range(steps):
        with attached.stream():
            for piece in texts(ROWS).unbind(1):
                logits = model(piece, use_cache=False).logits
                (F.cross_entropy(logits[:, -2], piece[:, -1]) / PIECES).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, weights[name])}

    # generate() reads the last piece; only the memory knows the ones before it.
    prompt, names = text[:, -1, :-1], text[:, -1, -1]
    greedy = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), attached.stream():
        for piece in text[:, :-1].unbind(1):
            model(piece, use_cache=False)
        told = model.generate(prompt, **greedy)[:, -1]
        attached.reset()
        untold = model.generate(prompt, **greedy)[:, -1]
    found = {
        "unchanged when attached": float(unchanged),
        "weights added": float(sum(weight.numel() for weight in attached.parameters())),
        "tensors of GPT-2 changed by training": float(sum("attached" not in name for name in changed)),
        "names right, memory carried": (told == names).float().mean().item(),
        "names right, memory reset": (untold == names).float().mean().item(),
    }
    for name, value in found.items():
        print(f"{name}: {value:.3f}" if "right" in name else f"{name}: {value:.0f}")
    return found


if __name__ == "__main__":
    main()
