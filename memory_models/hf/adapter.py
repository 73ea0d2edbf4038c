"""What `attach` adds to a decoder layer, a member behind a gate that is closed at first, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory_models.advance import advance
from memory_models.checkpoints import CheckpointError, library_version, read_tensors, write_tensors
from memory_models.module import MemoryModule
from memory_models.state import Memory, memory_state

FORMAT = "memory-models attached"
FORMAT_VERSION = "1"
WEIGHTS_FILE = "attached_memory.safetensors"


@memory_state
class AttachedMemory(Memory):
    """The memories of all adapters of a model, in the order of their layers."""

    layers: tuple[Memory, ...]

    @property
    def open_length(self) -> Tensor:
        """int64 `[batch]`: tokens of the open segment, not yet written."""
        return self.layers[0].open_length


class MemoryAdapter(nn.Module):
    """Adds `tanh(gate) * member(norm(hidden))` to a layer's output.

    The gate is zero at first, so that the sum is the hidden unchanged and the gate is the first to learn
    (Flamingo, Alayrac et al. 2022, arXiv:2204.14198, §2.2: one number; here one for each channel).

    Args:
        member: any memory module; with another width than the model's, two linear maps go in between.
        hidden_size: width of the model's hidden states.
        detach_input: whether to cut the gradient from the memory to the model's layers below.
    """

    def __init__(self, member: MemoryModule[Any], *, hidden_size: int, detach_input: bool = False) -> None:
        super().__init__()
        same = member.dim == hidden_size
        self.detach_input = detach_input
        # A large model's hidden states grow with depth; a member expects embeddings of unit variance.
        self.norm = nn.RMSNorm(hidden_size)
        self.enter: nn.Module = nn.Identity() if same else nn.Linear(hidden_size, member.dim, bias=False)
        self.member = member
        self.leave: nn.Module = nn.Identity() if same else nn.Linear(member.dim, hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor, memory: Memory | None, mask: Tensor | None) -> tuple[Tensor, Memory]:
        """Add what the memory has to say.

        Args:
            hidden: `[batch, time, hidden_size]`, any number of tokens; anything at padding.
            memory: the member's, None starts afresh.
            mask: bool `[batch, time]`, false at padding; None: none.

        Returns:
            `[batch, time, hidden_size]` in the dtype of `hidden`, which is returned as it was at padding, and
            the next memory.
        """
        x = hidden.detach() if self.detach_input else hidden
        x = x.to(self.gate.dtype)
        if mask is not None:
            # where, not multiply: padding may hold NaN.
            x = torch.where(mask[..., None], x, 0)
        y, memory = advance(self.member, self.enter(self.norm(x)), memory, mask)
        return hidden + (torch.tanh(self.gate) * self.leave(y)).to(hidden.dtype), memory


def write_attached(folder: Path, description: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a description and tensors to one file in a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        "description": json.dumps(description, sort_keys=True),
    }
    write_tensors(folder / WEIGHTS_FILE, copies, about)


def read_attached(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors in a file that `Attached.save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, foreign or of another version.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}; a folder that Attached.save wrote has it")
    tensors, about = read_tensors(path)
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by Attached.save")
    if about.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {about.get('format_version')}, this library reads {FORMAT_VERSION}; "
            "load it with the library version it names and save it again"
        )
    return json.loads(about["description"]), tensors
