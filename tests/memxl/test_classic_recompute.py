"""What the classic layers compute again on the way back: values and gradients of the plain expressions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memxl import (
    AutoregressiveWrapper,
    ClassicMemory,
    MemoryTransformerXL,
    classic_layers,
    classic_loss,
    classic_recompute,
)
from memxl.classic_loss import linear_cross_entropy
from memxl.classic_recompute import attend, linear_of_gelu
from memxl.classic_writer import copied_weights


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_alike(found: Tensor, expected: Tensor, inputs: list[Tensor], *, twice: bool = True) -> None:
    """The values, the gradients, and the gradients of those."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for graph in (False, True) if twice else (False,):
        one, other = (
            torch.autograd.grad(result.square().sum(), inputs, create_graph=graph, retain_graph=True)
            for result in (found, expected)
        )
        for first, second in zip(one, other, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=1e-10)
        if graph:
            one, other = (
                torch.autograd.grad(sum(part.square().sum() for part in gradients), inputs)  # type: ignore[arg-type]
                for gradients in (one, other)
            )
            for first, second in zip(one, other, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def one_by_one(
    queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, tokens: int, absent: Tensor | None
) -> Tensor:
    """Attention of each row, head and query alone."""
    batch, heads, time, _ = queries.shape
    number = keys.shape[2]
    found = []
    for row in range(batch):
        for head in range(heads):
            for index in range(time):
                query, shared = queries[row, head, index], min(head, keys.shape[1] - 1)
                scores, seen = [], []
                for key in range(number - time + index + 1):
                    if absent is not None and absent[row, key]:
                        continue
                    score = query @ keys[row, shared, key]
                    distance = number - time + index - key
                    if key >= number - tokens:
                        score = score + query @ table[head, table.shape[1] - 1 - distance]
                    scores.append(score)
                    seen.append(values[row, shared, key])
                found.append(torch.stack(scores).softmax(0) @ torch.stack(seen))
    return torch.stack(found).view(queries.shape)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("scores", [1 << 18, 60, 1], ids=["whole", "by row", "by head"])
def test_attention(kv_heads: int, ragged: bool, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic_recompute, "_SCORES", scores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    queries, keys, values = draw(2, 2, 3, 4), draw(2, kv_heads, 8, 4), draw(2, kv_heads, 8, 4)
    table = draw(2, 6, 4)
    absent = None
    if ragged:
        absent = torch.zeros(2, 8, dtype=torch.bool)
        absent[1, 2:5] = True
    found = attend(queries, keys, values, table, tokens=6, absent=absent, dropout=0.0)
    expected = one_by_one(queries, keys, values, table, 6, absent)
    assert_alike(found, expected, [queries, keys, values, table])
    with torch.no_grad():
        without = attend(queries, keys, values, table, tokens=6, absent=absent, dropout=0.0)
    torch.testing.assert_close(without, expected, rtol=0, atol=1e-12)


def test_attention_over_part_of_the_table() -> None:
    queries, keys, values, table = draw(1, 2, 3, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 4), draw(2, 9, 4)
    found = attend(queries, keys, values, table, tokens=5, absent=None, dropout=0.0)
    expected = one_by_one(queries, keys, values, table, 5, None)
    assert_alike(found, expected, [queries, keys, values, table])


def test_attention_of_inputs_that_need_no_gradient() -> None:
    queries, keys, values, table = (
        draw(1, 2, 3, 4),
        draw(1, 2, 5, 4).detach(),
        draw(1, 2, 5, 4),
        draw(2, 5, 4),
    )
    attend(queries, keys, values, table, tokens=5, absent=None, dropout=0.0).sum().backward()
    assert keys.grad is None
    assert all(part.grad is not None for part in (queries, values, table))


def test_feedforward() -> None:
    x, weight, bias = draw(2, 3, 8), draw(5, 8), draw(5)
    assert_alike(linear_of_gelu(x, weight, bias), F.linear(F.gelu(x), weight, bias), [x, weight, bias])


@pytest.mark.parametrize("ignored", [[], [0, 5, 69], list(range(70))], ids=["none", "some", "all"])
def test_loss(ignored: list[int]) -> None:
    x, weight, bias = draw(70, 6), draw(11, 6), draw(11)
    targets = torch.randint(11, (70,))
    targets[ignored] = -100
    found = linear_cross_entropy(x, weight, bias, targets, ignore_index=-100)
    if len(ignored) == 70:
        gradients = torch.autograd.grad(found, [x, weight, bias])
        assert not any(bool(part.any()) for part in (found, *gradients))
        return
    expected = F.cross_entropy(F.linear(x, weight, bias), targets)
    assert_alike(found, expected, [x, weight, bias])


@pytest.mark.parametrize("ignored", [[], [0, 5, 69], list(range(70))], ids=["none", "some", "all"])
def test_loss_without_a_way_back_is_summed_by_parts_of_the_vocabulary(
    ignored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classic_loss, "_TOKENS", 4)
    monkeypatch.setattr(classic_loss, "_LOGITS", 1)
    x, weight, bias = (30 * draw(70, 6)).detach(), draw(11, 6), draw(11)
    targets = torch.randint(11, (70,))
    targets[ignored] = -100
    x[ignored] = torch.nan
    counted = targets != -100
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, bias, targets, ignore_index=-100)
        total = F.cross_entropy(F.linear(x[counted], weight, bias), targets[counted], reduction="sum")
    torch.testing.assert_close(found, total / max(1, 70 - len(ignored)), rtol=1e-12, atol=1e-12)


def test_loss_of_ignored_rows_that_are_not_finite_or_far_apart() -> None:
    x, weight, bias = (1000 * draw(3, 6)).detach().requires_grad_(), draw(11, 6), draw(11)
    targets = torch.tensor([4, -100, 2])
    with torch.no_grad():
        x[1] = torch.nan
    found = linear_cross_entropy(x, weight, bias, targets, ignore_index=-100)
    expected = F.cross_entropy(F.linear(x[[0, 2]], weight, bias), targets[[0, 2]])
    torch.testing.assert_close(found, expected)
    (of_x,) = torch.autograd.grad(found, x)
    assert of_x.isfinite().all()
    assert not of_x[1].any()


def keeping(run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """The result, and the storages that autograd keeps for its way back: bytes by address."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, {address: tensor.untyped_storage().nbytes() for address, tensor in kept.items()}


def storages(*parts: Tensor) -> dict[int, int]:
    """As `keeping` tells them, each no larger than its tensor."""
    return {part.untyped_storage().data_ptr(): part.numel() * part.element_size() for part in parts}


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_weights_are_not_kept(ragged: bool) -> None:
    queries, keys, values, table = draw(1, 2, 64, 4), draw(1, 2, 256, 4), draw(1, 2, 256, 4), draw(2, 256, 4)
    absent = torch.arange(256)[None] < 100 if ragged else None
    weights = 2 * 64 * 256 * 8
    _, plain = keeping(lambda: (queries @ keys.mT).softmax(-1) @ values)
    assert max(plain.values()) == weights, "it would be seen if they were kept"

    found, kept = keeping(
        lambda: attend(queries, keys, values, table, tokens=256, absent=absent, dropout=0.0)
    )
    given = [queries, keys, values, table] if absent is None else [queries, keys, values, table, absent]
    assert kept == storages(*given, found)
    assert sum(kept.values()) < weights
    # Nor beside, where autograd does not see them.
    assert not any(isinstance(value, Tensor) for value in vars(found.grad_fn).values())


def test_the_result_that_attention_keeps_is_what_the_map_behind_it_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results: list[Tensor] = []

    def watched(*inputs: Any, **options: Any) -> Tensor:
        results.append(attend(*inputs, **options))
        return results[-1]

    monkeypatch.setattr(classic_layers, "attend", watched)
    layer, x, table = classic_layers.ClassicAttention(8, 2).double(), draw(3, 5, 8), draw(2, 5, 4)
    layer.to_out.register_forward_pre_hook(lambda module, inputs: results.append(inputs[0]))
    nothing = x[:, :0]
    layer(x, layer.open(nothing, nothing, None), table)
    result, read = results
    # One storage, so that keeping both costs what keeping one does.
    assert storages(read) == storages(result)


def build() -> MemoryTransformerXL:
    return MemoryTransformerXL(num_tokens=11, dim=16, seq_len=6, depth=1, heads=2, lmem_len=3, num_mem_kv=2)


def test_writes_of_one_graph_share_their_weights_until_these_change() -> None:
    model, tokens = build(), torch.randint(11, (2, 6))
    _, first = model(tokens)
    weights = copied_weights(model.writer, first.long)
    _, second = model(tokens, first)
    assert copied_weights(model.writer, second.long)["to_out.weight"] is weights["to_out.weight"]
    # Even a change that autograd does not hear of.
    model.writer.to_out.weight.data.mul_(1.1)
    changed = copied_weights(model.writer, second.long)
    assert changed["to_out.weight"] is not weights["to_out.weight"]
    assert torch.equal(changed["to_out.weight"], model.writer.to_out.weight)
    # Another model with equal weights learns from its own.
    other = build()
    other.load_state_dict(model.state_dict())
    _, third = other(tokens, second)
    third.long.sum().backward()
    assert other.writer.to_queries.weight.grad is not None


def test_a_memory_of_padding_keeps_what_it_was_written_with() -> None:
    model, tokens = build(), torch.randint(11, (2, 6))
    mask = torch.tensor([[True] * 6, [False] * 6])
    _, memories = model(tokens, None, mask)
    assert isinstance(memories, ClassicMemory)
    shared = copied_weights(model.writer, memories.long)
    _, after = model(tokens, memories, mask)
    assert copied_weights(model.writer, after.long)["to_out.weight"] is shared["to_out.weight"]


def test_maps_put_in_the_place_of_ours_are_called() -> None:
    class Louder(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    torch.manual_seed(0)
    model, tokens = build(), torch.randint(11, (1, 7))
    inner, head = Louder(64, 16), Louder(16, 11)
    with torch.no_grad():
        doubled = build()
        doubled.load_state_dict(model.state_dict())
        for one, other in ((model.layers[0].feedforward, inner), (model, head)):
            name = "to_out" if other is inner else "to_logits"
            other.load_state_dict(getattr(one, name).state_dict())
            setattr(one, name, other)
        for weight in (
            *doubled.get_submodule("layers.0.feedforward.to_out").parameters(),
            *doubled.to_logits.parameters(),
        ):
            weight.mul_(2)
    found, expected = (
        next(iter(AutoregressiveWrapper(net)(tokens, return_loss=True))) for net in (model, doubled)
    )
    torch.testing.assert_close(found.loss, expected.loss)
