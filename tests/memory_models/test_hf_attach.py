"""A memory attached to a model of transformers: nothing changes at first, and generate() works with it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_models import unroll
from tests.memory_models.hf_bases import (
    BASES,
    GREEDY,
    MEMORIES,
    VOCAB,
    WIDTH,
    attached_to,
    base,
    beam_search,
    cut_attention,
    open_gates,
    tokens,
)

transformers = pytest.importorskip("transformers")

# Every family with a memory, and every memory with a family.
PAIRS = list(zip(BASES, MEMORIES, strict=True))


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


# Attaching changes nothing.


@pytest.mark.parametrize(
    ("name", "memory"),
    [*PAIRS, ("llama", "gru")],
)
def test_attaching_changes_no_bit_until_the_gate_opens(name: str, memory: str) -> None:
    model, ids = base(name), tokens()
    before = model(ids, output_hidden_states=True)
    text = model.generate(ids, max_new_tokens=2, **GREEDY)
    attached = attached_to(model, memory)
    after = model(ids, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert all(torch.equal(*pair) for pair in zip(before.hidden_states, after.hidden_states, strict=True))
    assert torch.equal(text, model.generate(ids, max_new_tokens=2, **GREEDY))
    open_gates(attached)
    assert not torch.allclose(before.logits, model(ids).logits, atol=1e-3)
    attached.remove()
    assert torch.equal(before.logits, model(ids).logits)


def test_the_names_in_the_state_dict_stay_and_remove_takes_all_of_it_off() -> None:
    model = base()
    before, flags = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    attached = attached_to(model, layers=[-1])
    added = set(model.state_dict()) - before
    assert before < set(model.state_dict())
    assert all(name.startswith("model.layers.1.attached_memory.") for name in added)
    assert "generate" in model.__dict__
    attached.remove()
    attached.remove()
    assert set(model.state_dict()) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not {"generate", "attached_memory"} & set(model.__dict__)
    assert not model.model._forward_hooks
    assert not model.model.layers[1]._forward_hooks


def test_a_bfloat16_model_with_a_float32_memory() -> None:
    model, ids = base().to(torch.bfloat16), tokens()
    before = model(ids).logits
    attached = attached_to(model, dtype=torch.float32)
    assert {p.dtype for p in attached.parameters()} == {torch.float32}
    assert torch.equal(before, model(ids).logits)
    open_gates(attached)
    after = model(ids).logits
    assert after.dtype == torch.bfloat16
    assert not torch.equal(before, after)
    attached.remove()
    attached = open_gates(attached_to(model))
    assert {p.dtype for p in attached.parameters()} == {torch.bfloat16}
    assert bool(model(ids).logits.isfinite().all())


ROTARY = {
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": ROTARY,
    "gemma2": {**ROTARY, "sliding_window": 5},
    "phi3": ROTARY,
    "qwen3_moe": {**ROTARY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "gpt_neox": {"intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": WIDTH},
    "falcon": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_built_alike(name: str) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(name, **sizes, **OTHERS[name])
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), tokens()
    before = model(ids).logits
    attached = attached_to(model)
    assert torch.equal(before, model(ids).logits)
    open_gates(attached)
    whole, cache = model(ids).logits, None
    assert not torch.allclose(before, whole, atol=1e-3)
    for piece in ids.split([7, 4], 1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
    assert torch.allclose(out.logits, whole[:, 7:], atol=1e-5)


# What the memory adds.


@pytest.mark.parametrize(("name", "memory"), PAIRS)
def test_the_last_layer_gets_what_the_member_makes_of_it(name: str, memory: str) -> None:
    model, ids = base(name), tokens()
    decoder = model.get_decoder()
    norm, block = (decoder.ln_f, decoder.h[-1]) if name == "gpt2" else (decoder.norm, decoder.layers[-1])
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
    model(ids)
    handle.remove()
    attached = open_gates(attached_to(model, memory, [-1]))
    adapter = attached.adapters[1]
    scaled = nn.functional.rms_norm(seen[0], (WIDTH,))
    added, _ = unroll(adapter.member, scaled)
    expected = model.lm_head(norm(seen[0] + adapter.gate.tanh() * added))
    assert torch.allclose(expected, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(("name", "memory"), PAIRS)
def test_pieces_with_a_cache_equal_one_call(name: str, memory: str) -> None:
    model, ids = base(name), tokens(time=11)
    open_gates(attached_to(model, memory))
    whole = model(ids).logits
    for sizes in ([1] * 5 + [6], [3, 8], [8, 3]):
        cache, pieces = None, []
        for piece in ids.split(sizes, 1):
            out = model(piece, past_key_values=cache)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


def test_the_members_may_be_of_another_width() -> None:
    model, ids = base(), tokens()
    before = model(ids).logits
    attached = attached_to(model, dim=8, heads=2)
    assert torch.equal(before, model(ids).logits)
    assert attached.adapters[0].member.dim == 8
    open_gates(attached)
    assert not torch.allclose(before, model(ids).logits, atol=1e-3)


def test_recorded_hidden_states_are_those_that_the_next_layer_gets() -> None:
    model, ids = base(), tokens()
    model(ids, output_hidden_states=True)
    open_gates(attached_to(model, layers=[0]))
    seen: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert torch.equal(model(ids, output_hidden_states=True).hidden_states[1], seen[0])


# generate()


@pytest.mark.parametrize(("name", "memory"), PAIRS)
def test_greedy_text_equals_that_without_a_cache(name: str, memory: str) -> None:
    model, ids = base(name), tokens(time=6)
    open_gates(attached_to(model, memory, [-1]))
    text = ids
    for _ in range(7):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, model.generate(ids, max_new_tokens=7, **GREEDY))


@pytest.mark.parametrize(
    ("name", "memory"), [("gpt2", "memorizing"), ("llama", "memformer"), ("qwen2", "memxl"), ("qwen3", "htm")]
)
def test_beam_search_equals_a_slow_one(name: str, memory: str) -> None:
    model, ids = cut_attention(base(name)), tokens(time=5)
    open_gates(attached_to(model, memory, [-1]), factor=3)
    # Sharp logits, so that beams differ and overtake each other.
    model.lm_head.weight.mul_(20)
    found = model.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY)
    assert torch.equal(found, torch.cat([beam_search(model, row[None], 3, 6) for row in ids]))


def test_beams_swap_their_memories() -> None:
    model = base()
    attached_to(model, "memformer")
    ids = tokens(rows=3, time=6)
    out = model(ids)
    order = torch.tensor([2, 0, 0])
    memory = out.past_key_values.memory
    out.past_key_values.reorder_cache(order)
    for name, leaf in out.past_key_values.memory.tensors().items():
        assert torch.equal(leaf, memory.tensors()[name][order])
    more = tokens(rows=3, time=5, seed=7)
    expected = model(torch.cat([ids[order], more], 1)).logits[:, 6:]
    assert torch.allclose(expected, model(more, past_key_values=out.past_key_values).logits, atol=1e-5)


def test_several_samples_for_each_prompt() -> None:
    model, ids = base(), tokens(time=6)
    open_gates(attached_to(model, layers=[-1]))
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    torch.manual_seed(3)
    sampled = model.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(ids, use_cache=False, **options))
    assert sampled.shape == (4, 10)


@pytest.mark.parametrize("memory", MEMORIES)
def test_left_padding_changes_nothing(memory: str) -> None:
    model = base("gpt2" if memory == "htm" else "llama")
    open_gates(attached_to(model, memory, [0]))
    texts = [tokens(1, time, seed=time) for time in (3, 9, 6)]
    padded = torch.cat([nn.functional.pad(text, (9 - text.shape[1], 0)) for text in texts])
    mask = (padded != 0).long()
    found = model.generate(padded, attention_mask=mask, max_new_tokens=4, **GREEDY)[:, 9:]
    alone = [model.generate(text, max_new_tokens=4, **GREEDY)[:, text.shape[1] :] for text in texts]
    assert torch.equal(found, torch.cat(alone))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert torch.allclose(logits, torch.cat([model(text).logits[:, -1] for text in texts]), atol=1e-5)


def test_padding_behind_a_text_changes_nothing() -> None:
    model = base()
    attached = open_gates(attached_to(model, "memformer"))
    short, long = tokens(1, 6), tokens(1, 9, seed=4)
    padded = torch.cat([nn.functional.pad(short, (0, 3)), long])
    with attached.stream():
        logits = model(padded, attention_mask=(padded != 0).long(), use_cache=False).logits
        assert attached.memory is not None
        assert attached.memory.open_length.tolist() == [2, 1]
    assert torch.allclose(logits[:1, :6], model(short).logits, atol=1e-5)
    assert torch.allclose(logits[1:], model(long).logits, atol=1e-5)


def test_a_copied_cache_goes_on_alone() -> None:
    model, ids = base(), tokens()
    open_gates(attached_to(model))
    cache = model(ids).past_key_values
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(other) is type(cache)
        assert isinstance(other, transformers.DynamicCache)
        one = model(tokens(time=3), past_key_values=other).logits
        again = model(tokens(time=3), past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(one, again)


def test_a_copied_model_has_a_memory_of_its_own() -> None:
    model, ids = base(), tokens()
    plain = model(ids).logits
    open_gates(attached_to(model))
    expected = model(ids).logits
    other = copy.deepcopy(model)
    other.attached_memory.remove()
    assert torch.equal(other(ids).logits, plain)
    assert torch.equal(model(ids).logits, expected)
    assert other.generate(ids, max_new_tokens=2, **GREEDY).shape == (2, 13)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "cannot take tokens back"),
        ({"cache_implementation": "static"}, "generate with a dynamic cache"),
    ],
)
def test_what_generate_cannot_do_with_a_memory_says_so(option: dict[str, Any], message: str) -> None:
    model = base()
    attached_to(model)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=6, **GREEDY, **option)
    # A failed call leaves nothing behind.
    assert model.generate(ids, max_new_tokens=2, **GREEDY).shape == (1, 10)


def test_layers_that_are_no_sequence_of_ints_are_refused() -> None:
    for layers in (2, (0.0,)):
        with pytest.raises(TypeError, match=r"layers \(.*\) must be a sequence of ints or None"):
            attached_to(base(), layers=layers)
