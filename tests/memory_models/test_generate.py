"""Sampling: the filters' laws, and that each step equals the teacher-forced pass at one token's cost."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memory_models import MemoryLM, generate, greedy, sampler, unroll
from memory_models.generate import Step, filter_logits
from tests.members import MEMBERS, VARIANTS, small_lm, small_options
from tests.memory_models.toys import Average, Mean

VOCAB, LENGTH = 11, 6


def prompt(batch: int = 3, time: int = 4) -> Tensor:
    """Prompts that differ from the first token."""
    return torch.cat([torch.randperm(VOCAB)[:batch, None], torch.randint(VOCAB, (batch, time - 1))], 1)


def scattered(start: int = 0) -> Any:
    """Any token, but the same one for the same logits at the same step, in a batch as alone.

    Greedy text soon repeats itself; then htm's chunks are equal and which of them it reads is a toss-up.
    """
    step = itertools.count(start)

    def draw(logits: Tensor) -> Tensor:
        return ((logits * 1e4).long().abs().sum(-1) + 3 * next(step)) % VOCAB

    return draw


def tensors(memory: Any) -> dict[str, Tensor]:
    return memory.tensors()


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("time", [1, LENGTH, LENGTH + 2, 3 * LENGTH])
def test_each_step_equals_the_teacher_forced_pass(name: str, time: int) -> None:
    model, given_ids = small_lm(name), prompt(time=time)
    steps = list(generate(model, given_ids, max_new_tokens=15, sample=scattered()))
    tokens = torch.stack([step.token for step in steps], 1)
    assert len(tokens.unique()) > 5
    with torch.no_grad():
        logits, memory = unroll(model, torch.cat([given_ids, tokens], 1)[:, :-1], close=False)
    for index, step in enumerate(steps):
        torch.testing.assert_close(step.logits, logits[:, time - 1 + index], atol=1e-9, rtol=1e-9)
    # The last memory has seen all tokens but the last.
    for path, leaf in tensors(memory).items():
        torch.testing.assert_close(tensors(steps[-1].memory)[path], leaf, atol=1e-9, rtol=1e-9, msg=path)


@pytest.mark.parametrize("name", MEMBERS)
def test_ragged_prompts_equal_each_prompt_alone(name: str) -> None:
    model, ids = small_lm(name), prompt(batch=4, time=15)
    lengths = torch.tensor([15, 1, 6, 13])
    rubbish = torch.where(torch.arange(15) < lengths[:, None], ids, 999)
    steps = list(generate(model, rubbish, max_new_tokens=9, lengths=lengths, sample=scattered()))
    for row, length in enumerate(lengths.tolist()):
        alone = list(generate(model, ids[row : row + 1, :length], max_new_tokens=9, sample=scattered()))
        for one, other in zip(steps, alone, strict=True):
            assert one.token[row] == other.token[0]
            torch.testing.assert_close(one.logits[row], other.logits[0], atol=1e-9, rtol=1e-9)
        wanted = tensors(alone[-1].memory)
        for path, leaf in tensors(steps[-1].memory.select(torch.tensor([row]))).items():
            torch.testing.assert_close(leaf, wanted[path], atol=1e-9, rtol=1e-9, msg=path)


@pytest.mark.parametrize("name", MEMBERS)
def test_generation_goes_on_from_any_step(name: str) -> None:
    model, ids = small_lm(name), prompt()
    whole = list(generate(model, ids, max_new_tokens=14, sample=scattered()))
    for stop in (1, 2, 3, 9):
        last = whole[stop - 1]
        rest = generate(
            model, last.token[:, None], max_new_tokens=14 - stop, memory=last.memory, sample=scattered(stop)
        )
        for one, other in zip(rest, whole[stop:], strict=True):
            assert torch.equal(one.token, other.token)
            torch.testing.assert_close(one.logits, other.logits, atol=1e-9, rtol=1e-9)


def test_ragged_prompts_go_on_from_ragged_memories() -> None:
    model, ids = small_lm("htm"), prompt(time=20)
    lengths = torch.tensor([3, 9, 12])
    first = next(generate(model, ids[:, :12], max_new_tokens=1, lengths=lengths))
    assert first.memory.open_length.tolist() == [3, 3, 0]
    more = torch.tensor([7, 2, 8])
    second = list(generate(model, ids[:, 12:], max_new_tokens=4, memory=first.memory, lengths=more))
    for row in range(3):
        alone = torch.cat([ids[row, : lengths[row]], ids[row, 12 : 12 + more[row]]])
        for one, other in zip(second, generate(model, alone[None], max_new_tokens=4), strict=True):
            torch.testing.assert_close(one.logits[row], other.logits[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_full_segment_that_was_left_open_ends_before_the_prompt(ragged: bool) -> None:
    model, ids = small_lm("htm"), prompt(time=LENGTH + 3)
    memory = model(ids[:, :LENGTH], close=False).memory
    lengths = torch.tensor([3, 2, 3]) if ragged else None
    step = next(generate(model, ids[:, LENGTH:], max_new_tokens=1, memory=memory, lengths=lengths))
    for row in range(3):
        end = LENGTH + (3 if lengths is None else int(lengths[row]))
        logits, _ = unroll(model, ids[row : row + 1, :end], close=False)
        torch.testing.assert_close(step.logits[row], logits[0, -1], atol=1e-9, rtol=1e-9)


class Counted(torch.nn.Module):
    """A model that counts the tokens that pass."""

    def __init__(self, model: MemoryLM) -> None:
        super().__init__()
        self.model, self.tokens = model, 0
        model.module.register_forward_pre_hook(self._count)

    def _count(self, _: Any, args: tuple[Any, ...]) -> None:
        self.tokens += args[0].shape[1]


@pytest.mark.parametrize("name", MEMBERS)
def test_each_token_passes_once_and_costs_the_same_however_far(name: str) -> None:
    model = small_lm(name)
    counted = Counted(model)
    steps = generate(model, prompt(batch=1, time=1), max_new_tokens=200)
    costs = []
    for _ in range(5 * LENGTH):
        with FlopCounterMode(display=False) as counter:
            next(steps)
        costs.append(counter.get_total_flops())
    assert counted.tokens == 5 * LENGTH
    # What a step costs does not depend on how many came before: the second costs what the second of a late
    # segment does, and the sum over any two cycles of segments is the same.
    assert costs[1] == costs[4 * LENGTH + 1] > 0
    assert sum(costs[LENGTH : 2 * LENGTH]) == sum(costs[-LENGTH:])
    # Nor does it depend on the length of a segment by more than attention's look at it.
    whole = small_lm(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole(prompt(batch=1, time=LENGTH))
    assert max(costs) < counter.get_total_flops()


def test_memory_and_logits_of_earlier_steps_stay_as_they_were() -> None:
    model = small_lm("htm")
    steps = [
        (step, step.memory.map(torch.clone), step.logits.clone())
        for step in generate(model, prompt(), max_new_tokens=10)
    ]
    for step, memory, logits in steps:
        assert torch.equal(step.logits, logits)
        for path, leaf in tensors(memory).items():
            assert torch.equal(tensors(step.memory)[path], leaf)


def test_the_memory_given_is_not_changed() -> None:
    model = small_lm("htm")
    _, memory = unroll(model, prompt(time=8), close=False)
    before = memory.map(torch.clone)
    list(generate(model, prompt(), max_new_tokens=9, memory=memory))
    for path, leaf in tensors(before).items():
        assert torch.equal(tensors(memory)[path], leaf)


def test_rows_stop_at_their_ids_and_repeat_their_last_token() -> None:
    model = MemoryLM(Mean(), vocab_size=VOCAB).eval()
    script = torch.tensor([[5, 1, 7, 8], [2, 2, 9, 9], [3, 3, 3, 4]])  # by row; 7 and 2 end a row
    turn = itertools.count()
    steps = generate(
        model, prompt(), max_new_tokens=10, stop={7, 2, 4}, sample=lambda _: script[:, next(turn)]
    )
    tokens = torch.stack([step.token for step in steps], 1)
    assert tokens.tolist() == [[5, 1, 7, 7], [2, 2, 2, 2], [3, 3, 3, 4]]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in MEMBERS),
        ("memorizing", {"store": "outside", "memories": 9}),
        *(pytest.param(*variant, marks=pytest.mark.slow) for variant in VARIANTS),
    ],
)
def test_a_row_that_has_ended_keeps_its_last_step(name: str, options: dict[str, Any], ragged: bool) -> None:
    segment = small_options(name, **options)["segment_length"]
    # In the first segment and in later ones, at their first tokens, within and at their ends.
    ends = [1, max(1, segment - 3), 2 * segment + 1, 2 * segment + 2, segment]
    ids, stop = prompt(batch=5, time=7) % (VOCAB - 1), VOCAB - 1
    lengths = torch.tensor([7, 3, 5, 1, 6]) if ragged else torch.full((5,), 7)
    text = torch.randint(VOCAB - 1, (5, max(ends)))
    for row, end in enumerate(ends):
        text[row, end - 1] = stop

    def read(rows: Tensor) -> list[Step]:
        # A model for each, because one with an outside store writes where the last one did.
        torch.manual_seed(3)
        model, turn = small_lm(name, **options), itertools.count()
        longest = int(lengths[rows].max())
        return list(
            generate(
                model,
                ids[rows, :longest],
                max_new_tokens=100,
                lengths=lengths[rows] if ragged else None,
                sample=lambda _: text[rows, next(turn)],
                stop=stop,
            )
        )

    steps = read(torch.arange(5))
    assert len(steps) == max(ends)
    for row, end in enumerate(ends):
        alone = read(torch.tensor([row]))
        assert len(alone) == end
        for step in steps[end - 1 :]:
            assert step.token[row] == stop
            torch.testing.assert_close(step.logits[row], alone[-1].logits[0], atol=1e-9, rtol=1e-9)
            wanted = tensors(alone[-1].memory)
            for path, leaf in tensors(step.memory.select(torch.tensor([row]))).items():
                torch.testing.assert_close(leaf, wanted[path], atol=1e-9, rtol=1e-9, msg=path)


@pytest.mark.parametrize("stop", [0, [0], (0, 1)])
def test_one_id_or_several_may_end_a_row(stop: Any) -> None:
    model = MemoryLM(Mean(), vocab_size=VOCAB).eval()
    steps = generate(
        model, prompt(), max_new_tokens=10, stop=stop, sample=lambda logits: logits.new_zeros(3).long()
    )
    assert len(list(steps)) == 1


def test_no_more_tokens_than_asked_for() -> None:
    model = small_lm("window")
    assert list(generate(model, prompt(), max_new_tokens=0)) == []
    assert len(list(generate(model, prompt(), max_new_tokens=7))) == 7


def test_the_mode_of_every_part_is_set_back_even_between_steps() -> None:
    model = small_lm("window", dropout=0.9).train()
    frozen = model.module.trunk.norm.eval()  # type: ignore[union-attr]
    modes = {name: part.training for name, part in model.named_modules()}
    assert not frozen.training
    seen = []
    for step in generate(model, prompt(), max_new_tokens=3):
        seen.append(step.logits)
        assert {name: part.training for name, part in model.named_modules()} == modes
    # In evaluation mode nothing was dropped.
    for logits, step in zip(seen, generate(model.eval(), prompt_again(), max_new_tokens=3), strict=True):
        assert logits.shape == step.logits.shape
    assert not any(part.training for part in model.modules())


def prompt_again() -> Tensor:
    return torch.zeros(3, 4, dtype=torch.int64)


def test_dropout_is_off_while_generating() -> None:
    model, ids = small_lm("window", dropout=0.9), prompt()
    calm = [step.logits for step in generate(model.eval(), ids, max_new_tokens=3)]
    trained = [step.logits for step in generate(model.train(), ids, max_new_tokens=3)]
    assert all(torch.equal(one, two) for one, two in zip(calm, trained, strict=True))


def test_the_mode_is_set_back_after_an_error() -> None:
    model = small_lm("window").train()

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        next(generate(model, prompt(), max_new_tokens=1, sample=fail))
    assert model.training


def test_steps_carry_no_gradient_and_leave_gradients_on() -> None:
    model = small_lm("full")
    for step in generate(model, prompt(), max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not step.logits.requires_grad
        assert not any(leaf.requires_grad for leaf in tensors(step.memory).values())


def test_a_module_that_is_no_subclass_can_generate() -> None:
    class Lettered(Average):
        segment_length = 4

    model = MemoryLM(Lettered(), vocab_size=VOCAB).double().eval()  # type: ignore[arg-type]
    ids = prompt()
    steps = list(generate(model, ids, max_new_tokens=9, sample=scattered()))
    tokens = torch.stack([step.token for step in steps], 1)
    logits, _ = unroll(model, torch.cat([ids, tokens], 1))
    torch.testing.assert_close(torch.stack([step.logits for step in steps], 1), logits[:, 3:-1])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (prompt(), {"max_new_tokens": -1}, r"max_new_tokens \(-1\) must not be negative"),
        (prompt()[:, :0], {}, r"at least one token, got \(3, 0\)"),
        (prompt()[0], {}, r"prompt must be \[batch, time\] with at least one token, got \(4,\)"),
        (
            prompt(),
            {"lengths": torch.tensor([1, 2])},
            r"lengths must be int64 \[3\] and give each prompt between 1",
        ),
        (prompt(), {"lengths": torch.tensor([0, 1, 2])}, "between 1 and 4 tokens"),
        (prompt(), {"lengths": torch.tensor([1, 2, 5])}, "between 1 and 4 tokens"),
        (prompt(), {"lengths": torch.tensor([1.0, 2.0, 3.0])}, "int64"),
        (prompt(), {"lengths": torch.tensor([True, True, True])}, "int64"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(ids: Tensor, options: dict[str, Any], message: str) -> None:
    model = small_lm("window")
    with pytest.raises(ValueError, match=message):
        generate(model, ids, **{"max_new_tokens": 3} | options)  # not even a first step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature \(-0\.1\) must be 0 \(greedy\) or in \[1\.2e-38, inf\)"),
        ({"temperature": math.nan}, r"temperature \(nan\)"),
        ({"temperature": math.inf}, r"temperature \(inf\)"),
        ({"temperature": 1e-40}, r"temperature \(1e-40\)"),
        ({"top_k": 0}, r"top_k \(0\) must be at least 1"),
        ({"top_p": 0.0}, r"top_p \(0\.0\) must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p \(1\.1\) must lie in \(0, 1\]"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def kept(logits: Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero().flatten().tolist()


LOGITS = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=8)


@given(LOGITS, st.integers(1, 10))
def test_top_k_keeps_exactly_k_of_the_best(values: list[float], k: int) -> None:
    logits = torch.tensor(values)
    filtered = filter_logits(logits, top_k=k)
    chosen = kept(filtered)
    assert len(chosen) == min(k, len(values))
    assert torch.equal(filtered[chosen], logits[chosen])
    left = [value for index, value in enumerate(values) if index not in chosen]
    assert not left or max(left) <= min(values[index] for index in chosen)


@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_holds_p(values: list[float], p: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    chosen = kept(filter_logits(logits, top_p=p))
    total = sum(math.exp(v) for v in values)
    shares = {index: math.exp(value) / total for index, value in enumerate(values)}
    left = [share for index, share in shares.items() if index not in chosen]
    held = sum(shares[index] for index in chosen)
    assert chosen
    assert not left or max(left) <= min(shares[index] for index in chosen) + 1e-12
    assert held >= p - 1e-9
    # One fewer would hold less than p.
    assert held - min(shares[index] for index in chosen) < p + 1e-9


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125], dtype=torch.float64).log()
    assert kept(filter_logits(logits, top_p=0.5)) == [1]
    assert kept(filter_logits(logits, top_p=0.51)) == [0, 1]
    assert len(kept(filter_logits(logits, top_p=0.8))) == 3
    assert kept(filter_logits(logits, top_p=1.0)) == [0, 1, 2, 3]
    # First the k best, then the nucleus of what is left: 0.5 / 0.75 is more than 0.6.
    assert kept(filter_logits(logits, top_k=2, top_p=0.6)) == [1]


def test_top_p_counts_many_small_probabilities_in_bfloat16_too() -> None:
    # In bfloat16 the running sum of 1/4000 would stop growing near 1/16 and the nucleus hold everything.
    logits = torch.zeros(4000, dtype=torch.bfloat16)
    assert len(kept(filter_logits(logits, top_p=0.5))) == pytest.approx(2000, abs=2)


def test_filters_leave_their_input_alone_and_work_on_batches() -> None:
    logits = torch.randn(2, 3, 9)
    before = logits.clone()
    filtered = filter_logits(logits, top_k=4, top_p=0.9)
    assert torch.equal(logits, before)
    for row in itertools.product(range(2), range(3)):
        assert torch.equal(filtered[row], filter_logits(logits[row], top_k=4, top_p=0.9))


def test_greedy_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [-1.0, -3.0, -2.0]])
    assert greedy(logits).tolist() == [1, 0]
    assert sampler(temperature=0)(logits).tolist() == [1, 0]
    assert sampler(top_k=1)(logits).tolist() == [1, 0]
    assert sampler(top_p=1e-6)(logits).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"temperature": 2.0}, [2**0.5, 1.0, 0.5**0.5, 0.5**0.5]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        # Temperature comes first: at 0.5 the best token alone holds 16/22.
        ({"temperature": 0.5, "top_p": 0.6}, [1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_come_as_often_as_they_should(
    options: dict[str, Any], wanted: list[float], dtype: torch.dtype
) -> None:
    count = 20_000
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().to(dtype).expand(count, 4)
    tokens = sampler(**options, generator=torch.Generator().manual_seed(0))(logits)
    seen = torch.bincount(tokens, minlength=4) / count
    shares = torch.tensor(wanted) / sum(wanted)
    # Four standard deviations of a binomial share, and bfloat16's rounding of the logits.
    torch.testing.assert_close(seen, shares, atol=4 * 0.5 / math.sqrt(count) + 0.003, rtol=0)
    assert not seen[shares == 0].any()


def test_a_generator_makes_draws_repeatable() -> None:
    logits = torch.randn(50, 9)
    one, two = (sampler(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert [one(logits).tolist() for _ in range(3)] == [two(logits).tolist() for _ in range(3)]


@pytest.mark.parametrize(
    ("ids", "lengths", "error", "message"),
    [
        ([[1, 2]], None, TypeError, "prompt must be a tensor, got list"),
        (torch.ones(1, 2, dtype=torch.int64), [2], TypeError, "lengths must be a tensor, got list"),
        (
            torch.ones(1, 2, dtype=torch.int64),
            torch.ones(1, dtype=torch.int64, device="meta"),
            ValueError,
            "lengths is on meta, the input on cpu",
        ),
    ],
)
def test_prompts_and_lengths_are_tensors_in_one_place(
    ids: Any, lengths: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(small_lm("window"), ids, max_new_tokens=1, lengths=lengths)


def test_only_whole_numbers_of_tokens_are_kept() -> None:
    with pytest.raises(TypeError, match=r"top_k \(2\.5\) must be an int"):
        sampler(top_k=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_temperature_is_as_good_as_greedy(dtype: torch.dtype) -> None:
    logits = torch.tensor([[90.0, 3.0, 100.0], [-5.0, -90.0, -70.0]], dtype=dtype)
    assert sampler(temperature=1.2e-38)(logits).tolist() == greedy(logits).tolist()


@pytest.mark.parametrize(
    "stop", [3, torch.tensor(3), torch.tensor([9, 3]), np.int64(3), {3, 9}, [3]], ids=str
)
def test_a_stop_is_an_id_or_several(stop: Any) -> None:
    steps = list(
        generate(
            small_lm("window"), prompt(1), max_new_tokens=9, sample=lambda _: torch.tensor([3]), stop=stop
        )
    )
    assert len(steps) == 1


@pytest.mark.parametrize("stop", [2.5, "3", torch.tensor(3.0), [None]], ids=str)
def test_what_is_no_id_stops_nothing(stop: Any) -> None:
    with pytest.raises(TypeError, match="stop must be a token id or several, got"):
        generate(small_lm("window"), prompt(1), max_new_tokens=9, stop=stop)


@pytest.mark.parametrize("lengths", [None, torch.zeros(0, dtype=torch.int64)])
def test_no_rows_are_continued_by_nothing(lengths: Tensor | None) -> None:
    steps = list(generate(small_lm("window"), prompt()[:0], max_new_tokens=2, lengths=lengths))
    assert [step.token.shape for step in steps] == [(0,), (0,)]
