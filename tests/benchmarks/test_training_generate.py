"""`memory-bench generate`: what the model would write, as it writes it, after a prompt of any length."""

from __future__ import annotations

import io
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cli import main
from benchmarks.training.command import prepare, train
from benchmarks.training.generate_command import GenerateConfig, stream
from benchmarks.training.tokenizer import load_tokenizer
from memory_models import MemoryLM, create, from_pretrained, generate, save_pretrained, unroll
from tests.benchmarks.training import TEXT, tiny, write_tokenizer

# Many segments of 8 tokens.
LONG = TEXT * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training each on bytes and on tokens, three steps long."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generate")
    write_tokenizer(folder / "t.json")
    common = tiny(folder, steps=3, keep_memory=True)
    for config in (
        replace(common, out=folder / "bytes"),
        replace(common, out=folder / "tokens", tokenizer=str(folder / "t.json"), end_token="<|endoftext|>"),
    ):
        assert train(prepare(config), say=lambda _: None)
    return folder


def asked(folder: Path, kind: str, **changes: object) -> GenerateConfig:
    config = GenerateConfig(
        model=str(folder / kind / "model"), prompt=LONG, tokens=12, temperature=0.0, device="cpu"
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def greedy_by_reading_everything_again(model: MemoryLM, ids: list[int], tokens: int) -> list[int]:
    model.eval()
    written: list[int] = []
    with torch.no_grad():
        for _ in range(tokens):
            logits, _ = unroll(model, torch.tensor([ids + written]))
            written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_the_text_is_what_the_model_says_after_the_whole_prompt(kind: str, folder: Path) -> None:
    model = MemoryLM.from_pretrained(folder / kind / "model")
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else folder / "t.json")
    ids = tokenizer.encode(LONG.encode()).tolist()
    assert len(ids) > 3 * model.segment_length
    decode = tokenizer.stream()
    wanted = "".join(decode(token) for token in greedy_by_reading_everything_again(model, ids, 12))
    assert "".join(stream(asked(folder, kind))) == wanted


def test_text_comes_before_the_last_token_is_drawn(folder: Path) -> None:
    pieces = list(itertools.islice(stream(asked(folder, "bytes", tokens=10**9, temperature=1.0)), 5))
    assert len(pieces) == 5
    assert all(pieces)


def test_a_stop_token_ends_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MemoryLM.from_pretrained(folder / "tokens" / "model")
    tokenizer = load_tokenizer(folder / "t.json")
    end = tokenizer.id_of("<|endoftext|>")
    # A model that says the end token at the third place.
    forward = MemoryLM.forward
    calls = itertools.count()

    def ending(self: MemoryLM, tokens: torch.Tensor, *rest: object, **options: object) -> object:
        out = forward(self, tokens, *rest, **options)  # type: ignore[arg-type]
        if tokens.shape[1] == 1 and next(calls) == 1:
            out.logits[:, :, end] = 1e9
        return out

    whole = "".join(stream(asked(folder, "tokens", prompt="the")))
    monkeypatch.setattr(MemoryLM, "forward", ending)
    cut = "".join(stream(asked(folder, "tokens", prompt="the ", stop="<|endoftext|>")))
    assert len(cut) < len(whole)
    assert "<|endoftext|>" not in cut
    assert model.vocab_size == tokenizer.vocab_size


def test_it_starts_with_a_row_of_the_memory_kept(folder: Path) -> None:
    model, memory = from_pretrained(folder / "bytes" / "model", with_memory=True)
    assert isinstance(model, MemoryLM)
    prompt = torch.tensor([list(b"and")])
    steps = generate(model, prompt, max_new_tokens=1, memory=memory.select(torch.tensor([2])))
    wanted = next(steps)
    again = generate(model, prompt, max_new_tokens=1)
    # The memory tells in the logits, so that the comparison below can fail.
    assert not torch.equal(next(again).logits, wanted.logits)
    seen = []
    real = MemoryLM.forward
    with pytest.MonkeyPatch.context() as patch:

        def watched(self: MemoryLM, *given: object, **options: object) -> object:
            out = real(self, *given, **options)  # type: ignore[arg-type]
            seen.append(out.logits[:, -1])
            return out

        patch.setattr(MemoryLM, "forward", watched)
        "".join(stream(asked(folder, "bytes", prompt="and", tokens=1, memory_row=2)))
    assert torch.equal(seen[0], wanted.logits)
    with pytest.raises(ValueError, match=r"memory_row \(4\) must lie between 0 and 3"):
        list(stream(asked(folder, "bytes", memory_row=4)))


def test_the_command_writes_to_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["generate", "--model", str(folder / "bytes" / "model"), "--tokens", "20", "--device", "cpu"]
    assert main([*words, "--prompt", LONG, "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert said
    (tmp_path / "prompt.txt").write_text(LONG)
    assert main([*words, "--prompt-file", str(tmp_path / "prompt.txt"), "--seed", "3"]) == 0
    assert capsys.readouterr().out == said
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(LONG.encode())))
    assert main([*words, "--prompt-file", "-", "--seed", "3"]) == 0
    assert capsys.readouterr().out == said
    assert main([*words, "--prompt", LONG, "--seed", "4"]) == 0
    assert capsys.readouterr().out != said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", "nothing.txt"], "No such file"),
        (["--prompt", "a", "--temperature", "-1"], "temperature (-1.0)"),
        (["--prompt", "a", "--stop", "<eos>"], "no token '<eos>'"),
        (["--prompt", "a", "--model", "nothing"], "no folder nothing"),
        (["--prompt", "a", "--device", "abacus"], "device 'abacus'"),
    ],
)
def test_wrong_use_is_answered_with_the_way_out(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in words else ["--model", str(folder / "tokens" / "model")]
    assert main(["generate", *model, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_model_over_embeddings_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(create("gru", dim=8), tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds a GRU over embeddings, not a language model" in capsys.readouterr().err


def test_a_model_whose_tokenizer_is_lost_or_another(folder: Path, tmp_path: Path) -> None:
    MemoryLM.from_pretrained(folder / "tokens" / "model").save_pretrained(tmp_path)
    config = replace(asked(folder, "tokens"), model=str(tmp_path))
    with pytest.raises(ValueError, match=r"no tokenizer\.json and the model has 300 tokens"):
        list(stream(config))
    import tokenizers

    larger = tokenizers.Tokenizer.from_file(str(folder / "t.json"))
    larger.add_tokens(["<|more|>"])
    larger.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not the one that the model was trained with"):
        list(stream(config))
