"""Attention beside a memory of pairs: exact, equal to dense attention where it can be, no gradient stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing import KNNAttention, MemorizingConfig, PairMemory, read_pairs
from memorizing.attend import attend
from memory_models.transformer import Place, SegmentAttention
from tests.reference.memorizing import knn_attention, nearest, softmax_sum

HEADS, WIDTH, DIM, TIME = 2, 5, 8, 6
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def layer(*, matching: bool = False, **options: Any) -> KNNAttention:
    config = MemorizingConfig(
        **({"dim": DIM, "heads": HEADS, "dim_head": WIDTH, "memories": 9, "topk": 3} | options)
    )
    module = KNNAttention(config, matching=matching).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def stored(totals: list[int], *, memories: int = 9, dtype: torch.dtype = torch.float64) -> PairMemory:
    """A memory to whose rows so many pairs were written, one batch of random pairs at a time."""
    like = torch.zeros((), dtype=dtype)
    memory = PairMemory.empty(len(totals), memories, HEADS, WIDTH, like=like)
    lengths, new = torch.tensor(totals), (len(totals), max(1, *totals), HEADS, WIDTH)
    keys = F.normalize(torch.randn(new, dtype=torch.float64), dim=-1)
    return memory.append(keys, torch.randn(new, dtype=torch.float64), lengths)


def asked(batch: int, time: int = TIME) -> Tensor:
    queries = F.normalize(torch.randn(batch, time, HEADS, WIDTH, dtype=torch.float64), dim=-1)
    return (4 * queries).requires_grad_()


def by_loops(queries: Tensor, memory: PairMemory, topk: int) -> tuple[Tensor, Tensor]:
    outputs, totals = torch.zeros_like(queries), torch.zeros_like(queries[..., 0])
    rows = []
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in queries.shape[:3])).tolist():
        query, held = queries[b, t, h], min(int(memory.total[b]), memory.keys.shape[2])
        keys, values = list(memory.keys[b, h]), list(memory.values[b, h])
        found = nearest(query, list(range(held)), keys, topk)
        if not found:
            rows.append((query * 0, torch.tensor(-math.inf, dtype=query.dtype)))
            continue
        scores = torch.stack([(query * keys[p]).sum() for p in found])
        out = softmax_sum(query, [keys[p] for p in found], [values[p] for p in found])
        rows.append((out, scores.exp().sum().log()))
    outputs, totals = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return outputs.view(queries.shape), totals.view(queries.shape[:3])


@pytest.mark.parametrize("topk", [1, 3, 50])
@pytest.mark.parametrize("totals", [[20, 20], [4, 0], [0, 9], [2, 5]])
def test_the_read_equals_loops_in_values_and_gradients(topk: int, totals: list[int]) -> None:
    memory, queries = stored(totals), asked(2)
    # A slot that was never written may hold anything.
    empty = torch.arange(9) >= memory.held()[:, None]
    spoilt = memory.map(
        lambda leaf: torch.where(empty[:, None, :, None], torch.nan, leaf) if leaf.dim() == 4 else leaf
    )
    seen, wanted = read_pairs(queries, spoilt, topk=topk), by_loops(queries, memory, topk)
    pushes = [torch.randn_like(part) for part in wanted]
    grads = []
    for parts in (seen, wanted):
        # The logarithm of a row without pairs is minus infinity and takes no part.
        total = sum((p * w).where(p.isfinite(), 0).sum() for p, w in zip(parts, pushes, strict=True))
        grads.append(torch.autograd.grad(total, queries)[0])
    for ours, theirs in zip((*seen, grads[0]), (*wanted, grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [2, 40])
def test_the_search_is_exact(dtype: torch.dtype, time: int) -> None:
    keys = torch.randn(2, HEADS, 700, WIDTH).to(dtype)
    keys[:, :, 350:400] = keys[:, :, :1]  # ties
    queries = torch.randn(2, HEADS, time, WIDTH).to(torch.promote_types(dtype, torch.float32))
    for total in (700, 350, 900):
        held = min(total, 700)
        _, log, slots, weights = attend(queries, keys, keys, torch.tensor([total, total]), 32)
        scores = queries @ keys.to(queries.dtype).mT[..., :held]
        assert bool((slots < held).all())
        best = scores.topk(32).values
        torch.testing.assert_close(scores.gather(-1, slots).sort(-1, descending=True).values, best)
        torch.testing.assert_close(log, best.logsumexp(-1))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(log))


def test_the_operator_is_what_torch_expects_of_one() -> None:
    memory, queries = stored([9, 4]), asked(2).detach().transpose(1, 2).contiguous()
    arguments = (queries.requires_grad_(), memory.keys, memory.values, memory.total, 3)
    torch.library.opcheck(attend, arguments, test_utils=("test_schema", "test_faketensor"))
    assert torch.autograd.gradcheck(lambda q: attend(q, *arguments[1:])[:2], (queries,))


def dense(module: KNNAttention, x: Tensor, memory: PairMemory | None, *, local: bool = True) -> Tensor:
    """Plain attention of x over [memory; segment], before the output projection, by torch's own function."""
    batch, time = x.shape[:2]
    place = Place.of(torch.zeros(batch, dtype=torch.int64), time, None, time)
    made = module.project(module.norm(x), module.init_cache(batch), place)[:3]
    queries, keys, values = (part.transpose(1, 2) for part in made)
    seen = torch.ones(time, time, dtype=torch.bool).tril().expand(batch, HEADS, -1, -1)
    if memory is not None:
        held = torch.arange(memory.keys.shape[2]) < memory.held()[:, None]
        held = held[:, None, None].expand(-1, HEADS, time, -1)
        if local:
            keys, values = torch.cat([memory.keys, keys], 2), torch.cat([memory.values, values], 2)
            seen = torch.cat([held, seen], -1)
        else:
            keys, values, seen = memory.keys, memory.values, held
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=1.0)
    return attended.transpose(1, 2)


def projected(module: KNNAttention, attended: Tensor) -> Tensor:
    return module.to_out(attended.flatten(2))


def test_one_softmax_over_all_pairs_is_dense_attention() -> None:
    module, memory = layer(combine="softmax", topk=9), stored([20, 5])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    seen, _ = module.segment(x, memory)
    torch.testing.assert_close(seen, projected(module, dense(module, x, memory)), **EXACT)


def test_the_gate_mixes_dense_attention_to_the_memory_with_local_attention() -> None:
    module, memory = layer(topk=9), stored([20, 5])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    share = torch.sigmoid(module.gate)
    wanted = share * dense(module, x, memory, local=False) + (1 - share) * dense(module, x, None)
    torch.testing.assert_close(module.segment(x, memory)[0], projected(module, wanted), **EXACT)


def test_a_closed_gate_leaves_the_plain_layer_and_an_open_one_the_memory() -> None:
    module, memory = layer(topk=9), stored([20, 5])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    for bias, wanted in (
        (-math.inf, dense(module, x, None)),
        (math.inf, dense(module, x, memory, local=False)),
    ):
        with torch.no_grad():
            module.gate.fill_(bias)
        torch.testing.assert_close(module.segment(x, memory)[0], projected(module, wanted), **EXACT)


@pytest.mark.parametrize("combine", ["gate", "softmax"])
@pytest.mark.parametrize("matching", [False, True])
def test_an_empty_memory_is_local_attention_alone(combine: str, matching: bool) -> None:
    module = layer(combine=combine, matching=matching)
    plain = SegmentAttention(module.config, matching=matching, cosine=True).double().eval()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "gate"})
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    place = Place.of(torch.zeros(2, dtype=torch.int64), TIME, None, TIME)
    wanted, _ = plain(x, plain.init_cache(2), place)
    torch.testing.assert_close(module.segment(x)[0], wanted, **EXACT)
    # Row by row: another row's pairs change nothing.
    mixed = stored([0, 7])
    torch.testing.assert_close(module.segment(x, mixed)[0][0], wanted[0], **EXACT)


@pytest.mark.parametrize("combine", ["gate", "softmax"])
@pytest.mark.parametrize("matching", [False, True])
def test_the_layer_equals_loops_over_a_stream(combine: str, matching: bool) -> None:
    module = layer(combine=combine, matching=matching)
    x = torch.randn(4 * TIME, DIM, dtype=torch.float64, requires_grad=True)
    memory, outputs = None, []
    for part in x[None].split(TIME, 1):
        y, memory = module.segment(part, memory)
        outputs.append(y[0])
    seen, wanted = torch.cat(outputs), knn_attention(module, x, segment=TIME)
    torch.testing.assert_close(seen, wanted, **EXACT)
    push, inputs = torch.randn_like(wanted), [x, *module.parameters()]
    ours, theirs = (torch.autograd.grad((y * push).sum(), inputs) for y in (seen, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_nothing_flows_into_stored_pairs_but_into_queries_scale_and_gate() -> None:
    module = layer()
    x = torch.randn(1, TIME, DIM, dtype=torch.float64, requires_grad=True)
    _, memory = module.segment(x)
    assert not any(leaf.requires_grad for leaf in memory.tensors().values())
    # Not even if somebody hands in pairs that want a gradient.
    leaves = [memory.keys.clone().requires_grad_(), memory.values.clone().requires_grad_()]
    memory = PairMemory(keys=leaves[0], values=leaves[1], total=memory.total)
    with torch.no_grad():
        module.gate.fill_(math.inf)  # what comes now comes from the memory alone
    y, _ = module.segment(x, memory)
    module.gate.data.zero_()
    inputs = [*leaves, x, module.to_queries.weight, module.log_scale]
    none_keys, none_values, *some = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    assert none_keys is None
    assert none_values is None
    assert all(bool(grad.abs().sum() > 0) for grad in some)
    y, _ = module.segment(x, memory)
    assert bool((torch.autograd.grad(y.square().sum(), module.gate)[0] != 0).all())


def test_a_segment_is_searched_for_before_it_is_written() -> None:
    module, memory = layer(combine="softmax"), stored([5])
    x = torch.randn(1, TIME, DIM, dtype=torch.float64)
    before = memory.map(torch.clone)
    y, after = module.segment(x, memory)
    assert all(torch.equal(leaf, memory.tensors()[path]) for path, leaf in before.tensors().items())
    assert after.total.tolist() == [5 + TIME]
    leaking, _ = module.segment(x, after)
    assert not torch.allclose(leaking, y)
    # The last token's pair is what the first one would find, were the order the other way round.
    later = x.clone()
    later[:, -1] += 1
    torch.testing.assert_close(module.segment(later, memory)[0][:, :-1], y[:, :-1], atol=0, rtol=0)


def test_what_the_ring_holds_matters_and_not_where_it_stands() -> None:
    keys = F.normalize(torch.randn(1, 9, HEADS, WIDTH, dtype=torch.float64), dim=-1)
    values, queries = torch.randn_like(keys), asked(1)
    results = []
    for before in range(12):
        junk = torch.randn(1, before, HEADS, WIDTH, dtype=torch.float64)
        memory = stored([0]).append(junk, junk).append(keys, values)
        assert sorted(memory.ages()[0].tolist()) == list(range(9))
        order = memory.ages()[0].argsort(descending=True)
        assert torch.equal(memory.keys[0, :, order].transpose(0, 1), keys[0])
        assert torch.equal(memory.values[0, :, order].transpose(0, 1), values[0])
        results.append(read_pairs(queries, memory, topk=4)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)


@pytest.mark.parametrize("sizes", [[3, 4], [9], [23], [1] * 21, [0, 9, 5, 2, 11]])
def test_the_newest_pairs_stay(sizes: list[int]) -> None:
    memory, written = stored([0, 0]), [[], []]  # type: ignore[var-annotated]
    for size in sizes:
        keys = torch.randn(2, size, HEADS, WIDTH, dtype=torch.float64)
        lengths = torch.tensor([size, size // 2])
        memory = memory.append(keys, -keys, lengths)
        for row, length in enumerate(lengths.tolist()):
            written[row] += list(keys[row, :length])
    for row in range(2):
        assert int(memory.total[row]) == len(written[row])
        ages, kept = memory.ages()[row], written[row][-9:]
        for age, key in enumerate(reversed(kept)):
            (slot,) = (ages == age).nonzero().flatten().tolist()
            assert torch.equal(memory.keys[row, :, slot], key)
            assert torch.equal(memory.values[row, :, slot], -key)
        assert int((ages >= 0).sum()) == len(kept)


def test_padding_is_never_written_and_a_row_of_padding_keeps_its_memory() -> None:
    module, memory = layer(), stored([20, 5])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    _, after = module.segment(x, memory, lengths=torch.tensor([0, 2]))
    assert torch.equal(after.keys[0], memory.keys[0])
    assert torch.equal(after.values[0], memory.values[0])
    _, alone = module.segment(x[1:, :2], memory.select(torch.tensor([1])))
    torch.testing.assert_close(after.keys[1:], alone.keys, **EXACT)
    assert after.total.tolist() == [20, 7]
    none, same = module.segment(x[:, :0], memory)
    assert none.shape == (2, 0, DIM)
    assert torch.equal(same.total, memory.total)


def test_logits_never_exceed_the_scale() -> None:
    module = layer()
    x = 100 * torch.randn(3, TIME, DIM, dtype=torch.float64)
    _, memory = module.segment(x)
    place = Place.of(torch.zeros(3, dtype=torch.int64), TIME, None, TIME)
    queries = module.project(module.norm(x), module.init_cache(3), place)[0].transpose(1, 2)
    logits = (queries @ memory.keys.mT).abs().amax((0, 2, 3))
    assert bool((logits <= module.log_scale.exp().flatten() + 1e-12).all())
    assert math.isclose(KNNAttention(MemorizingConfig(dim=DIM)).log_scale[0].exp().item(), 10, rel_tol=1e-6)


@pytest.mark.parametrize("combine", ["gate", pytest.param("softmax", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_values_and_gradients(combine: str) -> None:
    module, memory = layer(combine=combine), stored([9, 4])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module.segment, backend="aot_eager", fullgraph=True, dynamic=False)
    grads = []
    for call in (module.segment, compiled):
        y, after = call(x, memory)
        grads.append((y, after.keys, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_pairs_kept_in_bfloat16_cost_little() -> None:
    memory, queries = stored([9, 9], dtype=torch.float64), asked(2)
    coarse = memory.to(dtype=torch.bfloat16)
    seen, _ = read_pairs(queries, coarse, topk=9)
    wanted, _ = read_pairs(queries, memory, topk=9)
    # 8 bits of mantissa: a value is off by up to 1/256 of itself, a logit of at most 4 by 4/256.
    assert float((seen - wanted).detach().abs().max()) < (1 + 2 * 4) / 256 * float(memory.values.abs().max())
    (gradient,) = torch.autograd.grad(seen.square().sum(), queries)
    assert bool(gradient.isfinite().all())


def test_queries_that_do_not_fit_the_memory_are_refused() -> None:
    memory = stored([3, 3])
    for shape in ((3, 1, HEADS, WIDTH), (2, 1, HEADS, WIDTH + 1), (2, 1, HEADS - 1, WIDTH)):
        with pytest.raises(ValueError, match="do not fit"):
            read_pairs(torch.randn(shape, dtype=torch.float64), memory, topk=2)


def test_the_parts_that_make_it_match_can_be_had_apart() -> None:
    tied = layer(matching=False, tie_keys=True)
    assert not tied.shift_keys
    config = MemorizingConfig(dim=DIM, heads=HEADS, shift_keys=False, tie_keys=True)
    apart = KNNAttention(config, matching=True)
    assert not hasattr(apart, "mix_previous")
    assert torch.equal(apart.to_keys.weight, apart.to_queries.weight)
    shifted = KNNAttention(MemorizingConfig(dim=DIM, heads=HEADS, shift_keys=True))
    assert shifted.shift_keys
    assert not torch.equal(shifted.to_keys.weight, shifted.to_queries.weight)
    both = KNNAttention(MemorizingConfig(dim=DIM, heads=HEADS), matching=True)
    assert both.shift_keys
    assert torch.equal(both.to_keys.weight, both.to_queries.weight)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_stands_at_padding_reaches_nothing(odd: float) -> None:
    module, memory, lengths = layer(), stored([4, 0]), torch.tensor([TIME - 2, 1])
    x = torch.randn(2, TIME, DIM, dtype=torch.float64)
    padding = torch.arange(TIME) >= lengths[:, None]
    wanted, kept = module.segment(x, memory, lengths=lengths)
    seen, after = module.segment(x.masked_fill(padding[..., None], odd), memory, lengths=lengths)
    assert torch.equal(seen[~padding], wanted[~padding])
    for one, other in zip(after.tensors().values(), kept.tensors().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("keys", "values", "lengths", "message"),
    [
        ((2, 3, 3, WIDTH), None, None, r"keys must have heads that the stores \(2\) divide, got 3"),
        ((2, 3, 1, WIDTH), None, None, r"keys must have heads that the stores \(2\) divide, got 1"),
        ((1, 3, HEADS, WIDTH), None, None, r"keys must have shape \[batch=2, time, heads, dim_head=5\]"),
        ((4, 3, HEADS, WIDTH), None, None, r"keys must have shape .*got \[4, 3, 2, 5\]"),
        ((2, 3, HEADS, 1), None, None, r"keys must have shape .*dim_head=5\], got \[2, 3, 2, 1\]"),
        ((2, 3, HEADS, WIDTH), (2, 2, HEADS, WIDTH), None, r"values must have shape \[batch=2, time=3"),
        ((2, 3, HEADS, WIDTH), (1, 3, HEADS, WIDTH), None, r"values must have shape \[batch=2, time=3"),
        ((2, 3, HEADS, WIDTH), None, [3], r"lengths must have shape \[batch=2\], got \[1\]"),
        ((2, 3, HEADS, WIDTH), None, [0, 4], "lengths must lie in 0 to 3, got 4"),
        ((2, 3, HEADS, WIDTH), None, [-1, 1], "lengths must lie in 0 to 3, got -1"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(
    keys: tuple[int, ...], values: tuple[int, ...] | None, lengths: list[int] | None, message: str
) -> None:
    count = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=message):
        stored([1, 2]).append(torch.zeros(keys), torch.zeros(values or keys), count)
