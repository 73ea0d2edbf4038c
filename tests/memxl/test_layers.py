"""Memxl's attention alone: what has a place and what has none, and what it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memory_models import collect_stats
from memory_models.transformer import Place, SegmentAttention
from memxl import MemXLAttention, MemXLConfig
from tests.reference.memxl import attention as by_loops

DIM, LENGTH, SLOTS = 8, 6, 3


def layer(*, matching: bool = False, reads_long: bool = True, **options: Any) -> MemXLAttention:
    sizes = {"dim": DIM, "heads": 2, "segment_length": LENGTH, "lmem_len": SLOTS}
    config = MemXLConfig(**(sizes | options))
    made = MemXLAttention(config, matching=matching, reads_long=reads_long).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def read(made: SegmentAttention, x: Tensor, filled: int = 0, **given: Tensor) -> Tensor:
    place = Place.of(torch.full((len(x),), filled), x.shape[1], None, LENGTH)
    return made(x, made.init_cache(len(x)), place, **given)[0]


def tokens(time: int = LENGTH) -> Tensor:
    return torch.randn(2, time, DIM, dtype=torch.float64)


@pytest.mark.parametrize("matching", [False, True])
@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("reads_long", [False, True])
def test_it_equals_loops_over_all_that_a_token_sees(
    matching: bool, persistent: int, reads_long: bool
) -> None:
    made = layer(matching=matching, persistent=persistent, reads_long=reads_long)
    x, short, long = tokens(), tokens(4), tokens(SLOTS)
    held = torch.tensor([[True] * 4, [False] * 3 + [True]])
    short = torch.where(held[..., None], short, 0)
    seen = read(made, x, short=short, held=held, long=long)
    for row in range(2):
        earlier = list(short[row][held[row]])
        wanted = torch.stack(by_loops(made, list(x[row]), earlier, long[row]))
        torch.testing.assert_close(seen[row], wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["persistent", "long"])
def test_what_has_no_place_is_seen_alike_from_everywhere(kind: str) -> None:
    # One pair without a place, tokens whose keys and values are zero: a token with n tokens in sight gives
    # the pair e^logit / (e^logit + n) of its attention, and equal tokens must have equal logits.
    made = layer(persistent=int(kind == "persistent"), reads_long=kind == "long", lmem_len=1, heads=1)
    with torch.no_grad():
        made.to_keys.weight.zero_()
        made.to_values.weight.zero_()
        made.to_out.weight.copy_(torch.eye(DIM))
    x, long = tokens(1).expand(-1, LENGTH, -1), tokens(1)
    short, held = tokens(4), torch.ones(2, 4, dtype=torch.bool)
    seen = read(made, x, short=short, held=held, long=long)
    if kind == "persistent":
        value = made.persistent_values[0, 0].expand(2, -1)
    else:
        content = torch.nn.functional.rms_norm(long[:, 0], (DIM,), made.slot_norm.weight)
        value = content @ made.slot_to_values.weight.T
    share = seen[..., 0] / value[:, None, 0]
    torch.testing.assert_close(seen, share[..., None] * value[:, None], atol=1e-12, rtol=0)
    logits = (share / (1 - share) * torch.arange(5, 5 + LENGTH)).log()
    torch.testing.assert_close(logits, logits[:, :1].expand(-1, LENGTH), atol=1e-10, rtol=0)


def test_places_of_the_short_memory_end_where_the_segment_begins() -> None:
    # Cut anywhere, a sequence is the same: what is not in the segment is in the short memory.
    made, x = layer(reads_long=False, lmem_len=0), tokens()
    whole = read(made, x)
    for cut in range(1, LENGTH):
        held = torch.ones(2, cut, dtype=torch.bool)
        rest = read(made, x[:, cut:], short=x[:, :cut], held=held)
        torch.testing.assert_close(rest, whole[:, cut:], atol=1e-12, rtol=0)


def test_in_the_matching_layer_the_token_before_the_first_is_the_newest_of_the_short_memory() -> None:
    made, x = layer(matching=True, reads_long=False, lmem_len=0), tokens()
    whole = read(made, x)
    for cut in range(1, LENGTH):
        held = torch.ones(2, cut, dtype=torch.bool)
        rest = read(made, x[:, cut:], short=x[:, :cut], held=held)
        torch.testing.assert_close(rest, whole[:, cut:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("matching", [False, True])
def test_without_a_memory_it_is_the_standard_attention(matching: bool) -> None:
    made = layer(matching=matching, reads_long=False)
    plain = SegmentAttention(made.config, matching=matching).double().eval()
    plain.load_state_dict(made.state_dict())
    x = tokens()
    torch.testing.assert_close(read(made, x), read(plain, x), atol=0, rtol=0)
    none = torch.zeros(2, 4, DIM, dtype=torch.float64)
    empty = read(made, x, short=none, held=torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(empty, read(plain, x), atol=1e-12, rtol=0)


def test_a_slot_is_found_by_its_content_and_its_own_vector() -> None:
    made, x, long = layer(), tokens(), tokens(SLOTS)
    order = torch.tensor([2, 0, 1])
    wanted = read(made, x, long=long)
    assert not torch.allclose(read(made, x, long=long[:, order]), wanted)
    with torch.no_grad():
        assert made.slot_places is not None
        made.slot_places.copy_(made.slot_places[order])
    torch.testing.assert_close(read(made, x, long=long[:, order]), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("matching", [False, True])
def test_the_shares_of_attention_by_hand(matching: bool) -> None:
    # With all keys zero every key gets the same weight.
    made = layer(matching=matching, persistent=2)
    with torch.no_grad():
        for weight in (made.to_keys.weight, made.slot_to_keys.weight, made.persistent_keys):
            assert weight is not None
            weight.zero_()
    held = torch.tensor([[True] * 4, [False] * 3 + [True]])
    with collect_stats() as stats:
        read(made, tokens(), short=tokens(4), held=held, long=tokens(SLOTS))
    for row, kept in enumerate((4, 1)):
        total = 2 + SLOTS + kept + torch.arange(1, LENGTH + 1).double()
        for name, count in (("long", SLOTS), ("short", kept)):
            share = stats[f"memxl/{name} share"][row, :, :, 0]
            torch.testing.assert_close(share, (count / total)[:, None].expand(-1, 2))


def test_what_is_missing_is_named() -> None:
    made, x = layer(), tokens()
    with pytest.raises(ValueError, match="reads the long memory"):
        read(made, x)
    with pytest.raises(ValueError, match="short and held"):
        read(made, x, long=tokens(SLOTS), short=tokens(4))
