"""Generation with the classic Memformer's decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memformer import Memformer
from memformer.decoder import Decoder, top_k, top_p
from tests.reference import memformer_classic as reference

VOCABULARY, LONGEST = 13, 8


def decoder() -> Decoder:
    made = Decoder(num_tokens=VOCABULARY, dim=8, depth=2, heads=2, max_seq_len=LONGEST).double()
    # Larger, so that the most likely token is not always the same.
    torch.nn.init.normal_(made.to_logits.weight, std=2)
    return made


def ids(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape)


def encoded(rows: int, length: int = 5) -> Tensor:
    return torch.randn(rows, length, 8, dtype=torch.float64)


def greedily(model: Decoder, prompt: Tensor, steps: int, context: Tensor) -> Tensor:
    """One row, every token from all before it, at most `LONGEST` of them."""
    tokens = prompt
    for _ in range(steps):
        logits = reference.decode(model, tokens[-LONGEST:], context)[-1]
        tokens = torch.cat([tokens, logits.argmax()[None]])
    return tokens[len(prompt) :]


def test_readme_calls() -> None:
    model = Memformer(
        dim=16,
        num_memory_slots=4,
        enc_num_tokens=20,
        enc_depth=1,
        enc_heads=4,
        enc_max_seq_len=16,
        dec_num_tokens=20,
        dec_depth=1,
        dec_heads=4,
        dec_max_seq_len=16,
    )
    first, second, tgt = (torch.randint(0, 20, (2, 16)) for _ in range(3))
    _, mems, _ = model(first)
    enc_out, mems, loss = model(second, tgt, mems=mems)
    loss.backward()
    assert model.decoder is not None
    out = model.decoder.generate(tgt[:, :1], 10, context=enc_out)
    assert out.shape == (2, 10)
    assert ((out >= 0) & (out < 20)).all()


@pytest.mark.parametrize("steps", [4, 11])
def test_steps_equal_passes_over_all_tokens(steps: int) -> None:
    # 3 + 11 tokens are more than max_seq_len: the last ones are read anew.
    model, prompt, context = decoder(), ids(3, 3), encoded(3)
    out = model.generate(prompt, steps, temperature=0, context=context)
    for row in range(3):
        assert torch.equal(out[row], greedily(model, prompt[row], steps, context[row]))
    assert out.unique().numel() > 2


def test_logits_of_each_step_equal_those_of_one_pass() -> None:
    model, prompt, context = decoder(), ids(2, 3), encoded(2)
    steps: list[Tensor] = []

    def listen(logits: Tensor, thres: float) -> Tensor:
        steps.append(logits)
        return logits

    out = model.generate(prompt, 5, filter_logits_fn=listen, context=context)
    expected = model(torch.cat([prompt, out], 1), context)[:, 2:-1]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [3, 9])
def test_prompts_of_different_lengths_equal_each_one_alone(steps: int) -> None:
    model, prompt, context = decoder(), ids(4, 5), encoded(4)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:], mask[2, :4], mask[3, 1:3] = False, False, False
    out = model.generate(
        prompt.masked_fill(~mask, -100), steps, temperature=0, context=context, input_mask=mask
    )
    for row in range(4):
        alone = prompt[row][mask[row]]
        assert torch.equal(out[row], greedily(model, alone, steps, context[row]))


def test_padding_of_the_context_is_not_read() -> None:
    model, prompt, context = decoder(), ids(2, 3), encoded(2)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    context[~mask] = torch.nan
    out = model.generate(prompt, 6, temperature=0, context=context, context_mask=mask)
    for row in range(2):
        assert torch.equal(out[row], greedily(model, prompt[row], 6, context[row][mask[row]]))


def test_a_prompt_longer_than_the_decoder_is_read_from_its_end() -> None:
    model, prompt, context = decoder(), ids(1, LONGEST + 5), encoded(1)
    out = model.generate(prompt, 4, temperature=0, context=context)
    assert torch.equal(out[0], greedily(model, prompt[0], 4, context[0]))


def test_a_step_reads_one_token_while_there_is_room() -> None:
    model = decoder()
    read: list[int] = []
    model.embedding.register_forward_hook(lambda module, given, out: read.append(given[0].shape[1]))
    model.generate(ids(2, 3), LONGEST, context=encoded(2))
    assert read == [3] + [1] * (LONGEST - 3) + [LONGEST] * 2


def test_one_prompt_without_a_batch() -> None:
    model, prompt, context = decoder(), ids(3), encoded(1)
    out = model.generate(prompt, 5, temperature=0, context=context)
    assert out.shape == (5,)
    assert torch.equal(out, greedily(model, prompt, 5, context[0]))


def test_rows_end_with_eos_and_generation_when_all_have() -> None:
    model, prompt, context = decoder(), ids(8, 2), encoded(8)
    free = model.generate(prompt, 9, temperature=0, context=context)
    # A token after which its row would go on with another one, and which not every row has.
    goes_on = [int(token) for token, after in zip(free[:, 2], free[:, 3], strict=True) if token != after]
    eos = next(token for token in goes_on if not bool((free == token).any(1).all()))
    out = model.generate(prompt, 9, eos, temperature=0, context=context)
    ends = []
    for row in range(8):
        places = (free[row] == eos).nonzero()
        ends.append(int(places[0]) + 1 if len(places) else 9)
        assert torch.equal(out[row, : ends[-1]], free[row, : ends[-1]])
        assert (out[row, ends[-1] :] == eos).all()
    first = min(range(8), key=lambda row: ends[row])
    alone = model.generate(prompt[[first]], 9, eos, temperature=0, context=context[[first]])
    assert alone.shape[1] == ends[first] < 9
    assert out.shape[1] == max(ends) == 9


def test_filters_keep_the_packages_shares() -> None:
    probabilities = torch.tensor([[0.05, 0.5, 0.2, 0.15, 0.1]])
    logits = probabilities.log()
    # int((1 - thres) * 5) most likely tokens, never none
    for thres, kept in ((0.0, 5), (0.5, 2), (0.9, 1), (1.0, 1)):
        assert torch.isfinite(top_k(logits, thres)).sum() == kept
    # tokens until the probability 1 - thres is reached
    for thres, kept in ((0.0, 5), (0.2, 3), (0.4, 2), (0.9, 1), (1.0, 1)):
        assert torch.isfinite(top_p(logits, thres)).sum() == kept
    assert top_p(logits, 0.4).argmax() == 1


@pytest.mark.parametrize("filter_fn", [top_k, top_p])
def test_samples_follow_the_filtered_distribution(filter_fn: Any) -> None:
    model = decoder()
    prompt, context = ids(1, 3).expand(4000, -1), encoded(1).expand(4000, -1, -1)
    drawn = model.generate(
        prompt,
        1,
        temperature=2.0,
        filter_logits_fn=filter_fn,
        filter_thres=0.3,
        context=context,
        generator=torch.Generator().manual_seed(1),
    )
    logits = reference.decode(model, prompt[0], context[0])[-1]
    expected = (filter_fn(logits[None], 0.3)[0] / 2.0).softmax(-1)
    counts = torch.bincount(drawn[:, 0], minlength=VOCABULARY) / 4000
    # four standard deviations of a share among 4000 draws
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()
    assert not counts[expected == 0].any()


def test_a_generator_repeats_its_draws() -> None:
    model, prompt, context = decoder(), ids(2, 3), encoded(2)

    def draw(seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 8, filter_thres=0.1, context=context, generator=source)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_it_leaves_no_graph_and_runs_in_bfloat16() -> None:
    model = decoder().bfloat16()
    mask = torch.tensor([[False, True], [True, True]])
    context = encoded(2).bfloat16().requires_grad_()
    out = model.generate(ids(2, 2), 15, context=context, input_mask=mask)
    assert out.shape == (2, 15)
    assert not out.requires_grad


def test_no_tokens_are_asked_for() -> None:
    assert decoder().generate(ids(2, 3), 0, context=encoded(2)).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start_tokens": ids(2, 0)}, ValueError, "at least one token a row"),
        ({"start_tokens": ids(2, 3).float()}, TypeError, "start_tokens must be int64 ids"),
        ({"start_tokens": torch.full((2, 3), VOCABULARY)}, ValueError, "start_tokens holds 13, outside"),
        ({"start_tokens": ids(3, 3)}, ValueError, "3 rows of tokens but 2 of context"),
        ({"input_mask": torch.ones(2, 2).bool()}, ValueError, r"input_mask has shape \(2, 2\), expected"),
        (
            {"input_mask": torch.tensor([[True] * 3, [False] * 3])},
            ValueError,
            r"got \(2, 3\) and a row that is all padding",
        ),
        ({"context": encoded(2)[..., :7]}, ValueError, r"context must be \[batch, length, 8\]"),
        ({"context_mask": torch.ones(2, 4).bool()}, ValueError, r"context_mask has shape \(2, 4\)"),
        ({"temperature": -1.0}, ValueError, r"temperature \(-1.0\) must be 0"),
        ({"filter_thres": 1.5}, ValueError, r"filter_thres \(1.5\) must lie between 0 and 1"),
        ({"seq_len": -1}, ValueError, r"seq_len \(-1\)"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"start_tokens": ids(2, 3), "seq_len": 4, "context": encoded(2)} | change
    with pytest.raises(error, match=message):
        decoder().generate(**given)
