"""Laws of the HTM read, in float64 against the loop in `tests/reference/htm.py`."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htm import HTMAttention, HTMBlock, chunk_positions, chunks, summarize
from htm import attend as inner
from tests.reference import htm as reference

DIM, HEADS, WIDTH, CHUNK = 12, 3, 4, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


# One query at a time in a block, some, and all at once.
@pytest.fixture(params=[1, 3 * 2 * CHUNK * DIM * 8, 2**20], ids=["single", "few", "all"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "CPU_BLOCK_BYTES", request.param)


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype, masked: bool) -> None:
    module = attention(init_scale=2.0)
    # values that every dtype holds exactly; one chunk, so that rounding cannot choose another
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().to(torch.float16).double()
    queries, memories = (randn(2, n, DIM).bfloat16().to(torch.float16).double() for n in (3, 3 * CHUNK))
    mask = torch.rand(2, 3 * CHUNK) > 0.3 if masked else None
    module.topk_mems = 3
    expected = module(queries, memories, mask)
    module.to(dtype)
    low = queries.to(dtype).requires_grad_()
    out = module(low, memories.to(dtype), mask)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    assert_close(out.double(), expected, atol=tolerance * expected.abs().max().item())
    out.float().square().sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == dtype
    assert low.grad.isfinite().all()


def test_autocast_with_gradient() -> None:
    module = attention().float()
    queries = torch.randn(2, 3, DIM, requires_grad=True)
    memories = torch.randn(2, 9, DIM)
    expected = module(queries, memories)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(queries, memories)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().median() < 0.05 * expected.abs().max()
    out.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_memories_may_be_stored_in_a_smaller_dtype() -> None:
    module, queries, memories = attention(), randn(2, 3, DIM), randn(2, 9, DIM).bfloat16()
    assert_close(module(queries, memories), module(queries, memories.double()), atol=0.1)
    assert module(queries, memories).dtype == torch.float64


# meta stands in for an accelerator: a tensor made on the CPU would be refused there too
@pytest.mark.parametrize("positions", [True, False])
def test_everything_is_made_on_the_device_of_the_input(positions: bool) -> None:
    module = attention(add_pos_enc=positions).to("meta")
    queries, memories = (torch.empty(2, n, DIM, dtype=torch.float64, device="meta") for n in (3, 9))
    mask = torch.ones(2, 9, dtype=torch.bool, device="meta")
    for masks in ((None, None), (mask, mask[:, None, :3].expand(2, 3, 3))):
        queries.requires_grad_()
        out = module(queries, memories, *masks)
        assert out.device.type == "meta"
        out.sum().backward()


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


def test_mask_beyond_the_length_does_not_make_a_chunk_readable() -> None:
    module, queries, contents = attention(), randn(1, 3, DIM), randn(1, 2, CHUNK, DIM)
    lengths = torch.tensor([[1, CHUNK]])
    mask = torch.ones(1, 2, CHUNK, dtype=torch.bool)
    mask[0, 0, 0] = False
    out = module.read(queries, contents, contents.mean(dim=2), lengths=lengths, mask=mask)
    assert_close(out, module(queries, contents[:, 1]))


def test_inputs_need_not_be_contiguous() -> None:
    module, queries, memories = attention(), randn(3, 2, DIM), randn(9, 2, DIM)
    across = (queries.transpose(0, 1), memories.transpose(0, 1))
    assert_close(module(*across), module(*(tensor.contiguous() for tensor in across)))


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


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_break(masked: bool) -> None:
    module, queries, memories = attention(), randn(2, 3, DIM, requires_grad=True), randn(2, 10, DIM)
    masks = (torch.rand(2, 10) > 0.3, torch.rand(2, 3, 3) > 0.3) if masked else ()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, expected = compiled(queries, memories, *masks), module(queries, memories, *masks)
    assert_close(out, expected)
    found, wanted = gradients(module, out, queries), gradients(module, expected, queries)
    for name in wanted:
        assert_close(found[name], wanted[name])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("detach", [True, False])
def test_operators_are_registered_as_torch_expects(detach: bool, joint: bool) -> None:
    queries = randn(2, 3, HEADS, DIM, requires_grad=True)
    weights = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    tokens, chosen = randn(2, 10, DIM, requires_grad=not detach), torch.randint(3, (2, 3, 2))
    places = torch.rand(2, 3, 2, CHUNK) > 0.3
    positions = reference.positions(CHUNK, DIM)
    arguments = (queries, weights, chosen, tokens, positions, places, CHUNK, DIM, joint, True)
    # gradcheck is another test's business: random places may hide a whole chunk that has a weight
    torch.library.opcheck(inner.attend, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(inner.attend, arguments, test_utils="test_aot_dispatch_static")


def test_nothing_of_the_gathered_memories_is_kept_for_backward() -> None:
    module, queries, memories = attention(topk_mems=8), randn(1, 64, DIM), randn(1, 16 * CHUNK, DIM)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    queries.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(queries, memories)
    gathered = 64 * 8 * CHUNK * DIM * 8
    assert sum(kept.values()) < gathered


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"queries": torch.zeros(2, DIM)},
            r"queries must have shape \[batch, queries, dim=12\], got \[2, 12\]",
        ),
        ({"queries": torch.zeros(2, 3, 5)}, r"queries must have shape .*dim=12\], got \[2, 3, 5\]"),
        ({"memories": torch.zeros(2, 9, 5)}, r"memories must have shape \[batch=2, time, dim=12\]"),
        ({"memories": torch.zeros(3, 9, DIM)}, r"memories must have shape \[batch=2.*got \[3, 9, 12\]"),
        ({"memories": torch.zeros(2, 9, DIM).long()}, r"memories must be floating point, got torch.int64"),
        ({"mask": torch.ones(2, 9)}, r"mask must be bool.*got torch.float32; use mask.bool\(\)"),
        ({"mask": torch.ones(2, 8).bool()}, r"mask must have shape \[batch=2, time=9\], got \[2, 8\]"),
        ({"chunk_attn_mask": torch.ones(2, 3, 2).bool()}, r"chunk_attn_mask .*chunks=3\], got \[2, 3, 2\]"),
        ({"chunk_attn_mask": torch.ones(2, 3, 3)}, r"chunk_attn_mask must be bool"),
    ],
)
def test_input_that_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    given = {"queries": torch.zeros(2, 3, DIM), "memories": torch.zeros(2, 9, DIM)} | change
    with pytest.raises(ValueError, match=message):
        attention().float()(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contents": torch.zeros(2, 5, 3, DIM)}, r"contents must have shape .*mem_chunk_size=4, dim=12\]"),
        ({"summaries": torch.zeros(2, 4, DIM)}, r"summaries must have shape \[batch=2, chunks=5, dim=12\]"),
        ({"lengths": torch.zeros(2, 5)}, r"lengths must be integers, got torch.float32"),
        ({"lengths": torch.zeros(5).long()}, r"lengths must have shape \[batch=2, chunks=5\], got \[5\]"),
        ({"mask": torch.ones(2, 5).bool()}, r"mask must have shape .*mem_chunk_size=4\], got \[2, 5\]"),
        ({"chunk_mask": torch.ones(2, 2, 5).bool()}, r"chunk_mask must have shape .*queries=3.*\[2, 2, 5\]"),
    ],
)
def test_chunks_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    given = {"contents": torch.zeros(2, 5, CHUNK, DIM), "summaries": torch.zeros(2, 5, DIM)} | change
    with pytest.raises(ValueError, match=message):
        attention().float().read(torch.zeros(2, 3, DIM), **given)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"topk_mems \(0\) must be at least 1"):
        HTMAttention(DIM, topk_mems=0)


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
