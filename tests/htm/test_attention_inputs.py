"""Dtypes, devices, compilation and operators of the HTM read, and the input that it refuses."""

import pytest
import torch
from torch import Tensor

from htm import HTMAttention
from htm import attend as inner
from tests.htm.common import CHUNK, DIM, HEADS, assert_close, attention, gradients, randn
from tests.reference import htm as reference


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


def test_inputs_need_not_be_contiguous() -> None:
    module, queries, memories = attention(), randn(3, 2, DIM), randn(9, 2, DIM)
    across = (queries.transpose(0, 1), memories.transpose(0, 1))
    assert_close(module(*across), module(*(tensor.contiguous() for tensor in across)))


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
        ({"lengths": torch.full((2, 5), CHUNK + 1)}, "lengths must lie in 0 to 4, got 5"),
        ({"lengths": torch.full((2, 5), -1)}, "lengths must lie in 0 to 4, got -1"),
        ({"mask": torch.ones(2, 5).bool()}, r"mask must have shape .*mem_chunk_size=4\], got \[2, 5\]"),
        ({"chunk_mask": torch.ones(2, 2, 5).bool()}, r"chunk_mask must have shape .*queries=3.*\[2, 2, 5\]"),
    ],
)
def test_chunks_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    given = {"contents": torch.zeros(2, 5, CHUNK, DIM), "summaries": torch.zeros(2, 5, DIM)} | change
    with pytest.raises(ValueError, match=message):
        attention().float().read(torch.zeros(2, 3, DIM), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(3, DIM)}, r"queries must have shape \[batch, queries, dim=12\]"),
        ({"queries": torch.zeros(1, 3, DIM)}, r"summaries must have shape \[batch=1, chunks, dim=12\]"),
        ({"summaries": torch.zeros(2, 5, 3)}, r"summaries must have shape \[batch=2, chunks, dim=12\]"),
        ({"lengths": torch.zeros(2, 4).long()}, r"lengths must have shape \[batch=2, chunks=5\]"),
        ({"lengths": torch.full((2, 5), CHUNK + 1)}, "lengths must lie in 0 to 4, got 5"),
    ],
)
def test_a_choice_among_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    given = {"queries": torch.zeros(2, 3, DIM), "summaries": torch.zeros(2, 5, DIM)} | change
    with pytest.raises(ValueError, match=message):
        attention().float().choose(**given)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"topk_mems \(0\) must be at least 1"):
        HTMAttention(DIM, topk_mems=0)
