"""The classic `MemoryTransformerXL`: its laws, and that the published faults are gone (`X1` to `X10`)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memxl import ClassicMemory, MemoryTransformerXL
from tests.reference.memxl_classic import read_segments

TOKENS = 11
OPTIONS: dict[str, Any] = {
    "num_tokens": TOKENS,
    "dim": 16,
    "seq_len": 6,
    "depth": 2,
    "heads": 2,
    "mem_len": 8,
    "lmem_len": 3,
    "num_mem_kv": 2,
}


def build(**options: Any) -> MemoryTransformerXL:
    model = MemoryTransformerXL(**(OPTIONS | options)).double().eval()
    with torch.no_grad():
        model.distances.normal_()
        for parameter in model.parameters():
            # Louder than at the start, so that what must not matter would.
            parameter.mul_(1.5)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randint(TOKENS, shape)


def run(
    model: MemoryTransformerXL, segments: list[Tensor], masks: list[Tensor] | None = None
) -> tuple[list[Tensor], ClassicMemory]:
    memories = None
    logits = []
    for index, tokens in enumerate(segments):
        out, memories = model(tokens, memories, None if masks is None else masks[index])
        logits.append(out)
    assert memories is not None
    return logits, memories


def assert_close(one: Tensor, other: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_layers": [2]},
        {"memory_layers": [1], "depth": 3, "mem_write_iters": 1},
        {"one_kv_head": True, "mem_len": 4},
        {"gru_gated_residual": False, "ff_glu": True, "emb_dim": 5},
        {"mem_len": 6, "num_mem_kv": 0},
        {"mem_len": 0},
        {"lmem_len": 0},
        {"mem_len": 0, "lmem_len": 0, "num_mem_kv": 0},
    ],
    ids=str,
)
def test_ragged_rows_read_like_the_reference(options: dict) -> None:
    model = build(**options)
    # Rows, segments, and how many tokens of each are real.
    lengths = torch.tensor([[6, 6, 6, 6], [6, 2, 0, 5], [0, 0, 3, 6]])
    segments = [draw(3, 6) for _ in range(4)]
    masks = [torch.rand(3, 6).argsort(1) < lengths[:, [index]] for index in range(4)]
    logits, memories = run(model, segments, masks)
    total = torch.stack([out[mask].square().sum() for out, mask in zip(logits, masks, strict=True)]).sum()
    weights = [weight for weight in model.parameters() if weight.numel()]
    gradients = torch.autograd.grad(total, weights, allow_unused=True)

    expected_total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        own = [tokens[row][mask[row]] for tokens, mask in zip(segments, masks, strict=True)]
        expected, short, slots = read_segments(model, [tokens for tokens in own if len(tokens)])
        found = [out[row][mask[row]] for out, mask in zip(logits, masks, strict=True)]
        assert_close(torch.cat(found), torch.cat(expected))
        expected_total = expected_total + torch.cat(expected).square().sum()
        for layer, held in enumerate(short):
            places = memories.short[layer, row]
            assert_close(places[len(places) - len(held) :], held)
            assert not places[: len(places) - len(held)].any()
        if slots is not None:
            assert_close(memories.long[row], slots)
    expected_gradients = torch.autograd.grad(expected_total, weights, allow_unused=True)
    for one, other in zip(gradients, expected_gradients, strict=True):
        zero = torch.zeros(())
        assert_close(zero if one is None else one, zero if other is None else other, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"one_kv_head": True}, {"mem_len": 0}, {"lmem_len": 0}], ids=str)
def test_token_by_token_equals_the_whole_segment(options: dict) -> None:
    model = build(**options)
    whole = draw(2, 18)
    logits, expected = run(model, list(whole.split(6, 1)))
    memories = model.init_memories(2)
    found = []
    for tokens in whole.split(6, 1):
        segment = model.open(memories)
        for piece in tokens.split([1, 3, 1, 1], 1):
            out, segment = model.read(piece, segment)
            found.append(out)
        memories = model.write(memories, segment)
    assert_close(torch.cat(found, 1), torch.cat(logits, 1))
    assert_close(memories.short, expected.short)
    assert_close(memories.long, expected.long)


@pytest.mark.parametrize("depth", [1, 3])
def test_without_long_memory_it_is_transformer_xl(depth: int) -> None:
    # With a short memory of all that came before, cutting into segments changes nothing, in any depth.
    options = {"depth": depth, "lmem_len": 0, "seq_len": 12, "mem_len": 12}
    model = build(**options)
    tokens = draw(2, 12)
    whole, _ = model(tokens)
    logits, _ = run(model, list(tokens.split([5, 4, 3], 1)))
    assert_close(torch.cat(logits, 1), whole)


def test_without_memories_nothing_is_carried() -> None:
    model = build(mem_len=0, lmem_len=0)
    first, second = draw(2, 6), draw(2, 6)
    logits, memories = run(model, [first, second])
    assert_close(logits[1], model(second)[0])
    assert memories.short.shape == (2, 2, 0, 16)
    assert memories.long.shape == (2, 0, 16)


@pytest.mark.parametrize("mem_len", [4, 6, 8, 20])
def test_short_memory_holds_the_newest_inputs(mem_len: int) -> None:
    """X2, X3: each call is written, whatever its length and the relation of mem_len to seq_len."""
    model = build(mem_len=mem_len, memory_layers=[1])
    tokens = draw(2, 14)
    _, memories = run(model, list(tokens.split([6, 3, 5], 1)))
    assert_close(memories.short[0], model.embed(tokens[:, -mem_len:]))


def test_permuting_long_slots_permutes_the_result() -> None:
    """X1."""
    model = build()
    with torch.no_grad():
        model.writer.places.zero_()
    _, memories = run(model, [draw(2, 6)])
    long, tokens, order = torch.randn_like(memories.long), draw(2, 6), torch.tensor([2, 0, 1])
    logits, after = model(tokens, ClassicMemory(memories.short, long))
    permuted_logits, permuted = model(tokens, ClassicMemory(memories.short, long[:, order]))
    assert_close(permuted.long, after.long[:, order])
    assert_close(permuted_logits, logits)


def test_padding_stays_out_of_everything() -> None:
    """X4."""
    model = build()
    first, second = draw(2, 6), draw(2, 6)
    mask = torch.tensor([[True] * 6, [True, True, False, False, True, False]])
    logits, memories = run(model, [first, second], [mask, torch.ones_like(mask)])
    other = torch.where(mask, first, -100)
    other_logits, other_memories = run(model, [other, second], [mask, torch.ones_like(mask)])
    assert torch.equal(logits[0][mask], other_logits[0][mask])
    assert torch.equal(logits[1], other_logits[1])
    assert torch.equal(memories.long, other_memories.long)
    assert torch.equal(memories.short, other_memories.short)


def test_an_all_padding_row_keeps_its_memory() -> None:
    model = build()
    _, before = run(model, [draw(2, 6)])
    mask = torch.tensor([[True] * 6, [False] * 6])
    _, after = model(draw(2, 6), before, mask)
    assert torch.equal(after.long[1], before.long[1])
    assert_close(after.short[:, 1, -6:], before.short[:, 1])
    assert not torch.equal(after.long[0], before.long[0])


def rows_used(model: MemoryTransformerXL, logits: Tensor) -> list[int]:
    """The rows of the position table that the last token's logits depend on, by distance."""
    (gradient,) = torch.autograd.grad(logits[:, -1].square().sum(), model.distances)
    return gradient.flip(1).abs().sum((0, 2)).nonzero().flatten().tolist()


def test_a_distance_has_the_same_row_in_each_call() -> None:
    """X5: with dim far below lmem_len; X6: neither persistent key/values nor slots have distances."""
    model = build(depth=1, lmem_len=40, num_mem_kv=5)
    first, memories = model(draw(1, 6))
    assert rows_used(model, first) == [0, 1, 2, 3, 4, 5]
    second, memories = model(draw(1, 3), memories)
    assert rows_used(model, second) == list(range(3 + 6))
    third, _ = model(draw(1, 1), memories)
    assert rows_used(model, third) == list(range(1 + 8))


def test_bfloat16_without_short_memory() -> None:
    """X10."""
    model = build(mem_len=0).bfloat16()
    logits, memories = run(model, [draw(2, 6), draw(2, 6)])
    assert {logits[1].dtype, memories.short.dtype, memories.long.dtype} == {torch.bfloat16}
    assert logits[1].isfinite().all()


@pytest.mark.parametrize("detach_at", [None, 1, 2])
def test_gradient_flows_through_the_long_memory_until_detached(detach_at: int | None) -> None:
    """X12; the weights that write are reached by each segment's loss, the first slots only without a cut."""
    model = build()
    memories = None
    for number in range(4):
        logits, memories = model(draw(2, 6), memories, detach_lmem=number == detach_at)
    gradients = torch.autograd.grad(
        logits.square().sum(), [model.writer.initial, model.writer.to_out.weight], allow_unused=True
    )
    assert (gradients[0] is None or not gradients[0].any()) == (detach_at is not None)
    assert gradients[1].any()


def test_short_memory_takes_no_gradient() -> None:
    model = build()
    _, memories = run(model, [draw(2, 6)])
    assert not memories.short.requires_grad
    assert memories.long.requires_grad


def test_an_optimiser_may_step_between_segments_of_one_graph() -> None:
    model = build()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    memories = None
    for _ in range(3):
        before = [parameter.clone() for parameter in model.parameters()]
        logits, memories = model(draw(2, 6), memories)
        # Goes back through the segments before, whose weights have changed since.
        logits.square().mean().backward(retain_graph=True)
        optimiser.step()
        optimiser.zero_grad()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_causal_in_a_segment_and_across() -> None:
    model = build()
    segments = [draw(1, 6) for _ in range(3)]
    logits, _ = run(model, segments)
    changed = [tokens.clone() for tokens in segments]
    changed[1][0, 3] = (changed[1][0, 3] + 1) % TOKENS
    others, _ = run(model, changed)
    assert torch.equal(others[0], logits[0])
    assert torch.equal(others[1][:, :3], logits[1][:, :3])
    assert not torch.equal(others[1][:, 3], logits[1][:, 3])
    assert not torch.equal(others[2], logits[2])


def test_rows_are_independent() -> None:
    model = build()
    segments = [draw(3, 6) for _ in range(3)]
    together, _ = run(model, segments)
    alone, _ = run(model, [tokens[1:2] for tokens in segments])
    assert_close(together[2][1:2], alone[2])


def test_swapping_layers_changes_the_write() -> None:
    model = build()
    hiddens = torch.randn(2, 1, 5, 16, dtype=torch.float64)
    slots = torch.randn(1, 3, 16, dtype=torch.float64)
    written = model.writer(slots, hiddens, None)
    assert not torch.allclose(model.writer(slots, hiddens.flip(0), None), written)
    # Linear attention knows no order of tokens.
    assert_close(model.writer(slots, hiddens.flip(2), None), written)


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    model = build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens, mask = draw(2, 6), torch.tensor([[True] * 6, [True, False, True, True, False, False]])
    _, memories = model(tokens)
    expected, after = model(tokens, memories, mask)
    logits, compiled_after = compiled(tokens, memories, mask)
    assert_close(logits[mask], expected[mask])
    assert_close(compiled_after.long, after.long)
    assert_close(compiled_after.short, after.short)


def test_dropouts_act_in_training_only() -> None:
    for name in ("attn_dropout", "ff_dropout", "attn_layer_dropout"):
        model = build(**{name: 0.5})
        tokens = draw(2, 6)
        assert torch.equal(model(tokens)[0], model(tokens)[0])
        model.train()
        assert not torch.equal(model(tokens)[0], model(tokens)[0]), name


def test_memory_stays_bounded() -> None:
    model = build()
    memories = None
    with torch.no_grad():
        for _ in range(300):
            _, memories = model(draw(1, 6), memories)
    assert memories is not None
    assert memories.long.isfinite().all()
    assert float(memories.long.abs().max()) < 20


def test_the_call_writes_nothing_in_place_and_takes_plain_pairs() -> None:
    model = build()
    _, memories = run(model, [draw(2, 6)])
    copies = [part.detach().clone() for part in memories]
    tokens = draw(2, 6)
    logits, _ = model(tokens, tuple(memories))
    assert all(torch.equal(part, copy) for part, copy in zip(memories, copies, strict=True))
    assert torch.equal(logits, model(tokens, memories)[0])
    assert torch.equal(model(tokens, (None, None))[0], model(tokens)[0])


def test_no_tokens_change_nothing() -> None:
    model = build()
    _, memories = run(model, [draw(2, 6)])
    logits, after = model(draw(2, 0), memories)
    assert logits.shape == (2, 0, TOKENS)
    assert after.long is memories.long


def test_state_dict_round_trip_and_autocast() -> None:
    model, tokens = build(), draw(2, 6)
    again = build()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    model.float()
    expected, _ = run(model, [tokens, tokens])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = run(model, [tokens, tokens])
    assert bool((found[1].float() - expected[1]).abs().max() < 0.2 * expected[1].std())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"dim \(16\) must be divisible by heads \(3\)"),
        ({"dim": 18}, r"dim \(18\) must be divisible by heads \(2\) and by the 4 of the write"),
        ({"memory_layers": [0]}, r"memory_layers \(\(0,\)\) must name different layers from 1"),
        ({"memory_layers": [1, 3]}, r"memory_layers \(\(1, 3\)\).* to 2"),
        ({"memory_layers": []}, r"memory_layers \(\(\)\)"),
        ({"mem_len": -1}, r"mem_len \(-1\) must be at least 0"),
        ({"depth": 0}, r"depth \(0\) must be at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryTransformerXL(**(OPTIONS | options))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(draw(2, 7)), ValueError, r"at most 6 tokens \(seq_len\), got 7; cut"),
        (lambda m: m(draw(6)), ValueError, r"tokens must be \[batch, time\], got \(6,\)"),
        (lambda m: m(draw(2, 6) * 0 + TOKENS), ValueError, rf"tokens hold {TOKENS}, outside the vocabulary"),
        (lambda m: m(draw(2, 6) - TOKENS), ValueError, r"tokens hold -\d+, outside the vocabulary"),
        (lambda m: m([[0, 1]]), TypeError, "tokens must be a tensor, got list"),
        (lambda m: m(torch.randn(2, 6)), TypeError, r"tokens must be int64, got torch.float32"),
        (lambda m: m(draw(2, 6), mask=torch.ones(2, 6)), TypeError, r"mask must be a bool tensor"),
        (lambda m: m(draw(2, 6), mask=torch.ones(2, 5).bool()), ValueError, r"mask has shape \(2, 5\)"),
        (
            lambda m: m(draw(2, 6), m.init_memories(3)),
            ValueError,
            r"short memory must be \[2, 2, tokens, 16\]",
        ),
        (
            lambda m: m(draw(2, 6), (torch.zeros(2, 2, 9, 16), None)),
            ValueError,
            r"holds 9 tokens, mem_len is 8",
        ),
        (
            lambda m: m(draw(2, 6), (None, torch.zeros(2, 4, 16))),
            ValueError,
            r"long memory must be \[2, 3, 16\]",
        ),
    ],
)
def test_inputs_that_do_not_fit(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(build())
