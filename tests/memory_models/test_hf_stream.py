"""A memory attached to a model of transformers, carried from call to call, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_models import CheckpointError, UnknownNameError, load_memory, save_memory
from tests.memory_models.hf_bases import (
    BASES,
    GREEDY,
    MEMORIES,
    SEGMENT,
    WIDTH,
    attached_to,
    base,
    cut_attention,
    open_gates,
    tokens,
)

transformers = pytest.importorskip("transformers")


GATES = {"layers.0.gate", "layers.1.gate"}


# The stream.


@pytest.mark.parametrize("memory", MEMORIES)
def test_calls_in_a_stream_equal_one_call_where_only_the_memory_knows_the_past(memory: str) -> None:
    model, ids = cut_attention(base()), tokens(time=12)
    attached = open_gates(attached_to(model, memory, [-1]))
    with torch.no_grad():
        whole = model(ids).logits
        with attached.stream():
            pieces = [model(piece, use_cache=False).logits for piece in ids.split([3, 4, 5], 1)]
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
        assert attached.memory is not None
        assert attached.memory.open_length.tolist() == [0, 0]
        # Outside a stream a call is a text of its own.
        alone = [model(piece).logits for piece in ids.split([3, 4, 5], 1)]
    assert torch.allclose(alone[0], pieces[0], atol=1e-6)
    assert not torch.allclose(alone[2], pieces[2], atol=1e-3)


def test_a_call_outside_a_stream_leaves_its_memory_alone() -> None:
    model, ids = base(), tokens()
    attached = attached_to(model)
    model(ids)
    assert attached.memory is None
    with attached.stream():
        model(ids)
        kept = attached.memory
    model(tokens(rows=3))
    assert attached.memory is kept
    with attached.stream():
        assert attached.memory is None


def test_rows_are_reset_one_by_one() -> None:
    model, first, second = cut_attention(base()), tokens(time=8), tokens(time=5, seed=3)
    attached = open_gates(attached_to(model, "memformer"))
    with torch.no_grad():
        fresh = model(second).logits
        with attached.stream():
            model(first)
            carried = model(second).logits
        with attached.stream():
            model(first)
            attached.reset(torch.tensor([False, True]))
            mixed = model(second).logits
            attached.reset()
            assert attached.memory is None
    assert torch.equal(mixed[0], carried[0])
    assert torch.equal(mixed[1], fresh[1])
    assert not torch.allclose(carried[1], fresh[1], atol=1e-3)


def test_a_streams_memory_is_a_value(tmp_path: Path) -> None:
    model, first, second = base(), tokens(time=8), tokens(rows=1, time=5)
    attached = open_gates(attached_to(model))
    with torch.no_grad(), attached.stream():
        model(first)
        memory = attached.memory
        expected = model(torch.cat([second, second])).logits
    assert memory is not None
    save_memory(memory, tmp_path / "memory")
    read = load_memory(tmp_path / "memory", attached.init_memory(1))
    with torch.no_grad(), attached.stream(read.select(torch.tensor([1]))):
        assert torch.allclose(model(second).logits, expected[1:], atol=1e-6)
    with pytest.raises(TypeError, match="AttachedMemory"):
        attached.memory = memory.layers[0]
    with attached.stream(memory), pytest.raises(ValueError, match=r"3 rows but the memory has 2.*reset"):
        model(tokens(rows=3))
    with attached.stream(), pytest.raises(RuntimeError, match="open already"), attached.stream():
        pass


@pytest.mark.parametrize("memory", ["memorizing", "memxl"])
def test_generating_in_a_stream_goes_on_with_its_memory(memory: str) -> None:
    model, before, prompt = base(), tokens(time=9), tokens(time=3, seed=5)
    attached = open_gates(attached_to(model, memory, [-1]), factor=3)
    with torch.no_grad():
        with attached.stream():
            model(before)
            start = attached.memory
            found = model.generate(prompt, max_new_tokens=6, **GREEDY)
            after = attached.memory
        text = prompt
        for _ in range(6):
            with attached.stream(start):
                logits = model(text, use_cache=False).logits
                end = attached.memory
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        fresh = model(text[:, :-1]).logits
    assert torch.equal(found, text)
    assert not torch.allclose(logits, fresh, atol=1e-3)
    # All but the last token were read.
    assert end is not None
    assert after is not None
    for name, leaf in end.tensors().items():
        assert torch.allclose(leaf.float(), after.tensors()[name].float(), atol=1e-5)


def test_beams_and_samples_leave_the_stream_as_it_was() -> None:
    model, before, prompt = base(), tokens(rows=2, time=9), tokens(rows=2, time=3)
    attached = open_gates(attached_to(model))
    with torch.no_grad(), attached.stream():
        model(before)
        start = attached.memory
        beams = model.generate(prompt, max_new_tokens=3, num_beams=3, **GREEDY)
        assert attached.memory is start
        model.generate(prompt, max_new_tokens=3, **{**GREEDY, "do_sample": True, "num_return_sequences": 2})
        assert attached.memory is start
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(prompt, max_new_tokens=3, use_cache=False, **GREEDY)
        assert attached.memory is start
    for row in range(2):
        assert start is not None
        with torch.no_grad(), attached.stream(start.select(torch.tensor([row]))):
            one = model.generate(prompt[row : row + 1], max_new_tokens=3, num_beams=3, **GREEDY)
        assert torch.equal(one[0], beams[row])


# Training.


@pytest.mark.parametrize(("name", "memory"), list(zip(BASES, MEMORIES, strict=True)))
def test_only_what_was_added_learns(name: str, memory: str) -> None:
    model, ids = base(name).train(), tokens(time=8)
    old = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attached = attached_to(model, memory)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert trained == set(attached.parameters())
    assert {name for name, _ in attached.named_parameters()} == set(attached.state_dict())
    new = {name: parameter.clone() for name, parameter in attached.named_parameters()}
    optimizer = torch.optim.Adam(attached.parameters(), lr=0.05)
    losses = []
    for step in range(15):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            # The gate is closed: it alone can tell what would help.
            assert all(
                bool(parameter.grad is not None and parameter.grad.any()) == (name in GATES)
                for name, parameter in attached.named_parameters()
            )
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    moved = {name for name, parameter in attached.named_parameters() if not torch.equal(parameter, new[name])}
    assert moved >= GATES
    assert any("member" in name for name in moved)
    now = dict(model.named_parameters())
    assert all(torch.equal(parameter, now[name]) for name, parameter in old.items())


def test_the_base_may_be_trained_too() -> None:
    model = base()
    attached_to(model, freeze=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def embeddings(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach().requires_grad_()


@pytest.mark.parametrize(("memory", "reaches"), [("memformer", True), ("memorizing", False)])
def test_gradients_through_the_stream(memory: str, reaches: bool) -> None:
    model = cut_attention(base())
    attached = open_gates(attached_to(model, memory, [-1]))
    for detach in (True, False):
        first, second = embeddings(model, tokens(time=4)), embeddings(model, tokens(time=4, seed=5))
        with attached.stream(detach=detach):
            model(inputs_embeds=first)
            model(inputs_embeds=second).logits.square().sum().backward()
        assert second.grad is not None
        assert (first.grad is not None and bool(first.grad.any())) == (reaches and not detach)


def test_truncated_training_over_a_stream() -> None:
    model, ids = cut_attention(base()), tokens(time=12)
    attached = open_gates(attached_to(model, "memformer"))
    with attached.stream():
        for piece in ids.split(6, 1):
            model(piece, labels=piece).loss.backward()
    assert all(parameter.grad is not None for parameter in attached.parameters())


def test_a_frozen_model_learns_to_recall_what_an_earlier_call_said() -> None:
    # Four keys with their values in the first call, the same keys in another order in the second.
    model = base(width=32)
    attached = attached_to(model, "memorizing", [-1], matching_layer=True, segment_length=8, memories=32)
    optimizer = torch.optim.Adam(attached.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def accuracy(*, train: bool, forget: bool = False) -> float:
        keys = 1 + torch.rand(64, 8, generator=generator).argsort(1)[:, :4]
        values = torch.randint(8, (64, 4), generator=generator)
        order = torch.rand(64, 4, generator=generator).argsort(1)
        with attached.stream():
            model(torch.stack([keys, 10 + values], 2).flatten(1))
            if forget:
                attached.reset()
            logits = model(keys.gather(1, order)).logits[..., 10:18]
        asked = values.gather(1, order)
        if train:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (logits.argmax(-1) == asked).float().mean().item()

    assert accuracy(train=False) < 0.25
    for _ in range(60):
        accuracy(train=True)
    assert accuracy(train=False) > 0.9
    assert accuracy(train=False, forget=True) < 0.25


@pytest.mark.parametrize("detach_input", [False, True])
def test_a_detached_input_keeps_the_memory_from_the_layers_below(detach_input: bool) -> None:
    model, ids = cut_attention(base()), tokens(time=4)
    open_gates(attached_to(model, layers=[-1], detach_input=detach_input))
    x = embeddings(model, ids)
    # In the open segment the last token reads the first, and without attention only there.
    model(inputs_embeds=x).logits[:, -1].square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad[:, 0].any()) != detach_input


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_reads_once(name: str) -> None:
    model, ids = base(name), tokens(time=10)
    attached = open_gates(attached_to(model, "memformer"))
    found = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            # Dropout is off, so that the two can be compared.
            model.train()
            for part in model.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
                if hasattr(part, "attention_dropout"):
                    part.attention_dropout = 0.0
        model.zero_grad()
        with attached.stream():
            loss = model(ids, labels=ids).loss
            assert attached.memory is not None
            assert attached.memory.open_length.tolist() == [2, 2]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in attached.parameters())])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*found, strict=True))


# Saving, loading.


@pytest.mark.parametrize("dim", [WIDTH, 8])
def test_the_added_part_is_saved_alone(tmp_path: Path, dim: int) -> None:
    from memory_models.hf import load_attached

    model, ids = base(), tokens()
    attached = open_gates(attached_to(model, "memxl", [-1], dim=dim, mem_len=3, memory_layers=(0,)))
    expected = model(ids).logits
    attached.save(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 4.5 * sum(p.numel() for p in attached.parameters()) + 5000
    # The same base, from elsewhere.
    other = base()
    again = load_attached(other, tmp_path)
    assert torch.equal(other(ids).logits, expected)
    assert again.description == attached.description
    assert all(parameter.requires_grad for parameter in again.parameters())
    again.adapters[1].gate.data.zero_()
    again.load(tmp_path)
    assert torch.equal(other(ids).logits, expected)


def test_both_parts_may_be_saved_into_one_folder(tmp_path: Path) -> None:
    from memory_models.hf import load_attached

    model, ids = base(), tokens()
    plain = model(ids).logits
    attached = open_gates(attached_to(model))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    attached.save(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, plain)
    load_attached(again, tmp_path)
    assert torch.equal(again(ids).logits, expected)


def test_what_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    from memory_models.hf import load_attached

    attached_to(base(), "memxl", [-1]).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"width 16 .* this one has width 24"):
        load_attached(base(width=24), tmp_path)
    other = base()
    attached = attached_to(other, "memxl", [0])
    with pytest.raises(CheckpointError, match=r"layers is \[1\], here it is \[0\]"):
        attached.load(tmp_path)
    attached.remove()
    with pytest.raises(CheckpointError, match="memory is 'memxl', here it is 'htm'"):
        attached_to(other, "htm", [-1]).load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"attached_memory\.safetensors"):
        load_attached(base(), tmp_path / "nowhere")
    file = tmp_path / "attached_memory.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        load_attached(base(), tmp_path)


# What is refused.


def test_wrong_choices_are_refused() -> None:
    model = base()
    with pytest.raises(ValueError, match=r"layers \(\(2,\)\) must name different layers of 0 to 1"):
        attached_to(model, layers=[2])
    with pytest.raises(ValueError, match=r"^layers \(\(\)\)"):
        attached_to(model, layers=[])
    with pytest.raises(UnknownNameError, match="Did you mean 'memformer'"):
        attached_to(model, "memfomer")
    with pytest.raises(TypeError, match="Did you mean 'memories'"):
        attached_to(model, memorys=3)
    with pytest.raises(ValueError, match=r"dim \(10\) must be divisible by heads"):
        attached_to(model, dim=10)
    assert not any("attached_memory" in name for name in model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    attached = attached_to(model)
    with pytest.raises(ValueError, match="has a memory already"):
        attached_to(model)
    attached.remove()
    assert attached_to(model, layers=None).description["layers"] == [1]


def test_only_decoder_models_are_taken() -> None:
    small = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = transformers.BertConfig(**small, intermediate_size=24)
    with pytest.raises(ValueError, match="BertModel is none"):
        attached_to(transformers.BertModel(bert))
    with pytest.raises(ValueError, match="BertForMaskedLM is none"):
        attached_to(transformers.BertForMaskedLM(bert))
    with pytest.raises(ValueError, match="no list of 2 decoder layers in BertLMHeadModel"):
        attached_to(transformers.BertLMHeadModel(bert))
    t5 = transformers.T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is none"):
        attached_to(transformers.T5ForConditionalGeneration(t5))
    mamba = transformers.MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="MambaForCausalLM has no past_key_values"):
        attached_to(transformers.MambaForCausalLM(mamba))
    with pytest.raises(TypeError, match="got Linear"):
        attached_to(torch.nn.Linear(2, 2))


def test_a_mask_that_does_not_say_what_is_padding_is_refused() -> None:
    model, ids = base(), tokens()
    attached_to(model)
    with pytest.raises(ValueError, match="which tokens are padding"):
        model(ids, attention_mask=torch.ones(2, 1, 11, 11, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="layer 0 was called outside the model"):
        model.model.layers[0](
            torch.zeros(1, 3, WIDTH),
            position_embeddings=model.model.rotary_emb(torch.zeros(1, 3, WIDTH), torch.arange(3)[None]),
        )
    assert model(ids).logits.shape == (2, 11, 31)
    assert SEGMENT < 11
