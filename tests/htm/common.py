"""A small HTM read with weights as if trained, the loop it must equal, and how the two are compared."""

import math
from typing import Any

import torch
from torch import Tensor

from htm import HTMAttention
from tests.reference import htm as reference

DIM, HEADS, WIDTH, CHUNK = 12, 3, 4, 4


def attention(dim: int = DIM, **options: Any) -> HTMAttention:
    options = {"heads": HEADS, "dim_head": WIDTH, "topk_mems": 2, "mem_chunk_size": CHUNK} | options
    module = HTMAttention(dim, **options).double()
    # trained weights are not as tame as fresh ones, and ties between chunks would hide the choice
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(dim) * 2)
    return module


def randn(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, **options)


def loop(module: HTMAttention, queries: Tensor, memories: Tensor, **masks: Any) -> Tensor:
    return reference.read(
        dict(module.named_parameters()),
        queries,
        memories,
        heads=module.heads,
        topk=module.topk_mems,
        chunk_size=module.mem_chunk_size,
        add_positions=module.add_pos_enc,
        detach=module.detach_memories,
        **masks,
    )


def gradients(module: HTMAttention, out: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters()) | {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    upstream = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    found = torch.autograd.grad(out, list(named.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(named.items(), found, strict=True)
    }


def assert_close(left: Tensor, right: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=atol)
