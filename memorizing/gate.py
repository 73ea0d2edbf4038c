"""What a layer may learn about the age of its memories, as small continuous networks over position.

Both start as nothing: their last layers are zero, so that the layer begins as the paper's (Wu et al. 2022,
§3.1). An age is counted in pairs: 0 is the newest pair of the memory.
"""

# b batch, t time, h heads, k pairs read, f features

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 16
# Logarithms of ages reach 12 at 262,144 memories; networks want numbers around one.
LOG_SCALE = 4.0


def log_age(ages: Tensor, dtype: torch.dtype) -> Tensor:
    """`log(1 + age)` on the networks' scale, 0 for the newest pair and for a slot without one (-1)."""
    return ages.clamp(min=0).to(dtype).log1p() / LOG_SCALE


class AgeBias(nn.Module):
    """What is added to the logit of a pair of some age: a network from log(1 + age) to a number per head.

    Continuous positions, as in the log-spaced position bias of Swin V2 (Liu et al. 2022, §3.3), so that a
    network trained with few memories says something about the ages in a larger one.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(1, HIDDEN)
        self.leave = nn.Linear(HIDDEN, heads, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, ages: Tensor) -> Tensor:
        """Ages int64 `[n]` to what is added to a logit, `[heads, n]`."""
        return self.leave(self._hidden(ages)).T

    def of_each(self, ages: Tensor) -> Tensor:
        """Ages of pairs that each head read, `[batch, time, heads, k]`, to a number for each."""
        return torch.einsum("bthkf,hf->bthk", self._hidden(ages), self.leave.weight)

    def _hidden(self, ages: Tensor) -> Tensor:
        return F.silu(self.enter(log_age(ages, self.enter.weight.dtype)[..., None]))


class MemoryGate(nn.Module):
    """The logit of a head's gate, from how many pairs its row holds and how old those attended to are."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(2, HIDDEN)
        self.leave = nn.Parameter(torch.zeros(heads, HIDDEN))

    def forward(self, held: Tensor, ages: Tensor, weights: Tensor) -> Tensor:
        """What is added to the gate's logit, `[batch, time, heads, 1]`.

        Args:
            held: int64 `[batch]`, pairs that each row holds.
            ages: int64 `[batch, time, heads, k]` of the pairs retrieved, -1 where there is none.
            weights: `[batch, time, heads, k]`, their shares of the attention; no gradient reaches them.
        """
        dtype = self.leave.dtype
        mean = (weights.detach() * log_age(ages, weights.dtype)).sum(-1).to(dtype)
        count = log_age(held, dtype)[:, None, None].expand_as(mean)
        hidden = F.silu(self.enter(torch.stack([count, mean], -1)))
        return torch.einsum("bthf,hf->bth", hidden, self.leave)[..., None]
