"""One run: its optimiser, its schedule, its interruptions, its tests of whether the memory is used."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import resumable
from benchmarks.endings import DivergedError
from benchmarks.evaluate import evaluate, segments
from benchmarks.learning import accumulate_gradients, learning_rate, loss_of, make_optimizer
from benchmarks.members import build_model
from benchmarks.provenance import versions
from benchmarks.results import DIVERGED, FAILED, FINISHED, Results, RunBusyError, plain
from benchmarks.settings import RunSpec, TrainSettings, cached_task, command_of, plan
from benchmarks.task import Batch
from benchmarks.train import CHECKPOINT, CannotWriteError, run
from tests.benchmarks.tiny import STREAM, TINY, Stream

NUMBERS = ("loss", "curve", "scores", "memory_use", "parameters", "state_bytes", "tokens")


def tiny_plan(*assignments: str, task: str = "recall", seed: int = 0) -> RunSpec:
    return plan(TINY, task, seed, smoke=True, assignments=assignments)


def numbers(record: Any) -> dict[str, Any]:
    assert record["status"] == FINISHED, record
    # As JSON: there a score that is not defined equals itself.
    return plain({name: record[name] for name in NUMBERS})


def stop_after(calls: int) -> Any:
    left = iter(range(calls))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("task", ["recall", STREAM])
def test_a_run_ends_with_scores_costs_and_the_command_that_repeats_it(tmp_path: Path, task: str) -> None:
    spec = tiny_plan("steps=8", task=task)
    record = run(spec, Results(tmp_path))
    assert record is not None
    assert record["status"] == FINISHED
    assert set(record["scores"]) == {metric["name"] for metric in record["task_facts"]["metrics"]}
    assert record["parameters"] == sum(
        p.numel()
        for p in build_model(
            TINY, spec.model_options, cached_task(task, spec.task_options).vocab_size
        ).parameters()
    )
    # Tiny carries one vector; its open segment is empty between segments and carries nothing.
    vector = 4 * spec.model_options["dim"]
    assert record["state_bytes"] == vector
    assert record["memory_bytes"] == 2 * vector + 8
    assert record["peak_bytes"] > 1e7
    assert record["tokens_per_second"] > 0
    assert record["seconds"]["training"] > 0
    assert 0 < record["seconds"]["training cpu"] < record["seconds"]["cpu"]
    assert [point["step"] for point in record["curve"]] == list(range(1, 9))
    assert sum("score" in point for point in record["curve"]) == spec.train.curve_points
    assert {"torch", "python", "memory-models", "cpu"} <= set(record["versions"])
    # With the commit, where there is one.
    assert record["versions"] == versions()
    assert numbers(Results(tmp_path).latest()[spec.id]) == numbers(record)


@pytest.mark.parametrize("task", ["recall", STREAM])
def test_the_command_in_a_record_plans_the_same_run(task: str) -> None:
    spec = tiny_plan("steps=9", "train.betas=(0.8,0.9)", "dim=4", task=task, seed=3)
    words = shlex.split(command_of(spec))
    assert words[:8] == ["memory-bench", "run", "--model", TINY, "--task", task, "--seed", "3"]
    again = plan(TINY, task, 3, assignments=words[words.index("--set") + 1 :])
    assert again.id == spec.id


def test_the_command_of_usual_settings_names_none_of_them() -> None:
    # A record is read back from JSON, which turns the tuples of the tables into lists.
    spec = RunSpec.from_json(json.loads(json.dumps(plan("htm", "recall", 0).to_json())))
    assert "--set" not in command_of(spec)


def test_a_run_says_what_it_was_called(tmp_path: Path) -> None:
    record = run(plan(f"{TINY} dim=4 steps=2", "recall", 0, smoke=True), Results(tmp_path))
    assert record is not None
    assert (record["model"], record["label"]) == (TINY, f"{TINY} dim=4 steps=2")


def test_all_models_are_trained_on_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[Any]] = []
    usual = Stream.batch

    def noted(self: Stream, **asked: Any) -> Batch:
        batch = usual(self, **asked)
        given[-1].append((asked, batch.tokens.tolist(), batch.labels.tolist()))
        return batch

    monkeypatch.setattr(Stream, "batch", noted)
    for model in (TINY, f"{TINY} gradient=replay", "window"):
        given.append([])
        spec = plan(model, STREAM, 3, smoke=True, assignments=["steps=2", "curve_points=0"])
        record = run(spec, Results(tmp_path))
        assert record is not None
        assert record["status"] == FINISHED, record
    # Two steps of training, and what the gradients of the memory are measured on.
    assert len(given[0]) > 2
    assert given[0] == given[1] == given[2]
    assert {asked["seed"] for asked, *_ in given[0]} == {3}


def test_a_gradient_that_is_not_finite_ends_the_run_and_spares_the_weights() -> None:
    spec = tiny_plan(task=STREAM)
    training = resumable.Training(spec, cached_task(STREAM, spec.task_options))
    training.advance()
    before = [p.detach().clone() for p in training.model.parameters()]
    # The loss stays finite.
    training.model.module.mix.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"gradient's norm is (inf|nan) at step 2 of 6"):
        training.advance()
    assert all(torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True))
    assert training.step == 1


@pytest.mark.parametrize("task", ["recall", STREAM])
def test_a_run_is_a_function_of_its_spec(tmp_path: Path, task: str) -> None:
    one, two = (run(tiny_plan(task=task), Results(tmp_path / name)) for name in "ab")
    assert numbers(one) == numbers(two)
    other = run(tiny_plan(task=task, seed=1), Results(tmp_path / "c"))
    assert other is not None
    assert other["loss"] != numbers(one)["loss"]


@pytest.mark.parametrize("task", ["recall", STREAM])
@pytest.mark.parametrize("calls", [0, 3, 6, 8])
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path: Path, task: str, calls: int) -> None:
    # Stopped in the training, at its last step, in the evaluation, in the probing.
    spec = tiny_plan(task=task)
    whole = run(spec, Results(tmp_path / "whole"))
    parts = Results(tmp_path / "parts")
    assert run(spec, parts, stopped=stop_after(calls)) is None
    assert (parts.run_folder(spec.id) / CHECKPOINT).exists()
    assert parts.records() == []
    torch.manual_seed(1234)
    resumed = run(spec, parts)
    assert numbers(resumed) == numbers(whole)
    assert not (parts.run_folder(spec.id) / CHECKPOINT).exists()


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    changes = ["steps=60", "pause=0.01"]
    command = [sys.executable, "-m", "benchmarks.cli", "run", "--model", TINY, "--task", STREAM, "--smoke"]
    command += ["--out", str(tmp_path / "killed"), "--checkpoint-seconds", "0", "--set", *changes]
    spec = tiny_plan(*changes, task=STREAM)
    checkpoint = Results(tmp_path / "killed").run_folder(spec.id) / CHECKPOINT
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Results(tmp_path / "killed").records() == []
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < 60

    resumed = run(spec, Results(tmp_path / "killed"))
    whole = run(tiny_plan(*changes, task=STREAM), Results(tmp_path / "whole"))
    assert numbers(resumed) == numbers(whole)


def test_a_damaged_checkpoint_costs_the_work_but_not_the_run(tmp_path: Path) -> None:
    spec = tiny_plan()
    results = Results(tmp_path)
    assert run(spec, results, stopped=stop_after(2)) is None
    path = results.run_folder(spec.id) / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    assert numbers(run(spec, results)) == numbers(run(spec, Results(tmp_path / "other")))


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    results = Results(tmp_path)
    record = run(tiny_plan("trouble=nan"), results)
    assert record is not None
    assert record["status"] == DIVERGED
    assert "nan at step 1 of 6" in record["error"]
    assert results.records()[-1]["status"] == DIVERGED


@pytest.mark.parametrize("points", [0, 8])
def test_a_last_step_that_leaves_weights_that_are_not_finite_is_no_result(
    tmp_path: Path, points: int
) -> None:
    spec = tiny_plan("steps=1", "learning_rate=1e38", "warmup=0", f"curve_points={points}", task=STREAM)
    record = run(spec, Results(tmp_path))
    assert record is not None
    assert record["status"] == DIVERGED
    assert "not finite" in record["error"]
    assert "scores" not in record


def test_answers_that_are_not_finite_are_no_score() -> None:
    spec = tiny_plan(task=STREAM)
    task = cached_task(STREAM, spec.task_options)
    model = build_model(TINY, spec.model_options, task.vocab_size)
    evaluate(model, task, rows=4)
    # Of a token that is read and given, whose row the gradient may never have reached.
    with torch.no_grad():
        next(p for p in model.parameters() if p.shape[0] == task.vocab_size)[0] = math.nan
    with pytest.raises(DivergedError, match="logits are not finite in evaluation"):
        evaluate(model, task, rows=4)


def test_an_error_in_a_model_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    record = run(tiny_plan("trouble=raise"), Results(tmp_path))
    assert record is not None
    assert record["status"] == FAILED
    assert "broken on purpose" in record["error"]
    assert any("_have_trouble" in line for line in record["traceback"])


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_run_is_not_filed_under_the_name_of_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"plugin_changed_{when}"
    plugin = tmp_path / f"{name}.py"
    text = "from tests.benchmarks.tiny import Stream\n\nclass Own(Stream):\n    name = 'own'\n"
    plugin.write_text(text)
    spec, results = plan(TINY, f"{name}:Own", 0, smoke=True), Results(tmp_path / "results")

    def edit() -> bool:
        plugin.write_text(text + "    summary = 'another'\n")
        return False

    if when == "before":
        edit()
    record = run(spec, results, stopped=edit)
    assert record is not None
    assert record["status"] == FAILED
    assert record["error"].startswith("the code changed since this run was planned")
    assert not results.is_finished(spec.id)
    # With the code that it was planned with, and comments at most, it is what its name says.
    plugin.write_text(text + "    # nothing\n")
    again = run(spec, results)
    assert again is not None
    assert again["status"] == FINISHED


def test_a_run_is_not_done_with_other_libraries_than_planned(tmp_path: Path) -> None:
    spec = tiny_plan("steps=2")
    other = dataclasses.replace(spec, libraries={**spec.libraries, "torch": "0.1"})
    record = run(other, Results(tmp_path))
    assert record is not None
    assert record["error"].startswith("the code changed since this run was planned")


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_plan()
    results = Results(tmp_path)
    assert run(spec, results, stopped=stop_after(2)) is None
    before = (results.run_folder(spec.id) / CHECKPOINT).read_bytes()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "write_atomically", full)
        with pytest.raises(CannotWriteError, match=r"No space left on device.*same command"):
            run(spec, results)
    assert (results.run_folder(spec.id) / CHECKPOINT).read_bytes() == before
    assert numbers(run(spec, results)) == numbers(run(spec, Results(tmp_path / "other")))


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    spec, results = tiny_plan(), Results(tmp_path)
    with results.claim(spec.id), pytest.raises(RunBusyError, match=spec.id):
        run(spec, results)


def test_a_finished_run_is_not_trained_again_by_who_waited_for_it(tmp_path: Path) -> None:
    spec, results = tiny_plan(), Results(tmp_path)
    record = run(spec, results)
    lines = results.lines.read_bytes()
    assert run(spec, results, stopped=lambda: pytest.fail("trained again")) == plain(record)
    assert results.lines.read_bytes() == lines


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    record = run(tiny_plan("steps=60", "learning_rate=0.02", "batch_size=16", task=STREAM), Results(tmp_path))
    assert record is not None
    losses = [point["loss"] for point in record["curve"]]
    assert losses[-1] < losses[0] / 2


def test_the_gradient_goes_through_all_segments_of_a_sequence() -> None:
    spec = tiny_plan()
    task = cached_task("recall", spec.task_options)
    model = build_model(TINY, spec.model_options, task.vocab_size).eval()
    batch = task.batch(seed=0, step=0, batch_size=3)
    embedded = []
    model.embedding.register_forward_hook(lambda _, __, out: embedded.append(out))
    loss, memory = loss_of(model, [batch], None)
    gradients = torch.autograd.grad(loss, embedded)
    assert len(gradients) == batch.tokens.shape[1] // model.segment_length
    # What the last token of the first segment is worth only later segments can tell.
    assert gradients[0][:, -1].abs().sum() > 0
    assert memory.batch_size == 3


def test_unrolled_streams_pass_the_gradient_from_segment_to_segment() -> None:
    spec = tiny_plan(task=STREAM)
    task = cached_task(STREAM, spec.task_options)
    model = build_model(TINY, spec.model_options, task.vocab_size).eval()
    batches = [task.batch(seed=0, step=step, batch_size=3) for step in range(3)]
    embedded = []
    model.embedding.register_forward_hook(lambda _, __, out: embedded.append(out))
    loss, _ = loss_of(model, batches, None)
    apart, memory = 0.0, None
    for batch in batches:
        one, memory = loss_of(model, [batch], memory)
        apart += one.item() * batch.asked
    assert loss.item() == pytest.approx(apart / sum(batch.asked for batch in batches), rel=1e-5)
    last = loss_of(model, batches[:1], None)[0]
    assert torch.autograd.grad(loss, embedded[0])[0][:, -1].abs().sum() > 0
    assert last.item() != loss.item()


def test_replay_trains_like_back_propagation_through_time() -> None:
    for task_name in ("recall", STREAM):
        spec = tiny_plan(task=task_name)
        task = cached_task(task_name, spec.task_options)
        torch.manual_seed(0)
        model = build_model(TINY, spec.model_options, task.vocab_size).double().train()
        batches = [task.batch(seed=0, step=step, batch_size=3) for step in range(2)]
        found = {}
        for way in ("bptt", "replay"):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            value, memory = accumulate_gradients(model, batches, None, through=way)
            gradients = [p.grad.clone() for p in model.parameters()]
            found[way] = (value, memory.tensors(), gradients)
        assert found["replay"][0] == pytest.approx(found["bptt"][0], rel=1e-10)
        for mine, other in zip(found["replay"][2], found["bptt"][2], strict=True):
            assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)
        for name, leaf in found["replay"][1].items():
            assert torch.allclose(leaf, found["bptt"][1][name])
            assert not leaf.requires_grad


def test_whole_sequences_are_not_unrolled(tmp_path: Path) -> None:
    record = run(tiny_plan("unroll=2"), Results(tmp_path))
    assert record is not None
    assert "unroll (2) is for streams" in record["error"]
    record = run(tiny_plan("unroll=2", task=STREAM), Results(tmp_path))
    assert record is not None
    assert record["status"] == FINISHED
    assert record["tokens"] == 2 * numbers(run(tiny_plan(task=STREAM), Results(tmp_path / "one")))["tokens"]


def test_a_sequence_longer_than_what_may_wait_for_the_store_is_trained_and_probed(tmp_path: Path) -> None:
    options = ["store='outside'", "memories=64", "topk=4", "pending_segments=1", "memory_layers=(-1,)"]
    assignments = ["task.segments=4", "steps=2", *(f"model.{option}" for option in options)]
    spec = plan("memorizing", "recall", 0, smoke=True, assignments=assignments)
    record = run(spec, Results(tmp_path))
    assert record is not None
    assert record["status"] == FINISHED, record
    assert any(name.endswith("memory share") for name in record["diagnostics"])


def test_the_pairs_of_a_row_weigh_wherever_they_are() -> None:
    task = cached_task("recall", {"segments": 4, "keys": 8, "values": 8, "evaluation_sequences": 4})
    sizes = {"dim": 16, "depth": 1, "heads": 2, "segment_length": task.segment_length, "memories": 40}
    weights = {}
    for store in ("state", "outside"):
        options = {**sizes, "store": store, **({"pending_segments": 1} if store == "outside" else {})}
        model = build_model("memorizing", options, task.vocab_size)
        weights[store] = evaluate(model, task, rows=4)
    pair = 2 * 2 * 8 * 4  # key and value, of two heads of 8 floats
    kept = task.segment_length
    assert weights["state"].state_bytes == 40 * pair + 8
    # The newest are in the state too, and the store has room for what older states still see.
    assert weights["outside"].state_bytes == (40 + kept + kept) * pair + 3 * 8
    for found in weights.values():
        assert found.memory_bytes == found.state_bytes + kept * pair + 8  # the open segment, and its length


def test_a_stopped_run_with_a_store_outside_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    options = ["store='outside'", "memories=64", "topk=4", "pending_segments=1", "memory_layers=(-1,)"]
    spec = plan("memorizing", STREAM, 0, smoke=True, assignments=[f"model.{option}" for option in options])
    whole = run(spec, Results(tmp_path / "whole"))
    assert whole is not None
    assert whole["status"] == FINISHED, whole
    parts = Results(tmp_path / "parts")
    assert run(spec, parts, stopped=stop_after(3)) is None
    folder = parts.run_folder(spec.id)
    assert len(list(folder.glob("store-*"))) == 1
    assert numbers(run(spec, parts)) == numbers(whole)
    assert not list(folder.glob("store-*"))


def test_the_loss_is_the_mean_over_all_that_is_asked() -> None:
    spec = tiny_plan()
    task = cached_task("recall", spec.task_options)
    model = build_model(TINY, spec.model_options, task.vocab_size).eval()
    batch = task.batch(seed=0, step=0, batch_size=3)
    memory, terms = None, []
    length = model.segment_length
    for start in range(0, batch.tokens.shape[1], length):
        out = model(batch.tokens[:, start : start + length], memory)
        memory = out.memory
        for row in range(3):
            for t in range(length):
                label = int(batch.labels[row, start + t])
                if label != -100:
                    terms.append(-out.logits[row, t].log_softmax(-1)[label].item())
    assert loss_of(model, [batch], None)[0].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_segments_put_a_batch_together_again() -> None:
    tokens = torch.arange(20).view(2, 10)
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[1, 7] = True
    batch = Batch(tokens=tokens, labels=tokens + 1, groups=tokens, reset=reset, mask=tokens > 3)
    parts = list(segments(batch, 4))
    assert [part.tokens.shape[1] for part in parts] == [4, 4, 2]
    for name in ("tokens", "labels", "groups", "reset", "mask"):
        assert torch.cat([getattr(part, name) for part in parts], 1).equal(getattr(batch, name))
    of_rows = list(segments(Batch(tokens=tokens, labels=tokens, groups=tokens, reset=reset[:, 7]), 4))
    assert of_rows[0].reset is not None
    assert of_rows[0].reset.equal(reset[:, 7])
    assert of_rows[1].reset is None


def test_weight_decay_spares_embeddings_norms_and_scales() -> None:
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(5, 4),
            "linear": torch.nn.Linear(4, 4),
            "norm": torch.nn.LayerNorm(4),
        }
    )
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(3, 1, 1)))
    optimizer = make_optimizer(model, TrainSettings(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if decay[id(p)]} == {"linear.weight"}


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    settings = TrainSettings(steps=200, warmup=10, decay=0.25, final=0.1, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:151]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[150:]))
    assert rates[175] == pytest.approx(0.55, abs=0.02)
    assert rates[-1] == pytest.approx(0.1)
    cosine = TrainSettings(steps=100, warmup=0, final=0.0)
    assert learning_rate(50, cosine) == pytest.approx(3e-3 * (1 + math.cos(math.pi * 50 / 99)) / 2)


class Parrot:
    """Answers what it was told a segment ago: right only if its memory is its own and up to date."""

    segment_length = 1
    training = False

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def init_memory(self, rows: int) -> Any:
        return self._memory(torch.zeros(rows, dtype=torch.int64))

    def commit(self, memory: Any) -> Any:
        return memory

    def outside_bytes(self, memory: Any) -> int:
        return 0

    def __call__(self, tokens: Any, memory: Any, *, mask: Any = None, reset: Any = None) -> Any:
        told = self.init_memory(len(tokens)).token if memory is None else memory.token
        if reset is not None:
            told = torch.where(reset, 0, told)
        logits = torch.nn.functional.one_hot(told[:, None], 10).float()
        return SimpleNamespace(logits=logits, memory=self._memory(tokens[:, 0]))

    def _memory(self, token: Any) -> Any:
        memory = SimpleNamespace(token=token, batch_size=len(token), nbytes=8 * len(token))
        memory.tensors = lambda: {"token": memory.token}
        memory.select = lambda rows: self._memory(token[rows])
        memory.where = lambda keep, other: self._memory(torch.where(keep, token, other.token))
        return memory


class Counting:
    """In segment s row r is told 5r + s + 1; hands the answers of all segments to `answer`."""

    streaming = True

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def evaluation(self, *, batch_size: int) -> Any:
        for s in range(4):
            told = torch.tensor([[1 + s], [6 + s]])
            yield Batch(tokens=told, labels=told, groups=told, reset=torch.tensor([s == 0, s == 0]))

    def scorer(self) -> Any:
        answers: list[list[int]] = []
        return SimpleNamespace(
            update=lambda logits, batch: answers.append(logits[:, 0].argmax(-1).tolist()),
            result=lambda: self.answer(answers) or {},
            counts=dict,
        )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("carried", [[0, 0], [1, 6], [2, 7], [3, 8]]),
        ("none", [[0, 0], [0, 0], [0, 0], [0, 0]]),
        ("shuffled", [[0, 0], [6, 1], [7, 2], [8, 3]]),
        ("frozen", [[0, 0], [1, 6], [1, 6], [1, 6]]),
    ],
)
def test_the_four_ways_to_carry_a_memory(mode: str, expected: list[list[int]]) -> None:
    seen: list[Any] = []
    evaluate(Parrot(), Counting(seen.extend), rows=2, mode=mode)  # type: ignore[arg-type]
    assert seen == expected


def test_probes_of_a_model_without_use_for_its_memory_show_no_drop(tmp_path: Path) -> None:
    # On `stream` the answer is in the token itself.
    record = run(tiny_plan("steps=80", "learning_rate=0.02", "batch_size=16", task=STREAM), Results(tmp_path))
    assert record is not None
    assert set(record["memory_use"]["drop"]) == {"none", "shuffled", "frozen"}
    for mode, drop in record["memory_use"]["drop"].items():
        assert drop == pytest.approx(
            record["memory_use"]["scores"]["carried"]["mean accuracy"]
            - record["memory_use"]["scores"][mode]["mean accuracy"]
        )


def test_evaluation_leaves_the_training_as_it_was() -> None:
    spec = tiny_plan()
    task = cached_task("recall", spec.task_options)
    model = build_model(TINY, spec.model_options, task.vocab_size)
    state = torch.get_rng_state()
    evaluate(model, task, rows=4)
    assert model.training
    assert torch.get_rng_state().equal(state)
