"""The language model around a module: ids, labels, the head, the loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_models import MemoryLM, collect_stats
from memory_models.lm import IGNORED_LABEL, cross_entropy
from tests.members import MEMBERS, small_lm
from tests.memory_models.toys import Mean, MeanConfig

VOCAB, TIME = 7, 4


def lm(**options: Any) -> MemoryLM:
    return MemoryLM(Mean(MeanConfig(dim=6, segment_length=TIME)), vocab_size=VOCAB, **options)


def tokens(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(VOCAB, (batch, time))


def loss_by_hand(logits: Tensor, labels: Tensor) -> float:
    losses = []
    for row in range(logits.shape[0]):
        for time in range(logits.shape[1]):
            label = int(labels[row, time])
            if label != -100:
                scores = [float(s) for s in logits[row, time]]
                losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[label])
    return sum(losses) / len(losses) if losses else 0.0


def test_the_loss_is_the_mean_over_labels_that_are_asked() -> None:
    model, ids, labels = lm().double(), tokens(), tokens()
    labels[0, 1:3] = -100
    labels[1, 0] = -100
    out = model(ids, labels=labels)
    assert out.loss is not None
    # Labels are aligned with logits: no shift.
    assert out.loss.item() == pytest.approx(loss_by_hand(out.logits.detach(), labels), abs=1e-12)
    assert model(ids).loss is None


def test_places_not_asked_get_no_gradient() -> None:
    logits = torch.randn(2, 3, VOCAB, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    assert ((logits.grad != 0).any(-1) == (labels != IGNORED_LABEL)).all()


def test_no_label_asked_costs_zero_not_nan() -> None:
    model = lm()
    out = model(tokens(), labels=torch.full((2, TIME), -100))
    assert out.loss is not None
    assert out.loss.item() == 0.0
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(g.isnan().any() for g in gradients)


def test_nothing_is_asked_at_padding() -> None:
    model, ids, labels = lm().double(), tokens(), tokens()
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    short = model(ids[:1, :2], labels=labels[:1, :2]).loss, model(ids[1:, 1:], labels=labels[1:, 1:]).loss
    wanted = (2 * short[0] + 3 * short[1]) / 5
    # Whatever stands there, -100 and ids that do not exist included.
    for filler in (0, 5, -100, VOCAB):
        out = model(ids, mask=mask, labels=torch.where(mask, labels, filler))
        torch.testing.assert_close(out.loss, wanted, atol=1e-12, rtol=0)


def test_logits_are_the_embedding_through_the_module_and_the_head() -> None:
    model, ids = lm(tie_embeddings=False).double(), tokens()
    scale = math.sqrt(6)  # the embedding has standard deviation dim ** -0.5
    wanted, memory = model.module(model.embedding.weight[ids] * scale)
    out = model(ids)
    torch.testing.assert_close(out.logits, wanted @ model.head.weight.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(out.memory.total, memory.total, atol=1e-12, rtol=0)


def test_a_tied_head_is_the_embedding() -> None:
    tied, apart = lm(), lm(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert apart.head.weight is not apart.embedding.weight
    assert len(list(apart.parameters())) == len(list(tied.parameters())) + 1
    copied = copy.deepcopy(tied)
    assert copied.head.weight is copied.embedding.weight


@pytest.mark.parametrize(("std", "scale", "factor"), [(0.02, None, 50.0), (0.5, 3.0, 3.0), (0.0, None, 1.0)])
def test_embedding_std_and_scale(std: float, scale: float | None, factor: float) -> None:
    model = MemoryLM(Mean(MeanConfig(dim=64)), vocab_size=200, embedding_std=std, embedding_scale=scale)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert model.embedding_scale == pytest.approx(factor)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([[0, VOCAB]]), ValueError, r"tokens hold 7, outside the vocabulary \(0 to 6\)"),
        (torch.tensor([[0, -1]]), ValueError, "tokens hold -1, outside"),
        (torch.tensor([[0, -100]]), ValueError, "tokens hold -100, outside"),
        (torch.tensor([0, 1]), ValueError, r"tokens must be \[batch, time\], got \(2,\)"),
        (torch.tensor([[0.0, 1.0]]), TypeError, "tokens must be int64, got torch.float32"),
        (torch.tensor([[True]]), TypeError, "tokens must be int64, got torch.bool"),
        (torch.zeros(1, TIME + 1, dtype=torch.int64), ValueError, "more than segment_length"),
        ([[0, 1]], TypeError, "tokens must be a tensor, got list"),
    ],
)
def test_wrong_tokens_are_refused(ids: Tensor, error: type[Exception], message: str) -> None:
    model = lm()
    memory = model.init_memory(1)
    with pytest.raises(error, match=message):
        model(ids, memory)
    assert all(
        torch.equal(a, b)
        for a, b in zip(memory.tensors().values(), model.init_memory(1).tensors().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([[0, 1, 2, VOCAB]]), ValueError, "labels hold 7, outside the vocabulary"),
        (torch.tensor([[0, 1, 2, -1]]), ValueError, "labels hold -1, outside"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"labels are \(1, 3\), tokens are \(1, 4\)"),
        (torch.zeros(1, 4), TypeError, "labels must be int64, got torch.float32"),
        ([[0, 1, 2, 3]], TypeError, "labels must be a tensor, got list"),
    ],
)
def test_wrong_labels_are_refused(labels: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lm()(tokens(1), labels=labels)


def test_int32_tokens_are_welcome() -> None:
    model, ids = lm(), tokens()
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


@pytest.mark.parametrize("filler", [0, -100, VOCAB, 10**9])
def test_padding_may_carry_any_id(filler: int) -> None:
    model, ids = lm(), tokens()
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    padded = model(torch.where(mask, ids, filler), mask=mask)
    short = model(ids[:1, :2])
    torch.testing.assert_close(padded.logits[:1, :2], short.logits)
    torch.testing.assert_close(padded.memory.total[:1], short.memory.total)


def test_a_vocabulary_needs_a_token() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(0\) must be at least 1"):
        MemoryLM(Mean(), vocab_size=0)


def test_diagnostics_come_when_asked_for() -> None:
    model, ids = lm(), tokens()
    assert model(ids).stats == {}
    out = model(ids, stats=True)
    assert out.stats.keys() == {"mean/past"}
    assert out.stats["mean/past"].shape == (2,)
    assert not out.stats["mean/past"].requires_grad
    # The caller's own listener hears what the model's did not take.
    with collect_stats() as heard:
        model(ids)
    assert heard.keys() == {"mean/past"}


def test_a_failed_call_stops_listening() -> None:
    model = lm()
    with collect_stats() as heard:
        with pytest.raises(ValueError):
            model(tokens(), torch.zeros(1), stats=True, reset=torch.ones(5, dtype=torch.bool))
        model(tokens())
    assert heard.keys() == {"mean/past"}


@pytest.mark.parametrize("name", MEMBERS)
def test_bfloat16_keeps_its_dtype_and_the_loss_is_summed_in_float32(name: str) -> None:
    exact = small_lm(name).float()
    model = copy.deepcopy(exact).bfloat16()
    ids, labels = torch.randint(11, (2, 5)), torch.randint(11, (2, 5))
    out, wanted = model(ids, labels=labels), exact(ids, labels=labels)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, wanted.loss, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_learns_to_copy_its_last_token(name: str) -> None:
    torch.manual_seed(0)
    model = small_lm(name).float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        ids = torch.randint(11, (8, 6))
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
