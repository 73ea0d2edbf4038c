"""What the HTM read may not see: masks, chunks that are not full, memories that are empty, bad numbers."""

import math

import pytest
import torch

from htm import summarize
from tests.htm.common import CHUNK, DIM, assert_close, attention, gradients, randn


def test_masked_chunk_is_as_good_as_removed() -> None:
    module, queries, chunks = attention(topk_mems=3), randn(1, 3, DIM), randn(1, 5, CHUNK, DIM)
    kept = [0, 2, 3, 4]
    removed = module(queries, chunks[:, kept].flatten(1, 2))
    mask, allowed = torch.ones(1, 5, CHUNK, dtype=torch.bool), torch.ones(1, 3, 5, dtype=torch.bool)
    mask[:, 1], allowed[..., 1] = False, False
    assert_close(module(queries, chunks.flatten(1, 2), mask.flatten(1)), removed)
    assert_close(module(queries, chunks.flatten(1, 2), chunk_attn_mask=allowed), removed)


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_query_that_can_see_nothing_gets_exactly_zero(bias: float) -> None:
    module, queries, memories = attention(), randn(2, 3, DIM), randn(2, 9, DIM)
    torch.nn.init.constant_(module.out.bias, bias)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    out = module(queries, memories, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_close(out[1:], module(queries[1:], memories[1:]))

    allowed = torch.ones(2, 3, 3, dtype=torch.bool)
    allowed[1, 2] = False
    out = module(queries, memories, chunk_attn_mask=allowed)
    assert torch.equal(out[1, 2], torch.zeros(DIM, dtype=torch.float64))
    assert_close(out[allowed.any(dim=-1)], module(queries, memories)[allowed.any(dim=-1)])


def test_a_token_alone_in_a_half_masked_chunk_is_averaged_over_itself() -> None:
    mask = torch.zeros(1, CHUNK, dtype=torch.bool)
    mask[0, 1] = True
    memories = randn(1, CHUNK, DIM)
    assert torch.equal(summarize(memories, CHUNK, mask=mask)[0, 0], memories[0, 1])


@pytest.mark.parametrize("queries", [0, 2])
def test_empty_memory_gives_zero_and_takes_part_in_training(queries: int) -> None:
    module, x = attention(), randn(2, queries, DIM, requires_grad=True)
    for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
        out = module(x, randn(2, 0, DIM), mask, torch.ones(2, queries, 0, dtype=torch.bool))
        assert torch.equal(out, torch.zeros(2, queries, DIM, dtype=torch.float64))
        out.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()
    assert module(x, randn(2, 9, DIM)).shape == x.shape


def test_batch_without_rows() -> None:
    queries, memories = randn(0, 3, DIM), randn(0, 9, DIM)
    for mask in (None, torch.ones(0, 9, dtype=torch.bool)):
        assert attention()(queries, memories, mask).shape == (0, 3, DIM)


def test_more_chunks_asked_for_than_there_are() -> None:
    few, many = attention(topk_mems=3), attention(topk_mems=100)
    many.load_state_dict(few.state_dict())
    queries, memories = randn(2, 3, DIM), randn(2, 3 * CHUNK - 1, DIM)
    assert_close(many(queries, memories), few(queries, memories))
    mask = torch.ones(2, 3 * CHUNK - 1, dtype=torch.bool)
    mask[:, CHUNK:] = False
    assert_close(many(queries, memories, mask), few(queries, memories[:, :CHUNK]))


@pytest.mark.parametrize("time", [1, CHUNK, 2 * CHUNK + 1, 5 * CHUNK])
def test_no_mask_equals_all_true(time: int) -> None:
    module, queries, memories = attention(), randn(2, 3, DIM), randn(2, time, DIM)
    allowed = torch.ones(2, 3, -(-time // CHUNK), dtype=torch.bool)
    for masks in ((torch.ones(2, time, dtype=torch.bool), None), (None, allowed)):
        assert_close(module(queries, memories, *masks), module(queries, memories))


def test_padding_at_the_end_changes_nothing() -> None:
    module, queries, memories = attention(), randn(2, 3, DIM), randn(2, 3 * CHUNK, DIM)
    mask = torch.arange(3 * CHUNK) < torch.tensor([[2 * CHUNK + 1], [3 * CHUNK]])
    padded = module(queries, memories, mask)
    assert_close(padded[:1], module(queries[:1], memories[:1, : 2 * CHUNK + 1]))
    assert_close(padded[1:], module(queries[1:], memories[1:]))


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_stands_at_masked_places_has_no_effect(bad: float, detach: bool) -> None:
    module = attention(topk_mems=6, detach_memories=detach)
    queries, memories = randn(2, 3, DIM, requires_grad=True), randn(2, 22, DIM, requires_grad=True)
    mask = torch.rand(2, 22) > 0.4
    mask[:, 4:8] = False
    allowed = torch.rand(2, 3, 6) > 0.3
    # a chunk that nobody may read although its tokens are valid, and a query with nothing to read
    allowed[:, :, 3] = False
    allowed[1, 0] = False
    mask[:, 12:16] = True
    hidden = ~mask
    hidden[:, 12:16] = True
    spoilt = memories.detach().masked_fill(hidden[..., None], bad).requires_grad_()
    clean = module(queries, memories, mask, allowed)
    out = module(queries, spoilt, mask, allowed)
    assert_close(out, clean)
    found, wanted = gradients(module, out, queries, spoilt), gradients(module, clean, queries, memories)
    for name in wanted:
        assert_close(found[name], wanted[name])
    assert not found["input 1"][hidden].any()


def test_nan_in_a_chunk_forbidden_to_one_query_stays_out_of_its_output() -> None:
    module, queries, memories = attention(topk_mems=3), randn(1, 2, DIM), randn(1, 3 * CHUNK, DIM)
    queries.requires_grad_()
    memories[:, :CHUNK] = math.nan
    allowed = torch.tensor([[[False, True, True], [True, True, True]]])
    out = module(queries, memories, chunk_attn_mask=allowed)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()
    (gradient,) = torch.autograd.grad(out[0, 0].sum(), queries)
    assert gradient[0, 0].isfinite().all()


def test_mask_beyond_the_length_does_not_make_a_chunk_readable() -> None:
    module, queries, contents = attention(), randn(1, 3, DIM), randn(1, 2, CHUNK, DIM)
    lengths = torch.tensor([[1, CHUNK]])
    mask = torch.ones(1, 2, CHUNK, dtype=torch.bool)
    mask[0, 0, 0] = False
    out = module.read(queries, contents, contents.mean(dim=2), lengths=lengths, mask=mask)
    assert_close(out, module(queries, contents[:, 1]))


@pytest.mark.parametrize("given", ["lengths", "mask", "both"])
def test_read_of_chunks_that_are_not_full(given: str) -> None:
    module, queries = attention(), randn(2, 3, DIM)
    lengths = torch.tensor([[4, 1, 0, 3], [0, 0, 0, 0]])
    mask = torch.arange(CHUNK) < lengths[..., None]
    contents = randn(2, 4, CHUNK, DIM).masked_fill(~mask[..., None], math.nan)
    summaries = summarize(contents.flatten(1, 2), CHUNK, mask=mask.flatten(1))
    masks = {"lengths": {"lengths": lengths}, "mask": {"mask": mask}}
    masks["both"] = masks["lengths"] | {"mask": mask.clone().index_fill_(2, torch.tensor(3), True)}
    out = module.read(queries, contents, summaries, **masks[given])
    assert_close(out, module(queries, contents.flatten(1, 2), mask.flatten(1)))
    assert not out[1].any()
