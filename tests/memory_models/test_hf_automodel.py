"""Members as `AutoModelForCausalLM`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer.config import MemformerConfig
from memformer.model import MemformerDecoder as Memformer
from memory_models import UnknownNameError, create_lm, list_models, unroll
from memory_models.lm import cross_entropy
from tests.memory_models.hf_bases import GREEDY, MEMORIES, SEGMENT, VOCAB, beam_search, tokens

transformers = pytest.importorskip("transformers")

SIZES = {"dim": 16, "depth": 1, "heads": 4, "segment_length": SEGMENT}


def model_of(name: str = "memformer", **options: Any) -> Any:
    from memory_models.hf import MemoryModelConfig

    given = {"dim": 16, "segment_length": SEGMENT} if name == "gru" else SIZES
    config = MemoryModelConfig(memory=name, options=given, vocab_size=VOCAB, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Sharp logits, so that a text depends on its past.
        model.lm.head.weight.mul_(4)
    return model


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", list_models())
def test_logits_are_those_of_the_member(name: str) -> None:
    model, ids = model_of(name), tokens()
    expected, _ = unroll(model.lm, ids)
    whole = model(ids)
    assert torch.allclose(whole.logits, expected, atol=1e-5)
    cache, pieces = None, []
    for piece in ids.split([1, 2, 7, 1], 1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-5)
    assert cache.get_seq_length() == 11
    assert torch.equal(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    assert torch.equal(model(ids, return_dict=False)[0], whole.logits)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("name", MEMORIES)
def test_generated_text_is_that_of_a_slow_search(name: str) -> None:
    model, ids = model_of(name), tokens(time=6)
    text = ids
    for _ in range(6):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, model.generate(ids, max_new_tokens=6, **GREEDY))
    found = model.generate(ids, max_new_tokens=6, num_beams=3, **GREEDY)
    assert torch.equal(found, torch.cat([beam_search(model, row[None], 3, 6) for row in ids]))


@pytest.mark.parametrize("name", MEMORIES)
def test_left_padding_changes_nothing(name: str) -> None:
    model = model_of(name)
    texts = [tokens(1, time, seed=time) for time in (3, 9, 6)]
    padded = torch.cat([nn.functional.pad(text, (9 - text.shape[1], 0)) for text in texts])
    mask = (padded != 0).long()
    # Any id may stand at padding.
    padded = padded.masked_fill(mask == 0, -100)
    found = model.generate(padded, attention_mask=mask, max_new_tokens=5, **GREEDY)[:, 9:]
    alone = [model.generate(text, max_new_tokens=5, **GREEDY)[:, text.shape[1] :] for text in texts]
    assert torch.equal(found, torch.cat(alone))


def test_a_memory_goes_from_text_to_text() -> None:
    from memory_models.hf import MemoryCache

    model, before, prompt = model_of(), tokens(rows=1, time=9), tokens(rows=1, time=3, seed=5)
    memory = model(before).past_key_values.memory
    whole = model.generate(torch.cat([before, prompt], 1), max_new_tokens=5, **GREEDY)[:, 9:]
    assert torch.equal(
        model.generate(prompt, past_key_values=MemoryCache(memory), max_new_tokens=5, **GREEDY), whole
    )
    # Beams share the memory that they start from.
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 5}
    beams = model.generate(torch.cat([before, prompt], 1), **options)[:, 9:]
    assert torch.equal(model.generate(prompt, past_key_values=MemoryCache(memory), **options), beams)
    # As with any cache of transformers, a conversation is given again whole and goes on where it was.
    cache = MemoryCache()
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert cache.get_seq_length() == 6
    turn = torch.cat([first, before], 1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert torch.equal(second, model.generate(turn, max_new_tokens=4, **GREEDY))


def test_the_loss_is_that_of_the_next_token() -> None:
    model, ids = model_of(), tokens()
    out = model(ids, labels=ids)
    assert torch.allclose(out.loss, cross_entropy(out.logits[:, :-1], ids[:, 1:]))
    some = ids.masked_fill(torch.arange(11) < 8, -100)
    loss = model(ids, labels=some).loss
    assert torch.allclose(loss, cross_entropy(out.logits[:, 7:-1], ids[:, 8:]))
    # Two batches of different length add up to the mean over all their labels.
    parts = [model(ids, labels=labels, num_items_in_batch=26).loss for labels in (ids, some)]
    assert torch.allclose(sum(parts), (20 * out.loss + 6 * loss) / 26)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, labels=ids).loss, out.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_asked_nor_an_answer(side: str) -> None:
    model = model_of().eval()
    ids = torch.randint(VOCAB, (1, 9))
    wanted = model(ids, labels=ids).loss
    padding = (3, 0) if side == "left" else (0, 3)
    padded = F.pad(ids, padding, value=1)
    mask = F.pad(torch.ones_like(ids), padding)
    # Labels as a tokenizer gives them, with its padding id and not -100.
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=padded).loss, wanted)


def test_it_learns() -> None:
    model, ids = model_of().train(), tokens()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    with torch.enable_grad():
        for _ in range(10):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["htm", "memxl"])
def test_saved_and_loaded(tmp_path: Path, name: str, tie: bool) -> None:
    model, ids = model_of(name, tie_word_embeddings=tie), tokens()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm.head.weight is again.lm.embedding.weight) == tie
    assert again.config.options == model.config.options
    # The defaults are spelled out, so that the model stays as it is when they change.
    assert again.config.options["dropout"] == 0.0
    assert again.config.hidden_size == 16
    assert transformers.AutoConfig.from_pretrained(tmp_path).memory == name


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_of().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm.module.trunk.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks lm\.module\.trunk\.norm\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


class Scaled(Memformer):
    """A member with a buffer that is not saved."""

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.full((config.dim,), 3.0), persistent=False)

    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        return y * self.scale, memory


def test_buffers_that_are_not_saved_are_made_again(tmp_path: Path) -> None:
    model, ids = model_of(f"{__name__}:Scaled"), tokens()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_of_this_library_becomes_one_of_theirs(tmp_path: Path) -> None:
    from memory_models.hf import MemoryModelForCausalLM

    lm, ids = create_lm("memxl", vocab_size=VOCAB, embedding_std=0.1, **SIZES), tokens()
    model = MemoryModelForCausalLM.from_lm(lm)
    expected: Tensor = unroll(lm, ids)[0]
    assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(ids).logits, expected, atol=1e-6)


def test_more_tokens_can_be_added() -> None:
    model, ids = model_of(), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert torch.allclose(model(ids).logits[..., :VOCAB], before, atol=1e-6)
    assert model(ids + 3).logits.shape[-1] == model.lm.vocab_size == VOCAB + 3
    assert model.lm.head.weight is model.lm.embedding.weight


def test_wrong_calls_say_what_is_wrong() -> None:
    from memory_models.hf import MemoryCache

    model, ids = model_of(), tokens()
    with pytest.raises(UnknownNameError, match="Did you mean 'memformer'"):
        model_of("memfomer")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="must be a MemoryCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="the memory has 2 rows, the input 3"):
        model(tokens(rows=3), past_key_values=MemoryCache(model(ids).past_key_values.memory))
    with pytest.raises(ValueError, match="labels are"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="attention_mask is"):
        model(ids, attention_mask=torch.ones(2, 10))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=5, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="take tokens back"):
        model(ids).past_key_values.crop(1)
    assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, VOCAB)


def test_without_transformers_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("memory_models.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install memory-models\[hf\]"):
        importlib.import_module("memory_models.hf")
