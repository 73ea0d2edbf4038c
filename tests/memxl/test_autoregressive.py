"""Loss by segment and generation around the classic model (faults X7, X8, X9)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memxl import AutoregressiveWrapper, ClassicMemory, MemoryTransformerXL, top_k, top_p

TOKENS = 11


@pytest.fixture
def wrapper() -> AutoregressiveWrapper:
    model = MemoryTransformerXL(
        num_tokens=TOKENS, dim=16, seq_len=6, depth=2, heads=2, mem_len=4, lmem_len=3, num_mem_kv=2
    ).double()
    with torch.no_grad():
        model.distances.normal_()
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return AutoregressiveWrapper(model.eval())


def draw(*shape: int) -> Tensor:
    return torch.randint(TOKENS, shape)


def greedy(wrapper: AutoregressiveWrapper, prompt: Tensor, steps: int) -> Tensor:
    """The likeliest continuation, each token by reading everything again, segment by segment."""
    tokens = prompt
    for _ in range(steps):
        memories = None
        for segment in tokens.split(wrapper.seq_len, 1):
            logits, memories = wrapper.net(segment, memories)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[:, prompt.shape[1] :]


def losses(wrapper: AutoregressiveWrapper, x: Any, **options: Any) -> list:
    found = wrapper(x, return_loss=True, **options)
    assert isinstance(found, Iterator)
    return list(found)


def test_plain_call_is_the_models_call(wrapper: AutoregressiveWrapper) -> None:
    """X7."""
    tokens = draw(2, 6)
    logits, memories = wrapper(tokens)
    expected_logits, expected = wrapper.net(tokens)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(memories.long, expected.long)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert torch.equal(
        wrapper(tokens, memories=memories, mask=mask)[0], wrapper.net(tokens, memories, mask)[0]
    )


def test_plain_call_pads_and_masks_a_list(wrapper: AutoregressiveWrapper) -> None:
    long, short = draw(6), draw(2)
    logits, memories = wrapper([long, short])
    alone, expected = wrapper([short])
    torch.testing.assert_close(logits[1, :2], alone[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(memories.long[1], expected.long[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("time", [1, 5, 6, 7, 12, 13, 20])
def test_generates_what_was_asked_for_after_any_prompt(wrapper: AutoregressiveWrapper, time: int) -> None:
    """X8, X9: as many tokens as wanted, the ones that teacher forcing gives, each token written once."""
    prompt = draw(2, time)
    found = wrapper.generate(prompt, 9, temperature=0)
    assert torch.equal(found, greedy(wrapper, prompt, 9))
    assert torch.equal(wrapper.generate(prompt[0], 9, temperature=0), found[0])


def test_each_token_is_written_once(wrapper: AutoregressiveWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """X9, by what is written."""
    lengths = []
    write = MemoryTransformerXL.write

    def counted(self: Any, memories: Any, segment: Any, **options: Any) -> ClassicMemory:
        lengths.append(segment.hiddens.shape[2])
        return write(self, memories, segment, **options)

    monkeypatch.setattr(MemoryTransformerXL, "write", counted)
    wrapper.generate(draw(2, 8), 11)
    # 8 of the prompt and 10 of the new tokens are read: three segments of six.
    assert lengths == [6, 6, 6]


def test_rows_of_a_masked_prompt_generate_as_if_alone(wrapper: AutoregressiveWrapper) -> None:
    prompt = draw(3, 14)
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask[0, :5] = False
    mask[2, [1, 3, 13]] = False
    found = wrapper.generate(prompt, 8, temperature=0, mask=mask)
    for row in range(3):
        assert torch.equal(found[row], greedy(wrapper, prompt[[row]][:, mask[row]], 8)[0])


def test_generation_goes_on_from_memories(wrapper: AutoregressiveWrapper) -> None:
    start, prompt = draw(2, 6), draw(2, 4)
    _, memories = wrapper(start)
    found = wrapper.generate(prompt, 5, temperature=0, memories=memories)
    assert torch.equal(found, greedy(wrapper, torch.cat([start, prompt], 1), 5))


def test_generation_stops_when_every_row_has_ended(wrapper: AutoregressiveWrapper) -> None:
    prompt = draw(3, 4)
    free = wrapper.generate(prompt, 12, temperature=0)
    end = int(free[0, 3])
    first = [(row == end).nonzero().flatten() for row in free]
    found = wrapper.generate(prompt, 12, eos_token=end, temperature=0)
    stops = [int(places[0]) + 1 if len(places) else 12 for places in first]
    assert found.shape[1] == max(stops)
    for row, stop in enumerate(stops):
        assert torch.equal(found[row, :stop], free[row, :stop])
        assert bool((found[row, stop:] == end).all())


def test_generation_leaves_mode_and_draws_from_the_filter(wrapper: AutoregressiveWrapper) -> None:
    wrapper.net.layers[0].eval()
    wrapper.net.writer.train()
    modes = [part.training for part in wrapper.modules()]
    only = 7

    def filtered(logits: Tensor, thres: float) -> Tensor:
        assert thres == 0.25
        return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([only]), 0.0)

    found = wrapper.generate(draw(2, 3), 4, filter_logits_fn=filtered, filter_thres=0.25)
    assert bool((found == only).all())
    assert [part.training for part in wrapper.modules()] == modes
    assert wrapper.generate(draw(2, 3), 0).shape == (2, 0)


def test_filters_keep_the_right_tokens() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.05, 0.25]]).log()
    kept = [top_k(logits, 0.5), top_p(logits, 0.3), top_p(logits, 0.2), top_p(logits, 1.0)]
    assert [row.isfinite().flatten().tolist() for row in kept] == [
        [True, False, False, True],
        [True, False, False, True],
        [True, True, False, True],
        [True, False, False, False],
    ]
    # In bfloat16 the running sum of 1/4000 would stop growing near 1/16 and everything stay.
    even = torch.zeros(1, 4000, dtype=torch.bfloat16)
    assert int(top_p(even, 0.5).isfinite().sum()) == pytest.approx(2000, abs=2)
    # A share that leaves out everything leaves one.
    assert top_k(logits, 0.99).isfinite().sum() == 1


def test_loss_is_the_mean_over_each_segment(wrapper: AutoregressiveWrapper) -> None:
    x = draw(2, 15)
    found = losses(wrapper, x)
    memories = None
    for begin, loss in zip(range(0, 14, 6), found, strict=True):
        inputs = x[:, :-1][:, begin : begin + 6]
        logits, memories = wrapper.net(inputs, memories)
        expected = F.cross_entropy(logits.transpose(1, 2), x[:, 1:][:, begin : begin + 6])
        torch.testing.assert_close(loss.loss, expected)
        assert loss.is_last_batch


def test_parts_of_the_batch_give_the_same_losses(wrapper: AutoregressiveWrapper) -> None:
    x = draw(5, 15)
    whole = [found.loss for found in losses(wrapper, x)]
    parts = losses(wrapper, x, max_batch_size=2)
    assert [found.is_last_batch for found in parts] == [False, False, True] * 3
    sizes = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    for index, expected in enumerate(whole):
        mean = torch.stack([found.loss for found in parts[3 * index : 3 * index + 3]]) @ sizes / 5
        torch.testing.assert_close(mean, expected)


def test_padding_is_no_target(wrapper: AutoregressiveWrapper) -> None:
    rows = [draw(15), draw(4), draw(1)]
    together = losses(wrapper, rows)
    first, second = losses(wrapper, [rows[0]]), losses(wrapper, [rows[1]])
    expected = (first[0].loss * 6 + second[0].loss * 3) / 9
    torch.testing.assert_close(together[0].loss, expected)
    torch.testing.assert_close(together[1].loss, first[1].loss)
    # Parts with nothing to predict have a loss of zero, and a gradient.
    alone = losses(wrapper, rows, max_batch_size=1)
    assert [float(found.loss.detach()) for found in alone[5::3]] == [0.0, 0.0]
    alone[5].loss.backward()


def test_masks_of_all_tokens_or_of_the_inputs(wrapper: AutoregressiveWrapper) -> None:
    x = draw(2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    of_inputs = mask[:, 1:]  # what is asked of a target may be said by the inputs' mask as well
    full, short = losses(wrapper, x, mask=mask), losses(wrapper, x, mask=of_inputs)
    expected = losses(wrapper, [x[0], x[1, :5]])
    for one, other, right in zip(full, short, expected, strict=True):
        torch.testing.assert_close(one.loss, right.loss)
        torch.testing.assert_close(other.loss, right.loss)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\)"):
        wrapper(x, return_loss=True, mask=mask[:, :6])


def test_ignored_targets_take_no_part() -> None:
    model = MemoryTransformerXL(num_tokens=TOKENS, dim=16, seq_len=6, depth=1, heads=2)
    wrapper = AutoregressiveWrapper(model, ignore_index=3)
    x = torch.tensor([[1, 3, 2, 3, 5]])
    logits, _ = model(x[:, :-1])
    expected = F.cross_entropy(logits[0, [1, 3]], torch.tensor([2, 5]))
    torch.testing.assert_close(losses(wrapper, x)[0].loss, expected)


def test_truncation_cuts_the_gradient_and_frees_the_graph(wrapper: AutoregressiveWrapper) -> None:
    x, first = draw(2, 25), wrapper.net.writer.initial
    reached = []
    for every in (None, 2):
        found = losses(wrapper, x, truncate_every=every)
        (gradient,) = torch.autograd.grad(found[-1].loss, first, allow_unused=True)
        reached.append(gradient is not None and bool(gradient.any()))
    assert reached == [True, False]
    optimiser = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    for found in wrapper(x, return_loss=True, truncate_every=1):
        found.loss.backward()
        optimiser.step()


def test_the_published_loop_runs(wrapper: AutoregressiveWrapper) -> None:
    optimiser = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in wrapper.parameters()]
    lasts = []
    for loss, is_last in wrapper(draw(4, 19), max_batch_size=2, return_loss=True):
        assert loss.isfinite()
        loss.backward(retain_graph=True)
        lasts.append(is_last)
        if is_last:
            optimiser.step()
            optimiser.zero_grad()
    # 18 targets in segments of six, each for both halves of the batch.
    assert lasts == [False, True] * 3
    assert all(not torch.equal(old, new) for old, new in zip(before, wrapper.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w(draw(2, 7)), r"at most 6 tokens"),
        (lambda w: w([draw(3)], mask=torch.ones(1, 3).bool()), r"a list of sequences brings its own mask"),
        (lambda w: w(draw(2, 7), return_loss=True, max_batch_size=0), r"max_batch_size \(0\)"),
        (lambda w: w(draw(2, 7), return_loss=True, truncate_every=0), r"truncate_every \(0\)"),
        (lambda w: w(draw(2, 7) + 100, return_loss=True), r"tokens hold \d+, outside the vocabulary"),
        (
            lambda w: w(torch.cat([draw(2, 6), draw(2, 1) + 100], 1), return_loss=True),
            r"targets hold \d+, outside the vocabulary",
        ),
        (lambda w: w.generate(draw(2, 3), -1), r"seq_len \(-1\) must be at least 0"),
        (lambda w: w.generate(draw(2, 3), 3, temperature=-1), r"temperature \(-1\) must be 0"),
        (lambda w: w.generate(draw(2, 3), 3, temperature=float("nan")), r"temperature \(nan\)"),
        (lambda w: w.generate(draw(2, 0), 3), r"at least one token, got lengths \[0, 0\]"),
        (lambda w: w.generate(draw(2, 3), 3, mask=torch.ones(2, 2).bool()), r"mask has shape \(2, 2\)"),
    ],
)
def test_errors_name_the_value(wrapper: AutoregressiveWrapper, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(wrapper)
