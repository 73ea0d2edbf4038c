"""Tiny random models of Hugging Face transformers, built offline, and a memory attached to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB, WIDTH, SEGMENT = 31, 16, 4
BASES = ("gpt2", "llama", "qwen2", "qwen3")
MEMORIES = ("memorizing", "memformer", "memxl", "htm")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
_CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def base(name: str = "llama", *, width: int = WIDTH, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=width,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = getattr(transformers, f"{_CLASSES[name]}Config")(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    return getattr(transformers, f"{_CLASSES[name]}ForCausalLM")(config).eval()


def attached_to(model: Any, memory: str = "memorizing", layers: Any = (0, 1), **options: Any) -> Any:
    from memory_models.hf import attach

    return attach(model, memory, layers, **{"segment_length": SEGMENT, **options})


@torch.no_grad()
def open_gates(attached: Any, *, factor: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(1)
    for adapter in attached.adapters.values():
        adapter.gate.copy_(factor * torch.randn(adapter.gate.shape, generator=generator))
    return attached


def tokens(rows: int = 2, time: int = 11, seed: int = 2) -> Tensor:
    return torch.randint(1, VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def cut_attention(model: Any) -> Any:
    # Then a layer's output depends on its own token alone, so that nothing but the memory knows the past.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "attn.c_proj.weight")):
            parameter.zero_()
    return model


@torch.no_grad()
def beam_search(model: Any, ids: Tensor, beams: int, steps: int) -> Tensor:
    """The best of `beams` continuations of one row, all read again from the beginning at each step."""
    scores, texts = torch.zeros(1), ids
    for _ in range(steps):
        grown = scores[:, None] + model(texts, use_cache=False).logits[:, -1].log_softmax(-1)
        scores, best = grown.flatten().topk(beams)
        texts = torch.cat([texts[best // VOCAB], (best % VOCAB)[:, None]], 1)
    return texts[:1]
