"""Attention over retrieved pairs against the same attention on pairs laid out, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from memorizing import KNNMemory


def laid_out(memory, queries, k, scale):
    """Gather the pairs, score them again, mask, softmax, sum: the obvious way."""
    ids = memory.lookup(queries, k, increment_hits=False).ids
    keys, values, mask = memory.gather(ids)
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    if memory.metric == "cosine":
        scores = (F.normalize(queries, dim=-1).unsqueeze(-2) * F.normalize(keys, dim=-1)).sum(-1)
    elif memory.metric == "l2":
        scores = -(queries.unsqueeze(-2) - keys).square().sum(-1)
    else:
        scores = (queries.unsqueeze(-2) * keys).sum(-1)
    if isinstance(scale, torch.Tensor):
        scale = scale.unsqueeze(-1)
    logits = (scores * scale).masked_fill(~mask, -1e30)
    weights = logits.softmax(-1).masked_fill(~mask, 0)
    return (weights.unsqueeze(-1) * values).sum(-2), torch.logsumexp(logits, -1), mask


def filled(metric="ip", n=40, dtype=torch.float64, **options):
    torch.manual_seed(0)
    memory = KNNMemory(6, 30, 2, metric=metric, dtype=dtype, **options)
    memory.add(
        torch.randn(2, n, 6, dtype=torch.float64), torch.randn(2, n, memory.value_dim, dtype=torch.float64)
    )
    return memory


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("snapshot", [False, True])
def test_equals_attention_on_pairs_laid_out(metric, n, snapshot):
    memory = filled(metric, n, value_dim=5)
    queries = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    ours = memory.attend(queries, 8, scale=scale, snapshot=snapshot)
    output, total, mask = laid_out(memory, queries, 8, scale.expand(2, 3, 7))
    torch.testing.assert_close(ours.output, output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.logsumexp, total, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours.ids >= 0, mask)
    torch.testing.assert_close(ours.weights.sum(-1), torch.ones_like(total))
    direction, push = torch.randn_like(output), torch.randn_like(total)
    grads = [
        torch.autograd.grad((o * direction).sum() + (t * push).sum(), (queries, scale))
        for o, t in ((ours.output, ours.logsumexp), (output, total))
    ]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_storage_dtype(dtype):
    memory = filled(dtype=dtype)
    queries = torch.randn(2, 50, 6, requires_grad=True)
    ours = memory.attend(queries, 8).output
    output, _, _ = laid_out(memory, queries, 8, 6**-0.5)
    torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(output)
    mine, expected = (torch.autograd.grad((o * direction).sum(), queries)[0] for o in (ours, output))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_all_pairs_is_dense_attention():
    memory = filled(n=30)
    queries = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = torch.stack(
        [F.scaled_dot_product_attention(queries[row], *(memory.contents(row)[:2])) for row in range(2)]
    )
    torch.testing.assert_close(memory.attend(queries, 30).output, expected)


def test_logsumexp_joins_two_attentions_into_one_softmax():
    memory = filled(n=30)
    queries = torch.randn(2, 9, 6, dtype=torch.float64)
    keys, values = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    local = queries @ keys.transpose(1, 2) * 6**-0.5
    far = memory.attend(queries, 30)
    share = torch.sigmoid(far.logsumexp - torch.logsumexp(local, -1)).unsqueeze(-1)
    joined = share * far.output + (1 - share) * (local.softmax(-1) @ values)
    both = [torch.stack([memory.contents(row)[part] for row in range(2)]) for part in (0, 1)]
    dense = F.scaled_dot_product_attention(
        queries, torch.cat((both[0], keys), 1), torch.cat((both[1], values), 1)
    )
    torch.testing.assert_close(joined, dense)


def test_a_row_with_nothing_gives_zero_and_no_gradient():
    memory = filled()
    memory.clear(0)
    queries = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    ours = memory.attend(queries, 4, scale=scale)
    assert ours.output[0].eq(0).all()
    assert ours.logsumexp[0].eq(-torch.inf).all()
    assert ours.ids[0].eq(-1).all()
    ours.output.sum().backward()
    assert queries.grad[0].eq(0).all()
    assert queries.grad[1].abs().sum() > 0
    assert scale.grad.isfinite()


def test_no_pairs_wanted():
    ours = filled(dtype=torch.float32).attend(torch.randn(2, 5, 6, requires_grad=True), 0)
    assert ours.output.shape == (2, 5, 6)
    assert ours.output.eq(0).all()
    assert ours.logsumexp.eq(-torch.inf).all()


def test_adding_before_the_backward_pass_is_fine_while_the_pairs_are_held():
    memory = filled(n=20)
    queries = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(memory.attend(queries, 4).output.sum(), queries)
    output = memory.attend(queries, 4).output
    memory.add(torch.randn(2, 10, 2, 6))
    (late,) = torch.autograd.grad(output.sum(), queries)
    torch.testing.assert_close(late, expected)


@pytest.mark.parametrize("change", ["give way", "clear", "clear and add"])
def test_pairs_gone_before_the_backward_pass_are_an_error_unless_copied(change):
    memory = filled(n=30)
    queries = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(memory.attend(queries, 4).output.sum(), queries)
    output = memory.attend(queries, 4).output
    copied = memory.attend(queries, 4, snapshot=True).output
    if change == "give way":
        memory.add(torch.randn(2, 29, 2, 6))
    else:
        memory.clear(1)
    if change == "clear and add":
        memory.add(torch.randn(2, 30, 2, 6))
    with pytest.raises(RuntimeError, match="snapshot=True"):
        output.sum().backward()
    (late,) = torch.autograd.grad(copied.sum(), queries)
    torch.testing.assert_close(late, expected)


def test_queries_in_half_precision_get_half_precision_back():
    memory = filled(dtype=torch.float32)
    queries = torch.randn(2, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    ours = memory.attend(queries, 4)
    assert ours.output.dtype == ours.weights.dtype == torch.bfloat16
    ours.output.sum().backward()
    assert queries.grad.dtype == torch.bfloat16


def test_autocast_changes_nothing():
    memory = filled(dtype=torch.float32)
    queries = torch.randn(2, 50, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = memory.attend(queries, 4).output
    assert torch.equal(inside, memory.attend(queries, 4).output)
