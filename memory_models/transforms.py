"""Where operators of our own must give way to torch's."""

from __future__ import annotations

import torch


def needs_plain_operators() -> bool:
    """Whether an exported graph is written, or a transform of `torch.func` runs.

    The graph shall run without this library; transforms take no custom operator that has a gradient.
    """
    if torch.compiler.is_exporting():
        return True
    # What `torch.autograd.Function` asks before it refuses; compilers see through transforms themselves.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
