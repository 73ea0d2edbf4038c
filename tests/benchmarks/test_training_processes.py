"""Two processes train as one with the same global batch: losses, weights, memories, checkpoints."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.cli import main
from benchmarks.training import processes
from benchmarks.training.command import prepare, train
from benchmarks.training.loop import Training
from benchmarks.training.processes import AcceleratedProcesses, Processes, connect
from memory_models import from_pretrained
from tests.benchmarks.training import tiny, words_of

STEPS, MIDDLE = 4, 2
# memformer's last write of a step has no gradient: processes must not wait for one.
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"accumulate": 2},
    "ddp-replay": {"gradient": "replay"},
    "fsdp": {},
    "fsdp-replay": {"gradient": "replay", "accumulate": 2},
}


def config_of(folder: Path, name: str, **changes: Any) -> Any:
    return tiny(folder, model="memformer", out=folder / name, keep_memory=True, **changes)


def figures(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Train a few steps, save, go on in a training made anew; then evaluate and export."""
    config = config_of(folder, name, **changes)
    training = prepare(config)
    losses = [training.advance() for _ in range(MIDDLE)]
    training.save()
    training = prepare(config)
    assert training.step == MIDDLE
    losses += [training.advance() for _ in range(STEPS - MIDDLE)]
    scores = training.evaluate()
    training.sample()
    training.save()
    training.export()
    training.advance()
    moments = [state["exp_avg"] for state in training.optimizer.state.values()]
    return {
        "losses": losses,
        "scores": scores,
        "rows": [list(rows) for rows in training.groups],
        "held": sum(getattr(moment, "_local_tensor", moment).numel() for moment in moments),
    }


def work(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    found = {}
    for name, changes in CASES.items():
        os.environ |= {"ACCELERATE_USE_FSDP": str(name.startswith("fsdp")).lower(), "FSDP_VERSION": "2"}
        found[name] = figures(folder, name, **changes)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    found["stopped"] = stopped_by_one(rank, folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def stopped_by_one(rank: int, folder: Path) -> dict[str, Any]:
    """A signal that reaches one process ends all after the same step."""
    training = prepare(config_of(folder, "stopped"))
    advance = training.advance

    def interrupted() -> float:
        if rank == 1 and training.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance()

    training.advance = interrupted  # type: ignore[method-assign]
    return {"finished": train(training, say=lambda _: None), "step": training.step}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    config_of(folder, "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(folder, port), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return figures(folder, "one")


def of_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text())[name] for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_losses_of_one(name: str, folder: Path, one: dict[str, Any]) -> None:
    first, second = of_ranks(folder, name)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert first["scores"] == second["scores"]
    assert first["scores"] == pytest.approx(one["scores"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_weights_and_memories_of_one(
    name: str, folder: Path, one: dict[str, Any]
) -> None:
    model, memory = from_pretrained(folder / name / "model", with_memory=True)
    wanted, rows = from_pretrained(folder / "one" / "model", with_memory=True)
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    assert memory.batch_size == 4
    # Row by row, in their order.
    for key, value in rows.tensors().items():
        torch.testing.assert_close(memory.tensors()[key], value, rtol=1e-3, atol=1e-3)


def test_rows_belong_to_one_process_each(folder: Path) -> None:
    assert [of["rows"] for of in of_ranks(folder, "ddp")] == [[[0], [1]], [[2], [3]]]
    assert [of["rows"] for of in of_ranks(folder, "fsdp")] == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on_where_two_were(name: str, folder: Path, one: dict[str, Any]) -> None:
    after = prepare(config_of(folder, "one")).advance()
    training = prepare(config_of(folder, name, **CASES[name]))
    assert training.step == STEPS
    assert training.advance() == pytest.approx(after, rel=1e-4)


def test_with_fsdp_a_process_holds_its_part_of_the_optimiser(folder: Path, one: dict[str, Any]) -> None:
    for name in CASES:
        held = [of["held"] for of in of_ranks(folder, name)]
        if name.startswith("fsdp"):
            assert sum(held) == one["held"]
            assert max(held) < 0.6 * one["held"]
        else:
            assert held == [one["held"]] * 2


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder: Path) -> None:
    assert of_ranks(folder, "stopped") == [{"finished": False, "step": 2}] * 2


def test_rows_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    three = Processes("cpu")
    three.count = 3
    with pytest.raises(ValueError, match="4 rows cannot be shared out evenly among 3 processes"):
        prepare(tiny(tmp_path), three)


def test_a_store_outside_the_memory_belongs_to_one_process(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    two = Processes("cpu")
    two.count = 2
    config = tiny(tmp_path, model="memorizing", set=("dim=16", "heads=2", "store=outside"))
    with pytest.raises(ValueError, match="train it in one"):
        prepare(config, two)


def test_several_processes_need_accelerate_and_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert isinstance(prepare(tiny(tmp_path)), Training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImportError, match=r"memory-models\[train\]"):
        connect()


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "auto", "take version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "auto", "take DDP or FSDP2"),
        ({}, "cuda:1", "chosen by Accelerate"),
    ],
)
def test_other_ways_of_sharing_work_are_refused(
    variables: dict[str, str], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        AcceleratedProcesses(device)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_torchrun_and_of_mpirun_know_of_each_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(processes, "AcceleratedProcesses", found.append)
    monkeypatch.setenv(name, "1")
    assert type(connect("cpu")) is Processes
    assert not found
    monkeypatch.setenv(name, "2")
    connect("cpu")
    assert found == ["cpu"]


def test_accelerate_is_not_believed_to_have_started_several_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    started = []
    # What it would start, in its own words.
    monkeypatch.setattr(
        launch.subprocess,
        "Popen",
        lambda command, env: started.append(env) or SimpleNamespace(wait=lambda: None, returncode=0),
    )
    words = ["train", *words_of(tiny(tmp_path, device="auto"))]
    for count in ("1", "2"):
        parser = launch.launch_command_parser()
        launch.launch_command(parser.parse_args(["--cpu", "--num_processes", count, "memory-bench", *words]))
    alone, asked_for_two = started
    for name in alone.keys() - os.environ.keys():
        monkeypatch.setenv(name, alone[name])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert connect().device == torch.device("cpu")
    for name in asked_for_two.keys() - os.environ.keys():
        monkeypatch.setenv(name, asked_for_two[name])
    assert main(words) == 2
    assert "starts one process" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "machines"),
    [(["--multi_gpu"], 1), (["--use_fsdp", "--fsdp_version", "2"], 1), (["--multi_gpu"], 2)],
    ids=["ddp", "fsdp", "ddp-two-machines"],
)
def test_accelerate_launch_gives_the_losses_of_one_process(
    how: list[str], machines: int, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    if torch.accelerator.is_available() and torch.accelerator.device_count() < 2:
        pytest.skip("two processes would need two accelerators")
    usual = tiny(tmp_path, model="memformer", evaluate_every=2, device="auto", sample_tokens=3)
    one, two = replace(usual, out=tmp_path / "one"), replace(usual, out=tmp_path / "two")
    assert main(["train", *words_of(replace(one, device="cpu"))]) == 0

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *how]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    launch += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1", "--machine_rank"]
    started = [
        subprocess.Popen(
            [*launch, str(machine), "-m", "benchmarks.cli", "train", *words_of(two)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for machine in range(machines)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * machines, said
    assert "2 processes" in said[0]

    logs = [[json.loads(line) for line in (c.out / "log.jsonl").read_text().splitlines()] for c in (one, two)]
    assert [line["step"] for line in logs[0]] == [2, 4, 6, 6]
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs.get("tokens") == mine.get("tokens")
    # One process goes on where two were, with the memory of each row.
    longer = {"steps": 7, "may_change": ("steps",), "device": "cpu"}
    ends = [prepare(replace(config, **longer)).advance() for config in (one, two)]  # type: ignore[arg-type]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


def test_the_precision_is_what_accelerate_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for told, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        assert prepare(tiny(tmp_path))._window.dtype == dtype
        assert prepare(tiny(tmp_path, precision="fp32"))._window.dtype == torch.float32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="'fp8' of Accelerate is not supported"):
        prepare(tiny(tmp_path))
