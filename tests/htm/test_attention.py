"""Laws of the HTM read, in float64 against the loop in `tests/reference/htm.py`."""

import math

import pytest
import torch
import torch.nn.functional as F

from htm import HTMAttention, HTMBlock, chunk_positions, chunks, summarize
from tests.htm.common import CHUNK, DIM, HEADS, WIDTH, assert_close, attention, gradients, loop, randn
from tests.reference import htm as reference


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("masks", ["none", "tokens", "chunks", "both"])
@pytest.mark.parametrize("time", [3, 20, 23])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_loop_in_values_and_gradients(masks: str, time: int, positions: bool, bias: bool) -> None:
    module = attention(add_pos_enc=positions, summary_bias=bias)
    queries, memories = randn(2, 5, DIM, requires_grad=True), randn(2, time, DIM)
    given = {}
    if masks in ("tokens", "both"):
        given["mask"] = torch.rand(2, time) > 0.5
    if masks in ("chunks", "both"):
        given["chunk_attn_mask"] = torch.rand(2, 5, -(-time // CHUNK)) > 0.5
    out = module(queries, memories, **given)
    expected = loop(
        module, queries, memories, mask=given.get("mask"), chunk_mask=given.get("chunk_attn_mask")
    )
    assert_close(out, expected)
    found, wanted = gradients(module, out, queries), gradients(module, expected, queries)
    for name in wanted:
        assert_close(found[name], wanted[name])


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_reaches_the_memories_only_on_request(masked: bool) -> None:
    queries, memories = randn(2, 3, DIM, requires_grad=True), randn(2, 14, DIM, requires_grad=True)
    mask = torch.rand(2, 14) > 0.4 if masked else None
    module = attention()
    out = module(queries, memories, mask)
    assert torch.autograd.grad(out.sum(), memories, allow_unused=True, retain_graph=True)[0] is None
    for name, gradient in gradients(module, out, queries).items():
        assert gradient.abs().max() > 0, name

    module.detach_memories = False
    out = module(queries, memories, mask)
    expected = loop(module, queries, memories, mask=mask)
    found = gradients(module, out, queries, memories)
    for name, gradient in gradients(module, expected, queries, memories).items():
        assert_close(found[name], gradient)


def test_gradcheck() -> None:
    module = attention(detach_memories=False)
    mask = torch.rand(1, 10) > 0.3
    inputs = (randn(1, 2, DIM, requires_grad=True), randn(1, 10, DIM, requires_grad=True))
    assert torch.autograd.gradcheck(lambda q, m: module(q, m, mask), inputs)


def test_second_derivatives_are_refused() -> None:
    module, queries = attention(), randn(1, 2, DIM, requires_grad=True)
    (first,) = torch.autograd.grad(
        module(queries, randn(1, 8, DIM)).square().sum(), queries, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_one_chunk_is_plain_attention() -> None:
    module = attention(topk_mems=1, add_pos_enc=False)
    queries, memories = randn(2, 3, DIM), randn(2, CHUNK, DIM)
    q, k, v = (
        layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        for layer, x in ((module.query, queries), (module.key, memories), (module.value, memories))
    )
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_close(module(queries, memories), module.out(plain))


def test_all_chunks_are_weighted_by_the_softmax_of_their_scores() -> None:
    module, queries, memories = attention(topk_mems=5), randn(1, 3, DIM), randn(1, 5 * CHUNK, DIM)
    chunks = memories.split(CHUNK, dim=1)
    keys = module.summary_key(torch.stack([chunk.mean(dim=1) for chunk in chunks], dim=1))
    share = (module.summary_query(queries) @ keys.mT / math.sqrt(DIM)).softmax(dim=-1)
    alone = torch.stack([module(queries, chunk) for chunk in chunks], dim=-1)
    assert_close(module(queries, memories), (alone * share[:, :, None]).sum(dim=-1))


def test_equal_scores_give_the_mean_over_chunks() -> None:
    module, queries, memories = attention(topk_mems=5), randn(1, 3, DIM), randn(1, 5 * CHUNK, DIM)
    torch.nn.init.zeros_(module.summary_key.weight)
    alone = torch.stack([module(queries, chunk) for chunk in memories.split(CHUNK, dim=1)])
    assert_close(module(queries, memories), alone.mean(dim=0))


def test_chunks_of_one_token_are_values_weighted_by_their_scores() -> None:
    module = attention(topk_mems=7, mem_chunk_size=1, add_pos_enc=False)
    queries, memories = randn(2, 3, DIM), randn(2, 7, DIM)
    scores = module.summary_query(queries) @ module.summary_key(memories).mT / math.sqrt(DIM)
    assert_close(module(queries, memories), scores.softmax(dim=-1) @ module.out(module.value(memories)))


def test_order_of_chunks_is_free_and_order_inside_one_counts_with_positions() -> None:
    queries, chunks = randn(1, 3, DIM), randn(1, 5, CHUNK, DIM)
    with_positions, without = attention(), attention(add_pos_enc=False)
    for module in (with_positions, without):
        shuffled = chunks[:, torch.randperm(5)]
        assert_close(module(queries, shuffled.flatten(1, 2)), module(queries, chunks.flatten(1, 2)))
    reversed_inside = chunks.flip(2).flatten(1, 2)
    assert_close(without(queries, reversed_inside), without(queries, chunks.flatten(1, 2)))
    moved = with_positions(queries, reversed_inside) - with_positions(queries, chunks.flatten(1, 2))
    assert moved.abs().max() > 1e-3


def test_chunks_stay_put_as_the_memory_grows() -> None:
    module, queries, memories = attention(), randn(1, 2, DIM), randn(1, 6 * CHUNK, DIM)
    first_only = module(queries, memories[:, :CHUNK])
    for time in range(CHUNK, 6 * CHUNK + 1):
        allowed = torch.zeros(1, 2, -(-time // CHUNK), dtype=torch.bool)
        allowed[..., 0] = True
        assert_close(module(queries, memories[:, :time], chunk_attn_mask=allowed), first_only)


def test_sharp_scores_read_the_best_chunk_alone() -> None:
    module, queries, memories = attention(topk_mems=3), randn(1, 4, DIM), randn(1, 5 * CHUNK, DIM)
    with torch.no_grad():
        module.summary_query.weight *= 1e4
    keys = module.summary_key(summarize(memories, CHUNK))
    best = (module.summary_query(queries) @ keys.mT).argmax(dim=-1)
    for index, chunk in enumerate(best[0].tolist()):
        alone = module(queries[:, index : index + 1], memories[:, chunk * CHUNK : (chunk + 1) * CHUNK])
        assert_close(module(queries, memories)[:, index : index + 1], alone)


@pytest.mark.parametrize("dim", [1, 7, 12])
def test_newest_place_of_a_chunk_is_position_zero(dim: int) -> None:
    table = chunk_positions(CHUNK, dim, dtype=torch.float64)
    assert_close(table, reference.positions(CHUNK, dim))
    half = (dim + 1) // 2
    assert torch.equal(table[-1], (torch.arange(dim) >= half).double())
    for dtype in (torch.float32, torch.bfloat16):
        used = chunks.positions_like(CHUNK, torch.empty(dim, dtype=dtype))
        assert used.dtype == dtype
        assert_close(used, chunk_positions(CHUNK, dim, dtype=dtype), atol=1e-5)


@pytest.mark.parametrize("dim", [1, 7])
def test_odd_width(dim: int) -> None:
    module = attention(dim)
    queries, memories = randn(2, 3, dim), randn(2, 11, dim)
    assert_close(module(queries, memories), loop(module, queries, memories))


def test_rows_are_independent() -> None:
    module, queries, memories = attention(), randn(4, 3, DIM), randn(4, 11, DIM)
    mask, allowed = torch.rand(4, 11) > 0.3, torch.rand(4, 3, 3) > 0.3
    together = module(queries, memories, mask, allowed)
    for row in range(4):
        one = slice(row, row + 1)
        assert_close(together[one], module(queries[one], memories[one], mask[one], allowed[one]))


def test_read_of_cached_summaries_equals_forward() -> None:
    module, queries, memories = attention(), randn(2, 3, DIM), randn(2, 5 * CHUNK, DIM)
    contents, summaries = memories.unflatten(1, (5, CHUNK)), summarize(memories, CHUNK)
    allowed = torch.rand(2, 3, 5) > 0.3
    assert_close(module.read(queries, contents, summaries), module(queries, memories))
    assert_close(
        module.read(queries, contents, summaries, chunk_mask=allowed),
        module(queries, memories, chunk_attn_mask=allowed),
    )
    for_all = allowed[:, :1]
    assert_close(
        module.read(queries, contents, summaries, chunk_mask=for_all),
        module(queries, memories, chunk_attn_mask=for_all.expand_as(allowed)),
    )
    # chunks in any order, as in a ring
    order = torch.randperm(5)
    assert_close(module.read(queries, contents[:, order], summaries[:, order]), module(queries, memories))


def test_block_is_a_true_residual() -> None:
    block = HTMBlock(DIM, heads=HEADS, dim_head=WIDTH, mem_chunk_size=CHUNK).double()
    queries, memories = 7 * randn(2, 3, DIM) + 2, randn(2, 9, DIM)
    assert_close(block(queries, memories), queries + block.attn(block.norm(queries), memories))
    assert torch.equal(block(queries, memories[:, :0]), queries)
    mask, allowed = torch.rand(2, 9) > 0.3, torch.rand(2, 3, 3) > 0.3
    out = block(queries, memories, mask=mask, chunk_attn_mask=allowed)
    assert_close(out, queries + block.attn(block.norm(queries), memories, mask, allowed))


def test_published_defaults() -> None:
    module = HTMAttention(512)
    settings = (module.heads, module.topk_mems, module.mem_chunk_size, module.dim_head, module.add_pos_enc)
    assert settings == (8, 2, 32, 64, True)
    assert HTMBlock(512, topk_mems=8).attn.topk_mems == 8


def test_init_scale_sets_the_variance_of_query_and_key_projections() -> None:
    module = HTMAttention(256, init_scale=2.0)
    for layer in (module.summary_query, module.summary_key, module.query, module.key):
        assert layer.weight.std().item() == pytest.approx(0.88 * math.sqrt(2.0 / 256), rel=0.02)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_the_matching_read_equals_the_loop(topk: int) -> None:
    module = HTMAttention(DIM, HEADS, topk, CHUNK, dim_head=4, matching=True, detach_memories=False).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    queries, contents = randn(2, 6, DIM, requires_grad=True), randn(2, 4, CHUNK, 2 * DIM, requires_grad=True)
    lengths = torch.tensor([[CHUNK, 0, 2, CHUNK], [0, 0, 0, 0]])
    place = torch.arange(CHUNK)
    summaries = torch.where((place < lengths[..., None])[..., None], contents, 0).sum(2)
    summaries = summaries / lengths.clamp(min=1)[..., None]
    pairs = contents.unflatten(-1, (2, DIM))
    chunks = [[pairs[row, m, : lengths[row, m]] for m in range(4)] for row in range(2)]
    found = module.read(queries, contents, summaries, lengths=lengths)
    wanted = reference.read_matching(dict(module.named_parameters()), queries, chunks, heads=HEADS, topk=topk)
    assert_close(found, wanted)
    inputs = [queries, contents, *(p for p in module.parameters())]
    weight = randn(*found.shape)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs, allow_unused=True),
        torch.autograd.grad((wanted * weight).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_a_token_is_found_by_what_came_before_it() -> None:
    # the point of matching, at the initial weights: the query looks like the token before the answer
    module = HTMAttention(64, 4, 2, CHUNK, dim_head=16, matching=True)
    memories = torch.nn.functional.rms_norm(torch.randn(1, 8 * CHUNK, 64), (64,))
    with torch.no_grad():
        module.value.weight.copy_(torch.eye(64))
        module.out.weight.copy_(torch.eye(64))
        module.out.bias.zero_()
        # the last of them ends its chunk: the answer opens the next one
        before = torch.tensor([5, CHUNK + 1, 6 * CHUNK - 1])
        read = module(memories[:, before], memories)
    nearest = torch.cdist(read, memories).argmin(-1)
    assert nearest.tolist() == [(before + 1).tolist()]
