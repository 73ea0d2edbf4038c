"""`KNNMemory` alone: a classifier that learns from single examples, for each user apart. Takes a second.

Rows of the memory are users. Each has shown 200 pictures (here: vectors around a centre for each kind) and
named them in a way of their own. A new picture is named by the nearest that this user has shown. The rows
never mix, the oldest pairs give way to new ones, one user's can be forgotten, and all come back from disk.
"""

from __future__ import annotations

import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing import KNNMemory

USERS, KINDS, DIM, NOISE = 4, 10, 32, 1.0
SHOWN, ASKED, NEIGHBOURS = 200, 100, 8


def pictures(centres: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each user `[USERS, count, DIM]` and the kind of each, int64 `[USERS, count]`."""
    kinds = torch.randint(KINDS, (USERS, count))
    return centres[kinds] + NOISE * torch.randn(USERS, count, DIM), kinds


def share_right(memory: KNNMemory, x: Tensor, names: Tensor) -> float:
    """How often the names of the nearest pairs, weighted by nearness, are right."""
    # attend = lookup, softmax over the scores, weighted sum of the values, for each row of the batch.
    votes = memory.attend(x, NEIGHBOURS, scale=10.0).output
    return (votes.argmax(-1) == names).float().mean().item()


def main() -> dict[str, float]:
    """Fill a memory, ask it, overfill it, forget, save and load; what was found at each point."""
    torch.manual_seed(0)
    centres = torch.randn(KINDS, DIM)
    # names_of[u, kind] is what user u calls it.
    names_of = torch.stack([torch.randperm(KINDS) for _ in range(USERS)])
    memory = KNNMemory(dim=DIM, value_dim=KINDS, max_memories=2 * SHOWN, num_indices=USERS, metric="cosine")
    shown, kinds = pictures(centres, SHOWN)
    memory.add(shown, F.one_hot(names_of.gather(1, kinds), KINDS).float())
    x, kinds = pictures(centres, ASKED)
    names = names_of.gather(1, kinds)
    found = {"own memory": share_right(memory, x, names)}

    # The same questions to the row of the next user: similar pictures, other names.
    with memory.at_batch_indices(torch.arange(USERS).roll(-1)):
        found["somebody else's"] = share_right(memory, x, names)

    # All users rename everything. As many pairs as there is room for push out the old ones.
    names_of = names_of.roll(1, dims=1)
    shown, kinds = pictures(centres, 2 * SHOWN)
    memory.add(shown, F.one_hot(names_of.gather(1, kinds), KINDS).float())
    x, kinds = pictures(centres, ASKED)
    found["after renaming"] = share_right(memory, x, names_of.gather(1, kinds))

    memory.clear([0])
    found["pairs of user 0 after clear"] = float(memory.counts[0])
    found["pairs of user 1"] = float(memory.counts[1])
    with tempfile.TemporaryDirectory() as folder:
        memory.save(f"{folder}/memory")
        again = KNNMemory.load(f"{folder}/memory")
    same = torch.equal(again.lookup(x, NEIGHBOURS).ids, memory.lookup(x, NEIGHBOURS).ids)
    found["same neighbours from disk"] = float(same)
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    return found


if __name__ == "__main__":
    main()
