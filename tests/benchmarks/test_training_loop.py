"""A training that was stopped, or killed at any moment, ends as one that was not: bit by bit."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cli import main
from benchmarks.endings import DivergedError
from benchmarks.training import state as states
from benchmarks.training.command import prepare, train
from benchmarks.training.loop import Training
from benchmarks.training.settings import OPTIMISATION, TrainConfig
from memory_models import CheckpointError, MemoryLM, from_pretrained, unroll
from tests.benchmarks.training import MODEL, tiny, words_of, write_corpus, write_tokenizer


def disturb() -> None:
    """As another process would have them: other generators."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002


def checkpoint_of(training: Training) -> dict[str, Any]:
    found = states.read_checkpoint(training.checkpoint, training.identity)
    assert found is not None
    return found


def assert_same(one: Any, other: Any) -> None:
    """Equal values; tensors bit by bit, of one dtype."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_same(value, other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "memxl", "set": (*MODEL, "dropout=0.2")},
        {"model": "memformer", "gradient": "replay", "accumulate": 2, "set": (*MODEL, "dropout=0.2")},
        {"model": "memorizing", "accumulate": 4, "precision": "bf16"},
        {"model": "gru", "set": ("dim=16", "segment_length=8"), "evaluate_every": 2},
    ],
    ids=lambda changes: changes["model"],
)
def test_a_resumed_training_is_bit_identical(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = prepare(tiny(tmp_path, out=tmp_path / "whole", **changes))
    losses = [whole.advance() for _ in range(6)]
    if changes.get("evaluate_every"):
        whole.evaluate()
    whole.save()

    config = tiny(tmp_path, out=tmp_path / "parts", **changes)
    seen = []
    for part in range(2):
        disturb()
        training = prepare(config)
        assert training.step == 3 * part
        for _ in range(3):
            seen.append(training.advance())
            if changes.get("evaluate_every"):
                # It draws nothing and leaves no trace.
                training.evaluate()
                training.sample()
        training.save()
    assert seen == losses
    assert_same(checkpoint_of(training), checkpoint_of(whole))


def test_an_outside_store_is_resumed_too(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    options = (*MODEL, "store=outside", "memories=32")
    whole = prepare(tiny(tmp_path, out=tmp_path / "whole", model="memorizing", set=options))
    losses = [whole.advance() for _ in range(6)]
    config = tiny(tmp_path, out=tmp_path / "parts", model="memorizing", set=options)
    seen = []
    for _ in range(3):
        training = prepare(config)
        seen += [training.advance() for _ in range(2)]
        training.save()
        assert len(list(config.out.glob("store-*"))) == 1
    assert seen == losses


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_end(tmp_path: Path) -> None:
    options = (*MODEL, "dropout=0.1")
    whole = tiny(tmp_path, out=tmp_path / "whole", steps=24, evaluate_every=5, set=options)
    killed = replace(whole, out=tmp_path / "killed", checkpoint_seconds=0)
    assert main(["train", *words_of(whole)]) == 0
    command = [sys.executable, "-m", "benchmarks.cli", "train", *words_of(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (killed.out / "log.jsonl").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 4 <= prepare(killed).step < 24
    assert main(["train", *words_of(killed)]) == 0
    endings = [checkpoint_of(prepare(config)) for config in (whole, killed)]
    assert endings[0]["step"] == 24
    assert_same(*endings)
    assert_same(*(dict(from_pretrained(config.out / "model").state_dict()) for config in (whole, killed)))
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
            for line in (config.out / "log.jsonl").read_text().splitlines()
        ]
        for config in (whole, killed)
    ]
    assert logs[0] == logs[1]


@contextmanager
def disk_that_holds(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("refused", ["checkpoint", "model"])
def test_a_full_disk_loses_nothing(
    refused: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, checkpoint_seconds=0)
    config = replace(config, may_change=("steps",))
    assert main(["train", *words_of(replace(config, steps=3))]) == 0
    files = [config.out / "checkpoint.pt", config.out / "model" / "model.safetensors"]
    before = [path.read_bytes() for path in files]
    capsys.readouterr()
    with monkeypatch.context() as patch, disk_that_holds(len(before[refused == "model"]) // 2):
        if refused == "model":
            patch.setattr(Training, "save", lambda training: None)
        assert main(["train", *words_of(config)]) == 1
    said = capsys.readouterr().err
    assert f"cannot write to {config.out}" in said
    assert "too large" in said
    assert "Traceback" not in said
    assert [path.read_bytes() for path in files] == before
    assert not list(config.out.rglob("*.part"))
    assert main(["train", *words_of(config)]) == 0
    assert checkpoint_of(prepare(config))["step"] == 6


def test_a_signal_stops_after_the_step_and_the_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path)
    advance = Training.advance

    def interrupted(training: Training) -> float:
        if training.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(training)

    monkeypatch.setattr(Training, "advance", interrupted)
    assert main(["train", *words_of(config)]) == 130
    said = capsys.readouterr().out
    assert "Stopped at step 3; it is saved. Go on with:\n  memory-bench train --data" in said
    assert main(["train", *words_of(config)]) == 0
    assert "goes on at step 3" in capsys.readouterr().out
    assert main(["train", *words_of(config)]) == 0
    assert "trained for 6 steps" in capsys.readouterr().out


def reference_losses(config: TrainConfig, training: Training) -> list[float]:
    """Plain: every row alone, one call a segment, AdamW by torch, constant learning rate."""
    model = training.model
    decayed = [
        p for n, p in model.named_parameters() if sum(s > 1 for s in p.shape) >= 2 and "embedding" not in n
    ]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
    )
    memories: list[Any] = [None] * config.batch_size
    losses = []
    for step in range(config.steps):
        nats, asked = torch.zeros(()), 0
        for row in range(config.batch_size):
            memory = memories[row]
            for piece in training._stream.window(step, range(row, row + 1)):
                length = int(piece.mask.sum())
                out = model(piece.tokens[:, :length], memory, reset=piece.reset)
                memory = out.memory
                nats = nats + F.cross_entropy(out.logits[0], piece.labels[0, :length], reduction="sum")
                asked += length
            memories[row] = memory.detach()
        loss = nats / asked
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("model", "gradient", "accumulate"),
    [("memxl", "bptt", 1), ("memxl", "replay", 2), ("memformer", "bptt", 2), ("memformer", "replay", 1)],
)
def test_steps_are_those_of_a_plain_loop_over_rows(
    model: str, gradient: Any, accumulate: int, tmp_path: Path
) -> None:
    config = tiny(tmp_path, model=model, gradient=gradient, accumulate=accumulate, warmup=0, decay=0.0)
    wanted = reference_losses(config, prepare(replace(config, out=tmp_path / "plain")))
    training = prepare(config)
    assert [training.advance() for _ in range(config.steps)] == pytest.approx(wanted, rel=1e-4)


def test_an_evaluation_is_the_loss_of_reading_each_document_alone(tmp_path: Path) -> None:
    training = prepare(tiny(tmp_path))
    held_out = training.text.held_out
    model = training.model.eval()
    nats, asked = 0.0, 0
    for start, length in zip(held_out.starts, held_out.asked, strict=True):
        ids = torch.from_numpy(held_out.tokens[start : start + length + 1].astype(np.int64))[None]
        logits, _ = unroll(model, ids[:, :-1])
        nats += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        asked += int(length)
    scores = training.evaluate()
    assert scores["loss"] == pytest.approx(nats / asked, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / asked), rel=1e-4)
    assert scores["bits per byte"] == pytest.approx(nats / asked / math.log(2), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_in_every_precision(precision: Any, tmp_path: Path) -> None:
    config = tiny(tmp_path, precision=precision, steps=12, learning_rate=2e-2)
    training = prepare(config)
    before = training.evaluate()["loss"]
    for _ in range(config.steps):
        training.advance()
    assert training.evaluate()["loss"] < before - 0.5
    assert all(p.dtype == torch.float32 for p in training.model.parameters())


def test_the_trained_model_comes_back_with_tokenizer_and_memory(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t.json")
    config = tiny(tmp_path, tokenizer=str(tokenizer), end_token="<|endoftext|>", keep_memory=True)
    training = prepare(config)
    assert train(training, say=lambda _: None)
    model, memory = from_pretrained(config.out / "model", with_memory=True)
    assert isinstance(model, MemoryLM)
    assert_same(dict(model.state_dict()), dict(training.model.state_dict()))
    assert memory.batch_size == config.batch_size
    assert_same(memory.tensors(), checkpoint_of(training)["memory"])
    assert (config.out / "model" / "tokenizer.json").read_text() == tokenizer.read_text()


def test_a_scale_of_fp16_that_shrinks_for_ever_ends_with_a_message(tmp_path: Path) -> None:
    training = prepare(tiny(tmp_path, precision="fp16"))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    next(training.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    training._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-22)
    training.advance()
    training.advance()
    with pytest.raises(DivergedError, match=r"in fp16 .* at step 3 of 6.*--precision bf16"):
        training.advance()
    assert_same(before, dict(training.model.state_dict()))


def test_a_loss_that_is_not_finite_ends_with_a_message_and_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, learning_rate=1e30, warmup=0, checkpoint_seconds=0)
    assert main(["train", *words_of(config)]) == 1
    said = capsys.readouterr()
    assert "is nan at step 2 of 6; lower --learning-rate" in said.err
    assert "Traceback" not in said.err
    training = prepare(config)
    assert training.step == 1
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    with pytest.raises(DivergedError):
        training.advance()
    assert_same(before, dict(training.model.state_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": (*MODEL, "dim=32")}, "model.options.dim was 16, now 32"),
        ({"model": "gru", "set": ()}, "model.model was 'memxl', now 'gru'"),
        ({"batch_size": 8}, "batch_size was 4, now 8"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"segments": 3}, "segments was 2, now 3"),
        (
            {"steps": 7},
            "steps was 6, now 7. Give the same options and data to go on, or --may-change steps to change",
        ),
        ({"learning_rate": 1e-2}, "learning_rate was 0.001, now 0.01"),
        ({"warmup": 1, "decay": 0.5}, "warmup was 2, now 1; decay was 1.0, now 0.5"),
        ({"final": 0.5}, "final was 0.1, now 0.5"),
        ({"weight_decay": 0.3}, "weight_decay was 0.01, now 0.3"),
        ({"betas": (0.9, 0.9)}, "betas was (0.9, 0.98), now (0.9, 0.9)"),
        ({"clip": 2.0}, "clip was 1.0, now 2.0"),
        ({"gradient": "replay"}, "gradient was 'bptt', now 'replay'"),
        ({"precision": "bf16"}, "precision was 'fp32', now 'bf16'"),
        ({"seed": 1, "may_change": ("steps",)}, "seed was 0, now 1"),
        ({"tokenizer": "t.json"}, "vocab_size was 256, now 300"),
        ({"data": "other"}, "data was '"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "other", 13)
    write_tokenizer(tmp_path / "t.json")
    training = prepare(tiny(tmp_path))
    training.save()
    for name in changes.keys() & {"data", "tokenizer"}:
        changes = {**changes, name: tmp_path / changes[name]}
    config = tiny(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        prepare(config)
    assert main(["train", *words_of(config)]) == 2
    assert message in capsys.readouterr().err


def test_what_changes_no_step_goes_on(tmp_path: Path) -> None:
    training = prepare(tiny(tmp_path))
    training.advance()
    training.save()
    rest = {"evaluate_every": 1, "evaluation_rows": 1, "sample_tokens": 3, "checkpoint_seconds": 1.0}
    assert prepare(tiny(tmp_path, accumulate=2, precision="fp32", threads=2, **rest)).step == 1


def test_a_checkpoint_that_does_not_say_how_it_was_optimised_goes_on(tmp_path: Path) -> None:
    training = prepare(tiny(tmp_path))
    training.save()
    content = torch.load(training.checkpoint, weights_only=True)
    for name in OPTIMISATION:
        del content["identity"][name]
    torch.save(content, training.checkpoint)
    assert prepare(tiny(tmp_path, learning_rate=1e-2)).step == 0


def test_what_may_change_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'steps'"):
        tiny(tmp_path, may_change=("stesp",))


def test_more_steps_and_other_rates_go_on_if_they_may(tmp_path: Path) -> None:
    training = prepare(tiny(tmp_path))
    training.advance()
    training.save()
    changes = {"steps": 100, "learning_rate": 1e-2, "weight_decay": 0.3}
    longer = prepare(tiny(tmp_path, **changes, may_change=tuple(changes), accumulate=2))
    assert longer.step == 1
    assert longer.optimizer.param_groups[0]["weight_decay"] == 0.3
    longer.advance()


@pytest.mark.parametrize("content", [b"", b"half a file"])
def test_a_damaged_checkpoint_is_not_started_over(content: bytes, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    config.out.mkdir()
    (config.out / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        prepare(config)
    torch.save({"format": "something"}, config.out / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of memory-bench train"):
        prepare(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("nothing/here")}, "neither a file nor a folder"),
        ({"tokenizer": "nothing.json"}, "no tokenizer file nothing.json"),
        ({"model": "memxk"}, "Did you mean 'memxl'"),
        ({"set": ("dimm=3",)}, "Did you mean 'dim'"),
        ({"set": ("dim",)}, "not of the form key=value"),
        ({"accumulate": 3}, "4 rows cannot be read in 3 equal parts"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"steps": 0}, "steps (0) must be at least 1"),
        ({"end_token": "x"}, "bytes have none"),
        ({"out": Path(__file__)}, "File exists"),
    ],
)
def test_wrong_use_is_answered_with_the_way_out(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tiny(tmp_path))
    for name, value in changes.items():
        place = words.index("--" + name) if "--" + name in words else len(words)
        end = place + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        given = map(str, value) if isinstance(value, tuple) else [str(value)]
        words[place:end] = ["--" + name.replace("_", "-"), *given]
    try:
        code: Any = main(["train", *words])
    except SystemExit as error:
        # What a single option refuses is said before there is a training.
        code = error.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_figures_go_to_tensorboard_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, tensorboard=True, sample_tokens=3)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", *words_of(config)]) == 2
    assert "pip install 'memory-models[tensorboard]'" in capsys.readouterr().err

    written: list[tuple[str, Any, int]] = []

    class Writer:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            assert folder == str(config.out / "tensorboard")
            assert purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        add_text = add_scalar

        def close(self) -> None:
            written.append(("closed", 0, 0))

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert main(["train", *words_of(config)]) == 0
    names = {name for name, _, _ in written}
    assert {"training/loss", "training/learning_rate", "held-out/loss", "held-out/sample", "closed"} <= names
    assert all(step == 6 for name, _, step in written if name != "closed")
